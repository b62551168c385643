//! A run's settings as one TOML file.

use super::optimization::Optimization;
use super::parameters::Masters;
use crate::backend::attention::AttentionShape;
use crate::checkpoint::ScaleStyle;
use crate::model::config::{
    Activation, Family, MAX_FEATURES, MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, Mode, ModelConfig, Quantization,
};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Vocabulary entries that byte-level BPE cannot do without: the bytes and the end of text.
pub const MIN_VOCAB: usize = 257;
/// Largest vocabulary that is trained.
pub const MAX_TRAINED_VOCAB: usize = 1 << 18;
/// Most tokens of a step.
pub const MAX_STEP_TOKENS: usize = 1 << 26;
/// Largest recipe that is read.
const MAX_RECIPE_BYTES: u64 = 1 << 20;

/// The blocks of the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Blocks {
    /// Sub-norms and relu², as microsoft/bitnet-b1.58-2B-4T.
    #[default]
    Bitnet,
    /// SiLU and no sub-norms.
    Llama,
}

/// The model's shape.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Shape {
    /// Its blocks.
    pub blocks: Blocks,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads; divides `hidden`.
    pub heads: usize,
    /// Key and value heads; divides `heads`. As many as query heads where nobody says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Positions, and tokens of a training sequence.
    pub context: usize,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Type of the master weights.
    pub masters: Masters,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            blocks: Blocks::Bitnet,
            hidden: 256,
            intermediate: 688,
            layers: 6,
            heads: 4,
            kv_heads: None,
            vocab: 2048,
            context: 256,
            tied: true,
            rope_theta: 10_000.0,
            masters: Masters::F32,
        }
    }
}

impl Shape {
    /// The configuration of a model of this shape whose end-of-text token is `end`, stored as masters.
    ///
    /// # Errors
    /// [`Error::Request`] naming the setting that is out of range.
    pub fn config(&self, end: u32) -> Result<ModelConfig> {
        let range = |name: &str, value: usize, low: usize, high: usize| match (low..=high).contains(&value) {
            true => Ok(()),
            false => Err(Error::request(name, format!("{value} is out of range: {low} to {high}"))),
        };
        range("hidden", self.hidden, 4, MAX_FEATURES)?;
        range("intermediate", self.intermediate, 4, MAX_FEATURES)?;
        range("layers", self.layers, 1, MAX_LAYERS)?;
        range("heads", self.heads, 1, MAX_HEADS)?;
        let kv_heads = self.kv_heads.unwrap_or(self.heads);
        range("kv_heads", kv_heads, 1, self.heads)?;
        range("vocab", self.vocab, MIN_VOCAB, MAX_TRAINED_VOCAB)?;
        range("context (--length)", self.context, 2, MAX_POSITIONS)?;
        let divides = |name: &str, value: usize, by: usize, what: &str| match value.is_multiple_of(by) {
            true => Ok(()),
            false => Err(Error::request(name, format!("{value} is no multiple of {by} ({what})"))),
        };
        divides("hidden", self.hidden, self.heads, "heads")?;
        divides("heads", self.heads, kv_heads, "kv_heads")?;
        range("heads / kv_heads", self.heads / kv_heads, 1, AttentionShape::MAX_GROUP)?;
        // Four rows share a byte in the packed form.
        divides("hidden", self.hidden, 4, "rows that share a byte")?;
        divides("intermediate", self.intermediate, 4, "rows that share a byte")?;
        let head_dim = self.hidden / self.heads;
        range("hidden / heads", head_dim, 4, AttentionShape::MAX_HEAD_DIM)?;
        divides("hidden / heads", head_dim, 4, "rotated pairs, and rows that share a byte")?;
        if !(1.0..=1e12).contains(&self.rope_theta) {
            return Err(Error::request("rope_theta", format!("{} is out of range: 1 to 1e12", self.rope_theta)));
        }
        let (family, activation, scale_style) = match self.blocks {
            Blocks::Bitnet => (Family::BitNet, Activation::Relu2, ScaleStyle::Multiply),
            Blocks::Llama => (Family::Llama, Activation::Silu, ScaleStyle::Divide),
        };
        Ok(ModelConfig {
            family,
            hidden_size: self.hidden,
            intermediate_size: self.intermediate,
            num_layers: self.layers,
            num_heads: self.heads,
            num_kv_heads: kv_heads,
            head_dim,
            vocab_size: self.vocab,
            max_positions: self.context,
            rms_norm_eps: 1e-5,
            rope_theta: self.rope_theta,
            tied_embeddings: self.tied,
            activation,
            sub_norms: self.blocks == Blocks::Bitnet,
            quantization: Quantization::plain(Mode::Online, scale_style),
            bos_token: Some(end),
            eos_tokens: vec![end],
        })
    }
}

/// How the text is cut into batches.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Batching {
    /// Part of the text that is set apart for validation.
    pub validation: f64,
    /// Sequences of a step.
    pub sequences: usize,
    /// Sequences of a micro-batch: what one thread computes at a time. Decides memory and the order of sums, so a run
    /// keeps it.
    pub micro: usize,
}

impl Default for Batching {
    fn default() -> Self {
        Self { validation: 0.02, sequences: 16, micro: 2 }
    }
}

/// All settings of a run from scratch.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// The model.
    pub model: Shape,
    /// The batches.
    pub batches: Batching,
    /// The steps.
    pub optimization: Optimization,
}

impl Recipe {
    /// Reads a TOML file; what it leaves out has the default.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] naming the line or the key.
    pub fn read(path: &Path) -> Result<Self> {
        let (mut text, file) = (String::new(), File::open(path).map_err(|e| Error::io(path, e))?);
        file.take(MAX_RECIPE_BYTES + 1).read_to_string(&mut text).map_err(|e| Error::io(path, e))?;
        if text.len() as u64 > MAX_RECIPE_BYTES {
            return Err(Error::file(path, format!("more than {MAX_RECIPE_BYTES} bytes: this is no recipe")));
        }
        toml::from_str(&text).map_err(|e| {
            let before = e.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            Error::file(path, format!("line {line}: {}", e.message().trim().replace('\n', " ")))
        })
    }

    /// The text of such a file.
    ///
    /// # Errors
    /// None for valid settings.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::request("recipe", e.to_string()))
    }

    /// # Errors
    /// [`Error::Request`] naming the setting that is out of range.
    pub fn check(&self) -> Result<()> {
        self.model.config(0)?;
        self.optimization.check()?;
        let b = self.batches;
        if !(0.0..=0.5).contains(&b.validation) {
            return Err(Error::request("validation", format!("{} is out of range: 0 to 0.5", b.validation)));
        }
        let most = (MAX_STEP_TOKENS / self.model.context).max(1);
        if !(1..=most).contains(&b.sequences) {
            return Err(Error::request("sequences (--batch)", format!("{} is out of range: 1 to {most}", b.sequences)));
        }
        if !(1..=b.sequences).contains(&b.micro) {
            let reason = format!("{} is out of range: 1 to {}, the sequences of a step", b.micro, b.sequences);
            return Err(Error::request("micro (--micro-batch)", reason));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_survives_toml() {
        let mut recipe = Recipe::default();
        recipe.model.hidden = 96;
        recipe.optimization.lr = 3e-3;
        assert_eq!(toml::from_str::<Recipe>(&recipe.to_toml().unwrap()).unwrap(), recipe);
        assert_eq!(toml::from_str::<Recipe>("").unwrap(), Recipe::default());
    }

    #[test]
    fn unknown_keys_and_bad_values_are_named() {
        let unknown = toml::from_str::<Recipe>("[optimization]\nlearning_rate = 1.0\n").unwrap_err();
        assert!(unknown.to_string().contains("learning_rate"), "{unknown}");
        let error = |edit: &dyn Fn(&mut Recipe)| {
            let mut recipe = Recipe::default();
            edit(&mut recipe);
            recipe.check().unwrap_err().to_string()
        };
        assert!(error(&|r| r.model.heads = 3).starts_with("hidden: 256 is no multiple of 3"));
        assert!(error(&|r| r.model.vocab = 10).starts_with("vocab: 10 is out of range: 257"));
        assert!(error(&|r| r.batches.micro = 17).starts_with("micro (--micro-batch): 17 is out of range: 1 to 16"));
        assert!(error(&|r| r.batches.validation = 0.9).starts_with("validation: 0.9"));
        assert!(error(&|r| r.optimization.lr = f64::NAN).starts_with("lr: NaN"));
        assert!(error(&|r| r.optimization.dropout = 1.0).starts_with("dropout: 1"));
    }
}
