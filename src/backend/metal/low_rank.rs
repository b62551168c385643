//! Low-rank updates on the device.

use super::dense::MetalDense;
use super::{Metal, MetalBuffer, MetalSlice};
use crate::Result;
use crate::backend::DenseType;
use crate::backend::gpu::dense::Columns;
use crate::backend::gpu::low_rank::{self, LowRank};

/// A low-rank update of a weight `[rows, cols]`, the scaling in B.
pub type MetalLowRank = LowRank<MetalBuffer<u8>>;

impl MetalLowRank {
    /// Takes row-major A `[rank, cols]` and B `[rows, rank]`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if `a` or `b` is not a matrix with `rank` rows or columns, or `cols` is no multiple of 4,
    /// [`crate::Error::Unavailable`] if memory is short.
    pub fn pack(metal: &Metal, rank: usize, a: &[f32], b: &[f32], scaling: f32) -> Result<Self> {
        let filled = |rows, cols, fill: &dyn Fn(&mut [u8])| MetalDense::filled(metal, DenseType::F32, rows, cols, fill);
        Self::of(rank, (a, b), scaling, filled, |_| Ok(()))
    }
}

impl Metal {
    /// Adds low-rank updates of f32 `x` `[tokens, cols]` to f32 `out` `[tokens, stride]`, each to the columns from the one
    /// on that stands beside it; they are in order and do not overlap.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for operands that do not fit, [`crate::Error::Device`] for what fails on the device.
    pub fn low_rank(
        &self,
        updates: &[(usize, &MetalLowRank)],
        x: MetalSlice<'_>,
        stride: usize,
        out: MetalSlice<'_>,
    ) -> Result<()> {
        const OP: &str = "low-rank update";
        let tokens = low_rank::tokens(updates, x.len(), stride, out.len())?;
        let scratch = &mut *self.scratch();
        for (at, w) in updates {
            let width = w.a.rows();
            let inner = scratch.inner.first(self, tokens * width, "an adapter's inner vectors")?;
            let columns = Columns { to: inner, stride: width, add: false };
            self.dense_columns(OP, &w.a, x, tokens, &mut scratch.columns, columns)?;
            let columns = Columns { to: out.slice(*at..), stride, add: true };
            self.dense_columns(OP, &w.b, inner, tokens, &mut scratch.columns, columns)?;
        }
        Ok(())
    }
}
