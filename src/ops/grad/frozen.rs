//! Linear layers whose weight stays as it is stored, ternary or dense, with the gradient to their input.

use super::{f32_storage, require_f32, tensor_like, with_values};
use crate::backend::cpu::OutputColumns;
use crate::backend::cpu::autograd::{Matrix, matmul};
use crate::backend::{Backend, DenseWeight, TernaryWeight};
use crate::ops::contiguous;
use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// Elements of a weight that are widened at a time: 4 MB.
const BLOCK: usize = 1 << 20;

/// A weight that no gradient is taken for; cloning shares it.
#[derive(Debug, Clone)]
pub enum FrozenWeight {
    /// Packed ternary weights, one or several over one input.
    Ternary(Arc<TernaryWeight>),
    /// A dense weight in its stored type.
    Dense(Arc<DenseWeight>),
}

impl FrozenWeight {
    /// Output features.
    pub fn rows(&self) -> usize {
        match self {
            Self::Ternary(w) => w.rows(),
            Self::Dense(w) => w.rows(),
        }
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        match self {
            Self::Ternary(w) => w.cols(),
            Self::Dense(w) => w.cols(),
        }
    }

    /// Rows `range` as f32.
    fn widen(&self, range: Range<usize>, out: &mut [f32]) -> Result<()> {
        match self {
            Self::Ternary(w) => Ok(w.cpu()?.dequantize_rows(range, out)?),
            Self::Dense(w) => {
                let stride = w.cols() * w.dtype().size();
                let bytes = w.host_bytes().and_then(|b| b.get(range.start * stride..range.end * stride));
                let Some(bytes) = bytes else { candle_core::bail!("rows {range:?} of a weight of {}", w.rows()) };
                w.dtype().widen(bytes, out);
                Ok(())
            }
        }
    }

    /// `W · quantise(x)` or `W · x` of rows of `x`, by inference's kernels.
    pub(super) fn product(&self, backend: &Backend, x: &[f32]) -> Result<Vec<f32>> {
        let (rows, cols) = (self.rows(), self.cols());
        let mut out = vec![0.0; x.len() / cols * rows];
        let (cpu, columns) = (backend.cpu(), OutputColumns::whole(&mut out, rows));
        match self {
            Self::Ternary(w) => cpu.norm_linear(w.cpu()?, x, None, columns)?,
            Self::Dense(w) => cpu.dense_linear(w.cpu()?, x, columns)?,
        }
        Ok(out)
    }

    /// `dx = dy · W` for `dy` `[tokens, rows]`: the weight is widened a block of rows at a time.
    pub(super) fn input_gradient(&self, dy: &[f32], dx: &mut [f32]) -> Result<()> {
        let (rows, cols) = (self.rows(), self.cols());
        let tokens = dy.len() / rows;
        let block = (BLOCK / cols).clamp(16, rows.max(16));
        let mut wide = vec![0.0; block.min(rows) * cols];
        for begin in (0..rows).step_by(block) {
            let count = block.min(rows - begin);
            let wide = &mut wide[..count * cols];
            self.widen(begin..begin + count, wide)?;
            let dy = Matrix::new(&dy[begin..], tokens, count, rows)?;
            matmul(dy, Matrix::new(wide, count, cols, cols)?, 1.0, dx, cols, begin > 0)?;
        }
        Ok(())
    }
}

/// `W · quantise(x)` for a ternary weight, `W · x` for a dense one, by the kernels of inference: f32 `[tokens, in]` to
/// `[tokens, out]`. The gradient reaches `x` through the weight's values and passes the activation quantiser unchanged
/// (straight-through).
///
/// # Errors
/// Of candle, if shapes or types do not fit.
pub fn frozen_linear(backend: &Backend, weight: &FrozenWeight, x: &Tensor) -> Result<Tensor> {
    require_f32("frozen linear", x)?;
    if x.rank() != 2 || x.dim(D::Minus1)? != weight.cols() || x.elem_count() == 0 {
        candle_core::bail!("frozen linear: input {:?} for [{}, {}]", x.dims(), weight.rows(), weight.cols());
    }
    x.contiguous()?.apply_op1(FrozenLinear { backend: backend.clone(), weight: weight.clone() })
}

struct FrozenLinear {
    backend: Backend,
    weight: FrozenWeight,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = self.weight.product(&self.backend, contiguous(s, l)?)?;
        let tokens = out.len() / self.weight.rows();
        Ok((f32_storage(out), Shape::from((tokens, self.weight.rows()))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let mut dx = vec![0.0; x.elem_count()];
        with_values([dy], |[dy]| self.weight.input_gradient(dy, &mut dx))?;
        tensor_like(dx, x).map(Some)
    }
}
