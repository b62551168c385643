//! Models with real shapes and random weights, for benchmarks and tests that must not download anything.

mod stored;
mod synthetic;

use super::config::{Activation, Family, Mode, ModelConfig, Quantization};
use crate::checkpoint::ScaleStyle;
use crate::{Error, Result};
pub use synthetic::SyntheticWeights;

/// A named shape.
#[derive(Debug, Clone, Copy)]
pub struct Preset {
    /// The name on the command line.
    pub name: &'static str,
    /// Which model has this shape.
    pub about: &'static str,
    shape: Shape,
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    family: Family,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
    positions: usize,
    rope_theta: f64,
    tied: bool,
    bos: u32,
    eos: u32,
}

/// All presets.
pub const PRESETS: [Preset; 5] = [
    Preset {
        name: "2b4t",
        about: "microsoft/bitnet-b1.58-2B-4T, exactly",
        shape: Shape {
            family: Family::BitNet,
            hidden: 2560,
            intermediate: 6912,
            layers: 30,
            heads: 20,
            kv_heads: 5,
            vocab: 128_256,
            positions: 4096,
            rope_theta: 500_000.0,
            tied: true,
            bos: 128_000,
            eos: 128_001,
        },
    },
    Preset {
        name: "0.7b",
        about: "the shape of 1bitLLM/bitnet_b1_58-large, as a BitNetForCausalLM",
        shape: FIRST_REPRODUCTION,
    },
    Preset {
        name: "3b",
        about: "the shape of 1bitLLM/bitnet_b1_58-3B (heads of 100), as a BitNetForCausalLM",
        shape: Shape { hidden: 3200, intermediate: 8640, layers: 26, heads: 32, kv_heads: 32, ..FIRST_REPRODUCTION },
    },
    Preset {
        name: "8b",
        about: "HF1BitLLM/Llama3-8B-1.58-100B-tokens: Llama 3 8B, untied, divide-style scales",
        shape: Shape {
            family: Family::Llama,
            hidden: 4096,
            intermediate: 14_336,
            layers: 32,
            heads: 32,
            kv_heads: 8,
            vocab: 128_256,
            positions: 8192,
            rope_theta: 500_000.0,
            tied: false,
            bos: 128_000,
            eos: 128_001,
        },
    },
    Preset {
        name: "30b",
        about: "no published model: LLaMA 30B's shape with b1.58 layers, 8 GB of ternary weights",
        shape: Shape {
            hidden: 6656,
            intermediate: 17_920,
            layers: 60,
            heads: 52,
            kv_heads: 52,
            vocab: 32_000,
            tied: false,
            ..FIRST_REPRODUCTION
        },
    },
];

const FIRST_REPRODUCTION: Shape = Shape {
    family: Family::BitNet,
    hidden: 1536,
    intermediate: 4096,
    layers: 24,
    heads: 16,
    kv_heads: 16,
    vocab: 32_002,
    positions: 2048,
    rope_theta: 10_000.0,
    tied: true,
    bos: 1,
    eos: 2,
};

impl Preset {
    /// The preset of this name.
    ///
    /// # Errors
    /// [`Error::Request`] naming the presets there are.
    pub fn find(name: &str) -> Result<Self> {
        PRESETS.into_iter().find(|p| p.name == name).ok_or_else(|| {
            let names: Vec<_> = PRESETS.iter().map(|p| p.name).collect();
            Error::request("preset", format!("there is no {name:?}; choose one of {}", names.join(", ")))
        })
    }

    /// The configuration: every projection packed, eps 1e-5.
    pub fn config(&self) -> ModelConfig {
        let s = &self.shape;
        let (activation, scale_style) = match s.family {
            Family::BitNet => (Activation::Relu2, ScaleStyle::Multiply),
            Family::Llama | Family::FirstReproduction => (Activation::Silu, ScaleStyle::Divide),
        };
        ModelConfig {
            family: s.family,
            hidden_size: s.hidden,
            intermediate_size: s.intermediate,
            num_layers: s.layers,
            num_heads: s.heads,
            num_kv_heads: s.kv_heads,
            head_dim: s.hidden / s.heads,
            vocab_size: s.vocab,
            max_positions: s.positions,
            rms_norm_eps: 1e-5,
            rope_theta: s.rope_theta,
            tied_embeddings: s.tied,
            activation,
            sub_norms: s.family != Family::Llama,
            quantization: Quantization::plain(Mode::Offline, scale_style),
            bos_token: Some(s.bos),
            eos_tokens: vec![s.eos],
        }
    }

    /// The text of its `config.json`.
    pub fn config_json(&self) -> String {
        self.config().to_json()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn presets_are_the_published_shapes_and_survive_their_own_json() {
        for preset in PRESETS {
            let config = preset.config();
            assert_eq!(ModelConfig::parse(Path::new("c"), &preset.config_json()).unwrap(), config, "{}", preset.name);
        }
        let config = |name| Preset::find(name).unwrap().config();
        assert_eq!(config("2b4t").parameters(), 2_412_820_480);
        assert_eq!(config("3b").head_dim, 100);
        assert_eq!(config("8b").parameters(), 8_030_261_248);
        assert!(Preset::find("7b").unwrap_err().to_string().contains("2b4t, 0.7b, 3b, 8b, 30b"));
    }
}
