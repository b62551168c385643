//! One test suite for every kernel: bit-equal to a naive oracle over odd shapes.

use super::generic::Generic;
use super::kernel::{MAX_TOKENS, TernaryKernel};
use super::linear::{Epilogue, linear};
use super::norm::{Gate, gate_row};
use super::output::OutputColumns;
use super::packing::Packing;
use super::pool::Pool;
use super::tiles::CpuTernary;
use crate::backend::Arrangement;
use crate::backend::activation::{QuantizedRows, row_stride, write_trailer};
use crate::ternary::{PackedTernary, Scale};
use proptest::prelude::*;

/// The oracle: Σ q · w, nothing else.
fn oracle(w: &PackedTernary, row: usize, q: &[i8]) -> i32 {
    q.iter().enumerate().map(|(k, q)| i32::from(*q) * i32::from(w.weight(row, k))).sum()
}

/// How weights and activations are drawn; the extremes find overflow.
#[derive(Debug, Clone, Copy)]
enum Fill {
    Random,
    AllPlus,
    AllMinus,
    AllZero,
}

#[derive(Debug, Clone)]
struct Case {
    rows: Vec<usize>,
    cols: usize,
    tokens: usize,
    weights: Fill,
    activations: Fill,
    seed: u64,
    gate: Option<Gate>,
}

fn cases() -> impl Strategy<Value = Case> {
    let fill = || prop_oneof![5 => Just(Fill::Random), 1 => Just(Fill::AllPlus), 1 => Just(Fill::AllMinus), 1 => Just(Fill::AllZero)];
    let rows = prop_oneof![
        6 => prop::collection::vec(1usize..40, 1),
        2 => prop::collection::vec(1usize..40, 2..4),
        1 => prop::collection::vec(60usize..150, 1),
    ];
    // Every remainder of 16, 20 and 64, a few long rows (the AVX2 budget is 256 columns; 6912 is 2B-4T's widest).
    let cols = prop_oneof![12 => 1usize..130, 4 => 130usize..700, 1 => 6900usize..6920];
    let tokens = prop_oneof![2 => Just(1usize), 2 => 2usize..=MAX_TOKENS, 1 => MAX_TOKENS + 1..30, 1 => 30usize..150];
    let gate = prop_oneof![3 => Just(None), 1 => Just(Some(Gate::Relu2)), 1 => Just(Some(Gate::Silu))];
    let drawn = (rows, cols, tokens, fill(), fill(), any::<u64>(), gate);
    drawn.prop_map(|(rows, cols, tokens, weights, activations, seed, gate)| {
        // Long rows with few others, so that the suite stays quick.
        let (rows, tokens) = if cols > 700 { (vec![rows[0] % 20 + 1], tokens.min(3)) } else { (rows, tokens) };
        let rows = if gate.is_some() { vec![rows[0]; 2] } else { rows };
        Case { rows, cols, tokens, weights, activations, seed, gate }
    })
}

/// Runs one case through the whole quantised linear and compares every accumulator.
fn check(kernel: &dyn TernaryKernel, pool: &Pool, case: &Case) -> Result<(), TestCaseError> {
    let mut state = case.seed | 1;
    let mut draw = |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % n
    };
    let mut value = |fill: Fill, limit: i32| match fill {
        Fill::Random => draw(2 * limit as u64 + 1) as i32 - limit,
        Fill::AllPlus => limit,
        Fill::AllMinus => -limit,
        Fill::AllZero => 0,
    };
    let mut weights = Vec::new();
    for rows in &case.rows {
        let w: Vec<i8> = (0..rows * case.cols).map(|_| value(case.weights, 1) as i8).collect();
        weights.push(PackedTernary::from_weights(*rows, case.cols, &w, Scale::Multiply(1.0)).unwrap());
    }
    let stride = row_stride(case.cols);
    let mut bytes = vec![0; case.tokens * stride];
    for row in bytes.chunks_exact_mut(stride) {
        let mut sum = 0;
        for q in &mut row[..case.cols] {
            let v = value(case.activations, 127);
            sum += v;
            *q = v as u8;
        }
        // s_x and the scale are 1, so the f32 result is the accumulator itself.
        write_trailer(&mut row[stride - 16..], 1.0, sum);
    }
    let x = QuantizedRows::new(&bytes, case.cols).unwrap();
    let arrangement = if case.gate.is_some() { Arrangement::GateUp } else { Arrangement::Stacked };
    let packed = CpuTernary::pack(&weights, arrangement, kernel.packing(), pool).unwrap();
    let width = packed.rows() / if case.gate.is_some() { 2 } else { 1 };
    let mut out = vec![f32::NAN; case.tokens * width];
    let isa = super::isa::Isa::portable();
    let epilogue = match case.gate {
        None => Epilogue::Columns(OutputColumns::whole(&mut out, width)),
        Some(gate) => Epilogue::Gated(gate, &mut out),
    };
    linear(kernel, isa, pool, &mut Vec::new(), &packed, &x, epilogue).unwrap();
    for (t, out) in out.chunks_exact(width).enumerate() {
        let product = |w: &PackedTernary| -> Vec<f32> {
            (0..w.rows()).map(|row| oracle(w, row, &x.codes(t)[..case.cols]) as f32).collect()
        };
        let products: Vec<Vec<f32>> = weights.iter().map(product).collect();
        let mut want = products.concat();
        if let (Some(gate), [g, up]) = (case.gate, &products[..]) {
            want.truncate(width);
            gate_row(gate, g, up, &mut want);
        }
        for row in 0..width {
            prop_assert_eq!(out[row], want[row], "token {} row {}", t, row);
        }
    }
    Ok(())
}

fn run_suite(kernel: &dyn TernaryKernel, cases_in_all: u32) {
    let pool = Pool::new(2);
    let config = ProptestConfig { cases: cases_in_all, failure_persistence: None, ..ProptestConfig::default() };
    proptest::test_runner::TestRunner::new(config)
        .run(&cases(), |case| check(kernel, &pool, &case))
        .unwrap_or_else(|e| panic!("{}: {e}", kernel.name()));
}

/// Instantiates the suite for a kernel; on a CPU that lacks its features the test says so and passes.
macro_rules! kernel_suite {
    ($($test:ident: $kernel:expr;)*) => { kernel_suite! { 10_000: $($test: $kernel;)* } };
    ($cases:literal: $($test:ident: $kernel:expr;)*) => {$(
        #[test]
        fn $test() {
            match $kernel {
                Some(kernel) => run_suite(&kernel, $cases),
                None => eprintln!("{}: this CPU lacks the features, nothing was run", stringify!($test)),
            }
        }
    )*};
}

kernel_suite! {
    generic: Some(Generic);
}

#[cfg(target_arch = "x86_64")]
kernel_suite! {
    avx2: super::x86_64::Avx2::new();
    avx_vnni: super::x86_64::AvxVnni::new();
    avx_vnni_body_in_evex: super::x86_64::EvexVnni::new();
    avx_vnni_body_in_avx2: super::x86_64::Avx2ForVnni::new();
    avx512_vnni: super::x86_64::Avx512Vnni::new();
    avx512_vbmi: super::x86_64::Avx512Vbmi::new();
    amx_int8: super::x86_64::AmxInt8::new();
}

// In software each dot of tiles is 16384 multiplications.
#[cfg(target_arch = "x86_64")]
kernel_suite! {
    2_000:
    amx_in_software: super::x86_64::Amx::<super::x86_64::Model>::new();
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
kernel_suite! {
    2_000:
    amx_instructions_trapped: super::x86_64::Amx::<super::x86_64::Trapped>::new();
}

#[cfg(target_arch = "aarch64")]
kernel_suite! {
    neon: super::aarch64::Neon::new();
    neon_dotprod: super::aarch64::NeonDotprod::new();
    neon_i8mm: super::aarch64::NeonI8mm::new();
}

#[test]
fn a_kernel_refuses_another_layout() {
    #[derive(Debug)]
    struct Other;
    impl TernaryKernel for Other {
        fn name(&self) -> &'static str {
            "other"
        }
        fn layout(&self) -> crate::backend::LayoutId {
            crate::backend::LayoutId::Unknown
        }
        fn gemv(&self, _: &[u8], _: usize, _: &[i8], _: &mut [i32]) {}
        fn gemm(&self, _: &[u8], _: usize, _: &[i32], _: usize, _: &mut [i32]) {}
    }
    let pool = Pool::new(1);
    let w = PackedTernary::from_weights(1, 1, &[1], Scale::Multiply(1.0)).unwrap();
    let packed = CpuTernary::pack(&[w], Arrangement::Stacked, Packing::TwoBits, &pool).unwrap();
    let bytes = vec![0; row_stride(1)];
    let x = QuantizedRows::new(&bytes, 1).unwrap();
    let isa = super::isa::Isa::portable();
    let mut out = [0.0];
    let epilogue = Epilogue::Columns(OutputColumns::whole(&mut out, 1));
    let err = linear(&Other, isa, &pool, &mut Vec::new(), &packed, &x, epilogue).unwrap_err();
    assert!(matches!(err, crate::Error::Layout { kernel: "other", found: "cpu-rows16", .. }), "{err}");
}
