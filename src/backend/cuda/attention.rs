//! Rotary embedding, the KV cache and attention in device memory.
//!
//! One token of each sequence goes through one kernel, cut into runs of positions; more go through one that rotates and
//! stores, then one that attends, on the matrix units where cache, head size and chip allow it.

use super::launch::arg;
use super::params::{AttentionParams, PrefillParams};
use super::{Chip, Cuda, CudaBatch, CudaSlice, CudaView, CudaViewMut, aligned, plan};
use crate::Result;
use crate::backend::DenseType;
use crate::backend::attention::{AttentionShape, RopeTable};
use crate::backend::gpu::attention::{self, Angles, KV, Kv};
use crate::backend::gpu::{Launch, int, shape};

/// One layer's keys and values of all slots in device memory.
pub type CudaKv = Kv<CudaSlice<u8>>;

impl CudaKv {
    /// Zeroed room for `slots` sequences of `positions` tokens each.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for heads that no kernel takes, [`crate::Error::Unavailable`] if memory is short.
    pub fn new(cuda: &Cuda, dtype: DenseType, shape: AttentionShape, slots: usize, positions: usize) -> Result<Self> {
        check_heads(&cuda.chip, dtype, shape)?;
        Self::of(dtype, shape, slots, positions, |size| cuda.zeroed(size, KV))
    }
}

fn check_heads(chip: &Chip, dtype: DenseType, heads: AttentionShape) -> Result<()> {
    let dim = heads.head_dim;
    attention::check_head_dim("CUDA", dim)?;
    let (needed, most) = (prefill(chip, dtype, dim).shared, chip.shared_per_block);
    if needed > most {
        let reason = format!(
            "a head_dim of {dim} takes {needed} bytes of shared memory, and {} has {most}; use --device cpu",
            chip.name
        );
        return Err(shape("attention", reason));
    }
    Ok(())
}

/// The angles of the rotary embedding in device memory.
pub type CudaRope = Angles<CudaSlice<f32>>;

impl CudaRope {
    /// Uploads a table.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if memory is short.
    pub fn new(cuda: &Cuda, table: &RopeTable) -> Result<Self> {
        Self::of(table, |angles, what| cuda.upload(angles, what))
    }
}

/// How a prefill attends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Prefill {
    kernel: &'static str,
    /// Queries of a block.
    queries: usize,
    shared: usize,
}

/// The matrix units where they can be had, else f32.
fn prefill(chip: &Chip, dtype: DenseType, head_dim: usize) -> Prefill {
    let matrix = match (dtype, head_dim) {
        (DenseType::BF16, 64) => Some("bitnet_prefill_attention_mma_bf16_64"),
        (DenseType::BF16, 96) => Some("bitnet_prefill_attention_mma_bf16_96"),
        (DenseType::BF16, 128) => Some("bitnet_prefill_attention_mma_bf16_128"),
        (DenseType::BF16, 256) => Some("bitnet_prefill_attention_mma_bf16_256"),
        (DenseType::F16, 64) => Some("bitnet_prefill_attention_mma_f16_64"),
        (DenseType::F16, 96) => Some("bitnet_prefill_attention_mma_f16_96"),
        (DenseType::F16, 128) => Some("bitnet_prefill_attention_mma_f16_128"),
        (DenseType::F16, 256) => Some("bitnet_prefill_attention_mma_f16_256"),
        _ => None,
    };
    let shared = plan::matrix_attention_shared(head_dim).filter(|s| chip.is_ampere() && chip.fits(*s, 1));
    match matrix.zip(shared) {
        Some((kernel, shared)) => Prefill { kernel, queries: 64, shared },
        None => {
            let kernel = match dtype {
                DenseType::F32 => "bitnet_prefill_attention_f32",
                DenseType::F16 => "bitnet_prefill_attention_f16",
                DenseType::BF16 => "bitnet_prefill_attention_bf16",
            };
            Prefill { kernel, queries: 32, shared: plan::prefill_attention_shared(head_dim) }
        }
    }
}

impl Cuda {
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
        qkv: &CudaView<'_, f32>,
        batch: &CudaBatch,
        rope: &CudaRope,
        kv: &mut CudaKv,
        out: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        const OP: &str = "attention";
        let (tokens, extent) = (batch.len(), batch.extent());
        let sizes = attention::sizes(heads, batch, rope, kv, qkv.len(), out.len())?;
        if tokens == 0 {
            return Ok(());
        }
        let [positions, slots, starts] = batch.row_addresses(self);
        let mut params = AttentionParams {
            qkv: self.read(qkv),
            cos: self.read(&rope.cos),
            sin: self.read(&rope.sin),
            positions,
            slots,
            k_cache: self.write(&mut kv.keys),
            v_cache: self.write(&mut kv.values),
            out: self.write(out),
            partial: 0,
            arrived: 0,
            sizes,
        };
        aligned(OP, [params.qkv, params.out])?;
        let [decode, rope_write] = attention::kernels(kv.dtype());
        if batch.decode() {
            let splits = plan::splits(batch.bucket(), tokens);
            let blocks = plan::decode_attention_blocks(heads.heads, heads.kv_heads);
            let scratch = &mut *self.scratch();
            // Room for any number of runs of up to 8 tokens, so that longer sequences do not move it.
            let most = (tokens * splits).max(plan::splits(usize::MAX, 1) * plan::DECODE_TOKENS);
            let partial = most.saturating_mul(heads.heads * (heads.head_dim + 2));
            params.partial = scratch.partial.address(self, partial, "partial attention")?;
            let counters = tokens.max(plan::DECODE_TOKENS) * blocks;
            params.arrived = scratch.arrived.address(self, counters, "attention counters")?;
            params.sizes.splits = int(OP, "runs", splits)?;
            let launch = Launch::new(decode, (blocks, splits, tokens), 128)
                .shared(plan::decode_attention_shared(heads.head_dim))
                .bytes(kv.decode_moves(batch));
            // SAFETY: the kernel takes one AttentionParams; the check above found qkv and out as large as the tokens, all
            // slots and positions inside cache and table; the scratch holds a partial result for each token, head and
            // run, and counters that are zero.
            return unsafe { self.launch(launch, &mut [arg(&params)]) };
        }
        let launch = Launch::new(rope_write, (tokens, 1, 1), plan::THREADS).bytes(kv.rope_moves(tokens));
        // SAFETY: AttentionParams and the address of qkv again; sizes as checked above. Rotating through an address that
        // came from a shared view breaks no rule of Rust: device memory is none of its objects, and the stream orders
        // everything that reads it.
        unsafe { self.launch(launch, &mut [arg(&params), arg(&params.qkv)]) }?;
        let plan = prefill(&self.chip, kv.dtype(), heads.head_dim);
        let grid = (extent.longest_run.div_ceil(plan.queries), heads.heads, extent.sequences);
        let sequences = int(OP, "sequences", extent.sequences)?;
        let params = PrefillParams { attention: params, starts, sequences };
        let launch = Launch::new(plan.kernel, grid, 128).shared(plan.shared).bytes(kv.prefill_moves(batch, out.len()));
        // SAFETY: the kernel takes one PrefillParams; as above, and `starts` holds the first token of each of `sequences`
        // sequences and their end.
        unsafe { self.launch(launch, &mut [arg(&params)]) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::chip::tests::chip;
    use super::super::images::known;
    use super::*;

    #[test]
    fn matrix_units_where_they_can_be_had() {
        for compute in [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0)] {
            let chip = chip(compute);
            for dtype in [DenseType::F32, DenseType::F16, DenseType::BF16] {
                for head_dim in (4..=256).step_by(4) {
                    let plan = prefill(&chip, dtype, head_dim);
                    assert!(known(plan.kernel).is_some(), "{}", plan.kernel);
                    // 7.5 has no room for the largest heads.
                    let heads = AttentionShape { heads: 2, kv_heads: 1, head_dim };
                    assert_eq!(check_heads(&chip, dtype, heads).is_ok(), compute > (7, 5) || head_dim <= 232);
                    let matrix = plan.kernel.contains("mma");
                    let form = matches!(head_dim, 64 | 96 | 128 | 256) && dtype != DenseType::F32;
                    let room = head_dim != 256 || chip.shared_per_block >= 133_120;
                    assert_eq!(matrix, form && room && compute >= (8, 0), "{compute:?} {dtype} {head_dim}");
                    assert_eq!(plan.queries, if matrix { 64 } else { 32 });
                    if matrix {
                        assert_eq!(plan.kernel, format!("bitnet_prefill_attention_mma_{dtype}_{head_dim}"));
                    }
                }
                assert!(attention::kernels(dtype).iter().all(|kernel| known(kernel).is_some()));
            }
        }
    }
}
