//! The quantised linear, with the norm before it and the gated activation after it.

use super::{Output, contiguous, expect, expect_norm, matrix, output, shape_error};
#[cfg(feature = "cuda")]
use super::{gpu, gpu_output};
use crate::Result;
use crate::backend::cpu::{Gate, OutputColumns};
#[cfg(feature = "cuda")]
use crate::backend::cuda::{CudaView, CudaViewMut};
use crate::backend::{Arrangement, Backend, TernaryWeight};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Tensor};

/// `y[t] = W q[t] / s_x[t]`, scaled per stacked weight, where `q` and `s_x` quantise each token of f32 `x` `[tokens, cols]`,
/// after RMSNorm if `norm` (weight f32 `[cols]`, epsilon) is given. Integer accumulators, bit-equal on every kernel; `y` is
/// rounded once.
///
/// # Errors
/// [`crate::Error::Shape`] for operands that do not fit or a weight that is not [`Arrangement::Stacked`]; of candle, wrapping
/// [`crate::Error::Layout`] for a weight packed for another kernel, and if `out` shares its storage with `x`.
pub fn norm_linear(
    backend: &Backend,
    weight: &TernaryWeight,
    x: &Tensor,
    norm: Option<(&Tensor, f32)>,
    out: Output<'_>,
) -> Result<()> {
    const NAME: &str = NormLinear::NAME;
    let tokens = check(NAME, weight, Arrangement::Stacked, x, norm)?;
    let width = out.check(NAME, tokens, weight.rows())?;
    let Output { tensor, first_column, add } = out;
    let eps = norm.map_or(0.0, |(_, eps)| eps);
    let op = NormLinear { backend, weight, eps, width, first_column, add };
    let applied = match norm {
        None => tensor.inplace_op2(x, &op),
        Some((norm, _)) => tensor.inplace_op3(x, norm, &op),
    };
    Ok(applied?)
}

/// `act(gate) · up` with `[gate | up]` as [`norm_linear`] computes it: replaces f32 `out` `[tokens, rows / 2]`.
///
/// # Errors
/// As [`norm_linear`], for a weight that is not [`Arrangement::GateUp`].
pub fn gated_linear(
    backend: &Backend,
    gate: Gate,
    weight: &TernaryWeight,
    x: &Tensor,
    norm: Option<(&Tensor, f32)>,
    out: &Tensor,
) -> Result<()> {
    const NAME: &str = GatedLinear::NAME;
    let tokens = check(NAME, weight, Arrangement::GateUp, x, norm)?;
    expect(NAME, "output", out, tokens, weight.rows() / 2)?;
    let op = GatedLinear { backend, gate, weight, eps: norm.map_or(0.0, |(_, eps)| eps) };
    let applied = match norm {
        None => out.inplace_op2(x, &op),
        Some((norm, _)) => out.inplace_op3(x, norm, &op),
    };
    Ok(applied?)
}

/// The tokens, if the operands fit.
fn check(
    op: &'static str,
    weight: &TernaryWeight,
    arrangement: Arrangement,
    x: &Tensor,
    norm: Option<(&Tensor, f32)>,
) -> Result<usize> {
    if weight.arrangement() != arrangement {
        let found = weight.arrangement();
        return Err(shape_error(op, format!("the weight was packed as {found:?}; {arrangement:?} is needed")));
    }
    let (tokens, cols) = matrix(op, "input", x)?;
    if cols != weight.cols() {
        let reason = format!("input [{tokens}, {cols}] for a weight of {} input features", weight.cols());
        return Err(shape_error(op, reason));
    }
    norm.map_or(Ok(()), |(norm, _)| expect_norm(op, norm, cols))?;
    Ok(tokens)
}

struct NormLinear<'a> {
    backend: &'a Backend,
    weight: &'a TernaryWeight,
    /// Of the norm, if there is one.
    eps: f32,
    width: usize,
    first_column: usize,
    add: bool,
}

impl NormLinear<'_> {
    const NAME: &'static str = "norm-linear";

    fn run(&self, out: &mut [f32], x: &[f32], norm: Option<&[f32]>) -> candle_core::Result<()> {
        let out = OutputColumns { values: out, width: self.width, first: self.first_column, add: self.add };
        Ok(self.backend.cpu().norm_linear(self.weight.cpu()?, x, norm.map(|n| (n, self.eps)), out)?)
    }

    #[cfg(feature = "cuda")]
    fn run_on_gpu(
        &self,
        mut out: CudaViewMut<'_, f32>,
        x: CudaView<'_, f32>,
        norm: Option<CudaView<'_, f32>>,
    ) -> candle_core::Result<()> {
        let (cuda, weight) = (self.backend.cuda()?, self.weight.cuda()?);
        let norm = norm.as_ref().map(|n| (n, self.eps));
        Ok(cuda.norm_linear(weight, &x, norm, &mut out, self.first_column, self.width, self.add)?)
    }
}

impl InplaceOp2 for NormLinear<'_> {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, lo: &Layout, x: &CpuStorage, lx: &Layout) -> candle_core::Result<()> {
        self.run(output(out, lo)?, contiguous(x, lx)?, None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, out: &mut CudaStorage, lo: &Layout, x: &CudaStorage, lx: &Layout) -> candle_core::Result<()> {
        self.run_on_gpu(gpu_output(out, lo)?, gpu(x, lx)?, None)
    }
}

impl InplaceOp3 for NormLinear<'_> {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        lo: &Layout,
        x: &CpuStorage,
        lx: &Layout,
        norm: &CpuStorage,
        ln: &Layout,
    ) -> candle_core::Result<()> {
        self.run(output(out, lo)?, contiguous(x, lx)?, Some(contiguous(norm, ln)?))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        out: &mut CudaStorage,
        lo: &Layout,
        x: &CudaStorage,
        lx: &Layout,
        norm: &CudaStorage,
        ln: &Layout,
    ) -> candle_core::Result<()> {
        self.run_on_gpu(gpu_output(out, lo)?, gpu(x, lx)?, Some(gpu(norm, ln)?))
    }
}

struct GatedLinear<'a> {
    backend: &'a Backend,
    gate: Gate,
    weight: &'a TernaryWeight,
    /// Of the norm, if there is one.
    eps: f32,
}

impl GatedLinear<'_> {
    const NAME: &'static str = "gated-linear";

    fn run(&self, out: &mut [f32], x: &[f32], norm: Option<&[f32]>) -> candle_core::Result<()> {
        Ok(self.backend.cpu().gated_linear(self.gate, self.weight.cpu()?, x, norm.map(|n| (n, self.eps)), out)?)
    }

    #[cfg(feature = "cuda")]
    fn run_on_gpu(
        &self,
        mut out: CudaViewMut<'_, f32>,
        x: CudaView<'_, f32>,
        norm: Option<CudaView<'_, f32>>,
    ) -> candle_core::Result<()> {
        let (cuda, weight) = (self.backend.cuda()?, self.weight.cuda()?);
        Ok(cuda.gated_linear(self.gate, weight, &x, norm.as_ref().map(|n| (n, self.eps)), &mut out)?)
    }
}

impl InplaceOp2 for GatedLinear<'_> {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, lo: &Layout, x: &CpuStorage, lx: &Layout) -> candle_core::Result<()> {
        self.run(output(out, lo)?, contiguous(x, lx)?, None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, out: &mut CudaStorage, lo: &Layout, x: &CudaStorage, lx: &Layout) -> candle_core::Result<()> {
        self.run_on_gpu(gpu_output(out, lo)?, gpu(x, lx)?, None)
    }
}

impl InplaceOp3 for GatedLinear<'_> {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        lo: &Layout,
        x: &CpuStorage,
        lx: &Layout,
        norm: &CpuStorage,
        ln: &Layout,
    ) -> candle_core::Result<()> {
        self.run(output(out, lo)?, contiguous(x, lx)?, Some(contiguous(norm, ln)?))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        out: &mut CudaStorage,
        lo: &Layout,
        x: &CudaStorage,
        lx: &Layout,
        norm: &CudaStorage,
        ln: &Layout,
    ) -> candle_core::Result<()> {
        self.run_on_gpu(gpu_output(out, lo)?, gpu(x, lx)?, Some(gpu(norm, ln)?))
    }
}
