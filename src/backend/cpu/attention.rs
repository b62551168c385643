//! Rotary embedding, the KV cache and attention on the CPU.
//!
//! Keys lie in blocks of 16 positions, transposed, so that 16 scores are one vector and need no horizontal sum:
//!
//! ```text
//! K: [slot][kv head][position / 16][dim][position % 16]      V: [slot][kv head][position][dim]
//! ```
//!
//! Attention walks over 64 positions at a time with an online softmax, always in the same blocks from position
//! 0 on. A token's result therefore does not depend on how the prompt was cut or what else is in the batch.

use super::isa::{Isa, per_isa};
use super::lanes::{LANES, Stored, exp, max_lanes, sum_lanes};
use super::pool::{Pool, SendPtr};
use crate::backend::DenseType;
use crate::backend::attention::{AttentionShape, RopeTable, RowPosition};
use crate::backend::host::AlignedBuffer;
use crate::{Error, Result};
use half::{bf16, f16};

/// Partial sums of a score.
const SUMS: usize = 8;
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
        let size = [slots, capacity, shape.kv_heads, shape.head_dim, dtype.size()];
        let size = size.iter().try_fold(1usize, |a, b| a.checked_mul(*b)).unwrap_or(usize::MAX);
        let (keys, values) = (AlignedBuffer::zeroed(size)?, AlignedBuffer::zeroed(size)?);
        Ok(Self { dtype, shape, slots, capacity, keys, values })
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
            let head_start = (row.slot * shape.kv_heads + head) * capacity * dim;
            let k_start = head_start + row.position / LANES * LANES * dim + row.position % LANES;
            let v_start = head_start + row.position * dim;
            for d in 0..dim {
                // SAFETY: slot < slots and position < capacity (checked by the caller), so both lie inside the
                // buffers; this call alone writes this head.
                unsafe {
                    *keys.get().add(k_start + d * LANES) = E::narrow(rotated[d]);
                    *values.get().add(v_start + d) = E::narrow(x[v_at + d]);
                }
            }
        }
    }
}

per_isa! {
    /// One token's query heads of one KV head over positions 0 … last; `out` is `[group][dim]`.
    fn attend<E: Stored>(q: &[f32], keys: &[E], values: &[E], last: usize, dim: usize, scale: f32, out: &mut [f32]) {
        let group = q.len() / dim;
        let length = last + 1;
        let mut wide = [0f32; AttentionShape::MAX_HEAD_DIM * LANES];
        let mut scores = [[0f32; BLOCK]; AttentionShape::MAX_GROUP];
        let mut max = [f32::NEG_INFINITY; AttentionShape::MAX_GROUP];
        let mut total = [0f32; AttentionShape::MAX_GROUP];
        out.fill(0.0);
        for start in (0..length).step_by(BLOCK) {
            let count = BLOCK.min(length - start);
            for sub in 0..count.div_ceil(LANES) {
                let block = &keys[(start + sub * LANES) * dim..][..dim * LANES];
                for (w, k) in wide.iter_mut().zip(block) {
                    *w = k.widen();
                }
                for g in 0..group {
                    let q = &q[g * dim..][..dim];
                    // Eight partial sums: short chains round less, and as many additions are in flight.
                    let mut acc = [[0f32; LANES]; SUMS];
                    let (wholes, rest) = wide[..dim * LANES].as_chunks::<{ SUMS * LANES }>();
                    for (k, q) in wholes.iter().zip(q.as_chunks::<SUMS>().0) {
                        for a in 0..SUMS {
                            for i in 0..LANES {
                                acc[a][i] += q[a] * k[a * LANES + i];
                            }
                        }
                    }
                    for (a, (k, q)) in rest.as_chunks::<LANES>().0.iter().zip(&q[wholes.len() * SUMS..]).enumerate() {
                        for i in 0..LANES {
                            acc[a][i] += q * k[i];
                        }
                    }
                    for i in 0..LANES {
                        let low = (acc[0][i] + acc[1][i]) + (acc[2][i] + acc[3][i]);
                        let high = (acc[4][i] + acc[5][i]) + (acc[6][i] + acc[7][i]);
                        scores[g][sub * LANES + i] = (low + high) * scale;
                    }
                }
            }
            for g in 0..group {
                let s = &mut scores[g];
                s[count..].fill(f32::NEG_INFINITY);
                let mut top = [f32::NEG_INFINITY; LANES];
                for c in s.as_chunks::<LANES>().0 {
                    for i in 0..LANES {
                        top[i] = if c[i] > top[i] { c[i] } else { top[i] };
                    }
                }
                let new_max = max[g].max(max_lanes(top));
                let shrink = exp(max[g] - new_max);
                max[g] = new_max;
                let mut sum = [0f32; LANES];
                for c in s.as_chunks_mut::<LANES>().0 {
                    for i in 0..LANES {
                        c[i] = exp(c[i] - new_max);
                        sum[i] += c[i];
                    }
                }
                total[g] = total[g] * shrink + sum_lanes(sum);
                add_values(&s[..count], &values[start * dim..], dim, shrink, &mut out[g * dim..][..dim]);
            }
        }
        for g in 0..group {
            for o in &mut out[g * dim..][..dim] {
                *o /= total[g];
            }
        }
    }
}

/// `out = out · shrink + Σ_j p[j] · values[j]`: four partial sums over j mod 4, which halves the rounding error of
/// one long sum and keeps four additions in flight.
#[inline(always)]
fn add_values<E: Stored>(p: &[f32], values: &[E], dim: usize, shrink: f32, out: &mut [f32]) {
    #[inline(always)]
    fn columns<E: Stored, const N: usize>(p: &[f32], values: &[E], dim: usize, shrink: f32, out: &mut [f32; N]) {
        let mut acc = [[0f32; N]; 4];
        let (fours, rest) = p.as_chunks::<4>();
        for (j, p) in fours.iter().enumerate() {
            for a in 0..4 {
                let v = &values[(4 * j + a) * dim..][..N];
                for i in 0..N {
                    acc[a][i] += p[a] * v[i].widen();
                }
            }
        }
        for (a, p) in rest.iter().enumerate() {
            let v = &values[(4 * fours.len() + a) * dim..][..N];
            for i in 0..N {
                acc[a][i] += p * v[i].widen();
            }
        }
        for i in 0..N {
            out[i] = out[i] * shrink + ((acc[0][i] + acc[1][i]) + (acc[2][i] + acc[3][i]));
        }
    }
    let (wide, rest) = out.as_chunks_mut::<LANES>();
    let done = wide.len() * LANES;
    for (c, out) in wide.iter_mut().enumerate() {
        columns(p, &values[c * LANES..], dim, shrink, out);
    }
    let (pairs, _) = rest.as_chunks_mut::<2>();
    for (c, out) in pairs.iter_mut().enumerate() {
        columns(p, &values[done + 2 * c..], dim, shrink, out);
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
        let (t, head) = (task / shape.kv_heads, task % shape.kv_heads);
        let row = rows[t];
        let (cos, sin) = rope.at(row.position);
        let width = group * dim;
        let x = &qkv[t * shape.qkv_dim() + head * width..][..width];
        let mut q = [0f32; AttentionShape::MAX_HEAD_DIM * AttentionShape::MAX_GROUP];
        let q = &mut q[..width];
        for (x, q) in x.chunks_exact(dim).zip(q.chunks_exact_mut(dim)) {
            rotate(x, cos, sin, q);
        }
        let start = (row.slot * shape.kv_heads + head) * capacity * dim;
        // SAFETY: task < tokens · kv_heads, so the range lies inside `out` (checked by the caller) and belongs
        // to this task alone.
        let out = unsafe { std::slice::from_raw_parts_mut(base.get().add((t * shape.kv_heads + head) * width), width) };
        let (keys, values) = (&keys[start..][..capacity * dim], &values[start..][..capacity * dim]);
        attend::<E>(isa, q, keys, values, row.position, dim, shape.scale(), out);
    });
}
