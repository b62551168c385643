//! Supervised fine-tuning through the public interface: examples, gradients of adapters, runs of both kinds.

#[path = "finetune/adapter.rs"]
mod adapter;
mod common;
#[path = "finetune/examples.rs"]
mod examples;
#[path = "finetune/operations.rs"]
mod operations;
#[path = "finetune/runs.rs"]
mod runs;

use candle_bitnet::backend::Backend;
use candle_bitnet::backend::cpu::CpuOptions;
use candle_bitnet::train::LoraOptions;
use candle_core::{Device, Tensor};

const CPU: Device = Device::Cpu;

fn values(n: usize, seed: u32) -> Vec<f32> {
    let value = |i: usize| {
        let x = (i as u32).wrapping_add(seed.wrapping_mul(7919)).wrapping_mul(2_654_435_761);
        ((x ^ x >> 15).wrapping_mul(2_246_822_519) >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..n).map(value).collect()
}

fn tensor(dims: &[usize], seed: u32) -> Tensor {
    Tensor::from_vec(values(dims.iter().product(), seed), dims, &CPU).unwrap()
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn close(got: &Tensor, want: &Tensor, relative: f32) {
    assert_eq!(got.dims(), want.dims());
    let (got, want) = (flat(got), flat(want));
    let size = want.iter().fold(1e-9f32, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        assert!((g - w).abs() <= relative * size, "element {i}: {g} instead of {w}");
    }
}

fn backend() -> Backend {
    Backend::new(&CPU, CpuOptions { kernel: None, threads: Some(1) }).unwrap()
}

fn lora(rank: usize, modules: &[&str]) -> LoraOptions {
    LoraOptions { rank, alpha: 2.0 * rank as f32, target_modules: modules.iter().map(|m| (*m).to_owned()).collect() }
}
