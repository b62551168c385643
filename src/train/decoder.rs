//! The decoder's forward pass with gradients: the shapes, names and order of [`crate::model::Decoder`].

use super::parameters::{Kind, Parameters};
use crate::backend::attention::{AttentionShape, RopeTable};
use crate::backend::cpu::Gate;
use crate::model::config::{Activation, ModelConfig, Projection};
use crate::ops::grad::{self, Precision};
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor, Var};
use std::sync::Arc;

/// Token ids of equally long sequences, one after the other, and what each position is to predict.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Tokens of a sequence.
    pub length: usize,
    /// The inputs, `sequences · length`.
    pub tokens: Vec<u32>,
    /// The target of each position; `None` where none counts.
    pub targets: Vec<Option<u32>>,
}

impl Batch {
    /// Positions that have a target.
    pub fn counted(&self) -> usize {
        self.targets.iter().flatten().count()
    }
}

/// Dropout of one forward pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct Regularization {
    /// Probability with which a value of the embedding or of what a layer adds to the residual stream is dropped.
    pub dropout: f32,
    /// Which values; the same seed drops the same ones.
    pub seed: u64,
}

/// A decoder to be trained: its configuration, without weights.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: ModelConfig,
    shape: AttentionShape,
    rope: Arc<RopeTable>,
    gate: Gate,
    precision: Precision,
}

impl Decoder {
    /// A decoder of this configuration.
    ///
    /// # Errors
    /// [`Error::Shape`] for heads that no kernel runs; [`Error::Request`] for norms inside BitLinear and for projections
    /// that are not BitLinear, which only come from converted models.
    pub fn new(config: &ModelConfig) -> Result<Self> {
        if config.quantization.use_rms_norm {
            let reason = "models with a norm inside BitLinear (use_rms_norm) cannot be trained, only adapted";
            return Err(Error::request("model", reason));
        }
        let linears = (0..config.num_layers).flat_map(|layer| config.linears(layer));
        if let Some((name, ..)) = linears.into_iter().find(|(name, ..)| !config.is_converted(name)) {
            let reason =
                format!("{name} is in modules_to_not_convert; only models whose every layer is ternary can be trained");
            return Err(Error::request("model", reason));
        }
        Ok(Self {
            shape: AttentionShape::new(config.num_heads, config.num_kv_heads, config.head_dim)?,
            rope: Arc::new(RopeTable::new(config.max_positions, config.head_dim, config.rope_theta)?),
            gate: match config.activation {
                Activation::Relu2 => Gate::Relu2,
                Activation::Silu => Gate::Silu,
            },
            config: config.clone(),
            precision: Precision::F32,
        })
    }

    /// With operands of matrix products rounded to this precision; f32 unless said.
    #[must_use]
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Quantises the masters, once for all the forward passes until they change. `lambda` is the part by which the
    /// quantisers are mixed in; 0 is a dense model.
    ///
    /// # Errors
    /// [`Error::Shape`] if a parameter is missing.
    pub fn prepare(&self, parameters: &Parameters, lambda: f32) -> Result<Prepared<'_>> {
        let mut leaves = Vec::new();
        let mut leaf = |names: &[String]| -> Result<Tensor> {
            let mut parts = Vec::with_capacity(names.len());
            let mut values = Vec::with_capacity(names.len());
            for name in names {
                let index = parameters.index(name)?;
                let p = &parameters.list()[index];
                values.push(match p.kind {
                    Kind::Ternary => grad::fake_ternary(&p.value, lambda)?,
                    _ => p.value.to_dtype(DType::F32)?,
                });
                parts.push(index);
            }
            let value = match &values[..] {
                [one] => one.clone(),
                _ => Tensor::cat(&values, 0)?,
            };
            let var = Var::from_tensor(&value)?;
            let tensor = var.as_tensor().clone();
            leaves.push(Leaf { var, parts });
            Ok(tensor)
        };
        let one = |name: &str| [name.to_owned()];
        let embedding = leaf(&one("model.embed_tokens.weight"))?;
        let mut layers = Vec::with_capacity(self.config.num_layers);
        for index in 0..self.config.num_layers {
            let names = |which: &[Projection]| -> Vec<String> {
                which.iter().map(|p| format!("{}.weight", self.config.projection_name(index, *p))).collect()
            };
            let norm = |path: &str| [format!("model.layers.{index}.{path}.weight")];
            let [attention, mlp] = self.config.family.sub_norms();
            let (attention_sub_norm, mlp_sub_norm) = match self.config.sub_norms {
                false => (None, None),
                true => (Some(leaf(&norm(attention))?), Some(leaf(&norm(mlp))?)),
            };
            layers.push(Layer {
                input_norm: leaf(&norm("input_layernorm"))?,
                qkv: leaf(&names(&[Projection::Query, Projection::Key, Projection::Value]))?,
                attention_sub_norm,
                output: leaf(&names(&[Projection::Output]))?,
                post_attention_norm: leaf(&norm("post_attention_layernorm"))?,
                gate_up: leaf(&names(&[Projection::Gate, Projection::Up]))?,
                mlp_sub_norm,
                down: leaf(&names(&[Projection::Down]))?,
            });
        }
        let norm = leaf(&one("model.norm.weight"))?;
        let head = match self.config.tied_embeddings {
            true => embedding.clone(),
            false => leaf(&one("lm_head.weight"))?,
        };
        Ok(Prepared { decoder: self, lambda, embedding, layers, norm, head, leaves })
    }
}

#[derive(Debug)]
struct Layer {
    input_norm: Tensor,
    qkv: Tensor,
    attention_sub_norm: Option<Tensor>,
    output: Tensor,
    post_attention_norm: Tensor,
    gate_up: Tensor,
    mlp_sub_norm: Option<Tensor>,
    down: Tensor,
}

/// A tensor that gradients are taken for: one parameter as the forward pass sees it, or several that one product reads,
/// row under row.
#[derive(Debug)]
struct Leaf {
    var: Var,
    parts: Vec<usize>,
}

/// A decoder with its weights as the forward pass sees them.
///
/// The straight-through gradient of a master is that of its effective weight, so gradients are taken for the effective
/// weights, and quantisation is not part of every micro-batch's graph.
#[derive(Debug)]
pub struct Prepared<'a> {
    decoder: &'a Decoder,
    lambda: f32,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
    leaves: Vec<Leaf>,
}

impl Prepared<'_> {
    /// The same weights without variables, so that a forward pass keeps nothing for gradients.
    pub(super) fn frozen(self) -> Self {
        let layer = |l: Layer| Layer {
            input_norm: l.input_norm.detach(),
            qkv: l.qkv.detach(),
            attention_sub_norm: l.attention_sub_norm.map(|n| n.detach()),
            output: l.output.detach(),
            post_attention_norm: l.post_attention_norm.detach(),
            gate_up: l.gate_up.detach(),
            mlp_sub_norm: l.mlp_sub_norm.map(|n| n.detach()),
            down: l.down.detach(),
        };
        Self {
            embedding: self.embedding.detach(),
            layers: self.layers.into_iter().map(layer).collect(),
            norm: self.norm.detach(),
            head: self.head.detach(),
            ..self
        }
    }

    fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// What the output head sees, `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::ContextFull`] for sequences longer than the model's positions, [`Error::Request`] for tokens outside the
    /// vocabulary or a count that is no multiple of the length.
    pub fn hidden(&self, tokens: &[u32], length: usize, regularization: Regularization) -> Result<Tensor> {
        let config = &self.decoder.config;
        if length > config.max_positions {
            return Err(Error::ContextFull { needed: length, available: config.max_positions });
        }
        if length == 0 || tokens.is_empty() || !tokens.len().is_multiple_of(length) {
            return Err(Error::request("batch", format!("{} tokens in sequences of {length}", tokens.len())));
        }
        if let Some(id) = tokens.iter().find(|id| **id as usize >= config.vocab_size) {
            return Err(Error::request("token id", format!("{id} is outside the vocabulary of {}", config.vocab_size)));
        }
        let sequences = tokens.len() / length;
        let Regularization { dropout, seed } = regularization;
        let drop = |x: Tensor, site: u64| grad::dropout(&x, dropout, seed.wrapping_add(site << 40));
        let ids = Tensor::from_slice(tokens, tokens.len(), self.device())?;
        let mut x = drop(self.embedding.index_select(&ids, 0)?, 1)?;
        let eps = config.rms_norm_eps;
        let normed = |x: &Tensor, weight: &Option<Tensor>| match weight {
            None => Ok(x.clone()),
            Some(weight) => grad::rms_norm(x, weight, eps),
        };
        let precision = self.decoder.precision;
        let project = |x: &Tensor, weight: &Tensor| grad::bit_linear(x, weight, self.lambda, precision);
        for (i, layer) in self.layers.iter().enumerate() {
            let qkv = project(&grad::rms_norm(&x, &layer.input_norm, eps)?, &layer.qkv)?;
            let width = qkv.dim(D::Minus1)?;
            let qkv = qkv.reshape((sequences, length, width))?;
            let context = grad::attention(&qkv, self.decoder.shape, &self.decoder.rope)?.flatten(0, 1)?;
            let out = project(&normed(&context, &layer.attention_sub_norm)?, &layer.output)?;
            x = (x + drop(out, 2 * i as u64 + 2)?)?;
            let gate_up = project(&grad::rms_norm(&x, &layer.post_attention_norm, eps)?, &layer.gate_up)?;
            let product = grad::gated(self.decoder.gate, &gate_up)?;
            let out = project(&normed(&product, &layer.mlp_sub_norm)?, &layer.down)?;
            x = (x + drop(out, 2 * i as u64 + 3)?)?;
        }
        Ok(grad::rms_norm(&x, &self.norm, eps)?)
    }

    /// Logits `[tokens, vocab]`, without dropout.
    ///
    /// # Errors
    /// As [`Self::hidden`].
    pub fn logits(&self, tokens: &[u32], length: usize) -> Result<Tensor> {
        let hidden = self.hidden(tokens, length, Regularization::default())?;
        Ok(grad::linear(&hidden, &self.head, self.decoder.precision)?)
    }

    /// Sum of the cross-entropy over all targets, in nats: a scalar that gradients can be taken of.
    ///
    /// # Errors
    /// As [`Self::hidden`]; of candle for targets outside the vocabulary.
    pub fn loss(&self, batch: &Batch, regularization: Regularization) -> Result<Tensor> {
        let hidden = self.hidden(&batch.tokens, batch.length, regularization)?;
        Ok(grad::cross_entropy(&hidden, &self.head, &batch.targets, self.decoder.precision)?)
    }

    /// The effective weights' gradients, in a fixed order; zeros where nothing flowed.
    ///
    /// # Errors
    /// Of candle.
    pub fn gradients(&self, mut store: GradStore) -> Result<Vec<Tensor>> {
        let take = |leaf: &Leaf| store.remove(&leaf.var).map_or_else(|| Ok(leaf.var.zeros_like()?), Ok);
        self.leaves.iter().map(take).collect()
    }

    /// Turns such gradients into one for each parameter, in the parameters' order.
    ///
    /// # Errors
    /// Of candle.
    pub fn by_parameter(&self, gradients: &[Tensor], parameters: &Parameters) -> Result<Vec<Tensor>> {
        let mut all = vec![None; parameters.list().len()];
        for (leaf, gradient) in self.leaves.iter().zip(gradients) {
            let mut row = 0;
            for part in &leaf.parts {
                let rows = parameters.list()[*part].value.dim(0)?;
                all[*part] = Some(gradient.narrow(0, row, rows)?);
                row += rows;
            }
        }
        let missing = |i: usize| Error::Shape {
            op: "gradients",
            reason: format!("{} takes no part in the model", parameters.list()[i].name),
        };
        all.into_iter().enumerate().map(|(i, g)| g.ok_or_else(|| missing(i))).collect()
    }
}
