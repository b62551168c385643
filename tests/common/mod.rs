//! What the integration tests share: the fixtures and their verdict.
#![allow(dead_code)]

use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;
use std::path::PathBuf;

/// The fixtures with safetensors checkpoints.
pub const FIXTURES: [&str; 4] = ["a1_packed", "a1_bf16", "a2_packed_gqa_untied_sharded", "a3_llama"];

/// The GPUs of this machine, as far as this build can use them, one of each kind: real ones, or the emulator's
/// (`kernels/emulator/with_driver.sh`, `with_metal.sh`). `BITNET_REQUIRE_GPU=n`: of so many kinds there has to be one.
pub fn gpus() -> Vec<Device> {
    let kinds = [candle_bitnet::backend::gpus(), candle_bitnet::backend::metal_gpus()];
    let first = |gpus: Vec<candle_bitnet::backend::Gpu>| gpus.into_iter().find(|g| g.problem.is_none());
    let found = kinds.into_iter().filter_map(|kind| first(kind.ok()?));
    let found: Vec<_> = found.map(|gpu| candle_bitnet::select_device(gpu.device).unwrap()).collect();
    let required: usize = std::env::var("BITNET_REQUIRE_GPU").map_or(0, |n| n.parse().unwrap());
    assert!(found.len() >= required, "no GPU of {required} kinds, or a build without kernels for them");
    found
}

/// Folder of a fixture.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The outputs of transformers that lie beside a fixture's checkpoint.
pub struct Expected {
    pub tensors: HashMap<String, Tensor>,
    pub json: serde_json::Value,
}

impl Expected {
    pub fn load(name: &str) -> Self {
        let dir = fixture(name);
        let tensors = candle_core::safetensors::load(dir.join("expected.safetensors"), &Device::Cpu).unwrap();
        let json = serde_json::from_str(&std::fs::read_to_string(dir.join("expected.json")).unwrap()).unwrap();
        Self { tensors, json }
    }

    pub fn prompts(&self) -> usize {
        self.tensors.keys().filter(|k| k.starts_with("input_ids_")).count()
    }

    pub fn ids(&self, prompt: usize) -> Vec<u32> {
        let ids = self.tensors[&format!("input_ids_{prompt}")].to_dtype(DType::U32).unwrap();
        ids.to_vec1().unwrap()
    }

    pub fn rows(&self, name: &str) -> Vec<Vec<f32>> {
        self.tensors[name].to_dtype(DType::F32).unwrap().to_vec2().unwrap()
    }

    pub fn greedy(&self, prompt: usize) -> Vec<u32> {
        let ids = self.tensors[&format!("greedy_{prompt}")].to_dtype(DType::U32).unwrap();
        ids.to_vec1().unwrap()
    }

    pub fn greedy_firm(&self, prompt: usize) -> bool {
        self.json["prompts"][prompt]["greedy_firm"].as_bool().unwrap()
    }

    /// The f32 verdict of the fixtures' compare.py: at least 80 % of all stable rows within 1e-3, all of them in
    /// at least two of the first three prompts, and a mean KL divergence of at most 5e-3.
    pub fn judge(&self, logits: &[Vec<Vec<f32>>]) -> Result<(), String> {
        let (mut whole, mut stable_rows, mut close_rows, mut rows, mut kl_sum) = (0, 0, 0, 0, 0.0);
        for (i, got) in logits.iter().enumerate() {
            let want = self.rows(&format!("logits_{i}"));
            let stable = self.tensors[&format!("stable_{i}")].to_vec1::<u8>().unwrap();
            if got.len() != want.len() || got.iter().flatten().any(|v| !v.is_finite()) {
                return Err(format!("prompt {i}: {} rows, expected {}, or not finite", got.len(), want.len()));
            }
            let mut all_close = true;
            for ((got, want), stable) in got.iter().zip(&want).zip(stable) {
                let max = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                kl_sum += kl(want, got);
                rows += 1;
                if stable != 0 {
                    stable_rows += 1;
                    close_rows += usize::from(max <= 1e-3);
                    all_close &= max <= 1e-3;
                }
            }
            whole += usize::from(i < 3 && all_close);
        }
        let (share, kl) = (close_rows as f64 / stable_rows as f64, kl_sum / rows as f64);
        if share >= 0.80 && whole >= 2 && kl <= 5e-3 {
            return Ok(());
        }
        Err(format!("{:.1} % of stable rows within 1e-3, {whole} prompts wholly, KL {kl:.2e}", 100.0 * share))
    }
}

fn log_softmax(x: &[f32]) -> Vec<f64> {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = x.iter().map(|v| (f64::from(*v) - max).exp()).sum();
    x.iter().map(|v| f64::from(*v) - max - sum.ln()).collect()
}

fn kl(want: &[f32], got: &[f32]) -> f64 {
    let (want, got) = (log_softmax(want), log_softmax(got));
    want.iter().zip(got).map(|(w, g)| w.exp() * (w - g)).sum()
}

/// Index of the largest value, the first of equals.
pub fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (i, v) in row.iter().enumerate() {
        if *v > row[best] {
            best = i;
        }
    }
    best as u32
}
