//! What the benches share: shapes, and the read bandwidth beside what is measured. Each takes what it needs.
#![allow(dead_code)]

use candle_bitnet::backend::Backend;
use candle_bitnet::backend::cpu::{Cpu, CpuOptions, read_bandwidth};
use candle_bitnet::bench::Spread;
use candle_bitnet::model::config::ModelConfig;
use candle_bitnet::model::presets::Preset;
use candle_core::{Device, Tensor};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Throughput};
use std::time::Instant;

/// Whether a bench only has to show that it runs, as under `cargo test --benches` and `-- --test`, or is only listed.
pub fn is_trial() -> bool {
    let has = |flag: &str| std::env::args().any(|a| a == flag);
    !has("--bench") || has("--test") || has("--list")
}

/// 2B-4T's shapes; tiny ones in a trial.
pub fn shapes() -> ModelConfig {
    let config = Preset::find("2b4t").expect("a preset").config();
    match is_trial() {
        false => config,
        true => ModelConfig {
            hidden_size: 256,
            intermediate_size: 512,
            num_layers: 5,
            num_heads: 2,
            num_kv_heads: 1,
            vocab_size: 1500,
            bos_token: Some(1),
            eos_tokens: vec![2],
            ..config
        },
    }
}

/// A fifth of 2B-4T: 6 of its 30 layers and 25 651 of its 128 256 tokens, all at their real width, 235 MB in two bits and
/// bf16. Every part of a step is a fifth of the model's, so that a fifth of its tokens a second are the model's.
pub fn fifth() -> ModelConfig {
    let whole = shapes();
    ModelConfig {
        num_layers: whole.num_layers / 5,
        vocab_size: whole.vocab_size / 5,
        bos_token: Some(1),
        eos_tokens: vec![2],
        ..whole
    }
}

/// The CPU with one thread and with as many as it has cores; one of them if that is one.
pub fn thread_counts() -> Vec<CpuOptions> {
    let all = Cpu::new(CpuOptions::default()).expect("a CPU").pool().threads();
    let mut counts = vec![1, all];
    counts.dedup();
    counts.into_iter().map(|n| CpuOptions { threads: Some(n), ..CpuOptions::default() }).collect()
}

/// A CPU backend, and what results call it: `avx2, 2 threads`.
pub fn backend(options: CpuOptions) -> (Backend, String) {
    let backend = Backend::new(&Device::Cpu, options).expect("an available kernel");
    let threads = backend.cpu().pool().threads();
    let name = format!("{}, {threads} thread{}", backend.kernel_name(), if threads == 1 { "" } else { "s" });
    (backend, name)
}

/// Activations of a few rows: about normal, the same on every machine.
pub fn activations(rows: usize, cols: usize) -> Tensor {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let x: Vec<f32> = (0..rows * cols).map(|_| 2.0 * (uniform() + uniform() + uniform())).collect();
    Tensor::from_vec(x, (rows, cols), &Device::Cpu).expect("as many as the shape says")
}

/// Measures `step`, which reads `bytes` and gives `tokens`, in GB/s; and between its samples how fast the same threads read
/// `regions`. The line behind the result has the median and range of those reads, and of the share that the step reached of
/// the read right after it: what a host takes from both is not in that share.
///
/// `regions` is the memory that the step reads, or a like part of it, larger than the caches.
pub fn beside_reads(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    cpu: &Cpu,
    regions: &[&[u8]],
    (bytes, tokens): (usize, usize),
    mut step: impl FnMut(),
) {
    group.throughput(match tokens {
        1 => Throughput::BytesDecimal(bytes as u64),
        n => Throughput::Elements(n as u64),
    });
    let mut rounds = Vec::new();
    group.bench_function(id, |b| {
        b.iter_custom(|iterations| {
            let start = Instant::now();
            (0..iterations).for_each(|_| step());
            let took = start.elapsed();
            if !is_trial() {
                let read = read_bandwidth(cpu, regions, took / 2);
                rounds.push((read, bytes as f64 * iterations as f64 / took.as_secs_f64() / read));
            }
            took
        });
    });
    // Not one that was filtered out.
    if !rounds.is_empty() {
        let read = Spread::of(rounds.iter().map(|(read, _)| read / 1e9).collect());
        let share = Spread::of(rounds.iter().map(|(_, share)| 100.0 * share).collect());
        println!(
            "                        beside it {:.1} GB/s were read ({:.1} to {:.1}): {:.0} % ({:.0} to {:.0} %)",
            read.median, read.min, read.max, share.median, share.min, share.max
        );
    }
}
