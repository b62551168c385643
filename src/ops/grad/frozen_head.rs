//! A frozen output head and its cross-entropy as one operation: logits exist for a few rows at a time, and only for those
//! that have a target.

use super::{FrozenWeight, f32_storage, require_f32, tensor_like};
use crate::backend::cpu::{OutputColumns, autograd};
use crate::backend::{Backend, DenseWeight};
use crate::ops::contiguous;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use std::sync::{Arc, Mutex, PoisonError};

/// Logits that are held at a time, 64 MB: the head is widened once for all the rows of a chunk.
const CHUNK_LOGITS: usize = 1 << 24;

/// As [`super::cross_entropy`], with a head in its stored type that no gradient is taken for.
///
/// # Errors
/// Of candle, if shapes or types do not fit or a target is outside the vocabulary.
pub fn frozen_cross_entropy(
    backend: &Backend,
    head: &Arc<DenseWeight>,
    hidden: &Tensor,
    targets: &[Option<u32>],
) -> Result<Tensor> {
    require_f32("frozen cross-entropy", hidden)?;
    let ((tokens, cols), (vocab, head_cols)) = (hidden.dims2()?, (head.rows(), head.cols()));
    if cols != head_cols || tokens != targets.len() || tokens == 0 {
        let (hidden, count) = (hidden.dims(), targets.len());
        candle_core::bail!("frozen cross-entropy: {hidden:?} with a head [{vocab}, {head_cols}] and {count} targets");
    }
    if let Some(id) = targets.iter().flatten().find(|id| **id as usize >= vocab) {
        candle_core::bail!("frozen cross-entropy: target {id} is outside the vocabulary of {vocab}");
    }
    let rows = targets.iter().enumerate().filter_map(|(row, target)| Some((row, (*target)? as usize)));
    hidden.contiguous()?.apply_op1(FrozenCrossEntropy {
        backend: backend.clone(),
        head: Arc::clone(head),
        rows: rows.collect(),
        wanted: hidden.track_op(),
        gradient: Mutex::default(),
    })
}

struct FrozenCrossEntropy {
    backend: Backend,
    head: Arc<DenseWeight>,
    /// Rows that have a target, with it.
    rows: Vec<(usize, usize)>,
    wanted: bool,
    /// The gradient of those rows for a loss of weight 1, computed while the logits are there.
    gradient: Mutex<Vec<f32>>,
}

impl CustomOp1 for FrozenCrossEntropy {
    fn name(&self) -> &'static str {
        "frozen-head-cross-entropy"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let hidden = contiguous::<f32>(s, l)?;
        let weight = self.head.cpu()?;
        let (vocab, cols) = (weight.rows(), weight.cols());
        let chunk = (CHUNK_LOGITS / vocab).clamp(1, self.rows.len().max(1));
        let (mut x, mut logits) = (vec![0.0; chunk * cols], vec![0.0; chunk * vocab]);
        let mut gradient = vec![0.0; if self.wanted { self.rows.len() * cols } else { 0 }];
        let mut loss = 0.0;
        for (i, rows) in self.rows.chunks(chunk).enumerate() {
            let (x, logits) = (&mut x[..rows.len() * cols], &mut logits[..rows.len() * vocab]);
            for (x, (row, _)) in x.chunks_exact_mut(cols).zip(rows) {
                x.copy_from_slice(&hidden[row * cols..][..cols]);
            }
            self.backend.cpu().dense_linear(weight, x, OutputColumns::whole(logits, vocab))?;
            for (logits, (_, target)) in logits.chunks_exact_mut(vocab).zip(rows) {
                loss += autograd::cross_entropy(logits, *target);
            }
            if self.wanted {
                let out = &mut gradient[i * chunk * cols..][..rows.len() * cols];
                FrozenWeight::Dense(Arc::clone(&self.head)).input_gradient(logits, out)?;
            }
        }
        *self.gradient.lock().unwrap_or_else(PoisonError::into_inner) = gradient;
        Ok((f32_storage(vec![loss as f32]), Shape::from(())))
    }

    fn bwd(&self, hidden: &Tensor, _: &Tensor, d: &Tensor) -> Result<Option<Tensor>> {
        let weight = d.to_scalar::<f32>()?;
        let cols = self.head.cols();
        let gradient = self.gradient.lock().unwrap_or_else(PoisonError::into_inner);
        let mut dx = vec![0.0; hidden.elem_count()];
        for ((row, _), gradient) in self.rows.iter().zip(gradient.chunks_exact(cols)) {
            for (d, g) in dx[row * cols..][..cols].iter_mut().zip(gradient) {
                *d = g * weight;
            }
        }
        tensor_like(dx, hidden).map(Some)
    }
}
