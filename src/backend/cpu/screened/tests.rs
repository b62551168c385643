//! The screened head against the whole one, bit for bit, on heads that are made to be hard.

use super::*;
use crate::backend::cpu::OutputColumns;
use crate::backend::cpu::dense::dense_linear;
use proptest::prelude::*;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 11
    }

    /// From −1 to 1.
    fn unit(&mut self) -> f32 {
        (self.next() % 2_000_001) as f32 / 1e6 - 1.0
    }

    fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.unit()).sum::<f32>() / 1.4
    }
}

fn head(dtype: DenseType, rows: usize, cols: usize, value: impl Fn(usize, usize) -> f32) -> CpuDense {
    CpuDense::owned(dtype, rows, cols, |bytes| {
        for (i, b) in bytes.chunks_exact_mut(dtype.size()).enumerate() {
            let v = value(i / cols, i % cols);
            match dtype {
                DenseType::F32 => b.copy_from_slice(&v.to_le_bytes()),
                DenseType::F16 => b.copy_from_slice(&f16::from_f32(v).to_le_bytes()),
                DenseType::BF16 => b.copy_from_slice(&bf16::from_f32(v).to_le_bytes()),
            }
        }
    })
    .unwrap()
}

/// Compares with the whole head, on every vector width; returns how many rows were computed.
fn check(head: &CpuDense, x: &[f32], k: usize) -> Screening {
    let pool = Pool::new(2);
    let screened = CpuScreened::new(head, &pool).unwrap().unwrap();
    let mut scratch = ScreenScratch::default();
    let mut first = None;
    for isa in Isa::available() {
        let mut whole = vec![0.0; head.rows()];
        dense_linear(isa, &pool, head, x, OutputColumns::whole(&mut whole, head.rows())).unwrap();
        let mut out = vec![f32::NAN; head.rows()];
        let screening = screened.top(isa, &pool, head, x, k, &mut scratch, &mut out).unwrap();
        let mut sorted = whole.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let least = sorted[k.min(sorted.len()) - 1];
        let mut computed = 0;
        for (row, (got, want)) in out.iter().zip(&whole).enumerate() {
            if *got == f32::NEG_INFINITY {
                assert!(*want < least, "{isa:?}: row {row} of {want} is among the {k} largest, from {least} on");
            } else {
                assert_eq!(got.to_bits(), want.to_bits(), "{isa:?}: row {row}");
                computed += 1;
            }
        }
        assert_eq!((screening.rows, screening.rescored), (head.rows(), computed));
        assert!(screening.refined >= computed);
        // Integer sums do not depend on the width, so neither does what they decide.
        assert_eq!(first.get_or_insert(screening), &screening);
    }
    first.unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]
    #[test]
    fn the_largest_logits_are_those_of_the_whole_head(
        rows in 1usize..700, cols in 1usize..400, k in 1usize..65, seed: u64, kind in 0usize..3, outlier in 0f32..200.0,
    ) {
        let mut random = Random(seed);
        let values: Vec<f32> = (0..rows * cols).map(|_| random.normal() * 0.03).collect();
        let mut x: Vec<f32> = (0..cols).map(|_| random.normal()).collect();
        x[0] *= outlier;
        let dtype = [DenseType::BF16, DenseType::F16, DenseType::F32][kind];
        check(&head(dtype, rows, cols, |r, c| values[r * cols + c]), &x, k);
    }

    #[test]
    fn near_duplicates_cannot_be_told_apart_and_are_all_computed(
        rows in 2usize..300, cols in 1usize..300, k in 1usize..9, seed: u64, step in 0usize..3,
    ) {
        let mut random = Random(seed);
        let base: Vec<f32> = (0..cols).map(|_| random.normal()).collect();
        let x: Vec<f32> = (0..cols).map(|_| random.normal()).collect();
        // All rows the same, or different in one of f32's or bf16's last places.
        let ulp = [0.0, 1.2e-7, 0.004][step];
        let h = head(DenseType::F32, rows, cols, |r, c| base[c] * (1.0 + ulp * ((r * 31 + c) % 5) as f32));
        check(&h, &x, k);
    }
}

#[test]
fn heads_that_are_hard_to_bound() {
    let mut random = Random(7);
    let (rows, cols) = (2000, 320);
    let values: Vec<f32> = (0..rows * cols).map(|_| random.normal() * 0.02).collect();
    let x: Vec<f32> = (0..cols).map(|_| random.normal()).collect();
    let at = |r: usize, c: usize| values[r * cols + c];
    for k in [1, 2, 10, 64] {
        let all = check(&head(DenseType::BF16, rows, cols, |_, c| at(0, c)), &x, k);
        assert_eq!(all.rescored, rows, "equal rows have equal logits");
        let zero = check(&head(DenseType::BF16, rows, cols, |_, _| 0.0), &x, k);
        assert_eq!(zero.rescored, rows);
        check(&head(DenseType::BF16, rows, cols, |r, c| if r == 1234 { 1e4 * at(r, c) } else { at(r, c) }), &x, k);
        check(&head(DenseType::BF16, rows, cols, |r, c| if c == 5 { 1e3 * at(r, c) } else { at(r, c) }), &x, k);
        check(&head(DenseType::BF16, rows, cols, |r, c| if r % 3 == 0 { 0.0 } else { at(r, c) }), &x, k);
        check(&head(DenseType::F32, rows, cols, |r, c| 1e30 * at(r, c)), &x, k);
        check(&head(DenseType::F32, rows, cols, |r, c| 1e-30 * at(r, c)), &x, k);
        // Products below the smallest f32.
        let tiny: Vec<f32> = x.iter().map(|v| 1e-12 * v).collect();
        check(&head(DenseType::F32, rows, cols, |r, c| 1e-30 * at(r, c)), &tiny, k);
        check(&head(DenseType::BF16, rows, cols, at), &vec![0.0; cols], k);
    }
    check(&head(DenseType::BF16, 1, 1, |_, _| -3.0), &[2.0], 64);
}

#[test]
fn few_rows_of_a_random_head_are_computed() {
    let mut random = Random(3);
    let (rows, cols) = (20_000, 640);
    let values: Vec<f32> = (0..rows * cols).map(|_| random.normal() * 0.02).collect();
    let x: Vec<f32> = (0..cols).map(|_| random.normal()).collect();
    let h = head(DenseType::BF16, rows, cols, |r, c| values[r * cols + c]);
    let one = check(&h, &x, 1);
    assert!(one.rescored < rows / 100 && one.refined < rows / 2, "{one:?}");
    let many = check(&h, &x, 64);
    assert!(many.rescored >= 64 && many.rescored < rows / 10, "{many:?}");
}

#[test]
fn what_cannot_be_bounded_is_left_to_the_whole_head() {
    let pool = Pool::new(1);
    for bad in [f32::NAN, f32::INFINITY, 1e-39] {
        let h = head(DenseType::F32, 20, 5, |r, _| if r == 17 { bad } else { 1.0 });
        assert!(CpuScreened::new(&h, &pool).unwrap().is_none(), "{bad}");
    }
    let h = head(DenseType::BF16, 20, 5, |r, c| (r + c) as f32);
    let screened = CpuScreened::new(&h, &pool).unwrap().unwrap();
    let mut out = vec![1.0; 20];
    for bad in [f32::NAN, f32::NEG_INFINITY] {
        let x = [1.0, bad, 0.0, 0.0, 0.0];
        let mut scratch = ScreenScratch::default();
        assert!(screened.top(Isa::best(), &pool, &h, &x, 1, &mut scratch, &mut out).is_none());
    }
    assert!(out.iter().all(|v| *v == 1.0));
    assert!(screened.bytes() >= 20 * 5 * 6 / 8 && screened.resident_bytes() > screened.bytes());
}
