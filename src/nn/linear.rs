//! Linear layers of a b1.58 decoder: ternary or left dense, alone or several over one input.

use super::RmsNorm;
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
        Ok(Self { weight, norm: parts.norm })
    }

    /// `W · quantise(norms(x))`, plus `residual`: f32 `[tokens, rows]`. `norm` comes before the layer's own.
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
            (Weight::Ternary(w), norm, own) if norm.is_none() || own.is_none() => {
                let norm = norm.or(own.as_ref()).map(|n| (n.weight(), n.eps()));
                let q = ops::gated_quantize(backend, gate, gate_up, norm)?;
                ops::linear(backend, w, &q, residual)
            }
            _ => self.forward(backend, &ops::gated(backend, gate, gate_up)?, norm, residual),
        }
    }

    /// Bytes that a decode step reads.
    pub fn bytes(&self) -> usize {
        match &self.weight {
            Weight::Ternary(w) => w.bytes(),
            Weight::Dense(w) => w.bytes(),
        }
    }

    /// The stored bytes, where this machine's memory holds them.
    pub fn host_bytes(&self) -> Option<&[u8]> {
        match &self.weight {
            Weight::Ternary(w) => w.host_bytes(),
            Weight::Dense(w) => w.host_bytes(),
        }
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
            Self::Separate(layers) => {
                let x = norm.forward(backend, x)?;
                let parts: Result<Vec<_>> = layers.iter().map(|l| l.forward(backend, &x, None, None)).collect();
                Ok(Tensor::cat(&parts?, D::Minus1)?)
            }
        }
    }

    /// The stored bytes, where this machine's memory holds them.
    pub fn host_bytes(&self) -> Vec<&[u8]> {
        match self {
            Self::Stacked(w) => w.host_bytes().into_iter().collect(),
            Self::Separate(layers) => layers.iter().filter_map(Linear::host_bytes).collect(),
        }
    }

    /// Bytes that a decode step reads: ternary, dense.
    pub fn bytes(&self) -> (usize, usize) {
        match self {
            Self::Stacked(w) => (w.bytes(), 0),
            Self::Separate(layers) => layers.iter().fold((0, 0), |(ternary, dense), l| {
                if l.is_ternary() { (ternary + l.bytes(), dense) } else { (ternary, dense + l.bytes()) }
            }),
        }
    }
}
