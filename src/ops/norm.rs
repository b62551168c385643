//! RMSNorm and gated activations in f32, for what stands before a weight that is not ternary.

use super::{contiguous, expect, expect_norm, matrix, metal_fwd, or_emulated_metal, output};
#[cfg(feature = "cuda")]
use super::{gpu, gpu_output};
use crate::Result;
use crate::backend::Backend;
use crate::backend::cpu::Gate;
#[cfg(feature = "metal")]
use crate::backend::metal::MetalSlice;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Tensor};

/// `weight · x / sqrt(mean(x²) + eps)` for each token of f32 `x` `[tokens, cols]`: replaces `out`, of the same shape.
///
/// # Errors
/// [`crate::Error::Shape`] for operands that do not fit; of candle, if `out` shares its storage with another.
pub fn rms_norm(backend: &Backend, x: &Tensor, weight: &Tensor, eps: f32, out: &Tensor) -> Result<()> {
    const NAME: &str = RmsNorm::NAME;
    let (tokens, cols) = matrix(NAME, "input", x)?;
    expect_norm(NAME, weight, cols)?;
    expect(NAME, "output", out, tokens, cols)?;
    Ok(out.inplace_op3(x, weight, &RmsNorm { backend, eps })?)
}

/// `act(gate) · up` of f32 `gate_up` `[tokens, gate | up]`: replaces `out` `[tokens, cols]`.
///
/// # Errors
/// [`crate::Error::Shape`] for operands that do not fit; of candle, if `out` shares its storage with `gate_up`.
pub fn gated(backend: &Backend, gate: Gate, gate_up: &Tensor, out: &Tensor) -> Result<()> {
    const NAME: &str = Gated::NAME;
    let (tokens, cols) = matrix(NAME, "output", out)?;
    expect(NAME, "input", gate_up, tokens, 2 * cols)?;
    Ok(out.inplace_op2(gate_up, &Gated { backend, gate, cols })?)
}

struct RmsNorm<'a> {
    backend: &'a Backend,
    eps: f32,
}

impl RmsNorm<'_> {
    const NAME: &'static str = "rms-norm";

    #[cfg(feature = "metal")]
    fn metal(&self, out: MetalSlice<'_>, (x, weight): (MetalSlice<'_>, MetalSlice<'_>)) -> candle_core::Result<()> {
        Ok(self.backend.metal()?.rms_norm(x, weight, self.eps, out)?)
    }
}

impl InplaceOp3 for RmsNorm<'_> {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        lo: &Layout,
        x: &CpuStorage,
        lx: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
    ) -> candle_core::Result<()> {
        or_emulated_metal!(self, out lo, x lx, weight lw);
        let _timer = self.backend.timed(Self::NAME, || (None, 0));
        let (x, weight) = (contiguous(x, lx)?, contiguous(weight, lw)?);
        Ok(self.backend.cpu().rms_norm(x, weight, self.eps, output(out, lo)?)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        out: &mut CudaStorage,
        lo: &Layout,
        x: &CudaStorage,
        lx: &Layout,
        weight: &CudaStorage,
        lw: &Layout,
    ) -> candle_core::Result<()> {
        let (x, weight, mut out) = (gpu(x, lx)?, gpu(weight, lw)?, gpu_output(out, lo)?);
        Ok(self.backend.cuda()?.rms_norm(&x, &weight, self.eps, &mut out)?)
    }

    metal_fwd!(x lx, weight lw);
}

struct Gated<'a> {
    backend: &'a Backend,
    gate: Gate,
    cols: usize,
}

impl Gated<'_> {
    const NAME: &'static str = "gated-activation";

    #[cfg(feature = "metal")]
    fn metal(&self, out: MetalSlice<'_>, (x,): (MetalSlice<'_>,)) -> candle_core::Result<()> {
        Ok(self.backend.metal()?.gated(self.gate, x, self.cols, out)?)
    }
}

impl InplaceOp2 for Gated<'_> {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, lo: &Layout, x: &CpuStorage, lx: &Layout) -> candle_core::Result<()> {
        or_emulated_metal!(self, out lo, x lx);
        let _timer = self.backend.timed(Self::NAME, || (None, 0));
        Ok(self.backend.cpu().gated(self.gate, contiguous(x, lx)?, self.cols, output(out, lo)?)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, out: &mut CudaStorage, lo: &Layout, x: &CudaStorage, lx: &Layout) -> candle_core::Result<()> {
        let (x, mut out) = (gpu(x, lx)?, gpu_output(out, lo)?);
        Ok(self.backend.cuda()?.gated(self.gate, &x, self.cols, &mut out)?)
    }

    metal_fwd!(x lx);
}
