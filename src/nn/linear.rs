//! A linear layer of a b1.58 decoder: ternary or left dense.

use super::{LowRank, RmsNorm};
use crate::Result;
use crate::backend::{Arrangement, Backend, DenseWeight, TernaryWeight};
use crate::ops::{self, Output};
use crate::ternary::PackedTernary;
use candle_core::Tensor;

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
            LinearWeight::Ternary(ternary) => Weight::Ternary(backend.pack(&[ternary], Arrangement::Stacked)?),
            LinearWeight::Dense(dense) => Weight::Dense(dense),
        };
        Ok(Self { weight, norm: parts.norm, adapter: None })
    }

    /// Adds a low-rank update of the layer's input, which is that before its own norm.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for an update of another shape.
    pub fn with_adapter(self, adapter: Option<LowRank>) -> Result<Self> {
        let (rows, cols) = match &self.weight {
            Weight::Ternary(w) => (w.rows(), w.cols()),
            Weight::Dense(w) => (w.rows(), w.cols()),
        };
        adapter.iter().try_for_each(|a| a.check(rows, cols))?;
        Ok(Self { adapter, ..self })
    }

    /// `W · quantise(norms(x))` of f32 `x` `[tokens, cols]`, plus the adapter's update. `norm` comes before the layer's own.
    ///
    /// A residual stream that is added to gets the update first and then the product.
    ///
    /// # Errors
    /// As [`ops::norm_linear`].
    pub fn forward(&self, backend: &Backend, x: &Tensor, norm: Option<&RmsNorm>, out: Output<'_>) -> Result<()> {
        let Some(adapter) = &self.adapter else { return self.base(backend, x, norm, out) };
        let normed = norm.map(|n| n.normalised(backend, x)).transpose()?;
        let h = normed.as_ref().unwrap_or(x);
        let update = || adapter.add_to(backend, h, out.tensor, out.first_column);
        update_and_base(out, update, || self.base(backend, h, None, out))
    }

    /// [`Linear::forward`] without the adapter.
    fn base(&self, backend: &Backend, x: &Tensor, norm: Option<&RmsNorm>, out: Output<'_>) -> Result<()> {
        let normed;
        let (x, last) = match (norm, &self.norm) {
            (Some(first), own @ Some(_)) => {
                normed = first.normalised(backend, x)?;
                (&normed, own.as_ref())
            }
            (first, own) => (x, first.or(own.as_ref())),
        };
        match (&self.weight, last) {
            (Weight::Ternary(w), last) => ops::norm_linear(backend, w, x, last.map(RmsNorm::parts), out),
            (Weight::Dense(w), None) => ops::dense_linear(backend, w, x, out),
            (Weight::Dense(w), Some(last)) => ops::dense_linear(backend, w, &last.normalised(backend, x)?, out),
        }
    }

    /// Bytes that a decode step reads of the weight.
    pub fn bytes(&self) -> usize {
        match &self.weight {
            Weight::Ternary(w) => w.bytes(),
            Weight::Dense(w) => w.bytes(),
        }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        match &self.weight {
            Weight::Ternary(w) => w.rows(),
            Weight::Dense(w) => w.rows(),
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

    /// Whether a forward pass makes no tensor of its own, so that a device can record it.
    pub(crate) fn is_plain(&self) -> bool {
        self.is_ternary() && self.norm.is_none() && self.adapter.is_none()
    }

    /// Whether the weight is ternary.
    pub fn is_ternary(&self) -> bool {
        matches!(self.weight, Weight::Ternary(_))
    }
}

/// Both parts of an adapted layer, in the order in which they are summed: what is added to gets the update first, what is
/// replaced gets the product first.
pub(super) fn update_and_base(
    out: Output<'_>,
    update: impl FnOnce() -> Result<()>,
    base: impl FnOnce() -> Result<()>,
) -> Result<()> {
    if out.add {
        update()?;
        return base();
    }
    base()?;
    update()
}
