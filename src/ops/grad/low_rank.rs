//! LoRA's update with its gradients.

use super::{f32_storage, require_f32, tensor_like, with_values};
use crate::backend::Backend;
use crate::backend::cpu::CpuLowRank;
use crate::backend::cpu::autograd::{Matrix, matmul};
use crate::ops::contiguous;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

/// `scaling · B · (A · h)` of f32 `h` `[tokens, cols]`, A `[rank, cols]` and B `[rows, rank]`, by inference's kernel:
/// f32 `[tokens, rows]`.
///
/// # Errors
/// Of candle, if shapes or types do not fit.
pub fn low_rank(backend: &Backend, h: &Tensor, a: &Tensor, b: &Tensor, scaling: f32) -> Result<Tensor> {
    for tensor in [h, a, b] {
        require_f32("low-rank update", tensor)?;
    }
    let ((tokens, cols), (rank, inputs), (rows, inner)) = (h.dims2()?, a.dims2()?, b.dims2()?);
    if cols != inputs || rank != inner || tokens == 0 {
        candle_core::bail!("low-rank update: {:?} with A {:?} and B {:?}", h.dims(), a.dims(), b.dims());
    }
    let op = LowRank { backend: backend.clone(), tokens, rows, cols, rank, scaling };
    h.contiguous()?.apply_op3(&a.contiguous()?, &b.contiguous()?, op)
}

struct LowRank {
    backend: Backend,
    tokens: usize,
    rows: usize,
    cols: usize,
    rank: usize,
    scaling: f32,
}

type Gradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl CustomOp3 for LowRank {
    fn name(&self) -> &'static str {
        "low-rank-with-gradient"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (a, b) = (contiguous(s2, l2)?, contiguous(s3, l3)?);
        let weight = CpuLowRank::pack(self.rank, a, b, self.scaling)?;
        let mut out = vec![0.0; self.tokens * self.rows];
        self.backend.cpu().low_rank(&[(0, &weight)], contiguous(s1, l1)?, self.cols, self.rows, &mut out)?;
        Ok((f32_storage(out), Shape::from((self.tokens, self.rows))))
    }

    fn bwd(&self, h: &Tensor, a: &Tensor, b: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Gradients> {
        let Self { tokens, rows, cols, rank, scaling, .. } = *self;
        let mut da = vec![0.0; rank * cols];
        let mut db = vec![0.0; rows * rank];
        let mut dh = vec![0.0; if h.track_op() { tokens * cols } else { 0 }];
        with_values([h, a, b, dy], |[h, a, b, dy]| {
            let (h, a) = (Matrix::new(h, tokens, cols, cols)?, Matrix::new(a, rank, cols, cols)?);
            let dy = Matrix::new(dy, tokens, rows, rows)?;
            let (mut inner, mut dinner) = (vec![0.0; tokens * rank], vec![0.0; tokens * rank]);
            matmul(h, a.t(), scaling, &mut inner, rank, false)?;
            matmul(dy.t(), Matrix::new(&inner, tokens, rank, rank)?, 1.0, &mut db, rank, false)?;
            matmul(dy, Matrix::new(b, rows, rank, rank)?, scaling, &mut dinner, rank, false)?;
            let dinner = Matrix::new(&dinner, tokens, rank, rank)?;
            matmul(dinner.t(), h, 1.0, &mut da, cols, false)?;
            if !dh.is_empty() {
                matmul(dinner, a, 1.0, &mut dh, cols, false)?;
            }
            Ok(())
        })?;
        let dh = h.track_op().then(|| tensor_like(dh, h)).transpose()?;
        Ok((dh, Some(tensor_like(da, a)?), Some(tensor_like(db, b)?)))
    }
}
