//! Low-rank updates, LoRA's, beside quantised and dense linears.

use super::{contiguous, no_gpu};
use crate::Result;
use crate::backend::{Backend, LowRankWeight};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, Layout, Shape, Tensor};

/// f32 `[tokens, rows]`: `residual`, or zeros, plus each update of f32 `x` `[tokens, cols]`, whose rows begin where
/// its number says.
///
/// # Errors
/// [`crate::Error::Shape`] for updates that overlap, stand out of order or read another number of columns; of candle,
/// if shapes or types do not fit.
pub fn low_rank(
    backend: &Backend,
    updates: &[(usize, &LowRankWeight)],
    x: &Tensor,
    residual: Option<&Tensor>,
    rows: usize,
) -> Result<Tensor> {
    let op = LowRank { backend, updates, cols: x.dim(D::Minus1)?, rows };
    let x = x.contiguous()?;
    Ok(match residual {
        None => x.apply_op1_no_bwd(&op)?,
        Some(residual) => x.apply_op2_no_bwd(&residual.contiguous()?, &op)?,
    })
}

struct LowRank<'a> {
    backend: &'a Backend,
    updates: &'a [(usize, &'a LowRankWeight)],
    cols: usize,
    rows: usize,
}

impl LowRank<'_> {
    fn run(&self, x: &[f32], mut out: Vec<f32>) -> candle_core::Result<(CpuStorage, Shape)> {
        let updates: Vec<_> = self.updates.iter().map(|(at, LowRankWeight::Cpu(w))| (*at, w)).collect();
        self.backend.cpu().low_rank(&updates, x, self.cols, self.rows, &mut out)?;
        Ok((CpuStorage::F32(out), Shape::from((x.len() / self.cols.max(1), self.rows))))
    }
}

impl CustomOp1 for LowRank<'_> {
    fn name(&self) -> &'static str {
        "low-rank"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = contiguous::<f32>(s, l)?;
        self.run(x, vec![0.0; x.len() / self.cols.max(1) * self.rows])
    }

    no_gpu!((s, l));
}

impl CustomOp2 for LowRank<'_> {
    fn name(&self) -> &'static str {
        "low-rank-residual"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.run(contiguous(s1, l1)?, contiguous::<f32>(s2, l2)?.to_vec())
    }

    no_gpu!((s1, l1), (s2, l2));
}
