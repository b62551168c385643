//! Two bits a weight against 1.6: decode products of 2B-4T's widest layer with both, in turn, beside the read bandwidth.
//!
//! `cargo bench --bench packings`. A round reads a buffer, then multiplies all copies of the layer in each packing; the
//! medians of the rounds are compared, so that a drift of the machine meets all of them. Needs 700 MB of memory.

use candle_bitnet::backend::Arrangement;
use candle_bitnet::backend::activation::{QuantizedRows, row_stride};
use candle_bitnet::backend::cpu::{Cpu, CpuOptions, CpuTernary, KernelKind, OutputColumns};
use candle_bitnet::backend::cpu::{bandwidth_buffer, read_bandwidth};
use candle_bitnet::model::config::Projection;
use candle_bitnet::model::presets::{Preset, SyntheticWeights};
use candle_bitnet::ternary::PackedTernary;
use std::time::{Duration, Instant};

/// Weights that are read in turn: 24 of 35 million.
const COPIES: usize = 24;
/// Rounds that are measured, after one that is not.
const ROUNDS: usize = 41;
/// Bytes that are read for the bandwidth.
const READ: usize = 256 << 20;

/// A packing's weights and times.
struct Trial {
    cpu: Cpu,
    packed: Vec<CpuTernary>,
    pack_seconds: f64,
    seconds: Vec<f64>,
}

impl Trial {
    fn new(kernel: KernelKind, threads: Option<usize>, weights: &[[PackedTernary; 2]]) -> Self {
        let cpu = Cpu::new(CpuOptions { kernel: Some(kernel), threads }).expect("an available kernel");
        let start = Instant::now();
        let pack = |w: &[PackedTernary; 2]| cpu.pack(w, Arrangement::Stacked).expect("a weight");
        let packed = weights.iter().map(pack).collect();
        Self { cpu, packed, pack_seconds: start.elapsed().as_secs_f64(), seconds: Vec::new() }
    }

    /// One product with every copy.
    fn round(&mut self) {
        let (rows, cols) = (self.packed[0].rows(), self.packed[0].cols());
        let x: Vec<f32> = (0..cols).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
        let mut bytes = vec![0; row_stride(cols)];
        self.cpu.quantize(&x, cols, None, &mut bytes).expect("shapes fit");
        let (x, mut out) = (QuantizedRows::new(&bytes, cols).expect("a row"), vec![0.0; rows]);
        let start = Instant::now();
        for w in &self.packed {
            self.cpu.linear(w, &x, OutputColumns::whole(&mut out, rows)).expect("shapes fit");
        }
        self.seconds.push(start.elapsed().as_secs_f64());
    }

    fn bytes(&self) -> f64 {
        self.packed.iter().map(CpuTernary::bytes).sum::<usize>() as f64
    }
}

/// Median, lowest and highest, without the first.
fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values[1..].to_vec();
    sorted.sort_by(f64::total_cmp);
    (sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1])
}

fn main() {
    // `cargo test --benches` only sees that it starts.
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    let kernels: Vec<_> = [KernelKind::Avx512Vnni, KernelKind::Avx512Vbmi]
        .into_iter()
        .filter(|k| KernelKind::available().contains(k))
        .collect();
    let source = SyntheticWeights::new(&Preset::find("2b4t").expect("a preset").config(), 0);
    let layer = |layer| [Projection::Gate, Projection::Up].map(|p| source.linear(layer, p).expect("weights"));
    let weights: Vec<_> = (0..COPIES).map(layer).collect();
    let count: usize = weights.iter().flatten().map(|w| w.rows() * w.cols()).sum();
    for threads in [Some(1), None] {
        let mut trials: Vec<_> = kernels.iter().map(|k| Trial::new(*k, threads, &weights)).collect();
        let Some(first) = trials.first() else { return println!("this CPU lacks AVX-512 VNNI and VBMI") };
        let buffer = bandwidth_buffer(&first.cpu, READ).expect("memory");
        let mut read = Vec::new();
        for _ in 0..=ROUNDS {
            read.push(READ as f64 / read_bandwidth(&trials[0].cpu, &[&buffer], Duration::ZERO));
            trials.iter_mut().for_each(Trial::round);
        }
        let (read_seconds, low, high) = spread(&read);
        let rate = |seconds: f64, bytes: f64| bytes / seconds / 1e9;
        let read_rate = rate(read_seconds, READ as f64);
        println!(
            "{} threads: read {read_rate:.1} GB/s ({:.1} to {:.1})",
            trials[0].cpu.pool().threads(),
            rate(high, READ as f64),
            rate(low, READ as f64)
        );
        let base = spread(&trials[0].seconds).0;
        for trial in &trials {
            let (median, low, high) = spread(&trial.seconds);
            let bytes = trial.bytes();
            println!(
                "  {:12} {:.3} bits a weight: {:.1} GB/s ({:.1} to {:.1}), {:.0} % of read; {:.1} G weights/s, {:.2} times as many; \
                 packed in {:.2} s",
                trial.cpu.kernel(),
                8.0 * bytes / count as f64,
                rate(median, bytes),
                rate(high, bytes),
                rate(low, bytes),
                100.0 * rate(median, bytes) / read_rate,
                count as f64 / median / 1e9,
                base / median,
                trial.pack_seconds
            );
        }
    }
}
