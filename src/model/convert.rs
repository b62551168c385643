//! Converts a b1.58 checkpoint from one safetensors form to another, so that it stays the same model.
//!
//! A model is codes and multipliers. [`Form`]s differ in how they are stored, and a model that was quantised from
//! masters, by this crate or at load, is the same in all of them: the same codes and the same logits, bit for bit.
//! Tensors are read, converted and written one at a time; what was written is read back and compared ([`verify`])
//! before it appears in the target directory.

mod config;
mod masters;
mod progress;
mod staging;
mod verify;

pub use progress::{OnProgress, Phase, Progress};
pub use verify::{Verified, verify};

use super::CheckpointWeights;
use super::config::{Mode, ModelConfig, Projection};
use crate::Result;
use crate::backend::DenseType;
use crate::checkpoint::write::{DEFAULT_SHARD_BYTES, Entry, check_target, write_checkpoint, write_text};
use crate::checkpoint::{Checkpoint, LinearWeight, ModelFiles, ScaleStyle, StoredType, TensorView};
use crate::ternary::{CODES_PER_BYTE, PackedTernary, Scale};
use half::bf16;
use masters::Recipe;
use progress::Tracker;
pub(crate) use staging::Companions;
use staging::Staging;
use std::collections::HashSet;
use std::io::{self, Write};
use std::path::Path;

/// Bytes that are copied at a time.
const CHUNK: usize = 4 << 20;

/// How a checkpoint stores its ternary weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Form {
    /// Codes, four to a byte, with a `weight_scale` that multiplies (`linear_class: autobitlinear`) or divides.
    Packed(ScaleStyle),
    /// Masters (`quantization_mode: online`), quantised at load. Masters of the source are copied; from codes, values are
    /// made that quantise to them and their multiplier: the same model to run, and something to train from, but not what
    /// the model was trained with.
    Masters,
}

/// What a conversion did.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// The form written.
    pub form: Form,
    /// Names of all files in the target directory.
    pub files: Vec<String>,
    /// Bytes of the tensors.
    pub bytes: u64,
    /// Matrices of masters that had to be F32: too small to meet their scale in BF16.
    pub f32_masters: usize,
    /// What was read back and found equal, and which scales could not be met exactly.
    pub verified: Verified,
    /// Files copied as they are: tokenizer, chat template, generation defaults, licence, read-me.
    pub copied: Vec<String>,
    /// Files of the source that were not copied.
    pub left: Vec<String>,
}

/// Writes the model in `source`, a directory or the built-in one, to the directory `target` in another form.
///
/// `config.json` changes only in `quantization_config`. A multiplier is stored as BF16 where that holds it exactly, as
/// F32 otherwise. Divide-style scales and masters cannot express every multiplier: one that did not come from masters may
/// change by a unit in the last place, which [`Summary::verified`] counts.
///
/// # Errors
/// [`crate::Error::Request`] if `target` holds a checkpoint, or files that would be replaced; those of opening and loading
/// `source`; [`crate::Error::Tensor`] for a weight that the form cannot express; [`crate::Error::Io`]. Nothing is
/// left in `target` then.
pub fn convert(
    source: impl Into<ModelFiles>,
    target: &Path,
    form: Form,
    progress: &mut OnProgress<'_>,
) -> Result<Summary> {
    check_target(target)?;
    let model = Model::open(source.into())?;
    let source = model.checkpoint.source();
    let tracker = Tracker::new(progress);
    let matrices = plan(&model, form, &tracker)?;
    let config = config::rewrite(&model, form)?;
    let companions = Companions::of(source)?;

    let staging = Staging::new(target)?;
    let bytes = write(&model, &matrices, staging.dir(), &tracker)?;
    for name in &companions.copied {
        staging.copy(source, name)?;
    }
    write_text(&staging.dir().join("config.json"), &config)?;
    let verified = verify::compare(&model, &Model::open(staging.dir())?, &tracker)?;
    let is_f32 = |m: &&Matrix| matches!(&m.store, Store::Masters(r) if r.dtype == DenseType::F32);
    let f32_masters = matrices.iter().filter(is_f32).count();
    let files = staging.commit()?;
    Ok(Summary { form, files, bytes, f32_masters, verified, copied: companions.copied, left: companions.left })
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
}

/// The ternary projections: layer, kind and tensor name without `.weight`.
fn linears(config: &ModelConfig) -> impl Iterator<Item = (usize, Projection, String)> {
    let all = (0..config.num_layers).flat_map(|layer| Projection::ALL.map(|which| (layer, which)));
    all.map(|(layer, which)| (layer, which, config.projection_name(layer, which)))
        .filter(|(.., name)| config.is_converted(name))
}

/// How one ternary matrix will be stored.
enum Store {
    Packed(Scale),
    Masters(Recipe),
    /// Masters already.
    Copy,
}

struct Matrix {
    layer: usize,
    which: Projection,
    name: String,
    rows: usize,
    cols: usize,
    store: Store,
}

/// Reads every ternary weight once, so that a source that cannot be converted is refused before anything is written.
fn plan(model: &Model, form: Form, tracker: &Tracker) -> Result<Vec<Matrix>> {
    let (checkpoint, config) = (&model.checkpoint, &model.config);
    let weights = model.weights()?;
    check_dense(checkpoint, config)?;
    let stored = |name: &str| checkpoint.tensor(&format!("{name}.weight")).map_or(0, |t| t.bytes().len() as u64);
    tracker.begin(Phase::Reading, linears(config).map(|(.., name)| stored(&name)).sum())?;
    let mut matrices = Vec::new();
    for (layer, which, name) in linears(config) {
        let Some(packed) = weights.ternary(layer, which)? else { continue };
        let weight = checkpoint.require(&format!("{name}.weight"))?;
        let has_codes = model.has_codes(&name)?;
        let store = match form {
            Form::Packed(style) => Store::Packed(packed_scale(&weight, &packed, style)?),
            Form::Masters if has_codes => match Recipe::new(packed.histogram(), packed.scale()) {
                Some(recipe) => Store::Masters(recipe),
                None => {
                    let m = packed.scale().multiplier();
                    return Err(weight.error(format!(
                        "no masters are quantised to its scale {m:e} (they reach from 1e-5 up); use a packed form"
                    )));
                }
            },
            Form::Masters => Store::Copy,
        };
        tracker.advance(weight.bytes().len() as u64)?;
        let (rows, cols) = (packed.rows(), packed.cols());
        matrices.push(Matrix { layer, which, name, rows, cols, store });
    }
    Ok(matrices)
}

/// The scale in this style, if the packed form can hold the matrix at all.
fn packed_scale(weight: &TensorView, packed: &PackedTernary, style: ScaleStyle) -> Result<Scale> {
    if !packed.rows().is_multiple_of(CODES_PER_BYTE) {
        let rows = packed.rows();
        return Err(weight.error(format!("{rows} output features are not a multiple of 4: it cannot be packed")));
    }
    let scale = match style {
        ScaleStyle::Multiply => packed.scale().to_multiply(),
        ScaleStyle::Divide => packed.scale().to_divide(),
    };
    match scale.stored().is_normal() {
        true => Ok(scale),
        false => {
            let m = packed.scale().multiplier();
            Err(weight.error(format!("its scale {m:e} is out of range for a weight_scale of this convention")))
        }
    }
}

/// The other tensors that a model of this configuration needs.
fn check_dense(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<()> {
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    checkpoint.dense("model.embed_tokens.weight", vocab, hidden)?;
    if !config.tied_embeddings {
        checkpoint.dense("lm_head.weight", vocab, hidden)?;
    }
    checkpoint.vector("model.norm.weight", hidden)?;
    for layer in 0..config.num_layers {
        for (name, len) in config.norms(layer) {
            checkpoint.vector(&name, len)?;
        }
        for (name, rows, cols) in config.linears(layer) {
            if !config.is_converted(&name) {
                checkpoint.dense(&format!("{name}.weight"), rows, cols)?;
            } else if config.quantization.use_rms_norm {
                checkpoint.vector(&format!("{name}.rms_norm.weight"), cols)?;
            }
        }
    }
    Ok(())
}

/// Writes all tensors; returns their bytes.
fn write(model: &Model, matrices: &[Matrix], dir: &Path, tracker: &Tracker) -> Result<u64> {
    let weights = model.weights()?;
    let mut entries = Vec::new();
    let mut done = HashSet::new();
    for matrix in matrices {
        let weight = format!("{}.weight", matrix.name);
        let scale = format!("{}.weight_scale", matrix.name);
        match &matrix.store {
            Store::Copy => {}
            Store::Packed(value) => {
                let (dtype, bytes) = scale_bytes(value.stored());
                entries.push(Entry::from_bytes(&scale, dtype, [1], bytes));
                let shape = [matrix.rows / CODES_PER_BYTE, matrix.cols];
                let weights = &weights;
                entries.push(Entry::new(&weight, StoredType::U8, shape, move |out| {
                    let packed = read(weights, matrix, tracker)?;
                    put(out, &tracker.keep(packed.to_hf())?, tracker)
                }));
            }
            Store::Masters(recipe) => {
                let dtype = match recipe.dtype {
                    DenseType::BF16 => StoredType::BF16,
                    _ => StoredType::F32,
                };
                let weights = &weights;
                entries.push(Entry::new(&weight, dtype, [matrix.rows, matrix.cols], move |out| {
                    let packed = read(weights, matrix, tracker)?;
                    recipe.write(&packed, out, |bytes| tracker.keep(tracker.advance(bytes)))
                }));
            }
        }
        if !matches!(matrix.store, Store::Copy) {
            done.extend([weight, scale]);
        }
    }
    let others: Vec<&str> = model.checkpoint.names().filter(|name| !done.contains(*name)).collect();
    for name in others {
        let view = model.checkpoint.require(name)?;
        entries.push(Entry::new(name, view.info.dtype, view.info.shape.as_slice(), move |out| {
            let mut at = view.info.range.start;
            for chunk in view.bytes().chunks(CHUNK) {
                put(out, chunk, tracker)?;
                view.file.release(at..at + chunk.len());
                at += chunk.len();
            }
            Ok(())
        }));
    }
    // As the hub's checkpoints are: in the order of names, so that a layer's tensors lie together.
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let total = entries.iter().map(|e| e.shape.iter().product::<usize>() as u64 * e.dtype.size() as u64).sum();
    tracker.begin(Phase::Writing, total)?;
    write_checkpoint(dir, entries, DEFAULT_SHARD_BYTES, &mut |_| {}).map_err(|e| tracker.cause(e))?;
    Ok(total)
}

fn read(weights: &CheckpointWeights, matrix: &Matrix, tracker: &Tracker) -> io::Result<PackedTernary> {
    let packed = tracker.keep(weights.ternary(matrix.layer, matrix.which))?;
    packed.ok_or_else(|| io::Error::other("not a ternary weight any more"))
}

fn put(out: &mut dyn Write, bytes: &[u8], tracker: &Tracker) -> io::Result<()> {
    for chunk in bytes.chunks(CHUNK) {
        out.write_all(chunk)?;
        tracker.keep(tracker.advance(chunk.len() as u64))?;
    }
    Ok(())
}

/// A scale in the smallest type that holds it exactly.
fn scale_bytes(scale: f32) -> (StoredType, Vec<u8>) {
    let short = bf16::from_f32(scale);
    match short.to_f32() == scale {
        true => (StoredType::BF16, short.to_le_bytes().to_vec()),
        false => (StoredType::F32, scale.to_le_bytes().to_vec()),
    }
}
