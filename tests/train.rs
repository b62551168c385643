//! Training through the public interface: gradients, optimiser, runs, data, and what a run leaves.

#[path = "train/data.rs"]
mod data;
#[path = "train/gradients.rs"]
mod gradients;
#[path = "train/inference.rs"]
mod inference;
#[path = "train/optimizer.rs"]
mod optimizer;
#[path = "train/oracle.rs"]
mod oracle;
#[path = "train/runs.rs"]
mod runs;
#[path = "train/scratch.rs"]
mod scratch;

use candle_bitnet::model::config::ModelConfig;
use candle_bitnet::train::{Blocks, Masters, Parameters, Shape};
use candle_core::{DType, Device, Tensor, Var};

const CPU: Device = Device::Cpu;

/// Numbers from −1 to 1 that look random.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn tensor(dims: &[usize], seed: u64) -> Tensor {
    Tensor::from_vec(numbers(dims.iter().product(), seed), dims, &CPU).unwrap()
}

fn var(dims: &[usize], seed: u64) -> Var {
    Var::from_tensor(&tensor(dims, seed)).unwrap()
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(t: &Tensor) -> Vec<u32> {
    flat(t).into_iter().map(f32::to_bits).collect()
}

/// All parameters' bits.
fn snapshot(parameters: &Parameters) -> Vec<Vec<u32>> {
    parameters.list().iter().map(|p| bits(&p.value)).collect()
}

#[track_caller]
fn close(got: &Tensor, want: &Tensor, relative: f32, what: &str) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let (got, want) = (flat(got), flat(want));
    let size = want.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        assert!((g - w).abs() <= relative * size, "{what}: element {i} is {g} instead of {w}");
    }
}

/// Two layers with grouped heads and odd sizes.
fn small(blocks: Blocks, tied: bool) -> ModelConfig {
    let shape = Shape {
        blocks,
        hidden: 24,
        intermediate: 20,
        layers: 2,
        heads: 3,
        kv_heads: Some(1),
        vocab: 257,
        context: 32,
        tied,
        ..Shape::default()
    };
    shape.config(0).unwrap()
}

/// One narrow layer, for whole runs.
fn tiny() -> ModelConfig {
    let shape = Shape {
        hidden: 16,
        intermediate: 20,
        layers: 1,
        heads: 2,
        kv_heads: Some(1),
        vocab: 257,
        context: 16,
        ..Shape::default()
    };
    shape.config(0).unwrap()
}

/// Parameters of which none is as it would begin: norms around 1, everything else around 0.
fn parameters(config: &ModelConfig, masters: Masters, seed: u64) -> Parameters {
    let mut index = seed;
    let read = |name: &str, dims: &[usize]| {
        index += 1;
        let (scale, shift) = if name.contains("norm") { (0.3, 1.0) } else { (0.4, 0.0) };
        Ok((tensor(dims, index).affine(scale, shift))?)
    };
    Parameters::from_values(config, masters, &CPU, read).unwrap()
}
