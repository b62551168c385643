//! Low-rank updates, `out += scaling · B · (A · x)`, with A and B in f32.
//!
//! A is read row by row like any dense weight. B is short and wide (16 columns where it has 2560 rows), so lanes run
//! over its rows: blocks of 32 rows are stored one after the other, each column by column, and are read in a stream.
//!
//! ```text
//! block 0: B[0..32][0]  B[0..32][1]  …  B[0..32][rank-1]     block 1: B[32..64][0]  …
//! ```
//!
//! Every (row, token) is one chain in one order, so a token's update does not depend on what is computed with it.

use super::dense::rows_times_tokens;
use super::isa::{Isa, per_isa};
use super::pool::{Pool, SendPtr};
use crate::backend::host::AlignedBuffer;
use crate::{Error, Result};

/// Rows of B in a block.
const BLOCK: usize = 32;
/// Tokens that share one reading of a block.
const PASS_TOKENS: usize = 4;
/// Tokens of a task: their activations stay in the second-level cache.
const TASK_TOKENS: usize = 16;
/// Rows of A in a task, where there are fewer tokens than that: 40 KB at a width of 2560.
const TASK_ROWS: usize = 4;
/// Blocks of B in a task: 32 KB at rank 16.
const TASK_BLOCKS: usize = 16;

/// A low-rank update of a weight `[rows, cols]`.
#[derive(Debug)]
pub struct CpuLowRank {
    rank: usize,
    rows: usize,
    cols: usize,
    scaling: f32,
    a: AlignedBuffer,
    b: AlignedBuffer,
}

impl CpuLowRank {
    /// Packs row-major A `[rank, cols]` and B `[rows, rank]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `a` or `b` is not a matrix with `rank` rows or columns, [`Error::Unavailable`] if memory is
    /// short.
    pub fn pack(rank: usize, a: &[f32], b: &[f32], scaling: f32) -> Result<Self> {
        if rank == 0 || a.is_empty() || b.is_empty() || !a.len().is_multiple_of(rank) || !b.len().is_multiple_of(rank) {
            let reason = format!("A of {} and B of {} elements do not fit rank {rank}", a.len(), b.len());
            return Err(Error::Shape { op: "low-rank update", reason });
        }
        let (rows, cols) = (b.len() / rank, a.len() / rank);
        let mut packed_a = AlignedBuffer::huge(size_of_val(a))?;
        packed_a.copy_from_slice(bytemuck::cast_slice(a));
        let mut packed_b = AlignedBuffer::huge(rows.div_ceil(BLOCK) * BLOCK * rank * size_of::<f32>())?;
        let blocks = bytemuck::cast_slice_mut::<u8, f32>(&mut packed_b).chunks_exact_mut(rank * BLOCK);
        for (block, b) in blocks.zip(b.chunks(rank * BLOCK)) {
            for (i, row) in b.chunks_exact(rank).enumerate() {
                row.iter().enumerate().for_each(|(j, v)| block[j * BLOCK + i] = *v);
            }
        }
        Ok(Self { rank, rows, cols, scaling, a: packed_a, b: packed_b })
    }

    /// Inner dimension.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The stored bytes of A and of B.
    pub fn data(&self) -> [&[u8]; 2] {
        [&self.a, &self.b]
    }

    fn a(&self) -> &[f32] {
        bytemuck::cast_slice(&self.a)
    }

    fn b(&self) -> &[f32] {
        bytemuck::cast_slice(&self.b)
    }
}

/// Adds one block's rows, `count` of them, for T tokens.
#[inline(always)]
fn pass<const T: usize>(block: &[f32], inner: [&[f32]; T], scaling: f32, out: [&mut [f32]; T]) {
    let mut acc = [[0f32; BLOCK]; T];
    for (j, column) in block.as_chunks::<BLOCK>().0.iter().enumerate() {
        for t in 0..T {
            let u = inner[t][j];
            for i in 0..BLOCK {
                acc[t][i] += column[i] * u;
            }
        }
    }
    for (out, acc) in out.into_iter().zip(acc) {
        for (o, a) in out.iter_mut().zip(acc) {
            *o += scaling * a;
        }
    }
}

per_isa! {
    /// Blocks of B times tokens of `inner`, rows of which are `inner_stride` apart: added to `out[t · stride + row]`
    /// for `rows` rows.
    fn add_blocks(
        b: &[f32],
        rank: usize,
        inner: &[f32],
        inner_stride: usize,
        scaling: f32,
        rows: usize,
        stride: usize,
        out: SendPtr<f32>,
    ) {
        let tokens = inner.len().div_ceil(inner_stride);
        let token = |t: usize| &inner[t * inner_stride..][..rank];
        for (k, block) in b.chunks_exact(rank * BLOCK).enumerate() {
            let count = BLOCK.min(rows - k * BLOCK);
            // SAFETY: the caller gives this call the elements t · stride + row for all tokens t and rows of `b`, and
            // the slices of different tokens do not overlap, as count ≤ stride.
            let out = |t: usize| unsafe {
                std::slice::from_raw_parts_mut(out.get().add(t * stride + k * BLOCK), count)
            };
            let mut t = 0;
            while t + PASS_TOKENS <= tokens {
                let inner: [_; PASS_TOKENS] = std::array::from_fn(|i| token(t + i));
                pass(block, inner, scaling, std::array::from_fn(|i| out(t + i)));
                t += PASS_TOKENS;
            }
            for t in t..tokens {
                pass(block, [token(t)], scaling, [out(t)]);
            }
        }
    }
}

/// A part of an operation: rows (or blocks of rows) of one update, for some tokens.
#[derive(Clone, Copy)]
struct Job {
    update: usize,
    first: usize,
    count: usize,
    token: usize,
    tokens: usize,
}

/// Cuts `parts(update)` rows of each update, `step` at a time, and the tokens.
fn jobs(updates: usize, parts: impl Fn(usize) -> usize, step: usize, tokens: usize) -> Vec<Job> {
    let mut jobs = Vec::new();
    for update in 0..updates {
        for first in (0..parts(update)).step_by(step) {
            let count = step.min(parts(update) - first);
            for token in (0..tokens).step_by(TASK_TOKENS) {
                jobs.push(Job { update, first, count, token, tokens: TASK_TOKENS.min(tokens - token) });
            }
        }
    }
    jobs
}

/// `out[t][at + row] += scaling · Σ_j B[row][j] · Σ_k A[j][k] · x[t][k]` for every (`at`, update), whose rows do not
/// overlap; rows of `out` are `stride` long.
pub(super) fn low_rank(
    isa: Isa,
    pool: &Pool,
    updates: &[(usize, &CpuLowRank)],
    x: &[f32],
    stride: usize,
    out: &mut [f32],
) -> Result<()> {
    let Some(cols) = updates.first().map(|(_, w)| w.cols) else { return Ok(()) };
    let tokens = x.len() / cols;
    let mut end = 0;
    let apart = updates.iter().all(|(at, w)| {
        let starts = *at >= end;
        end = at.saturating_add(w.rows);
        starts && w.cols == cols
    });
    if !apart || end > stride || x.len() != tokens * cols || tokens.checked_mul(stride) != Some(out.len()) {
        return Err(Error::Shape {
            op: "low-rank update",
            reason: format!("{} inputs of {cols}, {} outputs in rows of {stride}", x.len(), out.len()),
        });
    }
    // Where each update's inner vector starts.
    let starts: Vec<usize> =
        updates.iter().scan(0, |sum, (_, w)| Some(std::mem::replace(sum, *sum + w.rank))).collect();
    let width: usize = updates.iter().map(|(_, w)| w.rank).sum();
    let mut inner = vec![0f32; tokens * width];
    let base = SendPtr(inner.as_mut_ptr());
    let step = if tokens < TASK_TOKENS { TASK_ROWS } else { usize::MAX };
    let down = jobs(updates.len(), |u| updates[u].1.rank, step, tokens);
    pool.run(down.len(), &|i| {
        let Job { update, first, count, token, tokens } = down[i];
        let a = &updates[update].1.a()[first * cols..][..count * cols];
        // SAFETY: this task alone writes the columns first … first + count of this update for these tokens, which lie
        // inside `inner`, as first + count ≤ rank and token + tokens is at most the number of tokens.
        let out = SendPtr(unsafe { base.get().add(token * width + starts[update] + first) });
        rows_times_tokens::<f32>(isa, a, cols, &x[token * cols..][..tokens * cols], width, false, out);
    });
    let base = SendPtr(out.as_mut_ptr());
    let up = jobs(updates.len(), |u| updates[u].1.rows.div_ceil(BLOCK), TASK_BLOCKS, tokens);
    pool.run(up.len(), &|i| {
        let Job { update, first, count, token, tokens } = up[i];
        let (at, w) = updates[update];
        let b = &w.b()[first * w.rank * BLOCK..][..count * w.rank * BLOCK];
        let rows = (count * BLOCK).min(w.rows - first * BLOCK);
        let inner = &inner[token * width + starts[update]..][..(tokens - 1) * width + w.rank];
        // SAFETY: this task alone writes `rows` rows from at + first · BLOCK on for these tokens; they lie inside the
        // update's own rows, which the check above found inside `stride` and apart from other updates'.
        let out = SendPtr(unsafe { base.get().add(token * stride + at + first * BLOCK) });
        add_blocks(isa, b, w.rank, inner, width, w.scaling, rows, stride, out);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        let value = |i: usize| ((i as u64 + 1).wrapping_mul(seed | 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32;
        (0..n).map(|i| value(i) / 8_388_608.0 - 1.0).collect()
    }

    proptest! {
        #[test]
        fn equals_a_double_precision_product_and_itself_in_any_batch(
            shapes in prop::collection::vec((1usize..40, 1usize..150, 0usize..5), 1..4),
            cols in 1usize..150, tokens in prop::sample::select(vec![1usize, 2, 5, 16, 23, 37]), seed: u64,
        ) {
            let parts: Vec<_> = shapes.iter().enumerate().map(|(i, (rank, rows, _))| {
                let (a, b) = (values(rank * cols, seed ^ i as u64), values(rows * rank, !seed ^ i as u64));
                let packed = CpuLowRank::pack(*rank, &a, &b, 0.5 + i as f32).unwrap();
                (a, b, packed)
            }).collect();
            let (mut updates, mut stride) = (Vec::new(), 0);
            for ((_, rows, gap), (.., packed)) in shapes.iter().zip(&parts) {
                updates.push((stride + gap, packed));
                stride += gap + rows;
            }
            stride += seed as usize % 3;
            let (x, before) = (values(tokens * cols, 3), values(tokens * stride, 4));
            let mut first = None;
            for (isa, threads) in Isa::available().into_iter().flat_map(|isa| [(isa, 1), (isa, 3)]) {
                let pool = Pool::new(threads);
                let mut out = before.clone();
                low_rank(isa, &pool, &updates, &x, stride, &mut out).unwrap();
                for t in 0..tokens {
                    let mut alone = before[t * stride..][..stride].to_vec();
                    low_rank(isa, &pool, &updates, &x[t * cols..][..cols], stride, &mut alone).unwrap();
                    prop_assert_eq!(&alone[..], &out[t * stride..][..stride]);
                }
                prop_assert_eq!(first.get_or_insert(out.clone()), &out);
            }
            let out = first.unwrap();
            for t in 0..tokens {
                let mut want: Vec<f64> = before[t * stride..][..stride].iter().map(|v| f64::from(*v)).collect();
                let mut size: Vec<f64> = want.iter().map(|v| v.abs()).collect();
                for (i, ((at, w), (a, b, _))) in updates.iter().zip(&parts).enumerate() {
                    for r in 0..w.rows() {
                        for j in 0..w.rank() {
                            let terms = (0..cols).map(|k| f64::from(a[j * cols + k]) * f64::from(x[t * cols + k]));
                            let weight = (0.5 + i as f64) * f64::from(b[r * w.rank() + j]);
                            size[at + r] += terms.clone().map(f64::abs).sum::<f64>() * weight.abs();
                            want[at + r] += weight * terms.sum::<f64>();
                        }
                    }
                }
                for i in 0..stride {
                    prop_assert!((f64::from(out[t * stride + i]) - want[i]).abs() <= 1e-5 * size[i] + 1e-30);
                }
            }
        }
    }

    #[test]
    fn operands_that_do_not_fit_are_refused() {
        let pool = Pool::new(1);
        let w = CpuLowRank::pack(2, &[1.0; 6], &[1.0; 8], 1.0).unwrap();
        let other = CpuLowRank::pack(1, &[1.0; 4], &[1.0; 2], 1.0).unwrap();
        assert_eq!((w.rank(), w.rows(), w.cols()), (2, 4, 3));
        let run = |updates: &[(usize, &CpuLowRank)], x: usize, stride: usize, out: usize| {
            low_rank(Isa::portable(), &pool, updates, &vec![0.0; x], stride, &mut vec![0.0; out])
        };
        run(&[(0, &w), (4, &w)], 6, 8, 16).unwrap();
        run(&[], 6, 8, 16).unwrap();
        assert!(run(&[(0, &w), (3, &w)], 6, 8, 16).is_err(), "overlapping");
        assert!(run(&[(4, &w), (0, &w)], 6, 8, 16).is_err(), "out of order");
        assert!(run(&[(0, &w), (4, &other)], 6, 8, 16).is_err(), "other inputs");
        assert!(run(&[(5, &w)], 6, 8, 16).is_err(), "past the end");
        assert!(run(&[(usize::MAX, &w)], 6, 8, 16).is_err(), "far past the end");
        assert!(run(&[(0, &w)], 7, 8, 16).is_err() && run(&[(0, &w)], 6, 8, 15).is_err());
        for (rank, a, b) in [(0, 0, 0), (2, 5, 8), (2, 6, 7), (2, 0, 8), (2, 6, 0)] {
            assert!(CpuLowRank::pack(rank, &vec![0.0; a], &vec![0.0; b], 1.0).is_err(), "{rank} {a} {b}");
        }
    }
}
