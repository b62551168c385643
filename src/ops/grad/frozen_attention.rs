//! Causal self-attention whose forward pass is inference's own kernel, so that an adapter is trained on exactly the
//! values that it will meet.

use super::attention::{check, gradient};
use super::{f32_storage, require_f32};
use crate::backend::attention::{AttentionShape, RopeTable, RowPosition};
use crate::backend::cpu::CpuKv;
use crate::backend::{Backend, DenseType};
use crate::ops::contiguous;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use std::sync::Arc;

/// As [`super::attention`], with the result of [`crate::ops::attention`] on an f32 cache, bit for bit.
///
/// # Errors
/// Of candle, if shapes or types do not fit or `rope` has fewer than `length` positions.
pub fn frozen_attention(
    backend: &Backend,
    qkv: &Tensor,
    shape: AttentionShape,
    rope: &Arc<RopeTable>,
) -> Result<Tensor> {
    require_f32("frozen attention", qkv)?;
    let (sequences, length) = check(qkv, shape, rope)?;
    let (backend, rope) = (backend.clone(), Arc::clone(rope));
    qkv.contiguous()?.apply_op1(FrozenAttention { backend, shape, rope, sequences, length })
}

struct FrozenAttention {
    backend: Backend,
    shape: AttentionShape,
    rope: Arc<RopeTable>,
    sequences: usize,
    length: usize,
}

impl CustomOp1 for FrozenAttention {
    fn name(&self) -> &'static str {
        "frozen-attention"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (sequences, length, width) = (self.sequences, self.length, self.shape.heads * self.shape.head_dim);
        let mut kv = CpuKv::new(DenseType::F32, self.shape, sequences, length)?;
        let row = |t: usize| RowPosition { slot: t / length, position: t % length };
        let rows: Vec<RowPosition> = (0..sequences * length).map(row).collect();
        let mut out = vec![0.0; sequences * length * width];
        self.backend.cpu().attention(self.shape, contiguous(s, l)?, &rows, &self.rope, &mut kv, &mut out)?;
        Ok((f32_storage(out), Shape::from((sequences, length, width))))
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        gradient(qkv, self.shape, &self.rope, out, dout).map(Some)
    }
}
