//! Products with dense weights.

use super::{Output, contiguous, matrix, metal_fwd, or_emulated_metal, output, shape_error};
#[cfg(feature = "cuda")]
use super::{gpu, gpu_output};
use crate::Result;
use crate::backend::cpu::OutputColumns;
#[cfg(feature = "metal")]
use crate::backend::metal::MetalSlice;
use crate::backend::{Backend, DenseWeight};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};

/// `y = x Wᵀ` in f32 for f32 `x` `[tokens, cols]` and a weight `[rows, cols]` in its stored type.
///
/// # Errors
/// [`crate::Error::Shape`] for operands that do not fit; of candle, if `out` shares its storage with `x`.
pub fn dense_linear(backend: &Backend, weight: &DenseWeight, x: &Tensor, out: Output<'_>) -> Result<()> {
    const NAME: &str = DenseLinear::NAME;
    let (tokens, cols) = matrix(NAME, "input", x)?;
    if cols != weight.cols() {
        let reason = format!("input [{tokens}, {cols}] for a weight of {} input features", weight.cols());
        return Err(shape_error(NAME, reason));
    }
    let width = out.check(NAME, tokens, weight.rows())?;
    let Output { tensor, first_column, add } = out;
    Ok(tensor.inplace_op2(x, &DenseLinear { backend, weight, width, first_column, add })?)
}

struct DenseLinear<'a> {
    backend: &'a Backend,
    weight: &'a DenseWeight,
    width: usize,
    first_column: usize,
    add: bool,
}

impl DenseLinear<'_> {
    const NAME: &'static str = "dense-linear";

    #[cfg(feature = "metal")]
    fn metal(&self, out: MetalSlice<'_>, (x,): (MetalSlice<'_>,)) -> candle_core::Result<()> {
        let (metal, weight) = (self.backend.metal()?, self.weight.metal()?);
        Ok(metal.dense_linear(weight, x, out, self.first_column, self.width, self.add)?)
    }
}

impl InplaceOp2 for DenseLinear<'_> {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, lo: &Layout, x: &CpuStorage, lx: &Layout) -> candle_core::Result<()> {
        or_emulated_metal!(self, out lo, x lx);
        let about = || (Some((self.weight.rows(), self.weight.cols())), self.weight.bytes());
        let _timer = self.backend.timed(Self::NAME, about);
        let values = output(out, lo)?;
        let out = OutputColumns { values, width: self.width, first: self.first_column, add: self.add };
        Ok(self.backend.cpu().dense_linear(self.weight.cpu()?, contiguous(x, lx)?, out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, out: &mut CudaStorage, lo: &Layout, x: &CudaStorage, lx: &Layout) -> candle_core::Result<()> {
        let (cuda, x, mut out) = (self.backend.cuda()?, gpu(x, lx)?, gpu_output(out, lo)?);
        Ok(cuda.dense_linear(self.weight.cuda()?, &x, &mut out, self.first_column, self.width, self.add)?)
    }

    metal_fwd!(x lx);
}
