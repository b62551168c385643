//! Rotary embedding and attention with the KV cache.

use super::{contiguous, expect, metal_fwd, or_emulated_metal, output};
#[cfg(feature = "cuda")]
use super::{gpu, gpu_output};
use crate::Result;
use crate::backend::attention::AttentionShape;
#[cfg(feature = "metal")]
use crate::backend::metal::MetalSlice;
use crate::backend::{Backend, Batch, KvLayer, Rope};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};
use std::sync::{Mutex, PoisonError};

/// What attention needs besides the projections.
#[derive(Debug, Clone, Copy)]
pub struct AttentionInput<'a> {
    /// Heads.
    pub shape: AttentionShape,
    /// Slot and position of each row.
    pub batch: &'a Batch,
    /// Angles of the rotary embedding.
    pub rope: &'a Rope,
    /// This layer's cache, which grows by the rows' keys and values.
    pub kv: &'a Mutex<KvLayer>,
}

/// Rotates queries and keys of f32 `qkv` `[tokens, q | k | v]`, appends keys and values to the cache, and
/// attends causally: replaces f32 `out` `[tokens, heads · head_dim]`. What `qkv` holds afterwards is not specified.
///
/// # Errors
/// [`crate::Error::Shape`] for operands that do not fit; of candle, wrapping [`crate::Error::ContextFull`] for a position
/// that does not fit, and if `out` shares its storage with `qkv`.
pub fn attention(backend: &Backend, qkv: &Tensor, input: AttentionInput<'_>, out: &Tensor) -> Result<()> {
    const NAME: &str = Attention::NAME;
    let (tokens, shape) = (input.batch.len(), input.shape);
    expect(NAME, "input", qkv, tokens, shape.qkv_dim())?;
    expect(NAME, "output", out, tokens, shape.heads * shape.head_dim)?;
    Ok(out.inplace_op2(qkv, &Attention { backend, input })?)
}

struct Attention<'a> {
    backend: &'a Backend,
    input: AttentionInput<'a>,
}

impl Attention<'_> {
    const NAME: &'static str = "attention";

    #[cfg(feature = "metal")]
    fn metal(&self, out: MetalSlice<'_>, (qkv,): (MetalSlice<'_>,)) -> candle_core::Result<()> {
        let AttentionInput { shape, batch, rope, kv } = self.input;
        let mut kv = kv.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(self.backend.metal()?.attention(shape, qkv, batch.metal()?, rope.metal()?, kv.metal_mut()?, out)?)
    }
}

impl InplaceOp2 for Attention<'_> {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, lo: &Layout, qkv: &CpuStorage, lq: &Layout) -> candle_core::Result<()> {
        or_emulated_metal!(self, out lo, qkv lq);
        let AttentionInput { shape, batch, rope, kv } = self.input;
        let mut kv = kv.lock().unwrap_or_else(PoisonError::into_inner);
        let kv = kv.cpu_mut()?;
        let _timer = self.backend.timed(Self::NAME, || (None, kv.bytes_read(batch.rows())));
        let (qkv, out) = (contiguous(qkv, lq)?, output(out, lo)?);
        Ok(self.backend.cpu().attention(shape, qkv, batch.rows(), rope.cpu()?, kv, out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, out: &mut CudaStorage, lo: &Layout, qkv: &CudaStorage, lq: &Layout) -> candle_core::Result<()> {
        let AttentionInput { shape, batch, rope, kv } = self.input;
        let mut kv = kv.lock().unwrap_or_else(PoisonError::into_inner);
        let (cuda, qkv, mut out) = (self.backend.cuda()?, gpu(qkv, lq)?, gpu_output(out, lo)?);
        Ok(cuda.attention(shape, &qkv, batch.cuda()?, rope.cuda()?, kv.cuda_mut()?, &mut out)?)
    }

    metal_fwd!(qkv lq);
}
