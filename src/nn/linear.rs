//! Linear layers of a b1.58 decoder: ternary or left dense, alone or several over one input.

use super::{LowRank, RmsNorm};
use crate::backend::cpu::Gate;
use crate::backend::{Backend, DenseWeight, TernaryWeight};
use crate::ops::{self, Quantized};
use crate::ternary::PackedTernary;
use crate::{Error, Result};
use candle_core::{D, Tensor};

/// The weight of one linear layer, before it is packed.
#[derive(Debug)]
pub enum LinearWeight {
    /// Ternary codes.
    Ternary(PackedTernary),
    /// The weight of a layer that was never converted.
    Dense(DenseWeight),
}

/// What one linear layer is made of.
#[derive(Debug)]
pub struct LinearParts {
    /// Its weight.
    pub weight: LinearWeight,
    /// BitLinear's own norm before the quantiser (`use_rms_norm`).
    pub norm: Option<RmsNorm>,
}

#[derive(Debug)]
enum Weight {
    Ternary(TernaryWeight),
    Dense(DenseWeight),
}

/// One linear layer with its own activation quantiser.
#[derive(Debug)]
pub struct Linear {
    weight: Weight,
    norm: Option<RmsNorm>,
    adapter: Option<LowRank>,
}

impl Linear {
    /// Packs the weight for the backend's kernel.
    ///
    /// # Errors
    /// As [`Backend::pack`].
    pub fn new(backend: &Backend, parts: LinearParts) -> Result<Self> {
        let weight = match parts.weight {
            LinearWeight::Ternary(ternary) => Weight::Ternary(backend.pack(&[ternary])?),
            LinearWeight::Dense(dense) => Weight::Dense(dense),
        };
        Ok(Self { weight, norm: parts.norm, adapter: None })
    }

    /// Adds a low-rank update of the layer's input, which is that before its own norm.
    ///
    /// # Errors
    /// [`Error::Shape`] for an update of another shape.
    pub fn with_adapter(self, adapter: Option<LowRank>) -> Result<Self> {
        let (rows, cols) = match &self.weight {
            Weight::Ternary(w) => (w.rows(), w.cols()),
            Weight::Dense(w) => (w.rows(), w.cols()),
        };
        adapter.iter().try_for_each(|a| a.check(rows, cols))?;
        Ok(Self { adapter, ..self })
    }

    /// `W · quantise(norms(x))`, plus the adapter's update, plus `residual`: f32 `[tokens, rows]`. `norm` comes before
    /// the layer's own.
    ///
    /// # Errors
    /// Of candle, if shapes or types do not fit.
    pub fn forward(
        &self,
        backend: &Backend,
        x: &Tensor,
        norm: Option<&RmsNorm>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Some(adapter) = &self.adapter else { return self.base(backend, x, norm, residual) };
        let normed = norm.map(|n| n.forward(backend, x)).transpose()?;
        let h = normed.as_ref().unwrap_or(x);
        // The update goes where the residual goes, so that the product stays one operation.
        let update = adapter.forward(backend, h, residual)?;
        self.base(backend, h, None, Some(&update))
    }

    /// [`Linear::forward`] without the adapter.
    fn base(&self, backend: &Backend, x: &Tensor, norm: Option<&RmsNorm>, residual: Option<&Tensor>) -> Result<Tensor> {
        let normed;
        let (x, last) = match (norm, &self.norm, &self.weight) {
            (Some(first), own @ Some(_), _) => {
                normed = first.forward(backend, x)?;
                (&normed, own.as_ref())
            }
            (first, own, _) => (x, first.or(own.as_ref())),
        };
        match &self.weight {
            Weight::Ternary(w) => {
                let q = match last {
                    None => ops::quantize(backend, x)?,
                    Some(n) => ops::norm_quantize(backend, x, n.weight(), n.eps())?,
                };
                ops::linear(backend, w, &q, residual)
            }
            Weight::Dense(w) => {
                let x = last.map_or_else(|| Ok(x.clone()), |n| n.forward(backend, x))?;
                let y = ops::dense_linear(backend, w, &x)?;
                Ok(match residual {
                    None => y,
                    Some(r) => (y + r)?,
                })
            }
        }
    }

    /// [`Linear::forward`] of `act(gate) · up`, from f32 `[tokens, gate | up]`.
    ///
    /// # Errors
    /// Of candle, if shapes or types do not fit.
    pub fn forward_gated(
        &self,
        backend: &Backend,
        gate: Gate,
        gate_up: &Tensor,
        norm: Option<&RmsNorm>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        match (&self.weight, norm, &self.norm) {
            (Weight::Ternary(w), norm, own) if self.adapter.is_none() && (norm.is_none() || own.is_none()) => {
                let norm = norm.or(own.as_ref()).map(|n| (n.weight(), n.eps()));
                let q = ops::gated_quantize(backend, gate, gate_up, norm)?;
                ops::linear(backend, w, &q, residual)
            }
            _ => self.forward(backend, &ops::gated(backend, gate, gate_up)?, norm, residual),
        }
    }

    /// Bytes that a decode step reads of the weight.
    pub fn bytes(&self) -> usize {
        match &self.weight {
            Weight::Ternary(w) => w.bytes(),
            Weight::Dense(w) => w.bytes(),
        }
    }

    /// The weight's stored bytes, where this machine's memory holds them.
    pub fn host_bytes(&self) -> Option<&[u8]> {
        match &self.weight {
            Weight::Ternary(w) => w.host_bytes(),
            Weight::Dense(w) => w.host_bytes(),
        }
    }

    /// The adapter.
    pub fn adapter(&self) -> Option<&LowRank> {
        self.adapter.as_ref()
    }

    /// Whether the weight is ternary.
    pub fn is_ternary(&self) -> bool {
        matches!(self.weight, Weight::Ternary(_))
    }
}

/// Several linear layers over one input (query, key and value; gate and up), as one operation where they are
/// all ternary and share their quantised input.
#[derive(Debug)]
pub enum LinearGroup {
    /// One packed weight, one quantised input, one dispatch.
    Stacked(TernaryWeight),
    /// The same, with adapters on some of the stacked layers.
    Adapted(TernaryWeight, Vec<Option<LowRank>>),
    /// Layers with their own norms, or dense ones.
    Separate(Vec<Linear>),
}

impl LinearGroup {
    /// Packs the weights for the backend's kernel.
    ///
    /// # Errors
    /// As [`Backend::pack`].
    pub fn new(backend: &Backend, parts: Vec<LinearParts>) -> Result<Self> {
        if parts.is_empty() {
            return Err(Error::Shape { op: "linear group", reason: "no layers".into() });
        }
        let shared = |p: &LinearParts| p.norm.is_none() && matches!(p.weight, LinearWeight::Ternary(_));
        if !parts.iter().all(shared) {
            let layers = parts.into_iter().map(|p| Linear::new(backend, p));
            return Ok(Self::Separate(layers.collect::<Result<_>>()?));
        }
        let ternary = |p: LinearParts| match p.weight {
            LinearWeight::Ternary(w) => Some(w),
            LinearWeight::Dense(_) => None,
        };
        let ternary: Vec<PackedTernary> = parts.into_iter().filter_map(ternary).collect();
        Ok(Self::Stacked(backend.pack(&ternary)?))
    }

    /// Adds low-rank updates to the layers, in their order.
    ///
    /// # Errors
    /// [`Error::Shape`] for an update of another shape than its layer, or another number of them.
    pub fn with_adapters(self, adapters: Vec<Option<LowRank>>) -> Result<Self> {
        let layers = match &self {
            Self::Stacked(w) | Self::Adapted(w, _) => w.segments().len(),
            Self::Separate(layers) => layers.len(),
        };
        if adapters.len() != layers {
            let reason = format!("{} adapters for {layers} layers", adapters.len());
            return Err(Error::Shape { op: "linear group", reason });
        }
        match self {
            Self::Separate(layers) => {
                let layers = layers.into_iter().zip(adapters).map(|(l, a)| l.with_adapter(a));
                Ok(Self::Separate(layers.collect::<Result<_>>()?))
            }
            Self::Stacked(w) | Self::Adapted(w, _) => {
                let mut pairs = adapters.iter().zip(w.segments());
                pairs.try_for_each(|(a, s)| a.iter().try_for_each(|a| a.check(s.rows, w.cols())))?;
                Ok(if adapters.iter().all(Option::is_none) { Self::Stacked(w) } else { Self::Adapted(w, adapters) })
            }
        }
    }

    /// All outputs side by side, f32 `[tokens, Σ rows]`, of the normalised f32 `x` `[tokens, cols]`.
    ///
    /// # Errors
    /// Of candle, if shapes or types do not fit.
    pub fn forward(&self, backend: &Backend, x: &Tensor, norm: &RmsNorm) -> Result<Tensor> {
        match self {
            Self::Stacked(weight) => {
                let q: Quantized = ops::norm_quantize(backend, x, norm.weight(), norm.eps())?;
                ops::linear(backend, weight, &q, None)
            }
            Self::Adapted(weight, adapters) => {
                // The adapters need the input that the fused step would not leave behind.
                let h = norm.forward(backend, x)?;
                let mut updates = Vec::with_capacity(adapters.len());
                let mut first = 0;
                for (adapter, segment) in adapters.iter().zip(weight.segments()) {
                    updates.extend(adapter.iter().map(|a| (first, a.weight())));
                    first += segment.rows;
                }
                let updates = ops::low_rank(backend, &updates, &h, None, weight.rows())?;
                ops::linear(backend, weight, &ops::quantize(backend, &h)?, Some(&updates))
            }
            Self::Separate(layers) => {
                let x = norm.forward(backend, x)?;
                let parts: Result<Vec<_>> = layers.iter().map(|l| l.forward(backend, &x, None, None)).collect();
                Ok(Tensor::cat(&parts?, D::Minus1)?)
            }
        }
    }

    /// The adapters that there are.
    pub fn adapters(&self) -> Vec<&LowRank> {
        match self {
            Self::Stacked(_) => Vec::new(),
            Self::Adapted(_, adapters) => adapters.iter().flatten().collect(),
            Self::Separate(layers) => layers.iter().filter_map(Linear::adapter).collect(),
        }
    }

    /// The weights' stored bytes, where this machine's memory holds them.
    pub fn host_bytes(&self) -> Vec<&[u8]> {
        match self {
            Self::Stacked(w) | Self::Adapted(w, _) => w.host_bytes().into_iter().collect(),
            Self::Separate(layers) => layers.iter().filter_map(Linear::host_bytes).collect(),
        }
    }

    /// Bytes that a decode step reads of the weights: ternary, dense.
    pub fn bytes(&self) -> (usize, usize) {
        match self {
            Self::Stacked(w) | Self::Adapted(w, _) => (w.bytes(), 0),
            Self::Separate(layers) => layers.iter().fold((0, 0), |(ternary, dense), l| {
                if l.is_ternary() { (ternary + l.bytes(), dense) } else { (ternary, dense + l.bytes()) }
            }),
        }
    }
}
