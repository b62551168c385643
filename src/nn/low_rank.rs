//! LoRA's update of a linear layer (Hu et al., 2021), kept beside the weight and not merged into it.

use crate::backend::{Backend, LowRankWeight};
use crate::{Error, Result, ops};
use candle_core::Tensor;

/// `scaling · B · (A · h)`, with A `[rank, cols]` and B `[rows, rank]` in f32.
///
/// `h` is the layer's own input before its activations are quantised, as PEFT wraps a module: nothing of the update
/// is quantised. A token's update does not depend on what is computed with it, nor on threads or kernel.
#[derive(Debug)]
pub struct LowRank {
    weight: LowRankWeight,
}

impl LowRank {
    /// An update with row-major A `[rank, cols]` and B `[rows, rank]`.
    ///
    /// # Errors
    /// As [`Backend::low_rank`].
    pub fn new(backend: &Backend, rank: usize, a: &[f32], b: &[f32], scaling: f32) -> Result<Self> {
        Ok(Self { weight: backend.low_rank(rank, a, b, scaling)? })
    }

    /// The matrices.
    pub fn weight(&self) -> &LowRankWeight {
        &self.weight
    }

    /// Adds the update of f32 `h` `[tokens, cols]` to `rows` columns of f32 `out` `[tokens, width]`.
    ///
    /// # Errors
    /// As [`ops::low_rank`].
    pub fn add_to(&self, backend: &Backend, h: &Tensor, out: &Tensor, first_column: usize) -> Result<()> {
        ops::low_rank(backend, &[(first_column, &self.weight)], h, out)
    }

    /// Refuses an update for a layer of another shape.
    pub(super) fn check(&self, rows: usize, cols: usize) -> Result<()> {
        let own = (self.weight.rows(), self.weight.cols());
        if own == (rows, cols) {
            return Ok(());
        }
        let reason = format!("of [{}, {}] for a layer of [{rows}, {cols}]", own.0, own.1);
        Err(Error::Shape { op: "low-rank update", reason })
    }
}
