//! Converts a b1.58 checkpoint from one form to another, so that it stays the same model.
//!
//! A model is codes and multipliers. [`Form`]s differ in how they are stored, and a model that was quantised from
//! masters, by this crate or at load, is the same in all of them that hold its scales: the same codes and the same logits,
//! bit for bit. Tensors are read, converted and written one at a time; what was written is read back and compared
//! ([`verify`]) before it appears under its name.

mod config;
mod directory;
mod form;
mod gguf;
mod masters;
mod plan;
mod progress;
mod staging;
mod values;
mod verify;

pub use form::{Form, GgufType, Options};
pub use progress::{OnProgress, Phase, Progress};
pub use verify::{Verified, verify};

use super::CheckpointWeights;
use super::config::{Family, Mode, ModelConfig, Projection};
use crate::Result;
use crate::checkpoint::{Checkpoint, LinearWeight, ModelFiles};
use plan::Plan;
use progress::Tracker;
pub(crate) use staging::Companions;
use std::path::Path;

/// What a conversion did.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// The form written.
    pub form: Form,
    /// Names of all files in the target directory, or of the only file.
    pub files: Vec<String>,
    /// Bytes of the tensors.
    pub bytes: u64,
    /// Matrices of masters that had to be F32: too small to meet their scale in BF16.
    pub f32_masters: usize,
    /// What was read back and found equal, and what could not be met exactly.
    pub verified: Verified,
    /// Files copied as they are: tokenizer, chat template, generation defaults, licence, read-me.
    pub copied: Vec<String>,
    /// Files of the source that were not copied.
    pub left: Vec<String>,
}

/// Writes a model to `target` in another form: a new `*.gguf` file for [`Form::Gguf`], a directory otherwise.
///
/// In a directory, `config.json` changes only in `quantization_config` (and in the type of its weights, where that is what
/// the form changes). A multiplier is stored as BF16 where that holds it exactly, as F32 otherwise. Divide-style scales,
/// masters and dense values cannot express every multiplier; [`Summary::verified`] counts those that changed.
///
/// A GGUF file gets the model's tokenizer, chat template and generation defaults as metadata. Of a GGUF source, all metadata
/// that does not describe the tensors' types is kept as it is.
///
/// # Errors
/// [`crate::Error::Request`] if the target is there already or holds a checkpoint, and for a type of the head that the form
/// has not; those of opening and loading `source`; [`crate::Error::Tensor`], [`crate::Error::Config`] or
/// [`crate::Error::Text`] for what the form cannot express; [`crate::Error::Io`]. Nothing is left at `target` then.
pub fn convert(
    source: impl Into<ModelFiles>,
    target: &Path,
    options: impl Into<Options>,
    progress: &mut OnProgress<'_>,
) -> Result<Summary> {
    let options = options.into();
    options.check(target)?;
    let model = Model::open(source.into())?;
    let tracker = Tracker::new(progress);
    let plan = Plan::of(&model, options, &tracker)?;
    match options.form {
        Form::Gguf(kind) => gguf::convert(&model, &plan, kind, target, &tracker),
        form => directory::convert(&model, &plan, form, target, &tracker),
    }
}

/// A checkpoint with its configuration.
struct Model {
    checkpoint: Checkpoint,
    config: ModelConfig,
}

impl Model {
    fn open(files: impl Into<ModelFiles>) -> Result<Self> {
        let checkpoint = Checkpoint::open(files)?;
        let (path, text) = checkpoint.config();
        let config = ModelConfig::parse(path, text)?;
        Ok(Self { checkpoint, config })
    }

    /// Whether a projection is stored as codes and a scale rather than as masters.
    fn has_codes(&self, name: &str) -> Result<bool> {
        let has_scale = self.checkpoint.contains(&format!("{name}.weight_scale"));
        if has_scale || self.config.quantization.mode == Mode::Dequantized || !self.checkpoint.is_gguf() {
            return Ok(has_scale || self.config.quantization.mode == Mode::Dequantized);
        }
        // A GGUF file's types keep the scale beside the codes.
        let style = self.config.quantization.scale_style;
        Ok(match self.checkpoint.require(&format!("{name}.weight"))?.info.shape[..] {
            [rows, cols] => matches!(self.checkpoint.linear(name, rows, cols, style)?, LinearWeight::Ternary(_)),
            _ => false,
        })
    }

    fn weights(&self) -> Result<CheckpointWeights<'_>> {
        CheckpointWeights::new(&self.checkpoint, &self.config)
    }

    /// The ternary projections: layer, kind and tensor name without `.weight`.
    fn linears(&self) -> impl Iterator<Item = (usize, Projection, String)> {
        let all = (0..self.config.num_layers).flat_map(|layer| Projection::ALL.map(|which| (layer, which)));
        all.map(|(layer, which)| (layer, which, self.config.projection_name(layer, which)))
            .filter(|(.., name)| self.config.is_converted(name))
    }

    /// A projection that is not ternary, and the reason why this model is more than its codes, scales and norms; none if
    /// all forms can say all of it.
    fn extras(&self) -> Option<(&'static str, String)> {
        let q = &self.config.quantization;
        if q.use_rms_norm {
            return Some(("use_rms_norm", "norms inside its linear layers".into()));
        }
        let all = (0..self.config.num_layers).flat_map(|layer| self.config.linears(layer));
        let dense = all.map(|(name, ..)| name).find(|name| !self.config.is_converted(name))?;
        Some(("modules_to_not_convert", format!("layers that are not ternary ({dense})")))
    }

    /// Whether the model would be another one without this tensor: not constants that old exports stored, and not the head
    /// that a tied checkpoint repeats.
    fn needs(&self, name: &str) -> bool {
        !(name.ends_with(".rotary_emb.inv_freq") || self.config.tied_embeddings && name == "lm_head.weight")
    }

    /// The name under which a GGUF file's reader knows a tensor: the first reproduction's sub-norms have other names there.
    fn name_in_gguf(&self, name: &str) -> String {
        if self.config.family == Family::FirstReproduction {
            for (own, other) in Family::FirstReproduction.sub_norms().into_iter().zip(Family::BitNet.sub_norms()) {
                if let Some(layer) = name.strip_suffix(".weight").and_then(|n| n.strip_suffix(own)) {
                    return format!("{layer}{other}.weight");
                }
            }
        }
        name.to_owned()
    }
}
