//! Rotary embedding, the KV cache and attention on the CPU.
//!
//! Both lie in blocks of 16 positions. Keys are transposed, so that 16 scores are one vector and need no horizontal
//! sum; values are cut into 16 dimensions (padded), so that a vector of the result reads one contiguous piece:
//!
//! ```text
//! K: [slot][kv head][position / 16][dim][position % 16]
//! V: [slot][kv head][position / 16][dim / 16][position % 16][dim % 16]
//! ```
//!
//! Attention walks over 64 positions at a time with an online softmax, always in the same blocks from position
//! 0 on. A token's result therefore does not depend on how the prompt was cut or what else is in the batch.

use super::isa::{Isa, Level, per_isa};
use super::lanes::{LANES, Stored};
use super::pool::{Pool, SendPtr};
use super::scratch::with_scratch;
use crate::backend::DenseType;
use crate::backend::attention::{AttentionShape, RopeTable, RowPosition};
use crate::backend::host::AlignedBuffer;
use crate::{Error, Result};
use half::{bf16, f16};

/// Positions of a block of the online softmax.
const BLOCK: usize = 64;

/// One layer's keys and values of all slots; memory becomes resident as positions are written.
#[derive(Debug)]
pub struct CpuKv {
    dtype: DenseType,
    shape: AttentionShape,
    slots: usize,
    capacity: usize,
    keys: AlignedBuffer,
    values: AlignedBuffer,
}

impl CpuKv {
    /// Room for `slots` sequences of `positions` tokens each.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the system refuses the memory.
    pub fn new(dtype: DenseType, shape: AttentionShape, slots: usize, positions: usize) -> Result<Self> {
        let capacity = positions.next_multiple_of(LANES);
        let buffer = |dim: usize| {
            let size = [slots, capacity, shape.kv_heads, dim, dtype.size()];
            let size = size.iter().try_fold(1usize, |a, b| a.checked_mul(*b));
            AlignedBuffer::zeroed(size.unwrap_or(usize::MAX))
        };
        let (keys, values) = (buffer(shape.head_dim)?, buffer(shape.head_dim.next_multiple_of(LANES))?);
        Ok(Self { dtype, shape, slots, capacity, keys, values })
    }

    /// Bytes of keys and values that attention reads for these rows, each on its own.
    pub(crate) fn bytes_read(&self, rows: &[RowPosition]) -> usize {
        let positions: usize = rows.iter().map(|row| row.position + 1).sum();
        positions * 2 * self.shape.kv_heads * self.shape.head_dim * self.dtype.size()
    }
}

/// Rotates the first `dim` elements of `x`, pairs (i, i + dim / 2), by one position's angles.
///
/// In f64 with one rounding: the softmax multiplies errors of queries and keys by the size of the scores, and
/// there are few elements.
#[inline(always)]
pub(super) fn rotate(x: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
    let half = cos.len();
    let (x1, x2) = (&x[..half], &x[half..2 * half]);
    let (o1, o2) = out[..2 * half].split_at_mut(half);
    for i in 0..half {
        let (x1, x2) = (f64::from(x1[i]), f64::from(x2[i]));
        let (cos, sin) = (f64::from(cos[i]), f64::from(sin[i]));
        o1[i] = (x1 * cos - x2 * sin) as f32;
        o2[i] = (x2 * cos + x1 * sin) as f32;
    }
}

per_isa! {
    /// Writes one KV head's rotated keys and values of all tokens.
    fn write_head<E: Stored>(
        qkv: &[f32],
        head: usize,
        rows: &[RowPosition],
        shape: AttentionShape,
        rope: &RopeTable,
        capacity: usize,
        keys: SendPtr<E>,
        values: SendPtr<E>,
    ) {
        let dim = shape.head_dim;
        let (k_at, v_at) = (shape.heads * dim + head * dim, (shape.heads + shape.kv_heads + head) * dim);
        let mut rotated = [0f32; AttentionShape::MAX_HEAD_DIM];
        for (row, x) in rows.iter().zip(qkv.chunks_exact(shape.qkv_dim())) {
            let (cos, sin) = rope.at(row.position);
            rotate(&x[k_at..k_at + dim], cos, sin, &mut rotated);
            let before = (row.slot * shape.kv_heads + head) * capacity + row.position / LANES * LANES;
            let lane = row.position % LANES;
            let k_start = before * dim + lane;
            let v_start = before * dim.next_multiple_of(LANES) + lane * LANES;
            for d in 0..dim {
                // SAFETY: slot < slots and position < capacity (checked by the caller), so both lie inside the
                // buffers; this call alone writes this head.
                unsafe {
                    *keys.get().add(k_start + d * LANES) = E::narrow(rotated[d]);
                    let at = v_start + d / LANES * LANES * LANES + d % LANES;
                    *values.get().add(at) = E::narrow(x[v_at + d]);
                }
            }
        }
    }
}

/// Attention of one token for one KV head, once per vector width.
macro_rules! attend_for {
    ($module:ident, $simd:ident $(, $feature:literal)?) => {
        mod $module {
            use super::super::lanes::{LANES, Stored, max_lanes, sum_lanes};
            use super::super::simd::$simd::*;
            use super::{AttentionShape, BLOCK, Block};

            /// Partial sums of a score: short chains round less, and as many additions are in flight.
            const SUMS: usize = 8;

            /// 16 scores each of N queries: times one block of keys `[dim][16]`, which is loaded once for all.
            #[inline]
            $(#[target_feature(enable = $feature)])?
            fn scores<E: Stored, const N: usize>(q: [&[f32]; N], keys: &[[E; LANES]], scale: f32) -> [V; N] {
                let mut acc = [[splat(0.0); SUMS]; N];
                let (rows, last_rows) = keys.as_chunks::<SUMS>();
                for (i, k) in rows.iter().enumerate() {
                    for a in 0..SUMS {
                        let k = load_stored(&k[a]);
                        for n in 0..N {
                            acc[n][a] = add(acc[n][a], mul(splat(q[n][i * SUMS + a]), k));
                        }
                    }
                }
                for (a, k) in last_rows.iter().enumerate() {
                    for n in 0..N {
                        let q = q[n][rows.len() * SUMS + a];
                        acc[n][a] = add(acc[n][a], mul(splat(q), load_stored(k)));
                    }
                }
                let mut out = [splat(0.0); N];
                for n in 0..N {
                    let acc = acc[n];
                    let low = add(add(acc[0], acc[1]), add(acc[2], acc[3]));
                    let high = add(add(acc[4], acc[5]), add(acc[6], acc[7]));
                    out[n] = mul(add(low, high), splat(scale));
                }
                out
            }

            /// Σ_j p[j] · values[j] for N queries over the first `count` positions of 16 dimensions, in four partial
            /// sums over j mod 4. `blocks` are `stride` apart, and loaded once for all.
            #[inline]
            $(#[target_feature(enable = $feature)])?
            fn weighted<E: Stored, const N: usize>(
                p: [&[f32; BLOCK]; N],
                count: usize,
                blocks: &[Block<E>],
                stride: usize,
            ) -> [V; N] {
                let mut acc = [[splat(0.0); 4]; N];
                for sub in 0..count.div_ceil(LANES) {
                    // Positions that were never written, or by another sequence, are not even multiplied by zero.
                    let rows = (count - sub * LANES).min(LANES);
                    let block = &blocks[sub * stride];
                    let at = sub * LANES;
                    let fours = block.as_chunks::<4>().0;
                    for (i, v) in fours.iter().enumerate().take(rows / 4) {
                        for a in 0..4 {
                            let v = load_stored(&v[a]);
                            for n in 0..N {
                                acc[n][a] = add(acc[n][a], mul(splat(p[n][at + 4 * i + a]), v));
                            }
                        }
                    }
                    for (a, j) in (rows / 4 * 4..rows).enumerate() {
                        for n in 0..N {
                            acc[n][a] = add(acc[n][a], mul(splat(p[n][at + j]), load_stored(&block[j])));
                        }
                    }
                }
                let mut out = [splat(0.0); N];
                for n in 0..N {
                    out[n] = add(add(acc[n][0], acc[n][1]), add(acc[n][2], acc[n][3]));
                }
                out
            }

            /// Exponentials of a block's scores, the block's new maximum, and what shrinks the earlier sums.
            #[inline]
            $(#[target_feature(enable = $feature)])?
            fn softmax(s: &mut [f32; BLOCK], max_before: f32) -> (f32, f32, f32) {
                let (chunks, mut lanes) = (s.as_chunks_mut::<LANES>().0, [0f32; LANES]);
                let mut top = splat(f32::NEG_INFINITY);
                for c in chunks.iter() {
                    top = max(load(c), top);
                }
                store(top, &mut lanes);
                let new_max = max_before.max(max_lanes(lanes));
                let mut sum = splat(0.0);
                for c in chunks.iter_mut() {
                    let e = exp(sub(load(c), splat(new_max)));
                    store(e, c);
                    sum = add(sum, e);
                }
                store(sum, &mut lanes);
                (new_max, super::super::lanes::exp(max_before - new_max), sum_lanes(lanes))
            }

            /// Query heads `q` `[group][dim]` over positions 0 … last; `out` is `[group][dim]`.
            $(#[target_feature(enable = $feature)])?
            pub(super) fn attend<E: Stored>(
                q: &[f32],
                keys: &[E],
                values: &[E],
                last: usize,
                dim: usize,
                scale: f32,
                out: &mut [f32],
            ) {
                let group = q.len() / dim;
                let length = last + 1;
                let columns = dim.div_ceil(LANES);
                let keys = keys.as_chunks::<LANES>().0;
                let values = values.as_chunks::<LANES>().0.as_chunks::<LANES>().0;
                let mut scored = [[0f32; BLOCK]; AttentionShape::MAX_GROUP];
                let mut max_of = [f32::NEG_INFINITY; AttentionShape::MAX_GROUP];
                let mut total = [0f32; AttentionShape::MAX_GROUP];
                out.fill(0.0);
                for start in (0..length).step_by(BLOCK) {
                    let count = BLOCK.min(length - start);
                    for sub in 0..count.div_ceil(LANES) {
                        let block = &keys[(start / LANES + sub) * dim..][..dim];
                        for g in (0..group).step_by(2) {
                            let q = &q[g * dim..];
                            if g + 1 < group {
                                let [one, two] = scores([&q[..dim], &q[dim..2 * dim]], block, scale);
                                store(one, &mut scored[g].as_chunks_mut().0[sub]);
                                store(two, &mut scored[g + 1].as_chunks_mut().0[sub]);
                            } else {
                                let [one] = scores([&q[..dim]], block, scale);
                                store(one, &mut scored[g].as_chunks_mut().0[sub]);
                            }
                        }
                    }
                    let mut shrunk = [0f32; AttentionShape::MAX_GROUP];
                    for g in 0..group {
                        let s = &mut scored[g];
                        s[count..].fill(f32::NEG_INFINITY);
                        let (new_max, shrink, sum) = softmax(s, max_of[g]);
                        max_of[g] = new_max;
                        total[g] = total[g] * shrink + sum;
                        shrunk[g] = shrink;
                    }
                    let blocks = &values[start / LANES * columns..];
                    let mut add_to = |g: usize, c: usize, sums: V| {
                        let out = &mut out[g * dim..][..dim];
                        let end = dim.min((c + 1) * LANES);
                        let mut lanes = [0f32; LANES];
                        store(sums, &mut lanes);
                        for (o, sum) in out[c * LANES..end].iter_mut().zip(lanes) {
                            *o = *o * shrunk[g] + sum;
                        }
                    };
                    for g in (0..group).step_by(4) {
                        for c in 0..columns {
                            let blocks = &blocks[c..];
                            if let Some([p0, p1, p2, p3]) = scored[g..group].first_chunk() {
                                let sums = weighted([p0, p1, p2, p3], count, blocks, columns);
                                for (n, sums) in sums.into_iter().enumerate() {
                                    add_to(g + n, c, sums);
                                }
                            } else {
                                for n in g..group {
                                    let [sums] = weighted([&scored[n]], count, blocks, columns);
                                    add_to(n, c, sums);
                                }
                            }
                        }
                    }
                }
                for g in 0..group {
                    for o in &mut out[g * dim..][..dim] {
                        *o /= total[g];
                    }
                }
            }
        }
    };
}

attend_for!(attend_portable, portable);
#[cfg(target_arch = "x86_64")]
attend_for!(attend_avx2, avx2, "avx2");
#[cfg(target_arch = "x86_64")]
attend_for!(attend_avx512, avx512, "avx512f");

/// A block of values: 16 positions of 16 dimensions.
type Block<E> = [[E; LANES]; LANES];

/// One token's query heads `q` `[group][dim]` of one KV head over positions 0 … last; `out` is `[group][dim]`.
#[allow(clippy::too_many_arguments)]
fn attend<E: Stored>(
    isa: Isa,
    q: &[f32],
    keys: &[E],
    values: &[E],
    last: usize,
    dim: usize,
    scale: f32,
    out: &mut [f32],
) {
    match isa.level() {
        Level::Portable => attend_portable::attend(q, keys, values, last, dim, scale, out),
        // SAFETY: an `Isa` of this level is only made after the CPU was found to have the features.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { attend_avx2::attend(q, keys, values, last, dim, scale, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { attend_avx512::attend(q, keys, values, last, dim, scale, out) },
    }
}

/// Rotates queries and keys, appends keys and values to the cache, and attends; see `backend::attention`.
#[allow(clippy::too_many_arguments)]
pub(super) fn attention(
    isa: Isa,
    pool: &Pool,
    shape: AttentionShape,
    qkv: &[f32],
    rows: &[RowPosition],
    rope: &RopeTable,
    kv: &mut CpuKv,
    out: &mut [f32],
) -> Result<()> {
    let (tokens, out_dim) = (rows.len(), shape.heads * shape.head_dim);
    let fits = kv.shape == shape
        && rope.half_dim() * 2 == shape.head_dim
        && qkv.len() == tokens * shape.qkv_dim()
        && out.len() == tokens * out_dim;
    if !fits {
        return Err(Error::Shape {
            op: "attention",
            reason: format!("{} elements for {tokens} tokens of {shape:?}, cache of {:?}", qkv.len(), kv.shape),
        });
    }
    let limit = kv.capacity.min(rope.positions());
    if let Some(row) = rows.iter().find(|r| r.position >= limit) {
        return Err(Error::ContextFull { needed: row.position + 1, available: limit });
    }
    if let Some(row) = rows.iter().find(|r| r.slot >= kv.slots) {
        return Err(Error::Shape { op: "attention", reason: format!("slot {} of {}", row.slot, kv.slots) });
    }
    match kv.dtype {
        DenseType::F32 => typed::<f32>(isa, pool, qkv, rows, rope, kv, out),
        DenseType::F16 => typed::<f16>(isa, pool, qkv, rows, rope, kv, out),
        DenseType::BF16 => typed::<bf16>(isa, pool, qkv, rows, rope, kv, out),
    }
    Ok(())
}

fn typed<E: Stored>(
    isa: Isa,
    pool: &Pool,
    qkv: &[f32],
    rows: &[RowPosition],
    rope: &RopeTable,
    kv: &mut CpuKv,
    out: &mut [f32],
) {
    let (shape, capacity) = (kv.shape, kv.capacity);
    let (dim, group, tokens) = (shape.head_dim, shape.group(), rows.len());
    let padded = dim.next_multiple_of(LANES);
    let keys = bytemuck::cast_slice_mut::<u8, E>(&mut kv.keys);
    let values = bytemuck::cast_slice_mut::<u8, E>(&mut kv.values);
    let (k_ptr, v_ptr) = (SendPtr(keys.as_mut_ptr()), SendPtr(values.as_mut_ptr()));
    let write = |head: usize| {
        let (k, v) = (SendPtr(k_ptr.get()), SendPtr(v_ptr.get()));
        write_head::<E>(isa, qkv, head, rows, shape, rope, capacity, k, v);
    };
    // One token's keys and values are not worth waking anybody for.
    if tokens == 1 {
        (0..shape.kv_heads).for_each(write)
    } else {
        pool.run(shape.kv_heads, &write)
    }
    let (keys, values) = (&*keys, &*values);
    let base = SendPtr(out.as_mut_ptr());
    pool.run(tokens * shape.kv_heads, &|task| {
        // One head after the other: its keys and values stay in the cache while the tokens pass by.
        let (head, t) = (task / tokens, task % tokens);
        let row = rows[t];
        let (cos, sin) = rope.at(row.position);
        let width = group * dim;
        let x = &qkv[t * shape.qkv_dim() + head * width..][..width];
        let start = (row.slot * shape.kv_heads + head) * capacity;
        // SAFETY: task < tokens · kv_heads, so the range lies inside `out` (checked by the caller) and belongs
        // to this task alone.
        let out = unsafe { std::slice::from_raw_parts_mut(base.get().add((t * shape.kv_heads + head) * width), width) };
        let keys = &keys[start * dim..][..capacity * dim];
        let values = &values[start * padded..][..capacity * padded];
        with_scratch(width, |q| {
            for (x, q) in x.chunks_exact(dim).zip(q.chunks_exact_mut(dim)) {
                rotate(x, cos, sin, q);
            }
            attend::<E>(isa, q, keys, values, row.position, dim, shape.scale(), out);
        });
    });
}
