//! A frozen linear layer and the low-rank updates beside it as one operation: of the wide layers' outputs only their sum is
//! kept for the backward pass.

use super::{FrozenWeight, f32_storage, require_f32, tensor_like, with_values};
use crate::backend::Backend;
use crate::backend::cpu::CpuLowRank;
use crate::backend::cpu::autograd::{self, Matrix, matmul};
use crate::ops::contiguous;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use std::borrow::Cow;

/// One update of an adapted layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// First row of the outputs that it is added to.
    pub first_row: usize,
    /// Their number.
    pub rows: usize,
    /// Inner dimension.
    pub rank: usize,
    /// What it is multiplied by.
    pub scaling: f32,
    /// Which of its inputs are dropped.
    pub seed: u64,
}

/// [`super::frozen_linear`] of f32 `h` `[tokens, in]`, plus `scaling · B · (A · dropout(h))` for each update, by the kernels
/// of inference and in their order: f32 `[tokens, out]`. `a` holds the updates' A `[rank, in]` one under the other, `b`
/// their B `[rows, rank]` one after the other, `[Σ rows · rank]`.
///
/// # Errors
/// Of candle, if shapes or types do not fit, updates overlap or stand out of order, or `dropout` is not in `[0, 1)`.
pub fn adapted_linear(
    backend: &Backend,
    weight: &FrozenWeight,
    h: &Tensor,
    (a, b): (&Tensor, &Tensor),
    updates: &[Update],
    dropout: f32,
) -> Result<Tensor> {
    for tensor in [h, a, b] {
        require_f32("adapted linear", tensor)?;
    }
    let ((tokens, cols), (ranks, inputs)) = (h.dims2()?, a.dims2()?);
    let inner: usize = updates.iter().map(|u| u.rank).sum();
    let values: usize = updates.iter().map(|u| u.rank * u.rows).sum();
    let apart = updates.windows(2).all(|pair| pair[0].first_row + pair[0].rows <= pair[1].first_row);
    let inside = updates.iter().all(|u| u.first_row + u.rows <= weight.rows() && u.rank > 0 && u.rows > 0);
    if cols != weight.cols() || inputs != cols || ranks != inner || b.dims() != [values] || tokens == 0 {
        let (h, a, b) = (h.dims(), a.dims(), b.dims());
        candle_core::bail!("adapted linear: {h:?} with A {a:?} and B {b:?} for [{}, {}]", weight.rows(), weight.cols());
    }
    if !apart || !inside || !(0.0..1.0).contains(&dropout) {
        candle_core::bail!("adapted linear: updates {updates:?} of {} rows, dropout {dropout}", weight.rows());
    }
    let op = Adapted { backend: backend.clone(), weight: weight.clone(), updates: updates.to_vec(), dropout };
    h.contiguous()?.apply_op3(&a.contiguous()?, &b.contiguous()?, op)
}

struct Adapted {
    backend: Backend,
    weight: FrozenWeight,
    updates: Vec<Update>,
    dropout: f32,
}

type Gradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl Adapted {
    /// What an update reads; computed again in the backward pass, which costs less than keeping it.
    fn dropped<'h>(&self, h: &'h [f32], update: &Update) -> Cow<'h, [f32]> {
        if self.dropout == 0.0 {
            return Cow::Borrowed(h);
        }
        let mut out = vec![0.0; h.len()];
        autograd::dropout(h, self.dropout, update.seed, &mut out);
        Cow::Owned(out)
    }

    /// The updates with where their A and B begin.
    fn placed(&self) -> impl Iterator<Item = (&Update, usize, usize)> {
        let cols = self.weight.cols();
        self.updates.iter().scan((0, 0), move |(a, b), u| {
            let at = (*a, *b);
            (*a, *b) = (*a + u.rank * cols, *b + u.rank * u.rows);
            Some((u, at.0, at.1))
        })
    }

    fn backward(&self, h: &[f32], a: &[f32], b: &[f32], dy: &[f32], d: [&mut [f32]; 3]) -> Result<()> {
        let (cols, rows) = (self.weight.cols(), self.weight.rows());
        let tokens = h.len() / cols;
        let [dh, da, db] = d;
        if !dh.is_empty() {
            self.weight.input_gradient(dy, dh)?;
        }
        for (u, at_a, at_b) in self.placed() {
            let rank = u.rank;
            let x = self.dropped(h, u);
            let (x, a) = (Matrix::new(&x, tokens, cols, cols)?, Matrix::new(&a[at_a..], rank, cols, cols)?);
            let dy = Matrix::new(&dy[u.first_row..], tokens, u.rows, rows)?;
            let (mut inner, mut dinner) = (vec![0.0; tokens * rank], vec![0.0; tokens * rank]);
            matmul(x, a.t(), u.scaling, &mut inner, rank, false)?;
            matmul(dy.t(), Matrix::new(&inner, tokens, rank, rank)?, 1.0, &mut db[at_b..], rank, false)?;
            matmul(dy, Matrix::new(&b[at_b..], u.rows, rank, rank)?, u.scaling, &mut dinner, rank, false)?;
            let dinner = Matrix::new(&dinner, tokens, rank, rank)?;
            matmul(dinner.t(), x, 1.0, &mut da[at_a..], cols, false)?;
            if dh.is_empty() {
                continue;
            }
            if self.dropout == 0.0 {
                matmul(dinner, a, 1.0, dh, cols, true)?;
                continue;
            }
            let mut dx = vec![0.0; tokens * cols];
            matmul(dinner, a, 1.0, &mut dx, cols, false)?;
            dh.iter_mut().zip(&*self.dropped(&dx, u)).for_each(|(d, more)| *d += more);
        }
        Ok(())
    }
}

impl CustomOp3 for Adapted {
    fn name(&self) -> &'static str {
        "adapted-linear"
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
        let (h, a, b) = (contiguous::<f32>(s1, l1)?, contiguous::<f32>(s2, l2)?, contiguous::<f32>(s3, l3)?);
        let (cols, rows) = (self.weight.cols(), self.weight.rows());
        let mut out = self.weight.product(&self.backend, h)?;
        let mut sums = vec![0.0; out.len()];
        for (u, at_a, at_b) in self.placed() {
            let (a, b) = (&a[at_a..at_a + u.rank * cols], &b[at_b..at_b + u.rank * u.rows]);
            let packed = CpuLowRank::pack(u.rank, a, b, u.scaling)?;
            self.backend.cpu().low_rank(&[(u.first_row, &packed)], &self.dropped(h, u), cols, rows, &mut sums)?;
        }
        out.iter_mut().zip(&sums).for_each(|(y, update)| *y += update);
        Ok((f32_storage(out), Shape::from((h.len() / cols, rows))))
    }

    fn bwd(&self, h: &Tensor, a: &Tensor, b: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Gradients> {
        let mut dh = vec![0.0; if h.track_op() { h.elem_count() } else { 0 }];
        let (mut da, mut db) = (vec![0.0; a.elem_count()], vec![0.0; b.elem_count()]);
        with_values([h, a, b, dy], |[h, a, b, dy]| self.backward(h, a, b, dy, [&mut dh, &mut da, &mut db]))?;
        let dh = h.track_op().then(|| tensor_like(dh, h)).transpose()?;
        Ok((dh, Some(tensor_like(da, a)?), Some(tensor_like(db, b)?)))
    }
}
