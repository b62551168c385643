//! Rotary embedding and attention with the KV cache.

use super::{contiguous, no_gpu};
use crate::Result;
use crate::backend::attention::{AttentionShape, RopeTable, RowPosition};
use crate::backend::{Backend, KvLayer};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use std::sync::{Mutex, PoisonError};

/// What attention needs besides the projections.
#[derive(Debug, Clone, Copy)]
pub struct AttentionInput<'a> {
    /// Heads.
    pub shape: AttentionShape,
    /// Slot and position of each row.
    pub rows: &'a [RowPosition],
    /// Angles of the rotary embedding.
    pub rope: &'a RopeTable,
    /// This layer's cache, which grows by the rows' keys and values.
    pub kv: &'a Mutex<KvLayer>,
}

/// Rotates queries and keys of f32 `qkv` `[tokens, q | k | v]`, appends keys and values to the cache, and
/// attends causally: f32 `[tokens, heads · head_dim]`.
///
/// # Errors
/// [`crate::Error::ContextFull`] for a position that does not fit; of candle, if shapes do not fit.
pub fn attention(backend: &Backend, qkv: &Tensor, input: AttentionInput<'_>) -> Result<Tensor> {
    Ok(qkv.contiguous()?.apply_op1_no_bwd(&Attention { backend, input })?)
}

/// Rotates f32 `x` `[tokens, heads · head_dim]` (rotate-half form); row t stands at `positions[t]`.
///
/// # Errors
/// [`crate::Error::ContextFull`] for a position outside the table; of candle, if shapes do not fit.
pub fn rope(backend: &Backend, x: &Tensor, positions: &[usize], table: &RopeTable) -> Result<Tensor> {
    Ok(x.contiguous()?.apply_op1_no_bwd(&Rope { backend, positions, table })?)
}

struct Attention<'a> {
    backend: &'a Backend,
    input: AttentionInput<'a>,
}

impl CustomOp1 for Attention<'_> {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let AttentionInput { shape, rows, rope, kv } = self.input;
        let mut kv = kv.lock().unwrap_or_else(PoisonError::into_inner);
        let KvLayer::Cpu(kv) = &mut *kv;
        let width = shape.heads * shape.head_dim;
        let mut out = vec![0.0; rows.len() * width];
        self.backend.cpu().attention(shape, contiguous(s, l)?, rows, rope, kv, &mut out)?;
        Ok((CpuStorage::F32(out), Shape::from((rows.len(), width))))
    }

    no_gpu!((s, l));
}

struct Rope<'a> {
    backend: &'a Backend,
    positions: &'a [usize],
    table: &'a RopeTable,
}

impl CustomOp1 for Rope<'_> {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = contiguous::<f32>(s, l)?;
        let mut out = vec![0.0; x.len()];
        self.backend.cpu().rope(x, self.positions, self.table, &mut out)?;
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }

    no_gpu!((s, l));
}
