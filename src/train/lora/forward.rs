//! The forward pass of a frozen decoder with its adapter.

use super::{Frozen, LoraModel, Part, Site};
use crate::backend::Backend;
use crate::backend::attention::RowPosition;
use crate::backend::cpu::CpuOptions;
use crate::ops::grad::{self, FrozenWeight, Update};
use crate::ops::{self, Output};
use crate::train::decoder::{Batch, Regularization};
use crate::train::parameters::Parameters;
use crate::train::trainer::Trainable;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor, Var};

/// A frozen decoder with the values of its adapter.
#[derive(Debug)]
pub struct LoraPrepared<'a> {
    model: &'a LoraModel,
    /// A and B of each module.
    leaves: Vec<Var>,
}

/// One forward pass, on one thread: a backend's operations wait for each other, so every pass has its own.
struct Pass<'a> {
    prepared: &'a LoraPrepared<'a>,
    backend: Backend,
    regularization: Regularization,
}

impl<'a> LoraPrepared<'a> {
    pub(super) fn new(model: &'a LoraModel, leaves: Vec<Var>) -> Self {
        Self { model, leaves }
    }

    fn pass(&self, regularization: Regularization) -> Result<Pass<'_>> {
        let options = CpuOptions { kernel: Some(self.model.kernel), threads: Some(1) };
        Ok(Pass { prepared: self, backend: Backend::new(&Device::Cpu, options)?, regularization })
    }

    /// Logits `[tokens, vocab]` of equally long sequences, as inference with this adapter computes them, without dropout.
    ///
    /// # Errors
    /// [`Error::ContextFull`] for sequences longer than the context, [`Error::Request`] for tokens outside the vocabulary
    /// or a count that is no multiple of the length.
    pub fn logits(&self, tokens: &[u32], length: usize) -> Result<Tensor> {
        let pass = self.pass(Regularization::default())?;
        let hidden = pass.hidden(tokens, length)?;
        let head = &self.model.head;
        let logits = Tensor::zeros((hidden.dim(0)?, head.rows()), DType::F32, &Device::Cpu)?;
        ops::dense_linear(&pass.backend, head, &hidden, Output::replace(&logits))?;
        Ok(logits)
    }

    /// Sum of the cross-entropy over all targets, in nats: a scalar that gradients can be taken of. Dropout is that of
    /// the adapter's inputs.
    ///
    /// # Errors
    /// As [`Self::logits`]; of candle for targets outside the vocabulary.
    pub fn loss(&self, batch: &Batch, regularization: Regularization) -> Result<Tensor> {
        let pass = self.pass(regularization)?;
        let hidden = pass.hidden(&batch.tokens, batch.length)?;
        Ok(grad::frozen_cross_entropy(&pass.backend, &self.model.head, &hidden, &batch.targets)?)
    }

    /// The gradients of A and B of each module, in the parameters' order; zeros where nothing flowed.
    ///
    /// # Errors
    /// Of candle.
    pub fn gradients(&self, mut store: GradStore) -> Result<Vec<Tensor>> {
        let take = |leaf: &Var| store.remove(leaf).map_or_else(|| Ok(leaf.zeros_like()?), Ok);
        self.leaves.iter().map(take).collect()
    }
}

impl Pass<'_> {
    fn hidden(&self, tokens: &[u32], length: usize) -> Result<Tensor> {
        let model = self.prepared.model;
        let (config, backend) = (&model.config, &self.backend);
        if length > model.rope.positions() {
            return Err(Error::ContextFull { needed: length, available: model.rope.positions() });
        }
        if length == 0 || tokens.is_empty() || !tokens.len().is_multiple_of(length) {
            return Err(Error::request("batch", format!("{} tokens in sequences of {length}", tokens.len())));
        }
        let mut batch = backend.batch(tokens.len())?;
        let row = |t: usize| RowPosition { slot: t / length, position: t % length };
        batch.set(tokens, &(0..tokens.len()).map(row).collect::<Vec<_>>())?;
        let mut x = Tensor::zeros((tokens.len(), config.hidden_size), DType::F32, &Device::Cpu)?;
        ops::embed(backend, &model.embedding, &batch, &x)?;
        let eps = config.rms_norm_eps;
        let normed = |x: Tensor, weight: &Option<Tensor>| match weight {
            None => Ok(x),
            Some(weight) => grad::rms_norm(&x, weight, eps),
        };
        for (i, layer) in model.layers.iter().enumerate() {
            let seed = 8 * i as u64;
            let qkv = self.site(&layer.qkv, &grad::rms_norm(&x, &layer.input_norm, eps)?, None, seed)?;
            let width = qkv.dim(D::Minus1)?;
            let qkv = qkv.reshape((tokens.len() / length, length, width))?;
            let context = grad::frozen_attention(backend, &qkv, model.shape, &model.rope)?.flatten(0, 1)?;
            x = self.site(&layer.output, &normed(context, &layer.attention_sub_norm)?, Some(&x), seed + 3)?;
            let gate_up =
                self.site(&layer.gate_up, &grad::rms_norm(&x, &layer.post_attention_norm, eps)?, None, seed + 4)?;
            let product = grad::gated(model.gate, &gate_up)?;
            x = self.site(&layer.down, &normed(product, &layer.mlp_sub_norm)?, Some(&x), seed + 6)?;
        }
        Ok(grad::rms_norm(&x, &model.norm, eps)?)
    }

    /// A site's outputs side by side, plus `residual`. Sums are in inference's order.
    fn site(&self, site: &Site, h: &Tensor, residual: Option<&Tensor>, seed: u64) -> Result<Tensor> {
        if let ([Frozen { weight, norm: None }], None) = (&site.linears[..], residual)
            && site.parts.iter().any(|part| part.adapter.is_some())
        {
            return self.adapted(site, weight, h, seed);
        }
        let base = |linear: &Frozen| -> Result<Tensor> {
            let backend = &self.backend;
            Ok(match &linear.norm {
                None => grad::frozen_linear(backend, &linear.weight, h)?,
                Some((weight, eps)) => grad::frozen_linear(backend, &linear.weight, &grad::rms_norm(h, weight, *eps)?)?,
            })
        };
        let y = match &site.linears[..] {
            [one] => base(one)?,
            several => Tensor::cat(&several.iter().map(base).collect::<Result<Vec<_>>>()?, 1)?,
        };
        let added = match (self.update(site, h, seed)?, residual) {
            (Some(update), Some(residual)) => Some((residual + update)?),
            (update, residual) => update.or_else(|| residual.cloned()),
        };
        Ok(match added {
            None => y,
            Some(added) => (y + added)?,
        })
    }

    /// The values of A and B of a part that is adapted, and its scaling.
    fn matrices(&self, part: &Part) -> Result<Option<(&Tensor, &Tensor, f32)>> {
        let leaf = |index: usize| self.prepared.leaves.get(index).map(Var::as_tensor);
        match part.adapter {
            None => Ok(None),
            Some((index, scaling)) => match (leaf(index), leaf(index + 1)) {
                (Some(a), Some(b)) => Ok(Some((a, b, scaling))),
                _ => Err(Error::Shape { op: "low-rank update", reason: format!("no parameter {index}") }),
            },
        }
    }

    /// Which inputs are dropped at the `k`-th projection of a site.
    fn dropped(&self, seed: u64, k: usize) -> u64 {
        self.regularization.seed.wrapping_add((seed + k as u64 + 1) << 40)
    }

    /// The layer and its updates as one operation, so that no more than its result is kept for the backward pass.
    fn adapted(&self, site: &Site, weight: &FrozenWeight, h: &Tensor, seed: u64) -> Result<Tensor> {
        let (mut a, mut b, mut updates) = (Vec::new(), Vec::new(), Vec::new());
        let mut first_row = 0;
        for (k, part) in site.parts.iter().enumerate() {
            if let Some((part_a, part_b, scaling)) = self.matrices(part)? {
                let (rows, rank) = (part.rows, part_a.dim(0)?);
                updates.push(Update { first_row, rows, rank, scaling, seed: self.dropped(seed, k) });
                a.push(part_a);
                b.push(part_b.flatten_all()?);
            }
            first_row += part.rows;
        }
        let (a, b) = (Tensor::cat(&a, 0)?, Tensor::cat(&b, 0)?);
        let dropout = self.regularization.dropout;
        Ok(grad::adapted_linear(&self.backend, weight, h, (&a, &b), &updates, dropout)?)
    }

    fn update(&self, site: &Site, h: &Tensor, seed: u64) -> Result<Option<Tensor>> {
        if site.parts.iter().all(|part| part.adapter.is_none()) {
            return Ok(None);
        }
        let part = |(k, part): (usize, &Part)| -> Result<Tensor> {
            let Some((a, b, scaling)) = self.matrices(part)? else {
                return Ok(Tensor::zeros((h.dim(0)?, part.rows), DType::F32, h.device())?);
            };
            let dropped = grad::dropout(h, self.regularization.dropout, self.dropped(seed, k))?;
            Ok(grad::low_rank(&self.backend, &dropped, a, b, scaling)?)
        };
        let mut parts = site.parts.iter().enumerate().map(part).collect::<Result<Vec<_>>>()?;
        Ok(match parts.len() {
            1 => parts.pop(),
            _ => Some(Tensor::cat(&parts, 1)?),
        })
    }
}

impl Trainable for LoraModel {
    type Prepared<'a> = LoraPrepared<'a>;

    /// The base is quantised as it is; `lambda` changes nothing.
    fn prepare<'a>(&'a self, parameters: &Parameters, _lambda: f32) -> Result<LoraPrepared<'a>> {
        Self::prepare(self, parameters)
    }

    fn loss(prepared: &LoraPrepared<'_>, batch: &Batch, regularization: Regularization) -> Result<Tensor> {
        prepared.loss(batch, regularization)
    }

    fn gradients(prepared: &LoraPrepared<'_>, store: GradStore) -> Result<Vec<Tensor>> {
        prepared.gradients(store)
    }

    fn by_parameter(_: &LoraPrepared<'_>, gradients: &[Tensor], parameters: &Parameters) -> Result<Vec<Tensor>> {
        match gradients.len() == parameters.list().len() {
            true => Ok(gradients.to_vec()),
            false => Err(Error::Shape { op: "gradients", reason: "another number than parameters".into() }),
        }
    }
}
