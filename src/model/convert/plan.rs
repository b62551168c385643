//! What will be written, decided before anything is.

use super::form::{Form, GgufType, Options};
use super::masters::Recipe;
use super::progress::{Phase, Tracker};
use super::{Model, values};
use crate::backend::DenseType;
use crate::checkpoint::{ScaleStyle, StoredType, TensorView};
use crate::model::config::Projection;
use crate::ternary::{CODES_PER_BYTE, PackedTernary, Scale};
use crate::{Error, Result};
use half::f16;
use std::collections::HashSet;

/// How one ternary matrix will be stored.
pub(super) enum Store {
    Packed(Scale),
    Masters(Recipe),
    /// Masters already.
    Copy,
    Dense(DenseType),
    I2S,
    /// Blocks with this scale; `beside` it, if it is 1 there, a tensor with the real one.
    Blocks {
        d: f16,
        beside: Option<f32>,
    },
}

pub(super) struct Matrix {
    pub layer: usize,
    pub which: Projection,
    /// The tensor's name without `.weight`.
    pub name: String,
    pub rows: usize,
    pub cols: usize,
    pub store: Store,
}

/// A tensor of dense values, and the type that it will have.
pub(super) struct Other {
    pub name: String,
    pub dtype: StoredType,
}

pub(super) struct Plan {
    pub matrices: Vec<Matrix>,
    pub others: Vec<Other>,
}

impl Plan {
    /// Reads every ternary weight once, so that a source that cannot be converted is refused before anything is written.
    pub fn of(model: &Model, options: Options, tracker: &Tracker) -> Result<Self> {
        let checkpoint = &model.checkpoint;
        let weights = model.weights()?;
        if let (Form::Dense(_) | Form::Gguf(_), Some((key, what))) = (options.form, model.extras()) {
            let reason = format!("the model has {what}, which only packed codes and masters in safetensors can say");
            return Err(Error::config(checkpoint.config().0, format!("quantization_config.{key}"), reason));
        }
        check_dense(model)?;
        let stored = |name: &str| checkpoint.tensor(&format!("{name}.weight")).map_or(0, |t| t.bytes().len() as u64);
        tracker.begin(Phase::Reading, model.linears().map(|(.., name)| stored(&name)).sum())?;
        let mut matrices = Vec::new();
        for (layer, which, name) in model.linears() {
            let Some(packed) = weights.ternary(layer, which)? else { continue };
            let weight = checkpoint.require(&format!("{name}.weight"))?;
            let store = store(model, &name, &weight, &packed, options.form)?;
            tracker.advance(weight.bytes().len() as u64)?;
            let (rows, cols) = (packed.rows(), packed.cols());
            matrices.push(Matrix { layer, which, name, rows, cols, store });
        }
        let others = others(model, &matrices, options)?;
        Ok(Self { matrices, others })
    }
}

fn store(model: &Model, name: &str, weight: &TensorView, packed: &PackedTernary, form: Form) -> Result<Store> {
    let multiplier = packed.scale().multiplier();
    let unfit = |e: String| weight.error(e);
    Ok(match form {
        Form::Packed(style) => Store::Packed(packed_scale(weight, packed, style)?),
        Form::Masters if !model.has_codes(name)? => Store::Copy,
        Form::Masters => match Recipe::new(packed.histogram(), packed.scale()) {
            Some(recipe) => Store::Masters(recipe),
            None => {
                return Err(unfit(format!(
                    "no masters are quantised to its scale {multiplier:e} (they reach from 1e-5 up); use a packed form"
                )));
            }
        },
        Form::Dense(dtype) => match values::rounded(multiplier, dtype) {
            Some(_) => Store::Dense(dtype),
            None => {
                return Err(unfit(format!(
                    "its scale {multiplier:e} is out of range for {dtype} values; use bf16 or f32"
                )));
            }
        },
        Form::Gguf(kind) => {
            let (rows, cols) = (packed.rows(), packed.cols());
            let fits = match kind {
                GgufType::I2_S(layout) => PackedTernary::check_i2s(rows, cols, layout),
                _ if cols.is_multiple_of(kind.ggml().block_values()) => Ok(()),
                _ => Err(Error::Shape {
                    op: kind.ggml().name(),
                    reason: format!("{cols} columns are not a multiple of {}", kind.ggml().block_values()),
                }),
            };
            fits.map_err(|e| {
                unfit(format!("{e}; use another form: i2_s takes most shapes, packed takes all of 4 rows"))
            })?;
            match kind {
                GgufType::I2_S(_) => Store::I2S,
                _ => match f16::from_f32(multiplier) {
                    d if d.to_f32() == multiplier => Store::Blocks { d, beside: None },
                    _ => Store::Blocks { d: f16::ONE, beside: Some(multiplier) },
                },
            }
        }
    })
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
fn check_dense(model: &Model) -> Result<()> {
    let (checkpoint, config) = (&model.checkpoint, &model.config);
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    checkpoint.matrix("model.embed_tokens.weight", vocab, hidden)?;
    if !config.tied_embeddings {
        checkpoint.matrix("lm_head.weight", vocab, hidden)?;
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

/// Every tensor that is not part of a ternary weight, with its new type.
fn others(model: &Model, matrices: &[Matrix], options: Options) -> Result<Vec<Other>> {
    let is_gguf = matches!(options.form, Form::Gguf(_));
    let written = |m: &&Matrix| !matches!(m.store, Store::Copy);
    let ternary: HashSet<String> = matrices
        .iter()
        .filter(written)
        .flat_map(|m| ["weight", "weight_scale"].map(|part| format!("{}.{part}", m.name)))
        .collect();
    let mut others = Vec::new();
    for name in model.checkpoint.names().filter(|name| !ternary.contains(*name)) {
        // A GGUF file has no names for them.
        if is_gguf && !model.needs(name) {
            continue;
        }
        let view = model.checkpoint.require(name)?;
        let dtype = match options.head {
            Some(head) if ["model.embed_tokens.weight", "lm_head.weight"].contains(&name) => head,
            // llama.cpp takes vectors in no other type.
            _ if is_gguf && view.info.shape.len() == 1 => StoredType::F32,
            _ => match view.info.dtype {
                StoredType::Ggml(_) if !is_gguf => StoredType::BF16,
                dtype => dtype,
            },
        };
        dtype.bytes_of(&view.info.shape).map_err(|e| view.error(format!("{e}; choose another --head")))?;
        others.push(Other { name: name.to_owned(), dtype });
    }
    Ok(others)
}
