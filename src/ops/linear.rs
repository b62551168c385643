//! The quantised linear, with the norm before it and the gated activation after it.

use super::{Output, contiguous, expect, expect_norm, matrix, metal_fwd, or_emulated_metal, output, shape_error};
#[cfg(feature = "cuda")]
use super::{gpu, gpu_output};
use crate::Result;
use crate::backend::cpu::{Gate, OutputColumns};
#[cfg(feature = "cuda")]
use crate::backend::cuda::{CudaView, CudaViewMut};
#[cfg(feature = "metal")]
use crate::backend::metal::MetalSlice;
use crate::backend::{Arrangement, Backend, TernaryWeight};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Tensor};

const NORM_LINEAR: &str = "norm-linear";
const GATED_LINEAR: &str = "gated-linear";

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
    let tokens = check(NORM_LINEAR, weight, Arrangement::Stacked, x, norm)?;
    let width = out.check(NORM_LINEAR, tokens, weight.rows())?;
    let epilogue = Epilogue::Columns { width, first: out.first_column, add: out.add };
    Product { backend, weight, eps: 0.0, epilogue }.apply(out.tensor, x, norm)
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
    let tokens = check(GATED_LINEAR, weight, Arrangement::GateUp, x, norm)?;
    expect(GATED_LINEAR, "output", out, tokens, weight.rows() / 2)?;
    Product { backend, weight, eps: 0.0, epilogue: Epilogue::Gated(gate) }.apply(out, x, norm)
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

/// What the profile is told of a product.
fn about(weight: &TernaryWeight) -> (Option<(usize, usize)>, usize) {
    (Some((weight.rows(), weight.cols())), weight.bytes())
}

/// A product of quantised rows, with the norm before it if it is given as the third operand.
struct Product<'a> {
    backend: &'a Backend,
    weight: &'a TernaryWeight,
    /// Of the norm, if there is one.
    eps: f32,
    epilogue: Epilogue,
}

/// What becomes of a product.
#[derive(Debug, Clone, Copy)]
enum Epilogue {
    /// Columns from `first` on of rows of `width`, replaced or added to.
    Columns { width: usize, first: usize, add: bool },
    /// The gated activation of its two halves.
    Gated(Gate),
}

impl Product<'_> {
    /// Applies the operation.
    fn apply(self, out: &Tensor, x: &Tensor, norm: Option<(&Tensor, f32)>) -> Result<()> {
        let applied = match norm {
            None => out.inplace_op2(x, &self),
            Some((norm, eps)) => out.inplace_op3(x, norm, &Self { eps, ..self }),
        };
        Ok(applied?)
    }

    fn op_name(&self) -> &'static str {
        match self.epilogue {
            Epilogue::Columns { .. } => NORM_LINEAR,
            Epilogue::Gated(_) => GATED_LINEAR,
        }
    }

    fn run(&self, out: &mut [f32], x: &[f32], norm: Option<&[f32]>) -> candle_core::Result<()> {
        let _timer = self.backend.timed(self.op_name(), || about(self.weight));
        let (cpu, weight, norm) = (self.backend.cpu(), self.weight.cpu()?, norm.map(|n| (n, self.eps)));
        let done = match self.epilogue {
            Epilogue::Columns { width, first, add } => {
                cpu.norm_linear(weight, x, norm, OutputColumns { values: out, width, first, add })
            }
            Epilogue::Gated(gate) => cpu.gated_linear(gate, weight, x, norm, out),
        };
        Ok(done?)
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
        let done = match self.epilogue {
            Epilogue::Columns { width, first, add } => cuda.norm_linear(weight, &x, norm, &mut out, first, width, add),
            Epilogue::Gated(gate) => cuda.gated_linear(gate, weight, &x, norm, &mut out),
        };
        Ok(done?)
    }

    #[cfg(feature = "metal")]
    fn metal<'a>(&self, out: MetalSlice<'_>, inputs: impl Into<MetalInputs<'a>>) -> candle_core::Result<()> {
        let (metal, weight, MetalInputs { x, norm }) = (self.backend.metal()?, self.weight.metal()?, inputs.into());
        let norm = norm.map(|n| (n, self.eps));
        let done = match self.epilogue {
            Epilogue::Columns { width, first, add } => metal.norm_linear(weight, x, norm, out, first, width, add),
            Epilogue::Gated(gate) => metal.gated_linear(gate, weight, x, norm, out),
        };
        Ok(done?)
    }
}

/// The input, and the norm's weight if it is given.
#[cfg(feature = "metal")]
struct MetalInputs<'a> {
    x: MetalSlice<'a>,
    norm: Option<MetalSlice<'a>>,
}

#[cfg(feature = "metal")]
impl<'a> From<(MetalSlice<'a>,)> for MetalInputs<'a> {
    fn from((x,): (MetalSlice<'a>,)) -> Self {
        Self { x, norm: None }
    }
}

#[cfg(feature = "metal")]
impl<'a> From<(MetalSlice<'a>, MetalSlice<'a>)> for MetalInputs<'a> {
    fn from((x, norm): (MetalSlice<'a>, MetalSlice<'a>)) -> Self {
        Self { x, norm: Some(norm) }
    }
}

impl InplaceOp2 for Product<'_> {
    fn name(&self) -> &'static str {
        self.op_name()
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, lo: &Layout, x: &CpuStorage, lx: &Layout) -> candle_core::Result<()> {
        or_emulated_metal!(self, out lo, x lx);
        self.run(output(out, lo)?, contiguous(x, lx)?, None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, out: &mut CudaStorage, lo: &Layout, x: &CudaStorage, lx: &Layout) -> candle_core::Result<()> {
        self.run_on_gpu(gpu_output(out, lo)?, gpu(x, lx)?, None)
    }

    metal_fwd!(x lx);
}

impl InplaceOp3 for Product<'_> {
    fn name(&self) -> &'static str {
        self.op_name()
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
        or_emulated_metal!(self, out lo, x lx, norm ln);
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

    metal_fwd!(x lx, norm ln);
}
