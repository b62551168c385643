//! Several linear layers over one input: query, key and value; gate and up.

use super::linear::update_and_base;
use super::{Linear, LinearParts, LinearWeight, LowRank, RmsNorm};
use crate::backend::cpu::Gate;
use crate::backend::{Arrangement, Backend, TernaryWeight};
use crate::ops::{self, Output};
use crate::ternary::PackedTernary;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// Several linear layers over one input, as one operation where they are all ternary and share their quantised input.
#[derive(Debug)]
pub enum LinearGroup {
    /// One packed weight, one quantised input, one dispatch.
    Stacked(TernaryWeight),
    /// Gate and up in one packed weight that gives their gated product.
    GateUp(TernaryWeight),
    /// One packed weight with adapters on some of the stacked layers.
    Adapted(TernaryWeight, Vec<Option<LowRank>>),
    /// Layers with their own norms, or dense ones.
    Separate(Vec<Linear>),
}

impl LinearGroup {
    /// Whether a forward pass makes no tensor of its own, so that a device can record it.
    pub(crate) fn is_plain(&self) -> bool {
        matches!(self, Self::Stacked(_) | Self::GateUp(_))
    }

    /// Packs the weights for the backend's kernel, one below the other.
    ///
    /// # Errors
    /// As [`Backend::pack`].
    pub fn new(backend: &Backend, parts: Vec<LinearParts>) -> Result<Self> {
        match Self::pack(backend, parts, Arrangement::Stacked)? {
            Packed::Together(weight) => Ok(Self::Stacked(weight)),
            Packed::Apart(layers) => Ok(Self::Separate(layers)),
        }
    }

    /// Packs gate and up for [`LinearGroup::forward_gated`], which then is one operation. Adapters need
    /// [`LinearGroup::new`]: they are added before the activation.
    ///
    /// # Errors
    /// As [`Backend::pack`].
    pub fn gate_up(backend: &Backend, parts: Vec<LinearParts>) -> Result<Self> {
        match Self::pack(backend, parts, Arrangement::GateUp)? {
            Packed::Together(weight) => Ok(Self::GateUp(weight)),
            Packed::Apart(layers) => Ok(Self::Separate(layers)),
        }
    }

    fn pack(backend: &Backend, parts: Vec<LinearParts>, arrangement: Arrangement) -> Result<Packed> {
        if parts.is_empty() {
            return Err(Error::Shape { op: "linear group", reason: "no layers".into() });
        }
        let shared = |p: &LinearParts| p.norm.is_none() && matches!(p.weight, LinearWeight::Ternary(_));
        if !parts.iter().all(shared) {
            let layers = parts.into_iter().map(|p| Linear::new(backend, p));
            return Ok(Packed::Apart(layers.collect::<Result<_>>()?));
        }
        let ternary = |p: LinearParts| match p.weight {
            LinearWeight::Ternary(w) => Some(w),
            LinearWeight::Dense(_) => None,
        };
        let ternary: Vec<PackedTernary> = parts.into_iter().filter_map(ternary).collect();
        Ok(Packed::Together(backend.pack(&ternary, arrangement)?))
    }

    /// Adds low-rank updates to the layers, in their order.
    ///
    /// # Errors
    /// [`Error::Shape`] for an update of another shape than its layer, another number of them, or any of a
    /// [`LinearGroup::GateUp`].
    pub fn with_adapters(self, adapters: Vec<Option<LowRank>>) -> Result<Self> {
        let refuse = |reason| Err(Error::Shape { op: "linear group", reason });
        let layers = match &self {
            Self::Stacked(w) | Self::GateUp(w) | Self::Adapted(w, _) => w.segments().len(),
            Self::Separate(layers) => layers.len(),
        };
        if adapters.len() != layers {
            return refuse(format!("{} adapters for {layers} layers", adapters.len()));
        }
        match self {
            Self::Separate(layers) => {
                let layers = layers.into_iter().zip(adapters).map(|(l, a)| l.with_adapter(a));
                Ok(Self::Separate(layers.collect::<Result<_>>()?))
            }
            group if adapters.iter().all(Option::is_none) => match group {
                Self::Adapted(w, _) => Ok(Self::Stacked(w)),
                group => Ok(group),
            },
            Self::GateUp(_) => refuse("gate and up packed for their gated product take no adapters".into()),
            Self::Stacked(w) | Self::Adapted(w, _) => {
                let mut pairs = adapters.iter().zip(w.segments());
                pairs.try_for_each(|(a, s)| a.iter().try_for_each(|a| a.check(s.rows, w.cols())))?;
                Ok(Self::Adapted(w, adapters))
            }
        }
    }

    /// Output features of all layers.
    pub fn rows(&self) -> usize {
        match self {
            Self::Stacked(w) | Self::GateUp(w) | Self::Adapted(w, _) => w.rows(),
            Self::Separate(layers) => layers.iter().map(Linear::rows).sum(),
        }
    }

    /// All outputs side by side, `Σ rows` columns, of the normalised f32 `x` `[tokens, cols]`.
    ///
    /// # Errors
    /// As [`ops::norm_linear`]: also for a [`LinearGroup::GateUp`], whose outputs are never apart.
    pub fn forward(&self, backend: &Backend, x: &Tensor, norm: &RmsNorm, out: Output<'_>) -> Result<()> {
        match self {
            Self::Stacked(weight) | Self::GateUp(weight) => {
                ops::norm_linear(backend, weight, x, Some(norm.parts()), out)
            }
            Self::Adapted(weight, adapters) => {
                // The adapters need the input that the fused step would not leave behind.
                let h = norm.normalised(backend, x)?;
                let pairs = adapters.iter().zip(weight.segments());
                let at = |row: usize| out.first_column.saturating_add(row);
                let updates: Vec<_> =
                    pairs.filter_map(|(a, s)| a.as_ref().map(|a| (at(s.first_row), a.weight()))).collect();
                let update = || ops::low_rank(backend, &updates, &h, out.tensor);
                update_and_base(out, update, || ops::norm_linear(backend, weight, &h, None, out))
            }
            Self::Separate(layers) => {
                let x = norm.normalised(backend, x)?;
                let mut first = 0;
                for layer in layers {
                    layer.forward(backend, &x, None, out.skip(first))?;
                    first += layer.rows();
                }
                Ok(())
            }
        }
    }

    /// `act(gate) · up` of the normalised f32 `x` `[tokens, cols]`, where the group is gate and up: replaces f32 `out`
    /// `[tokens, rows / 2]`.
    ///
    /// # Errors
    /// As [`ops::gated_linear`].
    pub fn forward_gated(&self, backend: &Backend, gate: Gate, x: &Tensor, norm: &RmsNorm, out: &Tensor) -> Result<()> {
        if let Self::GateUp(weight) = self {
            return ops::gated_linear(backend, gate, weight, x, Some(norm.parts()), out);
        }
        let gate_up = Tensor::zeros((x.dim(0)?, self.rows()), DType::F32, x.device())?;
        self.forward(backend, x, norm, Output::replace(&gate_up))?;
        ops::gated(backend, gate, &gate_up, out)
    }

    /// The adapters that there are.
    pub fn adapters(&self) -> Vec<&LowRank> {
        match self {
            Self::Stacked(_) | Self::GateUp(_) => Vec::new(),
            Self::Adapted(_, adapters) => adapters.iter().flatten().collect(),
            Self::Separate(layers) => layers.iter().filter_map(Linear::adapter).collect(),
        }
    }

    /// The weights' stored bytes, where this machine's memory holds them.
    pub fn host_bytes(&self) -> Vec<&[u8]> {
        match self {
            Self::Stacked(w) | Self::GateUp(w) | Self::Adapted(w, _) => w.host_bytes().into_iter().collect(),
            Self::Separate(layers) => layers.iter().filter_map(Linear::host_bytes).collect(),
        }
    }

    /// Bytes that a decode step reads of the weights: ternary, dense.
    pub fn bytes(&self) -> (usize, usize) {
        match self {
            Self::Stacked(w) | Self::GateUp(w) | Self::Adapted(w, _) => (w.bytes(), 0),
            Self::Separate(layers) => layers.iter().fold((0, 0), |(ternary, dense), l| {
                if l.is_ternary() { (ternary + l.bytes(), dense) } else { (ternary, dense + l.bytes()) }
            }),
        }
    }
}

/// Weights that share their input, as far as they can be packed together.
enum Packed {
    Together(TernaryWeight),
    Apart(Vec<Linear>),
}
