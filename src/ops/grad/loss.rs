//! The output head and its cross-entropy as one operation, whose logits exist for a few rows at a time only.

use super::{Precision, composed, f32_storage, require_f32};
use crate::backend::cpu::autograd::{self, Epilogue, Matrix, Operand, matmul, matmul_bf16};
use crate::ops::contiguous;
use candle_core::{CpuStorage, CustomOp2, Device, Layout, Result, Shape, Tensor};
use std::sync::{Mutex, PoisonError};

/// Logits that are held at a time, unless that is less than [`MIN_ROWS`] rows.
const CHUNK_LOGITS: usize = 1 << 20;
/// Rows for which the head is read at least: with fewer, a large one would be read for next to no work.
const MIN_ROWS: usize = 64;

/// Sum over all tokens of the cross-entropy, in nats, between `softmax(hidden · headᵀ)` and the target ids; a token whose
/// target is `None` does not count. `hidden` is f32 `[tokens, cols]`, `head` f32 `[vocab, cols]`; the result is a scalar.
///
/// # Errors
/// Of candle, if shapes or types do not fit or a target is outside the vocabulary.
pub fn cross_entropy(hidden: &Tensor, head: &Tensor, targets: &[Option<u32>], precision: Precision) -> Result<Tensor> {
    let ((tokens, cols), (vocab, head_cols)) = (hidden.dims2()?, head.dims2()?);
    if cols != head_cols || tokens != targets.len() || tokens == 0 || vocab == 0 {
        let (hidden, head) = (hidden.dims(), head.dims());
        candle_core::bail!("cross-entropy: {hidden:?} with a head {head:?} and {} targets", targets.len());
    }
    if let Some(id) = targets.iter().flatten().find(|id| **id as usize >= vocab) {
        candle_core::bail!("cross-entropy: target {id} is outside the vocabulary of {vocab}");
    }
    if !hidden.device().is_cpu() {
        return composed::cross_entropy(hidden, head, targets);
    }
    require_f32("cross-entropy", hidden)?;
    require_f32("cross-entropy", head)?;
    let wanted = Wanted { hidden: hidden.track_op(), head: head.track_op() };
    let op = CrossEntropy { targets: targets.to_vec(), vocab, cols, wanted, precision, gradients: Mutex::default() };
    hidden.contiguous()?.apply_op2(&head.contiguous()?, op)
}

#[derive(Clone, Copy)]
struct Wanted {
    hidden: bool,
    head: bool,
}

#[derive(Default)]
struct Gradients {
    hidden: Option<Tensor>,
    head: Option<Tensor>,
}

struct CrossEntropy {
    targets: Vec<Option<u32>>,
    vocab: usize,
    cols: usize,
    wanted: Wanted,
    precision: Precision,
    /// Both gradients for a loss of weight 1, computed while the logits are there.
    gradients: Mutex<Gradients>,
}

impl CrossEntropy {
    /// The product of two matrices, each with whether it is transposed.
    fn product(
        &self,
        (a, a_t): (Matrix, bool),
        (b, b_t): (Matrix, bool),
        out: &mut [f32],
        stride: usize,
        accumulate: bool,
    ) -> Result<()> {
        Ok(match self.precision {
            Precision::F32 => {
                let (a, b) = (if a_t { a.t() } else { a }, if b_t { b.t() } else { b });
                matmul(a, b, 1.0, out, stride, accumulate)
            }
            Precision::BF16 => {
                let operand = |matrix, transposed| Operand { transposed, ..Operand::new(matrix) };
                let epilogue = Epilogue { accumulate, ..Epilogue::default() };
                matmul_bf16(operand(a, a_t), operand(b, b_t), epilogue, out, stride)
            }
        }?)
    }
}

impl CustomOp2 for CrossEntropy {
    fn name(&self) -> &'static str {
        "head-cross-entropy"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (hidden, head) = (contiguous::<f32>(s1, l1)?, contiguous::<f32>(s2, l2)?);
        let (vocab, cols) = (self.vocab, self.cols);
        let mut dhidden = vec![0.0; if self.wanted.hidden { hidden.len() } else { 0 }];
        let mut dhead = vec![0.0; if self.wanted.head { head.len() } else { 0 }];
        let chunk = (CHUNK_LOGITS / vocab).max(MIN_ROWS).min(self.targets.len());
        let mut logits = vec![0.0; chunk * vocab];
        let head = Matrix::new(head, vocab, cols, cols)?;
        let mut loss = 0.0;
        for (i, targets) in self.targets.chunks(chunk).enumerate() {
            if targets.iter().all(Option::is_none) {
                continue;
            }
            let (begin, rows) = (i * chunk, targets.len());
            let x = Matrix::new(&hidden[begin * cols..], rows, cols, cols)?;
            self.product((x, false), (head, true), &mut logits, vocab, false)?;
            for (row, target) in logits.chunks_exact_mut(vocab).zip(targets) {
                match target {
                    Some(id) => loss += autograd::cross_entropy(row, *id as usize),
                    None => row.fill(0.0),
                }
            }
            let d = Matrix::new(&logits, rows, vocab, vocab)?;
            if self.wanted.hidden {
                self.product((d, false), (head, false), &mut dhidden[begin * cols..], cols, false)?;
            }
            if self.wanted.head {
                self.product((d, true), (x, false), &mut dhead, cols, true)?;
            }
        }
        let keep = |wanted: bool, values: Vec<f32>, layout: &Layout| {
            wanted.then(|| Tensor::from_vec(values, layout.shape(), &Device::Cpu)).transpose()
        };
        *self.gradients.lock().unwrap_or_else(PoisonError::into_inner) =
            Gradients { hidden: keep(self.wanted.hidden, dhidden, l1)?, head: keep(self.wanted.head, dhead, l2)? };
        Ok((f32_storage(vec![loss as f32]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, d: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let weight = d.to_scalar::<f32>()?;
        let gradients = self.gradients.lock().unwrap_or_else(PoisonError::into_inner);
        // A loss that is what gradients are taken of has weight 1, and nothing is copied.
        let scaled = |gradient: &Option<Tensor>| match gradient {
            Some(g) if weight != 1.0 => (g * f64::from(weight)).map(Some),
            g => Ok(g.clone()),
        };
        Ok((scaled(&gradients.hidden)?, scaled(&gradients.head)?))
    }
}
