//! Rotary embedding, the KV cache and attention.
//!
//! One token of each sequence goes through one kernel, cut into runs of positions that a second one joins; more go through
//! one that rotates and stores, then one that attends.
//!
//! ```text
//! cache of a layer, keys and values alike: [slot][position][kv head][head_dim]
//! ```

use super::launch::Launch;
use super::params::Attention;
use super::{Metal, MetalBatch, MetalBuffer, MetalSlice, aligned, int, plan, shape};
use crate::backend::DenseType;
use crate::backend::attention::{AttentionShape, RopeTable};
use crate::{Error, Result};

/// One layer's keys and values of all slots.
#[derive(Debug)]
pub struct MetalKv {
    dtype: DenseType,
    shape: AttentionShape,
    slots: usize,
    positions: usize,
    keys: MetalBuffer<u8>,
    values: MetalBuffer<u8>,
}

impl MetalKv {
    /// Zeroed room for `slots` sequences of `positions` tokens each.
    ///
    /// # Errors
    /// [`Error::Shape`] for heads that no kernel takes, [`Error::Unavailable`] if memory is short.
    pub fn new(metal: &Metal, dtype: DenseType, shape: AttentionShape, slots: usize, positions: usize) -> Result<Self> {
        check_heads(shape)?;
        let size = [slots, positions, shape.kv_heads, shape.head_dim, dtype.size()];
        let size = size.iter().try_fold(1usize, |a, b| a.checked_mul(*b)).unwrap_or(usize::MAX);
        int("KV cache", "positions", positions)?;
        let what = "the KV cache of a layer";
        let (keys, values) = (metal.zeroed(size, what)?, metal.zeroed(size, what)?);
        Ok(Self { dtype, shape, slots, positions, keys, values })
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

    /// Bytes of keys and values.
    pub fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }
}

fn check_heads(heads: AttentionShape) -> Result<()> {
    let dim = heads.head_dim;
    if dim == 0 || !dim.is_multiple_of(4) || dim > AttentionShape::MAX_HEAD_DIM {
        let reason = format!(
            "the Metal kernels need a head_dim that is a multiple of 4 and at most {}, not {dim}; use --device cpu",
            AttentionShape::MAX_HEAD_DIM
        );
        return Err(shape("attention", reason));
    }
    Ok(())
}

/// The angles of the rotary embedding on the device, f32 `[positions, head_dim / 2]` each.
#[derive(Debug)]
pub struct MetalRope {
    positions: usize,
    half_dim: usize,
    cos: MetalBuffer<f32>,
    sin: MetalBuffer<f32>,
}

impl MetalRope {
    /// Copies a table.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if memory is short.
    pub fn new(metal: &Metal, table: &RopeTable) -> Result<Self> {
        let (cos, sin) = table.tables();
        let what = "the rotary embedding";
        let (cos, sin) = (metal.upload(cos, what)?, metal.upload(sin, what)?);
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

/// The kernels for a cache type: decode, rotate and store, prefill for heads of up to 64, 128, 256.
struct Kernels {
    decode: &'static str,
    rope_write: &'static str,
    prefill: [&'static str; 3],
}

macro_rules! kernels {
    ($dtype:literal) => {
        Kernels {
            decode: concat!("bitnet_decode_attention_", $dtype),
            rope_write: concat!("bitnet_rope_write_", $dtype),
            prefill: [
                concat!("bitnet_prefill_attention_", $dtype, "_64"),
                concat!("bitnet_prefill_attention_", $dtype, "_128"),
                concat!("bitnet_prefill_attention_", $dtype, "_256"),
            ],
        }
    };
}

fn kernels(dtype: DenseType) -> Kernels {
    match dtype {
        DenseType::F32 => kernels!("f32"),
        DenseType::F16 => kernels!("f16"),
        DenseType::BF16 => kernels!("bf16"),
    }
}

impl Metal {
    /// Rotates queries and keys of f32 `qkv` `[tokens, q | k | v]`, appends keys and values to the cache, and attends to
    /// positions 0 … each token's own: f32 `out` `[tokens, heads · head_dim]`.
    ///
    /// `qkv` is scratch: a prefill rotates its queries in place, so its contents are not to be used afterwards.
    ///
    /// # Errors
    /// [`Error::ContextFull`] for a position outside the cache or the table, [`Error::Shape`] for operands that do not
    /// fit, [`Error::Device`] for what fails on the device.
    pub fn attention(
        &self,
        heads: AttentionShape,
        qkv: MetalSlice<'_>,
        batch: &MetalBatch,
        rope: &MetalRope,
        kv: &mut MetalKv,
        out: MetalSlice<'_>,
    ) -> Result<()> {
        const OP: &str = "attention";
        let (tokens, extent) = (batch.len(), batch.extent());
        let fits = kv.shape == heads
            && 2 * rope.half_dim == heads.head_dim
            && extent.slots <= kv.slots
            && tokens.checked_mul(heads.qkv_dim()) == Some(qkv.len())
            && tokens.checked_mul(heads.heads * heads.head_dim) == Some(out.len());
        if !fits {
            let reason = format!(
                "{tokens} tokens in slots below {}, {heads:?}, {} elements of qkv, {} of output, a cache of {} slots with \
                 {:?}, angles for a head of {}",
                extent.slots,
                qkv.len(),
                out.len(),
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
        if tokens == 0 {
            return Ok(());
        }
        aligned(OP, [qkv, out])?;
        let params = Attention {
            tokens: int(OP, "tokens", tokens)?,
            heads: int(OP, "heads", heads.heads)?,
            kv_heads: int(OP, "heads", heads.kv_heads)?,
            head_dim: int(OP, "elements of a head", heads.head_dim)?,
            max_positions: int(OP, "positions", kv.positions)?,
            splits: 1,
            scale: heads.scale(),
        };
        match batch.decode() {
            true => self.decode_attention(heads, qkv, batch, rope, kv, out, params),
            false => self.prefill_attention(heads, qkv, batch, rope, kv, out, params),
        }
    }

    /// One token of each sequence; operands were checked.
    #[allow(clippy::too_many_arguments)]
    fn decode_attention(
        &self,
        heads: AttentionShape,
        qkv: MetalSlice<'_>,
        batch: &MetalBatch,
        rope: &MetalRope,
        kv: &mut MetalKv,
        out: MetalSlice<'_>,
        params: Attention,
    ) -> Result<()> {
        const OP: &str = "attention";
        let (tokens, extent) = (batch.len(), batch.extent());
        let groups = plan::decode_attention_groups(heads.heads, heads.kv_heads);
        let splits = plan::splits(self.chip.cores(), extent.longest, groups * tokens);
        let params = Attention { splits: int(OP, "runs", splits)?, ..params };
        let mut scratch = self.scratch();
        let partial = tokens.saturating_mul(splits).saturating_mul(heads.heads * (heads.head_dim + 2));
        let partial = scratch.partial.first(self, partial, "partial attention")?;
        let [positions, slots, _] = batch.row_slices();
        let row = heads.kv_heads * heads.head_dim * kv.dtype.size();
        let bytes: usize = batch.rows().iter().map(|r| 2 * (r.position + 1) * row).sum();
        let launch = Launch::new(kernels(kv.dtype).decode, (groups, splits, tokens), plan::ATTENTION_THREADS)
            .threadgroup(plan::decode_attention_memory(heads.head_dim))
            .bytes(bytes);
        let bindings = [
            qkv.input(),
            rope.cos.as_slice().input(),
            rope.sin.as_slice().input(),
            positions.input(),
            slots.input(),
            kv.keys.as_slice().output(),
            kv.values.as_slice().output(),
            out.output(),
            partial.output(),
        ];
        // SAFETY: the bindings and parameters of bitnet_decode_attention_*: `attention` found qkv and out as large as the
        // tokens, all slots and positions inside cache and table; the scratch holds a partial result for each token, head
        // and run.
        unsafe { self.launch(launch, &bindings, &params) }?;
        if splits == 1 {
            return Ok(());
        }
        let launch = Launch::new("bitnet_decode_combine", (heads.heads, tokens, 1), plan::ATTENTION_THREADS)
            .threadgroup(plan::COMBINE_MEMORY)
            .bytes(size_of::<f32>() * (partial.len() + out.len()));
        // SAFETY: the bindings and parameters of bitnet_decode_combine, as above.
        unsafe { self.launch(launch, &[partial.input(), positions.input(), out.output()], &params) }
    }

    /// Any tokens; operands were checked.
    #[allow(clippy::too_many_arguments)]
    fn prefill_attention(
        &self,
        heads: AttentionShape,
        qkv: MetalSlice<'_>,
        batch: &MetalBatch,
        rope: &MetalRope,
        kv: &mut MetalKv,
        out: MetalSlice<'_>,
        params: Attention,
    ) -> Result<()> {
        let (tokens, extent, kernels) = (batch.len(), batch.extent(), kernels(kv.dtype));
        let [positions, slots, starts] = batch.row_slices();
        let (keys, values) = (kv.keys.as_slice(), kv.values.as_slice());
        let values_moved = tokens * (2 * (heads.heads + heads.kv_heads) + heads.kv_heads) * heads.head_dim;
        let launch =
            Launch::new(kernels.rope_write, (tokens, 1, 1), plan::THREADS).bytes(values_moved * size_of::<f32>());
        let bindings = [
            qkv.output(),
            rope.cos.as_slice().input(),
            rope.sin.as_slice().input(),
            positions.input(),
            slots.input(),
            keys.output(),
            values.output(),
        ];
        // SAFETY: the bindings and parameters of bitnet_rope_write_*; sizes as `attention` checked them.
        unsafe { self.launch(launch, &bindings, &params) }?;
        let plan = plan::prefill_attention(heads.head_dim);
        let grid = (extent.longest_run.div_ceil(plan.queries), heads.heads, extent.sequences);
        let row = heads.kv_heads * heads.head_dim * kv.dtype.size();
        let ends = batch.rows().iter().filter(|r| r.position + 1 == extent.longest).count().max(1);
        let launch = Launch::new(kernels.prefill[plan.form], grid, plan.threads)
            .threadgroup(plan.threadgroup)
            .bytes(2 * extent.longest * row * ends + 2 * out.len() * size_of::<f32>());
        let bindings =
            [qkv.input(), positions.input(), slots.input(), starts.input(), keys.input(), values.input(), out.output()];
        // SAFETY: the bindings and parameters of bitnet_prefill_attention_*; as above, and `starts` holds the first token
        // of each of the grid's sequences and their end.
        unsafe { self.launch(launch, &bindings, &params) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernels::kernel;
    use super::*;

    #[test]
    fn every_type_has_its_kernels() {
        for dtype in [DenseType::F32, DenseType::F16, DenseType::BF16] {
            let Kernels { decode, rope_write, prefill } = kernels(dtype);
            for name in [decode, rope_write].into_iter().chain(prefill) {
                assert!(kernel(name).is_ok() && name.contains(dtype.name()), "{name}");
            }
        }
        assert!(kernel("bitnet_decode_combine").is_ok());
    }

    #[test]
    fn heads_that_no_kernel_takes_are_refused_by_their_number() {
        let check = |head_dim| check_heads(AttentionShape { heads: 2, kv_heads: 1, head_dim });
        assert!(check(80).is_ok());
        for bad in [0, 6, 260] {
            let message = check(bad).unwrap_err().to_string();
            assert!(message.contains(&format!("not {bad}")), "{message}");
        }
    }
}
