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

mod blocks;

use super::isa::{Isa, per_isa};
use super::lanes::{LANES, Stored};
use super::pool::{Pool, SendPtr};
use super::scratch::{grown, with_scratch};

use crate::backend::DenseType;
use crate::backend::attention::{AttentionShape, RopeTable, RowPosition};
use crate::backend::host::AlignedBuffer;
use crate::{Error, Result};
use blocks::{BLOCK, Cached, Softmax, finish, score, soften, weigh};
use half::{bf16, f16};

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
    scratch: &mut Shared,
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
        DenseType::F32 => typed::<f32>(isa, pool, qkv, rows, rope, kv, scratch, out),
        DenseType::F16 => typed::<f16>(isa, pool, qkv, rows, rope, kv, scratch, out),
        DenseType::BF16 => typed::<bf16>(isa, pool, qkv, rows, rope, kv, scratch, out),
    }
    Ok(())
}

#[allow(clippy::too_many_arguments)]
fn typed<E: Stored>(
    isa: Isa,
    pool: &Pool,
    qkv: &[f32],
    rows: &[RowPosition],
    rope: &RopeTable,
    kv: &mut CpuKv,
    scratch: &mut Shared,
    out: &mut [f32],
) {
    let (shape, capacity) = (kv.shape, kv.capacity);
    let tokens = rows.len();
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
    let attending = Attending {
        isa,
        shape,
        qkv,
        rows,
        rope,
        capacity,
        keys: &*keys,
        values: &*values,
        out: SendPtr(out.as_mut_ptr()),
    };
    // Too few heads to keep all threads busy: a head's positions and dimensions are shared out too.
    let longest = rows.iter().map(|r| r.position + 1).max().unwrap_or(0);
    if pool.threads() > 1 && tokens * shape.kv_heads < 4 * pool.threads() && longest > 2 * BLOCK {
        attending.shared(pool, longest, scratch);
    } else {
        // One head after the other: its keys and values stay in the cache while the tokens pass by.
        pool.run(tokens * shape.kv_heads, &|task| attending.whole(task % tokens, task / tokens));
    }
}

/// Buffers of attention that is shared out by positions.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Queries, scores and what shrinks them.
    floats: Vec<f32>,
    states: Vec<Softmax>,
}

/// What every task of an attention reads, and where it writes.
struct Attending<'a, E> {
    isa: Isa,
    shape: AttentionShape,
    qkv: &'a [f32],
    rows: &'a [RowPosition],
    rope: &'a RopeTable,
    capacity: usize,
    keys: &'a [E],
    values: &'a [E],
    out: SendPtr<f32>,
}

impl<E: Stored> Attending<'_, E> {
    /// Columns of 16 dimensions of a head.
    fn columns(&self) -> usize {
        self.shape.head_dim.div_ceil(LANES)
    }

    /// The keys and values that token `t` sees of a KV head.
    fn cached(&self, t: usize, head: usize) -> Cached<'_, E> {
        let (row, dim, padded) = (self.rows[t], self.shape.head_dim, LANES * self.columns());
        let start = (row.slot * self.shape.kv_heads + head) * self.capacity;
        Cached {
            keys: &self.keys[start * dim..][..self.capacity * dim],
            values: &self.values[start * padded..][..self.capacity * padded],
            length: row.position + 1,
            dim,
            scale: self.shape.scale(),
        }
    }

    /// Rotates the queries of token `t` for a KV head into `q` `[group][dim]`.
    fn rotated(&self, t: usize, head: usize, q: &mut [f32]) {
        let (cos, sin) = self.rope.at(self.rows[t].position);
        let x = &self.qkv[t * self.shape.qkv_dim() + head * q.len()..][..q.len()];
        let dim = self.shape.head_dim;
        for (x, q) in x.chunks_exact(dim).zip(q.chunks_exact_mut(dim)) {
            rotate(x, cos, sin, q);
        }
    }

    /// Writes columns from `first` on of a token's heads, which belong to the caller's task alone.
    fn put(&self, t: usize, head: usize, first: usize, sums: &[[f32; LANES]], state: &Softmax) {
        let (dim, group) = (self.shape.head_dim, self.shape.group());
        finish(sums, state, group, |c, g, values| {
            let at = (first + c) * LANES;
            let len = LANES.min(dim - at);
            let start = ((t * self.shape.kv_heads + head) * group + g) * dim + at;
            // SAFETY: t, head and g are inside the shape and at + len <= dim, so the range lies inside the output
            // (checked by the caller); no other task writes these columns of these heads.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.get().add(start), len) };
            out.copy_from_slice(&values[..len]);
        });
    }

    /// One token and KV head.
    fn whole(&self, t: usize, head: usize) {
        let (head_of, group) = (self.cached(t, head), self.shape.group());
        let (width, columns) = (group * self.shape.head_dim, self.columns());
        with_scratch(width + columns * group * LANES, |scratch| {
            let (q, sums) = scratch.split_at_mut(width);
            self.rotated(t, head, q);
            sums.fill(0.0);
            let sums = sums.as_chunks_mut().0;
            let mut scored = [[0f32; BLOCK]; AttentionShape::MAX_GROUP];
            let mut shrink = [0f32; AttentionShape::MAX_GROUP];
            let (scored, mut state) = (&mut scored[..group], Softmax::new());
            for block in 0..head_of.blocks() {
                score(self.isa, &head_of, q, block, scored);
                soften(self.isa, &head_of, block, scored, &mut state, &mut shrink);
                weigh(self.isa, &head_of, block, scored, &shrink, 0..columns, sums);
            }
            self.put(t, head, 0, sums, &state);
        });
    }

    /// All tokens and heads in three dispatches: scores by blocks, the softmax by heads, values by columns.
    fn shared(&self, pool: &Pool, longest: usize, scratch: &mut Shared) {
        let (heads, group, columns) = (self.shape.kv_heads, self.shape.group(), self.columns());
        let (pairs, blocks, width) = (self.rows.len() * heads, longest.div_ceil(BLOCK), group * self.shape.head_dim);
        let of = |pair: usize| (pair / heads, pair % heads);
        let floats = grown(&mut scratch.floats, pairs * (width + blocks * group * (BLOCK + 1)));
        let (q, rest) = floats.split_at_mut(pairs * width);
        let (scored, shrink) = rest.split_at_mut(pairs * blocks * group * BLOCK);
        let scored = scored.as_chunks_mut::<BLOCK>().0;
        for (pair, q) in q.chunks_exact_mut(width).enumerate() {
            let (t, head) = of(pair);
            self.rotated(t, head, q);
        }
        pool.for_each_chunk(scored, group, |i, scored| {
            let (pair, block) = (i / blocks, i % blocks);
            let (t, head) = of(pair);
            let cached = self.cached(t, head);
            if block < cached.blocks() {
                score(self.isa, &cached, &q[pair * width..][..width], block, scored);
            }
        });
        let states = grown(&mut scratch.states, pairs);
        states.fill(Softmax::new());
        let (scores_of, shrink_of) = (SendPtr(scored.as_mut_ptr()), SendPtr(shrink.as_mut_ptr()));
        pool.for_each_chunk(states, 1, |pair, state| {
            let (t, head) = of(pair);
            let cached = self.cached(t, head);
            for block in 0..cached.blocks() {
                let at = (pair * blocks + block) * group;
                // SAFETY: both have `group` elements for each block of each pair, and this task alone has this pair.
                let (scored, shrink) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(scores_of.get().add(at), group),
                        std::slice::from_raw_parts_mut(shrink_of.get().add(at), group),
                    )
                };
                soften(self.isa, &cached, block, scored, &mut state[0], shrink);
            }
        });
        let (scored, shrink) = (&*scored, &*shrink);
        // Pieces of whole columns, about four tasks a thread.
        let pieces = (4 * pool.threads()).div_ceil(pairs).next_power_of_two().min(columns);
        let per_piece = columns.div_ceil(pieces);
        let pieces = columns.div_ceil(per_piece);
        pool.run(pairs * pieces, &|task| {
            let (pair, first) = (task / pieces, task % pieces * per_piece);
            let (t, head) = of(pair);
            let (cached, range) = (self.cached(t, head), first..columns.min(first + per_piece));
            with_scratch(range.len() * group * LANES, |sums| {
                sums.fill(0.0);
                let sums = sums.as_chunks_mut().0;
                for block in 0..cached.blocks() {
                    let at = (pair * blocks + block) * group;
                    let (scored, shrink) = (&scored[at..at + group], &shrink[at..at + group]);
                    weigh(self.isa, &cached, block, scored, shrink, range.clone(), sums);
                }
                self.put(t, head, first, sums, &states[pair]);
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step on one thread and on several, which share out what one does alone.
    #[test]
    fn a_step_has_the_same_bits_however_it_is_shared_out() {
        let cases = [(1, 4, 64), (5, 1, 20), (2, 3, 128), (3, 5, 40)];
        for ((kv_heads, group, dim), positions) in cases.into_iter().zip([129, 200, 331, 256]) {
            let shape = AttentionShape::new(kv_heads * group, kv_heads, dim).unwrap();
            let rope = RopeTable::new(positions + 2, dim, 10_000.0).unwrap();
            let row = |position| RowPosition { slot: 0, position };
            let values = |tokens: usize, seed: usize| -> Vec<f32> {
                let value = |i: usize| ((i.wrapping_mul(2_654_435_761) + seed * 977) % 1009) as f32 / 250.0 - 2.0;
                (0..tokens * shape.qkv_dim()).map(value).collect()
            };
            for dtype in [DenseType::F32, DenseType::BF16] {
                let mut first: Option<Vec<f32>> = None;
                for isa in Isa::available() {
                    for threads in [1, 2, 7] {
                        let (pool, mut scratch) = (Pool::new(threads), Shared::default());
                        let mut kv = CpuKv::new(dtype, shape, 1, positions + 2).unwrap();
                        let mut got = Vec::new();
                        // A prompt, one token, and two at a time.
                        for (from, to) in [(0, positions - 1), (positions - 1, positions), (positions, positions + 2)] {
                            let rows: Vec<_> = (from..to).map(row).collect();
                            let mut out = vec![f32::NAN; rows.len() * shape.heads * dim];
                            let qkv = values(rows.len(), from);
                            attention(isa, &pool, shape, &qkv, &rows, &rope, &mut kv, &mut scratch, &mut out).unwrap();
                            got.extend(out);
                        }
                        assert!(got.iter().all(|v| v.is_finite()));
                        let same = first.get_or_insert_with(|| got.clone()) == &got;
                        assert!(same, "{kv_heads} heads of {group}, {dim} wide, {isa:?}, {threads} threads");
                    }
                }
            }
        }
    }
}
