//! Causal self-attention with its gradient.

use super::{composed, f32_storage, require_f32, tensor_like, with_values};
use crate::backend::attention::{AttentionShape, RopeTable};
use crate::backend::cpu::autograd;
use crate::ops::contiguous;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use std::sync::Arc;

/// Rotary embedding and causal attention over whole sequences: f32 `[sequences, length, q | k | v]` to
/// `[sequences, length, heads · head_dim]`.
///
/// # Errors
/// Of candle, if shapes or types do not fit or `rope` has fewer than `length` positions.
pub fn attention(qkv: &Tensor, shape: AttentionShape, rope: &Arc<RopeTable>) -> Result<Tensor> {
    let (sequences, length) = check(qkv, shape, rope)?;
    if !qkv.device().is_cpu() {
        return composed::attention(qkv, shape, rope);
    }
    require_f32("attention", qkv)?;
    qkv.contiguous()?.apply_op1(Attention { shape, rope: Arc::clone(rope), sequences, length })
}

/// Sequences and their length, if the shapes fit.
pub(super) fn check(qkv: &Tensor, shape: AttentionShape, rope: &RopeTable) -> Result<(usize, usize)> {
    let (sequences, length, width) = qkv.dims3()?;
    if width != shape.qkv_dim() || length > rope.positions() || sequences * length == 0 {
        let positions = rope.positions();
        candle_core::bail!("attention: {:?} for rows of {} at {positions} positions", qkv.dims(), shape.qkv_dim());
    }
    Ok((sequences, length))
}

/// The gradient at `qkv` `[sequences, length, q | k | v]`, where attention gave `out`.
pub(super) fn gradient(
    qkv: &Tensor,
    shape: AttentionShape,
    rope: &RopeTable,
    out: &Tensor,
    dout: &Tensor,
) -> Result<Tensor> {
    let mut dqkv = vec![0.0; qkv.elem_count()];
    let length = qkv.dim(1)?;
    with_values([qkv, out, dout], |[x, y, dy]| {
        Ok(autograd::attention_backward(x, shape, rope, length, y, dy, &mut dqkv)?)
    })?;
    tensor_like(dqkv, qkv)
}

struct Attention {
    shape: AttentionShape,
    rope: Arc<RopeTable>,
    sequences: usize,
    length: usize,
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention-with-gradient"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = self.shape.heads * self.shape.head_dim;
        let mut out = vec![0.0; self.sequences * self.length * width];
        autograd::attention(contiguous(s, l)?, self.shape, &self.rope, self.length, &mut out)?;
        Ok((f32_storage(out), Shape::from((self.sequences, self.length, width))))
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        gradient(qkv, self.shape, &self.rope, out, dout).map(Some)
    }
}
