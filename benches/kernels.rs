//! The ternary kernels on 2B-4T's widest layer, in bytes of stored weights a second, beside the read bandwidth.
//!
//! `cargo bench --bench kernels`; weights are spread over more memory than the caches hold.

use candle_bitnet::backend::Arrangement;
use candle_bitnet::backend::activation::{QuantizedRows, row_stride};
use candle_bitnet::backend::cpu::{Cpu, CpuOptions, KernelKind, OutputColumns, bandwidth_buffer, read_bandwidth};
use candle_bitnet::model::config::Projection;
use candle_bitnet::model::presets::{Preset, SyntheticWeights};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::time::Duration;

/// Weights that are read in turn: 24 of 8.8 MB.
const COPIES: usize = 24;
/// Tokens of the prefill measurement.
const TOKENS: usize = 96;

fn quantized(cpu: &Cpu, cols: usize, tokens: usize) -> Vec<u8> {
    let x: Vec<f32> = (0..tokens * cols).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
    let mut rows = vec![0; tokens * row_stride(cols)];
    cpu.quantize(&x, cols, None, &mut rows).expect("shapes fit");
    rows
}

fn kernels(c: &mut Criterion) {
    let weights = SyntheticWeights::new(&Preset::find("2b4t").expect("a preset").config(), 0);
    let all = [Some(1), None].map(|threads| CpuOptions { kernel: None, threads });
    for options in all {
        let cpu = Cpu::new(options).expect("a CPU");
        let threads = cpu.pool().threads();
        let buffer = bandwidth_buffer(&cpu, 256 << 20).expect("memory");
        let mut group = c.benchmark_group(format!("read, {threads} threads"));
        group.throughput(Throughput::Bytes(256 << 20));
        group.bench_function("256 MiB", |b| b.iter(|| read_bandwidth(&cpu, &[&buffer], Duration::ZERO)));
        group.finish();
        drop(buffer);
        for kernel in KernelKind::available().into_iter().filter(|k| *k != KernelKind::Generic) {
            let cpu = Cpu::new(CpuOptions { kernel: Some(kernel), ..options }).expect("an available kernel");
            let pack = |layer| {
                let gate_up = [Projection::Gate, Projection::Up].map(|p| weights.linear(layer, p).expect("weights"));
                cpu.pack(&gate_up, Arrangement::Stacked).expect("a weight")
            };
            let packed: Vec<_> = (0..COPIES).map(pack).collect();
            let (rows, cols) = (packed[0].rows(), packed[0].cols());
            let mut group = c.benchmark_group(format!("{kernel}, {threads} threads"));
            let bytes = quantized(&cpu, cols, 1);
            let x = QuantizedRows::new(&bytes, cols).expect("a row");
            let mut out = vec![0.0; rows];
            group.throughput(Throughput::Bytes(packed[0].bytes() as u64));
            let mut next = 0;
            group.bench_function(BenchmarkId::new("gemv", format!("{rows}x{cols}")), |b| {
                b.iter(|| {
                    next = (next + 1) % COPIES;
                    cpu.linear(&packed[next], &x, OutputColumns::whole(&mut out, rows)).expect("shapes fit");
                });
            });
            let bytes = quantized(&cpu, cols, TOKENS);
            let x = QuantizedRows::new(&bytes, cols).expect("rows");
            let mut out = vec![0.0; TOKENS * rows];
            group.throughput(Throughput::Elements((rows * cols * TOKENS) as u64));
            group.bench_function(BenchmarkId::new("gemm", format!("{rows}x{cols}x{TOKENS}")), |b| {
                b.iter(|| cpu.linear(&packed[0], &x, OutputColumns::whole(&mut out, rows)).expect("shapes fit"));
            });
            group.finish();
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = kernels
}
criterion_main!(benches);
