//! Rotary embedding, the KV cache and attention.
//!
//! One token of each sequence goes through one kernel, cut into runs of positions that a second one joins; more go through
//! one that rotates and stores, then one that attends.

use super::{Metal, MetalBatch, MetalBuffer, MetalSlice, aligned, plan};
use crate::Result;
use crate::backend::DenseType;
use crate::backend::attention::{AttentionShape, RopeTable};
use crate::backend::gpu::attention::{self, Angles, KV, Kv};
use crate::backend::gpu::params::Attention;
use crate::backend::gpu::{Launch, int};

/// One layer's keys and values of all slots.
pub type MetalKv = Kv<MetalBuffer<u8>>;

impl MetalKv {
    /// Zeroed room for `slots` sequences of `positions` tokens each.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for heads that no kernel takes, [`crate::Error::Unavailable`] if memory is short.
    pub fn new(metal: &Metal, dtype: DenseType, shape: AttentionShape, slots: usize, positions: usize) -> Result<Self> {
        attention::check_head_dim("Metal", shape.head_dim)?;
        Self::of(dtype, shape, slots, positions, |size| metal.zeroed(size, KV))
    }
}

/// The angles of the rotary embedding on the device.
pub type MetalRope = Angles<MetalBuffer<f32>>;

impl MetalRope {
    /// Copies a table.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if memory is short.
    pub fn new(metal: &Metal, table: &RopeTable) -> Result<Self> {
        Self::of(table, |angles, what| metal.upload(angles, what))
    }
}

/// The prefill kernels for a cache type: for heads of up to 64, 128, 256.
fn prefill_kernels(dtype: DenseType) -> [&'static str; 3] {
    macro_rules! by_head {
        ($name:literal) => {
            [concat!($name, "_64"), concat!($name, "_128"), concat!($name, "_256")]
        };
    }
    match dtype {
        DenseType::F32 => by_head!("bitnet_prefill_attention_f32"),
        DenseType::F16 => by_head!("bitnet_prefill_attention_f16"),
        DenseType::BF16 => by_head!("bitnet_prefill_attention_bf16"),
    }
}

/// One layer's attention, checked.
struct Operands<'a> {
    heads: AttentionShape,
    qkv: MetalSlice<'a>,
    batch: &'a MetalBatch,
    rope: &'a MetalRope,
    kv: &'a MetalKv,
    out: MetalSlice<'a>,
    sizes: Attention,
}

impl Metal {
    /// Rotates queries and keys of f32 `qkv` `[tokens, q | k | v]`, appends keys and values to the cache, and attends to
    /// positions 0 … each token's own: f32 `out` `[tokens, heads · head_dim]`.
    ///
    /// `qkv` is scratch: a prefill rotates its queries in place, so its contents are not to be used afterwards.
    ///
    /// # Errors
    /// [`crate::Error::ContextFull`] for a position outside the cache or the table, [`crate::Error::Shape`] for operands that
    /// do not fit, [`crate::Error::Device`] for what fails on the device.
    pub fn attention(
        &self,
        heads: AttentionShape,
        qkv: MetalSlice<'_>,
        batch: &MetalBatch,
        rope: &MetalRope,
        kv: &mut MetalKv,
        out: MetalSlice<'_>,
    ) -> Result<()> {
        let sizes = attention::sizes(heads, batch, rope, kv, qkv.len(), out.len())?;
        if batch.is_empty() {
            return Ok(());
        }
        aligned("attention", [qkv, out])?;
        let operands = Operands { heads, qkv, batch, rope, kv, out, sizes };
        if batch.decode() { self.decode_attention(operands) } else { self.prefill_attention(operands) }
    }

    /// One token of each sequence.
    fn decode_attention(&self, o: Operands<'_>) -> Result<()> {
        let Operands { heads, qkv, batch, rope, kv, out, sizes } = o;
        let (tokens, extent) = (batch.len(), batch.extent());
        let groups = plan::decode_attention_blocks(heads.heads, heads.kv_heads);
        let splits = plan::splits(self.chip.cores(), extent.longest, groups * tokens);
        let sizes = Attention { splits: int("attention", "runs", splits)?, ..sizes };
        let mut scratch = self.scratch();
        let partial = tokens.saturating_mul(splits).saturating_mul(heads.heads * (heads.head_dim + 2));
        let partial = scratch.partial.first(self, partial, "partial attention")?;
        let [positions, slots, _] = batch.row_slices();
        let [decode, _] = attention::kernels(kv.dtype());
        let launch = Launch::new(decode, (groups, splits, tokens), plan::ATTENTION_THREADS)
            .shared(plan::decode_attention_shared(heads.head_dim))
            .bytes(kv.decode_moves(batch));
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
        unsafe { self.launch(launch, &bindings, &sizes) }?;
        if splits == 1 {
            return Ok(());
        }
        let launch = Launch::new("bitnet_decode_combine", (heads.heads, tokens, 1), plan::ATTENTION_THREADS)
            .shared(plan::COMBINE_MEMORY)
            .bytes(size_of::<f32>() * (partial.len() + out.len()));
        // SAFETY: the bindings and parameters of bitnet_decode_combine, as above.
        unsafe { self.launch(launch, &[partial.input(), positions.input(), out.output()], &sizes) }
    }

    /// Any tokens.
    fn prefill_attention(&self, o: Operands<'_>) -> Result<()> {
        let Operands { heads, qkv, batch, rope, kv, out, sizes } = o;
        let (tokens, extent) = (batch.len(), batch.extent());
        let [positions, slots, starts] = batch.row_slices();
        let (keys, values) = (kv.keys.as_slice(), kv.values.as_slice());
        let [_, rope_write] = attention::kernels(kv.dtype());
        let launch = Launch::new(rope_write, (tokens, 1, 1), plan::THREADS).bytes(kv.rope_moves(tokens));
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
        unsafe { self.launch(launch, &bindings, &sizes) }?;
        let plan = plan::prefill_attention(heads.head_dim);
        let grid = (extent.longest_run.div_ceil(plan.queries), heads.heads, extent.sequences);
        let launch = Launch::new(prefill_kernels(kv.dtype())[plan.form], grid, plan.threads)
            .shared(plan.threadgroup)
            .bytes(kv.prefill_moves(batch, out.len()));
        let bindings =
            [qkv.input(), positions.input(), slots.input(), starts.input(), keys.input(), values.input(), out.output()];
        // SAFETY: the bindings and parameters of bitnet_prefill_attention_*; as above, and `starts` holds the first token
        // of each of the grid's sequences and their end.
        unsafe { self.launch(launch, &bindings, &sizes) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernels::kernel;
    use super::*;

    #[test]
    fn every_type_has_its_kernels() {
        for dtype in [DenseType::F32, DenseType::F16, DenseType::BF16] {
            let all = attention::kernels(dtype).into_iter().chain(prefill_kernels(dtype));
            all.for_each(|name| assert!(kernel(name).is_ok() && name.contains(dtype.name()), "{name}"));
        }
        assert!(kernel("bitnet_decode_combine").is_ok());
    }
}
