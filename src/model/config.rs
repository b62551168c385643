//! A checkpoint's `config.json`, typed and checked.
//!
//! Follows transformers 5 (`configuration_bitnet.py`, `configuration_llama.py`, `BitNetQuantConfig`), including
//! its defaults for keys that may be left out.

mod modules;
mod read;

use crate::checkpoint::ScaleStyle;
use crate::{Error, Result};
use modules::Pattern;
pub(crate) use read::SUPPORTED;
use std::path::Path;

/// Features of a linear layer's input or output. Integer accumulators stay exact in f32 up to 132,104 inputs.
pub const MAX_FEATURES: usize = 1 << 17;
/// Decoder layers.
pub const MAX_LAYERS: usize = 1024;
/// Query heads.
pub const MAX_HEADS: usize = 1024;
/// Dimensions of a head.
pub const MAX_HEAD_DIM: usize = 1024;
/// Entries of the vocabulary.
pub const MAX_VOCAB: usize = 1 << 22;
/// Positions of the context.
pub const MAX_POSITIONS: usize = 1 << 24;
/// End-of-sequence tokens.
pub const MAX_EOS_TOKENS: usize = 64;

/// The architecture, as `architectures` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// `BitNetForCausalLM`: sub-norms before `o_proj` and `down_proj` (microsoft/bitnet-b1.58-2B-4T).
    BitNet,
    /// `LlamaForCausalLM` with BitLinear projections (HF1BitLLM, Falcon3-1.58bit, Falcon-E).
    Llama,
    /// `BitnetForCausalLM`: the first reproduction, with norms before `o_proj` and `down_proj` and SiLU
    /// (1bitLLM/bitnet_b1_58-large, -xl, -3B). Not `BitNetForCausalLM`.
    FirstReproduction,
}

impl Family {
    /// The name in `architectures`.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::BitNet => "BitNetForCausalLM",
            Self::Llama => "LlamaForCausalLM",
            Self::FirstReproduction => "BitnetForCausalLM",
        }
    }

    /// The name in `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::BitNet => "bitnet",
            // The first reproduction calls itself so too: `architectures` decides.
            Self::Llama | Self::FirstReproduction => "llama",
        }
    }

    /// Paths, inside a layer, of the norms before `o_proj` and before `down_proj`, where there are any.
    pub fn sub_norms(self) -> [&'static str; 2] {
        match self {
            Self::BitNet | Self::Llama => ["self_attn.attn_sub_norm", "mlp.ffn_sub_norm"],
            Self::FirstReproduction => ["self_attn.inner_attn_ln", "mlp.ffn_layernorm"],
        }
    }
}

/// The MLP's activation on the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `max(x, 0)²`.
    Relu2,
    /// `x · sigmoid(x)`.
    Silu,
}

impl Activation {
    /// The name in `hidden_act`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Relu2 => "relu2",
            Self::Silu => "silu",
        }
    }
}

/// How the checkpoint says its weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Quantised: codes and `weight_scale`.
    Offline,
    /// Masters, to be quantised at load.
    Online,
    /// Quantised, but stored as the dense values −s, 0 and s: a checkpoint without a `quantization_config`, as Falcon-E's
    /// revision `bfloat16`. Loading checks every value, so that a model that was never ternary is refused.
    Dequantized,
}

/// `quantization_config`.
#[derive(Debug, Clone)]
pub struct Quantization {
    /// `quantization_mode`.
    pub mode: Mode,
    /// What `weight_scale` does, from `linear_class`.
    pub scale_style: ScaleStyle,
    /// Whether every BitLinear has an `rms_norm.weight` before its activation quantiser.
    pub use_rms_norm: bool,
    /// The eps of that norm.
    pub rms_norm_eps: f32,
    /// `modules_to_not_convert` as given; see [`ModelConfig::is_converted`].
    pub modules_not_converted: Vec<String>,
    patterns: Vec<Pattern>,
}

impl PartialEq for Quantization {
    fn eq(&self, other: &Self) -> bool {
        let key = |q: &Self| (q.mode, q.scale_style, q.use_rms_norm, q.rms_norm_eps.to_bits());
        key(self) == key(other) && self.modules_not_converted == other.modules_not_converted
    }
}

impl Quantization {
    /// # Errors
    /// The pattern and what is wrong with it.
    fn new(
        mode: Mode,
        scale_style: ScaleStyle,
        use_rms_norm: bool,
        rms_norm_eps: f32,
        modules_not_converted: Vec<String>,
    ) -> Result<Self, String> {
        let patterns = modules_not_converted.iter().map(|p| Pattern::new(p)).collect::<Result<_, _>>()?;
        Ok(Self { mode, scale_style, use_rms_norm, rms_norm_eps, modules_not_converted, patterns })
    }

    /// Every projection converted, no extra norms.
    pub fn plain(mode: Mode, scale_style: ScaleStyle) -> Self {
        let (modules_not_converted, patterns) = (Vec::new(), Vec::new());
        Self { mode, scale_style, use_rms_norm: false, rms_norm_eps: 1e-6, modules_not_converted, patterns }
    }
}

/// The seven linear layers of a decoder layer, in the order in which they are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Projection {
    Query,
    Key,
    Value,
    Output,
    Gate,
    Up,
    Down,
}

impl Projection {
    /// All seven.
    pub const ALL: [Self; 7] = [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// The module's path inside its layer.
    pub fn path(self) -> &'static str {
        match self {
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::Output => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// A model's shape and conventions. Every field has been checked against the limits above.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The architecture.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Dimensions of a head; even. Explicit, or `hidden_size / num_heads`.
    pub head_dim: usize,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Positions that the model was trained for.
    pub max_positions: usize,
    /// The eps of every norm outside BitLinear.
    pub rms_norm_eps: f32,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Whether the output head is the embedding.
    pub tied_embeddings: bool,
    /// The MLP's activation.
    pub activation: Activation,
    /// Whether there are norms before `o_proj` and `down_proj`.
    pub sub_norms: bool,
    /// How the BitLinear layers are stored.
    pub quantization: Quantization,
    /// Beginning-of-sequence token.
    pub bos_token: Option<u32>,
    /// End-of-sequence tokens.
    pub eos_tokens: Vec<u32>,
}

impl ModelConfig {
    /// Reads the text of a `config.json`; `path` names it in errors.
    ///
    /// # Errors
    /// [`Error::File`] for malformed JSON, [`Error::Config`] naming the key for anything missing, out of range or
    /// not supported.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        read::parse(path, text)
    }

    /// Output features of the query projection, input features of the output projection.
    pub fn q_size(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Output features of the key and of the value projection.
    pub fn kv_size(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Output and input features of a projection.
    pub fn projection_shape(&self, which: Projection) -> (usize, usize) {
        match which {
            Projection::Query => (self.q_size(), self.hidden_size),
            Projection::Key | Projection::Value => (self.kv_size(), self.hidden_size),
            Projection::Output => (self.hidden_size, self.q_size()),
            Projection::Gate | Projection::Up => (self.intermediate_size, self.hidden_size),
            Projection::Down => (self.hidden_size, self.intermediate_size),
        }
    }

    /// Tensor name of a projection without `.weight`.
    pub fn projection_name(&self, layer: usize, which: Projection) -> String {
        format!("model.layers.{layer}.{}", which.path())
    }

    /// Name, output and input features of a layer's projections, in [`Projection::ALL`]'s order.
    pub fn linears(&self, layer: usize) -> [(String, usize, usize); 7] {
        Projection::ALL.map(|which| {
            let (rows, cols) = self.projection_shape(which);
            (self.projection_name(layer, which), rows, cols)
        })
    }

    /// Name and length of a layer's norms: input, post-attention, and with `sub_norms` those before `o_proj` and
    /// `down_proj`. Norms inside BitLinear (`use_rms_norm`) are not among them.
    pub fn norms(&self, layer: usize) -> Vec<(String, usize)> {
        let name = |path: &str| format!("model.layers.{layer}.{path}.weight");
        let mut norms =
            vec![(name("input_layernorm"), self.hidden_size), (name("post_attention_layernorm"), self.hidden_size)];
        if self.sub_norms {
            let [attention, mlp] = self.family.sub_norms();
            norms.push((name(attention), self.q_size()));
            norms.push((name(mlp), self.intermediate_size));
        }
        norms
    }

    /// Whether the module `name` (a tensor name without `.weight`) is a BitLinear. `modules_to_not_convert` is
    /// matched as transformers' `should_convert_module` does; `lm_head` is always dense.
    pub fn is_converted(&self, name: &str) -> bool {
        name != "lm_head" && !self.quantization.patterns.iter().any(|p| p.excludes(name))
    }

    /// Weights of all matrices and vectors, counting a tied head once.
    pub fn parameters(&self) -> u64 {
        let matrix = |(rows, cols): (usize, usize)| rows as u64 * cols as u64;
        let linears: u64 = Projection::ALL.iter().map(|p| matrix(self.projection_shape(*p))).sum();
        let norms: u64 = self.norms(0).iter().map(|(_, len)| *len as u64).sum();
        let inner: u64 = match self.quantization.use_rms_norm {
            true => Projection::ALL.iter().map(|p| self.projection_shape(*p).1 as u64).sum(),
            false => 0,
        };
        let embedding = matrix((self.vocab_size, self.hidden_size));
        let head = if self.tied_embeddings { 0 } else { embedding };
        self.num_layers as u64 * (linears + norms + inner) + embedding + head + self.hidden_size as u64
    }

    /// The names among `names` that this configuration gives no meaning to. A model that does not know what a
    /// tensor is for would run without it, and wrongly.
    pub fn unexplained<'a>(&self, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
        names.filter(|name| !self.explains(name)).collect()
    }

    fn explains(&self, name: &str) -> bool {
        let Some(rest) = name.strip_prefix("model.layers.") else {
            // A tied checkpoint may repeat its embedding as lm_head.
            return ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"].contains(&name);
        };
        let Some((layer, path)) = rest.split_once('.') else { return false };
        let canonical = |n: usize| n < self.num_layers && n.to_string() == layer;
        if !layer.parse().is_ok_and(canonical) {
            return false;
        }
        let Some((module, kind)) = path.rsplit_once('.') else { return false };
        match kind {
            "weight" | "weight_scale" if Projection::ALL.iter().any(|p| p.path() == module) => true,
            "weight" => match module.strip_suffix(".rms_norm") {
                Some(inner) => self.quantization.use_rms_norm && Projection::ALL.iter().any(|p| p.path() == inner),
                None => match module {
                    "input_layernorm" | "post_attention_layernorm" => true,
                    module => self.sub_norms && self.family.sub_norms().contains(&module),
                },
            },
            // A constant that old exports stored; it is computed here.
            "inv_freq" => module == "self_attn.rotary_emb",
            _ => false,
        }
    }

    /// The configuration as the text of a `config.json` that [`ModelConfig::parse`] reads back to the same.
    pub fn to_json(&self) -> String {
        let mut json = serde_json::json!({
            "architectures": [self.family.architecture()],
            "model_type": self.family.model_type(),
            "hidden_act": self.activation.name(),
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            // Through text, so that 1e-5 is written as such and not as the f64 next to the f32.
            "rms_norm_eps": self.rms_norm_eps.to_string().parse::<f64>().unwrap_or_default(),
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied_embeddings,
            "bos_token_id": self.bos_token,
            "eos_token_id": self.eos_tokens,
            "torch_dtype": "bfloat16",
        });
        if let [one] = self.eos_tokens[..] {
            json["eos_token_id"] = one.into();
        }
        if self.family == Family::FirstReproduction {
            json["weight_bits"] = 1.into();
            json["input_bits"] = 8.into();
        }
        let q = &self.quantization;
        let mode = match q.mode {
            Mode::Offline => "offline",
            Mode::Online => "online",
            // What there is no configuration for is how it is known.
            Mode::Dequantized => return format!("{json:#}\n"),
        };
        json["quantization_config"] = serde_json::json!({ "quant_method": "bitnet" });
        json["quantization_config"]["linear_class"] = match q.scale_style {
            ScaleStyle::Multiply => "autobitlinear".into(),
            ScaleStyle::Divide => "bitlinear".into(),
        };
        json["quantization_config"]["quantization_mode"] = mode.into();
        if q.use_rms_norm {
            json["quantization_config"]["use_rms_norm"] = true.into();
            json["quantization_config"]["rms_norm_eps"] =
                q.rms_norm_eps.to_string().parse::<f64>().unwrap_or_default().into();
        }
        json["quantization_config"]["modules_to_not_convert"] = match q.modules_not_converted[..] {
            [] => serde_json::Value::Null,
            _ => q.modules_not_converted.clone().into(),
        };
        format!("{json:#}\n")
    }
}
