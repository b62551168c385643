//! What a GGUF file means: its metadata as a configuration, its tensors as weights.
#![no_main]

use candle_bitnet::checkpoint::gguf::{DenseMatrix, Gguf};
use candle_bitnet::checkpoint::{Checkpoint, StoredType};
use candle_bitnet::model::CheckpointWeights;
use candle_bitnet::model::config::{ModelConfig, Projection};
use candle_bitnet_fuzz::{Scratch, checkpoint};
use libfuzzer_sys::fuzz_target;
use std::path::Path;
use std::sync::LazyLock;

static FILE: LazyLock<Scratch> = LazyLock::new(|| Scratch::new(".gguf"));

fuzz_target!(|lines: &[u8]| {
    let path = FILE.write(&checkpoint(lines));
    let Ok(gguf) = Gguf::open(path) else { return };
    for text in [gguf.config_json(), gguf.generation_json(), gguf.tokenizer_config_json()].into_iter().flatten() {
        assert!(serde_json::from_str::<serde_json::Value>(&text).unwrap().is_object());
    }
    if let (Ok(special), Some(tokens)) = (gguf.special_tokens(), gguf.tokens()) {
        assert!(special.len() <= tokens.max(1) * 4);
    }
    let Ok(checkpoint) = Checkpoint::open(path) else { return };
    assert!(checkpoint.names().is_sorted());
    for tensor in checkpoint.tensors().filter(|t| t.elements() <= 1 << 16) {
        if let [len] = tensor.shape[..]
            && let Ok(values) = checkpoint.vector(&tensor.name, len)
        {
            assert!(values.len() == len && values.iter().all(|v| v.is_finite()));
        }
        if let [rows, cols] = tensor.shape[..]
            && let Ok(DenseMatrix::Blocks(view)) = checkpoint.matrix(&tensor.name, rows, cols)
        {
            assert!(matches!(tensor.dtype, StoredType::Ggml(_)));
            let mut out = vec![0; 2 * rows * cols];
            let _ = view.to_bf16(&mut out);
        }
    }
    let (_, text) = checkpoint.config();
    let Ok(config) = ModelConfig::parse(Path::new("config.json"), text) else { return };
    let Ok(weights) = CheckpointWeights::new(&checkpoint, &config) else { return };
    for layer in 0..config.num_layers.min(2) {
        for which in Projection::ALL {
            let (rows, cols) = config.projection_shape(which);
            if let Ok(Some(packed)) = weights.ternary(layer, which) {
                assert_eq!((packed.rows(), packed.cols()), (rows, cols));
                assert!(packed.scale().multiplier().is_normal());
                // Every code is a weight, and there are no others.
                assert_eq!(packed.histogram().iter().sum::<usize>(), rows * cols);
            }
        }
    }
});
