//! What was trained is what inference runs.

use crate::{flat, parameters, small};
use candle_bitnet::backend::DenseType;
use candle_bitnet::checkpoint::{Checkpoint, ScaleStyle};
use candle_bitnet::model::config::{ModelConfig, Projection};
use candle_bitnet::model::convert::{Form, convert};
use candle_bitnet::model::{CheckpointWeights, Logits, Sequence};
use candle_bitnet::ops::grad;
use candle_bitnet::train::{Blocks, Decoder, Masters, write_masters};
use candle_bitnet::{LoadOptions, LoadedDecoder};
use candle_core::Device;
use std::ops::ControlFlow;
use std::path::Path;

fn logits(dir: &Path, tokens: &[u32]) -> Vec<Vec<f32>> {
    let options = LoadOptions::new(&Device::Cpu).threads(Some(1));
    let model = LoadedDecoder::load(dir.to_str().unwrap(), &options).unwrap().decoder;
    let cache = model.kv_cache(DenseType::F32, 1).unwrap();
    let sequence = Sequence { slot: 0, position: 0, tokens };
    model.forward(&[sequence], &cache, Logits::All).unwrap().to_vec2().unwrap()
}

#[test]
fn a_trained_model_is_the_model_that_is_loaded() {
    let tokens: Vec<u32> = (0..32).map(|i| i * 29 % 257).collect();
    for (blocks, tied, masters) in [
        (Blocks::Bitnet, true, Masters::BF16),
        (Blocks::Bitnet, false, Masters::F32),
        (Blocks::Llama, true, Masters::F32),
        (Blocks::Llama, false, Masters::BF16),
    ] {
        let config = small(blocks, tied);
        let parameters = parameters(&config, masters, 7);
        let decoder = Decoder::new(&config).unwrap();
        let prepared = decoder.prepare(&parameters, 1.0).unwrap();
        let trained: Vec<Vec<f32>> = prepared.logits(&tokens, tokens.len()).unwrap().to_vec2().unwrap();

        let dir = tempfile::tempdir().unwrap();
        let stored = dir.path().join("masters");
        std::fs::create_dir(&stored).unwrap();
        write_masters(&stored, &config, &parameters, true).unwrap();
        let checkpoint = Checkpoint::open(&stored).unwrap();
        let read = ModelConfig::parse(checkpoint.config().0, checkpoint.config().1).unwrap();
        assert_eq!(read, config);
        let weights = CheckpointWeights::new(&checkpoint, &read).unwrap();
        for (layer, which) in (0..config.num_layers).flat_map(|l| Projection::ALL.map(|p| (l, p))) {
            let loaded = weights.ternary(layer, which).unwrap().unwrap();
            let name = format!("{}.weight", config.projection_name(layer, which));
            let master = &parameters.list()[parameters.index(&name).unwrap()].value;
            assert_eq!(flat(&grad::fake_ternary(master, 1.0).unwrap()), loaded.dequantize(), "{name}");
        }

        // Not bit for bit: training multiplies dequantised f32 values where inference adds integers, sums attention by
        // blocks, and keeps embeddings in the masters' type. A last bit of an activation that stands between two int8
        // values can then fall to the other side, which moves that row by more; so most rows, and all within a bound.
        let loaded = logits(&stored, &tokens);
        let all: Vec<f32> = trained.iter().flatten().copied().collect();
        let spread = all.iter().copied().fold(f32::MIN, f32::max) - all.iter().copied().fold(f32::MAX, f32::min);
        let difference =
            |(a, b): (&Vec<f32>, &Vec<f32>)| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / spread;
        let mut rows: Vec<f32> = trained.iter().zip(&loaded).map(difference).collect();
        rows.sort_by(f32::total_cmp);
        let most = if masters == Masters::BF16 { 1e-3 } else { 1e-2 };
        assert!(rows[rows.len() / 2] < most && rows[31] < 0.1, "{blocks:?} {masters:?}: {rows:?}");

        for style in [ScaleStyle::Multiply, ScaleStyle::Divide] {
            let packed = dir.path().join(format!("{style:?}"));
            convert(&stored, &packed, Form::Packed(style), &mut |_| ControlFlow::Continue(())).unwrap();
            assert_eq!(logits(&packed, &tokens), loaded, "{style:?}");
        }
    }
}

#[test]
fn values_that_are_not_finite_are_not_written() {
    let config = small(Blocks::Bitnet, true);
    let dir = tempfile::tempdir().unwrap();
    let good = parameters(&config, Masters::F32, 7);
    write_masters(dir.path(), &config, &good, true).unwrap();
    let before = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let bad = candle_bitnet::train::Parameters::from_values(&config, Masters::F32, &Device::Cpu, |name, _| {
        let value = good.list()[good.index(name)?].value.clone();
        let broken = name.contains("layers.1.mlp.up_proj");
        Ok(if broken { value.affine(f64::from(f32::MAX), 0.0)?.sqr()? } else { value })
    });
    let error = write_masters(dir.path(), &config, &bad.unwrap(), true).unwrap_err().to_string();
    assert!(error.contains("layers.1.mlp.up_proj") && error.contains("not written"), "{error}");
    assert_eq!(std::fs::read(dir.path().join("model.safetensors")).unwrap(), before);
}
