//! Low-rank updates, LoRA's, beside quantised and dense linears.

use super::{Output, contiguous, matrix, metal_fwd, or_emulated_metal, output, shape_error};
#[cfg(feature = "cuda")]
use super::{gpu, gpu_output};
use crate::Result;
#[cfg(feature = "metal")]
use crate::backend::metal::MetalSlice;
use crate::backend::{Backend, LowRankWeight};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};

/// Adds each update of f32 `x` `[tokens, cols]` to the columns of f32 `out` `[tokens, width]` that begin where its number
/// says.
///
/// # Errors
/// [`crate::Error::Shape`] for updates that overlap, stand out of order, reach past `out` or read another number of columns;
/// of candle, if `out` shares its storage with `x`.
pub fn low_rank(backend: &Backend, updates: &[(usize, &LowRankWeight)], x: &Tensor, out: &Tensor) -> Result<()> {
    const NAME: &str = LowRank::NAME;
    let (tokens, cols) = matrix(NAME, "input", x)?;
    let width = Output::add_to(out).check(NAME, tokens, 0)?;
    let mut end = 0usize;
    for (at, update) in updates {
        if update.cols() != cols || *at < end || at.saturating_add(update.rows()) > width {
            let (rows, inputs) = (update.rows(), update.cols());
            let reason = format!("update [{rows}, {inputs}] at {at} of [{tokens}, {width}] for an input of {cols}");
            return Err(shape_error(NAME, reason));
        }
        end = at + update.rows();
    }
    Ok(out.inplace_op2(x, &LowRank { backend, updates, cols, width })?)
}

struct LowRank<'a> {
    backend: &'a Backend,
    updates: &'a [(usize, &'a LowRankWeight)],
    cols: usize,
    width: usize,
}

impl LowRank<'_> {
    const NAME: &'static str = "low-rank";

    #[cfg(feature = "metal")]
    fn metal(&self, out: MetalSlice<'_>, (x,): (MetalSlice<'_>,)) -> candle_core::Result<()> {
        let updates = self.updates.iter().map(|(at, w)| Ok((*at, w.metal()?))).collect::<Result<Vec<_>>>()?;
        Ok(self.backend.metal()?.low_rank(&updates, x, self.width, out)?)
    }
}

impl InplaceOp2 for LowRank<'_> {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, lo: &Layout, x: &CpuStorage, lx: &Layout) -> candle_core::Result<()> {
        or_emulated_metal!(self, out lo, x lx);
        let bytes = || self.updates.iter().map(|(_, w)| w.bytes()).sum();
        let _timer = self.backend.timed(Self::NAME, || (None, bytes()));
        let updates = self.updates.iter().map(|(at, w)| Ok((*at, w.cpu()?))).collect::<Result<Vec<_>>>()?;
        let (x, out) = (contiguous(x, lx)?, output(out, lo)?);
        Ok(self.backend.cpu().low_rank(&updates, x, self.cols, self.width, out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, out: &mut CudaStorage, lo: &Layout, x: &CudaStorage, lx: &Layout) -> candle_core::Result<()> {
        let updates = self.updates.iter().map(|(at, w)| Ok((*at, w.cuda()?))).collect::<Result<Vec<_>>>()?;
        let (x, mut out) = (gpu(x, lx)?, gpu_output(out, lo)?);
        Ok(self.backend.cuda()?.low_rank(&updates, &x, self.width, &mut out)?)
    }

    metal_fwd!(x lx);
}
