//! Rows of an embedding and of other tensors.

use super::{contiguous, expect, matrix, metal_fwd, or_emulated_metal, output, shape_error};
#[cfg(feature = "cuda")]
use super::{gpu, gpu_output};
#[cfg(feature = "metal")]
use crate::backend::metal::MetalSlice;
use crate::backend::{Backend, Batch, DenseWeight};
use crate::{Error, Result};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Tensor};

/// The batch's rows of an embedding, widened: replaces f32 `out` `[tokens, cols]`.
///
/// # Errors
/// [`Error::Request`] for an id outside the vocabulary, [`Error::Shape`] for an output that does not fit.
pub fn embed(backend: &Backend, weight: &DenseWeight, batch: &Batch, out: &Tensor) -> Result<()> {
    expect(Embed::NAME, "output", out, batch.len(), weight.cols())?;
    if let Some(id) = batch.ids().iter().find(|id| **id as usize >= weight.rows()) {
        return Err(Error::request("token id", format!("{id} is outside the vocabulary of {}", weight.rows())));
    }
    Ok(out.inplace_op1(&Embed { backend, weight, batch })?)
}

/// Rows `rows` of f32 `x` `[tokens, cols]`: replaces `out` `[rows, cols]`.
///
/// # Errors
/// [`Error::Shape`] for operands that do not fit or a row that does not exist; of candle, if `out` shares its storage with
/// `x`.
pub fn select_rows(backend: &Backend, x: &Tensor, rows: &[u32], out: &Tensor) -> Result<()> {
    const NAME: &str = SelectRows::NAME;
    let (tokens, cols) = matrix(NAME, "input", x)?;
    expect(NAME, "output", out, rows.len(), cols)?;
    if let Some(row) = rows.iter().find(|row| **row as usize >= tokens) {
        return Err(shape_error(NAME, format!("row {row} of [{tokens}, {cols}]")));
    }
    Ok(out.inplace_op2(x, &SelectRows { backend, rows, cols })?)
}

struct Embed<'a> {
    backend: &'a Backend,
    weight: &'a DenseWeight,
    batch: &'a Batch,
}

impl Embed<'_> {
    const NAME: &'static str = "embed";

    #[cfg(feature = "metal")]
    fn metal(&self, out: MetalSlice<'_>, (): ()) -> candle_core::Result<()> {
        Ok(self.backend.metal()?.embed(self.weight.metal()?, self.batch.metal()?, out)?)
    }
}

impl InplaceOp1 for Embed<'_> {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, lo: &Layout) -> candle_core::Result<()> {
        or_emulated_metal!(self, out lo);
        let row = || self.weight.bytes() / self.weight.rows().max(1);
        let _timer = self.backend.timed(Self::NAME, || (None, self.batch.len() * row()));
        Ok(self.backend.cpu().embed(self.weight.cpu()?, self.batch.ids(), output(out, lo)?)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, out: &mut CudaStorage, lo: &Layout) -> candle_core::Result<()> {
        Ok(self.backend.cuda()?.embed(self.weight.cuda()?, self.batch.cuda()?, &mut gpu_output(out, lo)?)?)
    }

    metal_fwd!();
}

struct SelectRows<'a> {
    backend: &'a Backend,
    rows: &'a [u32],
    cols: usize,
}

impl SelectRows<'_> {
    const NAME: &'static str = "select-rows";

    #[cfg(feature = "metal")]
    fn metal(&self, out: MetalSlice<'_>, (x,): (MetalSlice<'_>,)) -> candle_core::Result<()> {
        Ok(self.backend.metal()?.select_rows(x, self.cols, self.rows, out)?)
    }
}

impl InplaceOp2 for SelectRows<'_> {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, lo: &Layout, x: &CpuStorage, lx: &Layout) -> candle_core::Result<()> {
        or_emulated_metal!(self, out lo, x lx);
        let _timer = self.backend.timed(Self::NAME, || (None, 0));
        Ok(self.backend.cpu().select_rows(contiguous(x, lx)?, self.cols, self.rows, output(out, lo)?)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, out: &mut CudaStorage, lo: &Layout, x: &CudaStorage, lx: &Layout) -> candle_core::Result<()> {
        let (x, mut out) = (gpu(x, lx)?, gpu_output(out, lo)?);
        Ok(self.backend.cuda()?.select_rows(&x, self.cols, self.rows, &mut out)?)
    }

    metal_fwd!(x lx);
}
