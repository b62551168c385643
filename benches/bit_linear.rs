//! The four quantised linears of a 2B-4T layer as the decoder calls them: norm, quantisation and product, for gate and up
//! the activation as well. One token in bytes of weights a second, beside the read bandwidth; many in products a second.
//!
//! `cargo bench --bench bit_linear`: the chosen kernel on all four, the others on the widest. Each linear is there so often that
//! the copies are far larger than the caches, and is multiplied in turn; 600 MB of memory.

mod common;

use candle_bitnet::backend::Backend;
use candle_bitnet::backend::cpu::{CpuOptions, Gate, KernelKind};
use candle_bitnet::model::config::{ModelConfig, Projection};
use candle_bitnet::model::presets::SyntheticWeights;
use candle_bitnet::nn::{LinearGroup, LinearParts, LinearWeight, RmsNorm};
use candle_bitnet::ops::Output;
use candle_core::{DType, Device, Tensor};
use common::{activations, backend, beside_reads, is_trial, shapes, thread_counts};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use std::time::Duration;

/// Bytes of all copies of a linear at two bits a weight.
const COPIES: usize = 200 << 20;
/// Tokens of a prefill's product.
const TOKENS: usize = 96;

/// Projections that are one operation, by name.
const OPERATIONS: [(&str, &[Projection]); 4] = [
    ("gate-up", &[Projection::Gate, Projection::Up]),
    ("down", &[Projection::Down]),
    ("qkv", &[Projection::Query, Projection::Key, Projection::Value]),
    ("o", &[Projection::Output]),
];

/// One operation with several weights.
struct Operation<'a> {
    backend: &'a Backend,
    copies: Vec<LinearGroup>,
    norm: RmsNorm,
    gated: bool,
    rows: usize,
    cols: usize,
}

impl<'a> Operation<'a> {
    fn new(backend: &'a Backend, config: &ModelConfig, projections: &[Projection]) -> Self {
        let weights = SyntheticWeights::new(config, 0);
        let (rows, cols) = projections.iter().fold((0, 0), |(sum, _), p| {
            let (rows, cols) = config.projection_shape(*p);
            (sum + rows, cols)
        });
        let gated = projections.contains(&Projection::Gate);
        let copies = if is_trial() { 1 } else { (COPIES / (rows * cols / 4)).max(1) };
        let copy = |layer| {
            let part = |p: &Projection| LinearParts {
                weight: LinearWeight::Ternary(weights.linear(layer, *p).expect("weights")),
                norm: None,
            };
            let parts = projections.iter().map(part).collect();
            let group = if gated { LinearGroup::gate_up(backend, parts) } else { LinearGroup::new(backend, parts) };
            group.expect("shapes that the kernel runs")
        };
        let copies = (0..copies).map(copy).collect();
        let norm = RmsNorm::new(weights.vector("norm", cols), config.rms_norm_eps, &Device::Cpu).expect("memory");
        Self { backend, copies, norm, gated, rows, cols }
    }

    fn output(&self, tokens: usize) -> Tensor {
        let columns = if self.gated { self.rows / 2 } else { self.rows };
        Tensor::zeros((tokens, columns), DType::F32, &Device::Cpu).expect("memory")
    }

    fn run(&self, copy: usize, x: &Tensor, out: &Tensor) {
        let (backend, linear) = (self.backend, &self.copies[copy]);
        match self.gated {
            true => linear.forward_gated(backend, Gate::Relu2, x, &self.norm, out),
            false => linear.forward(backend, x, &self.norm, Output::replace(out)),
        }
        .expect("shapes fit");
    }
}

fn bit_linear(c: &mut Criterion) {
    let config = shapes();
    for options in thread_counts() {
        let kernels = KernelKind::available().into_iter().filter(|k| is_trial() || *k != KernelKind::Generic);
        for (rank, kernel) in kernels.enumerate() {
            let (backend, name) = backend(CpuOptions { kernel: Some(kernel), ..options });
            let mut group = c.benchmark_group(format!("bit_linear, {name}"));
            group.sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
            for (what, projections) in &OPERATIONS[..if rank == 0 { OPERATIONS.len() } else { 1 }] {
                let operation = Operation::new(&backend, &config, projections);
                let (rows, cols, copies) = (operation.rows, operation.cols, operation.copies.len());
                let regions: Vec<&[u8]> = operation.copies.iter().flat_map(LinearGroup::host_bytes).collect();
                let bytes = operation.copies[0].bytes().0;
                let (x, out) = (activations(1, cols), operation.output(1));
                let (id, mut next) = (BenchmarkId::new(*what, format!("{rows}x{cols}, 1 token")), 0);
                beside_reads(&mut group, id, backend.cpu(), &regions, (bytes, 1), || {
                    next = (next + 1) % copies;
                    operation.run(next, &x, &out);
                });
                let (x, out) = (activations(TOKENS, cols), operation.output(TOKENS));
                group.sampling_mode(SamplingMode::Flat).throughput(Throughput::Elements((rows * cols * TOKENS) as u64));
                group.bench_function(BenchmarkId::new(*what, format!("{rows}x{cols}, {TOKENS} tokens")), |b| {
                    b.iter(|| operation.run(0, &x, &out));
                });
                group.sampling_mode(SamplingMode::Auto);
            }
            group.finish();
        }
    }
}

criterion_group!(benches, bit_linear);
criterion_main!(benches);
