//! Rotary embedding, the KV cache and attention, but for how they run.
//!
//! ```text
//! cache of a layer, keys and values alike: [slot][position][kv head][head_dim]
//! ```

use super::batch::GpuBatch;
use super::params::Attention;
use super::{Memory, int, shape};
use crate::backend::DenseType;
use crate::backend::attention::{AttentionShape, RopeTable};
use crate::{Error, Result};
use std::sync::atomic::{AtomicU64, Ordering};

const OP: &str = "attention";
/// The KV cache in errors.
pub(crate) const KV: &str = "the KV cache of a layer";

/// One layer's keys and values of all slots.
#[derive(Debug)]
pub struct Kv<M> {
    id: u64,
    dtype: DenseType,
    shape: AttentionShape,
    slots: usize,
    positions: usize,
    pub(in crate::backend) keys: M,
    pub(in crate::backend) values: M,
}

impl<M> Kv<M> {
    /// Room for `slots` sequences of `positions` tokens each, twice as many bytes as `allocate` is asked for.
    ///
    /// # Errors
    /// [`Error::Shape`] for more positions than kernels count; those of `allocate`.
    pub(in crate::backend) fn of(
        dtype: DenseType,
        shape: AttentionShape,
        slots: usize,
        positions: usize,
        allocate: impl Fn(usize) -> Result<M>,
    ) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let size = [slots, positions, shape.kv_heads, shape.head_dim, dtype.size()];
        let size = size.iter().try_fold(1usize, |a, b| a.checked_mul(*b)).unwrap_or(usize::MAX);
        int("KV cache", "positions", positions)?;
        let (keys, values) = (allocate(size)?, allocate(size)?);
        Ok(Self { id: NEXT.fetch_add(1, Ordering::Relaxed), dtype, shape, slots, positions, keys, values })
    }

    /// A number that no other cache of this process has or will have.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Stored type.
    pub fn dtype(&self) -> DenseType {
        self.dtype
    }

    /// Heads.
    pub fn shape(&self) -> AttentionShape {
        self.shape
    }

    /// Sequences.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Positions of a sequence.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Bytes of a position's keys or values.
    fn row(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim * self.dtype.size()
    }

    /// Bytes that a decode step's attention moves.
    pub(in crate::backend) fn decode_moves<B>(&self, batch: &GpuBatch<B>) -> usize {
        batch.rows().iter().map(|r| 2 * (r.position + 1) * self.row()).sum()
    }

    /// Bytes that rotating and storing a prefill's tokens moves.
    pub(in crate::backend) fn rope_moves(&self, tokens: usize) -> usize {
        let heads = self.shape;
        tokens * (2 * (heads.heads + heads.kv_heads) + heads.kv_heads) * heads.head_dim * size_of::<f32>()
    }

    /// Bytes that a prefill's attention with so many output values moves.
    pub(in crate::backend) fn prefill_moves<B>(&self, batch: &GpuBatch<B>, outputs: usize) -> usize {
        let longest = batch.extent().longest;
        let ends = batch.rows().iter().filter(|r| r.position + 1 == longest).count().max(1);
        2 * longest * self.row() * ends + 2 * outputs * size_of::<f32>()
    }
}

impl<M: Memory> Kv<M> {
    /// Bytes of keys and values.
    pub fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }
}

/// Refuses heads that the `kernels` of a kind of GPU do not take.
///
/// # Errors
/// [`Error::Shape`], with the number.
pub(crate) fn check_head_dim(kernels: &str, dim: usize) -> Result<()> {
    if dim == 0 || !dim.is_multiple_of(4) || dim > AttentionShape::MAX_HEAD_DIM {
        let reason = format!(
            "the {kernels} kernels need a head_dim that is a multiple of 4 and at most {}, not {dim}; use --device cpu",
            AttentionShape::MAX_HEAD_DIM
        );
        return Err(shape(OP, reason));
    }
    Ok(())
}

/// The angles of the rotary embedding, f32 `[positions, head_dim / 2]` each.
#[derive(Debug)]
pub struct Angles<M> {
    positions: usize,
    half_dim: usize,
    pub(in crate::backend) cos: M,
    pub(in crate::backend) sin: M,
}

impl<M> Angles<M> {
    /// Copies a table.
    ///
    /// # Errors
    /// Those of `upload`.
    pub(in crate::backend) fn of(table: &RopeTable, upload: impl Fn(&[f32], &str) -> Result<M>) -> Result<Self> {
        let (cos, sin) = table.tables();
        let what = "the rotary embedding";
        let (cos, sin) = (upload(cos, what)?, upload(sin, what)?);
        Ok(Self { positions: table.positions(), half_dim: table.half_dim(), cos, sin })
    }

    /// Positions in the table.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Half the rotated elements of a head.
    pub fn half_dim(&self) -> usize {
        self.half_dim
    }
}

/// The kernels for a cache type that decode, and that rotate and store.
pub(crate) fn kernels(dtype: DenseType) -> [&'static str; 2] {
    match dtype {
        DenseType::F32 => ["bitnet_decode_attention_f32", "bitnet_rope_write_f32"],
        DenseType::F16 => ["bitnet_decode_attention_f16", "bitnet_rope_write_f16"],
        DenseType::BF16 => ["bitnet_decode_attention_bf16", "bitnet_rope_write_bf16"],
    }
}

/// What the kernels take of sizes, for a batch's attention in one piece.
///
/// # Errors
/// [`Error::ContextFull`] for a position outside the cache or the table, [`Error::Shape`] for operands that do not fit.
pub(crate) fn sizes<M, R, B>(
    heads: AttentionShape,
    batch: &GpuBatch<B>,
    rope: &Angles<R>,
    kv: &Kv<M>,
    qkv: usize,
    outputs: usize,
) -> Result<Attention> {
    let (tokens, extent) = (batch.len(), batch.extent());
    let fits = kv.shape == heads
        && 2 * rope.half_dim == heads.head_dim
        && extent.slots <= kv.slots
        && tokens.checked_mul(heads.qkv_dim()) == Some(qkv)
        && tokens.checked_mul(heads.heads * heads.head_dim) == Some(outputs);
    if !fits {
        let reason = format!(
            "{tokens} tokens in slots below {}, {heads:?}, {qkv} elements of qkv, {outputs} of output, a cache of {} slots \
             with {:?}, angles for a head of {}",
            extent.slots,
            kv.slots,
            kv.shape,
            2 * rope.half_dim
        );
        return Err(shape(OP, reason));
    }
    let available = kv.positions.min(rope.positions);
    if extent.longest > available {
        return Err(Error::ContextFull { needed: extent.longest, available });
    }
    Ok(Attention {
        tokens: int(OP, "tokens", tokens)?,
        heads: int(OP, "heads", heads.heads)?,
        kv_heads: int(OP, "heads", heads.kv_heads)?,
        head_dim: int(OP, "elements of a head", heads.head_dim)?,
        max_positions: int(OP, "positions", kv.positions)?,
        splits: 1,
        scale: heads.scale(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_its_kernels() {
        for dtype in [DenseType::F32, DenseType::F16, DenseType::BF16] {
            assert!(kernels(dtype).iter().all(|k| k.ends_with(dtype.name())));
        }
    }

    #[test]
    fn heads_that_no_kernel_takes_are_refused_by_their_number() {
        assert!(check_head_dim("CUDA", 80).is_ok());
        for bad in [0, 6, 260] {
            let message = check_head_dim("CUDA", bad).unwrap_err().to_string();
            assert!(message.contains(&format!("not {bad}")), "{message}");
        }
    }
}
