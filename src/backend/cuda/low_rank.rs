//! Low-rank updates in device memory.

use super::dense::CudaDense;
use super::{Cuda, CudaSlice, CudaView, CudaViewMut};
use crate::Result;
use crate::backend::DenseType;
use crate::backend::gpu::dense::Columns;
use crate::backend::gpu::low_rank::{self, LowRank};

/// A low-rank update of a weight `[rows, cols]` in device memory, with the scaling once for each row: the product is multiplied
/// by it as it is stored.
pub type CudaLowRank = LowRank<CudaSlice<u8>, CudaSlice<f32>>;

impl CudaLowRank {
    /// Uploads row-major A `[rank, cols]` and B `[rows, rank]`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if `a` or `b` is not a matrix with `rank` rows or columns, or `cols` is no multiple of 4,
    /// [`crate::Error::Unavailable`] if memory is short.
    pub fn pack(cuda: &Cuda, rank: usize, a: &[f32], b: &[f32], scaling: f32) -> Result<Self> {
        let filled = |rows, cols, fill: &dyn Fn(&mut [u8])| CudaDense::filled(cuda, DenseType::F32, rows, cols, fill);
        let scaling = |rows| cuda.upload(&vec![scaling; rows], "an adapter's scaling");
        Self::of(rank, (a, b), 1.0, filled, scaling)
    }
}

impl Cuda {
    /// Adds low-rank updates of f32 `x` `[tokens, cols]` to f32 `out` `[tokens, stride]`, each to the columns from the one
    /// on that stands beside it; they are in order and do not overlap.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for operands that do not fit, [`crate::Error::Device`] for what fails on the device.
    pub fn low_rank(
        &self,
        updates: &[(usize, &CudaLowRank)],
        x: &CudaView<'_, f32>,
        stride: usize,
        out: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        const OP: &str = "low-rank update";
        let tokens = low_rank::tokens(updates, x.len(), stride, out.len())?;
        let (x, out) = (self.read(x), self.write(out));
        let scratch = &mut *self.scratch();
        for (at, w) in updates {
            let width = w.a.rows();
            let inner = scratch.inner.address(self, tokens * width, "an adapter's inner vectors")?;
            let columns = Columns { to: inner, stride: width, add: false };
            // SAFETY: x is [tokens, cols], and the scratch holds the [tokens, padded rank] of this product.
            unsafe { self.dense_columns(OP, &w.a, 0, x, tokens, &mut scratch.columns, columns) }?;
            let to = out + (at * size_of::<f32>()) as u64;
            let columns = Columns { to, stride, add: true };
            let scaling = self.read(&w.scaling);
            // SAFETY: the inner vectors of all tokens were just written, padding included; there is a scaling for each
            // row of B; its columns lie inside `out`'s rows, checked above.
            unsafe { self.dense_columns(OP, &w.b, scaling, inner, tokens, &mut scratch.columns, columns) }?;
        }
        Ok(())
    }
}
