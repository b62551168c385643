//! The steps of attention of one token's query heads over one KV head, a block of 64 positions at a time: scores, an
//! online softmax, and the weighted sum of values. Whoever runs them, in whichever order they may be cut over threads,
//! does the same arithmetic in the same order for every element.

use super::super::isa::{Isa, Level};
use super::super::lanes::{LANES, Stored};
use crate::backend::attention::AttentionShape;
use std::ops::Range;

/// Positions of a block of the online softmax.
pub(super) const BLOCK: usize = 64;

/// A block of values: 16 positions of 16 dimensions.
type Block<E> = [[E; LANES]; LANES];

/// The keys and values of a sequence that a token attends to, of one KV head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cached<'a, E> {
    pub keys: &'a [E],
    pub values: &'a [E],
    /// Positions that the token sees.
    pub length: usize,
    pub dim: usize,
    pub scale: f32,
}

impl<E> Cached<'_, E> {
    pub(super) fn blocks(&self) -> usize {
        self.length.div_ceil(BLOCK)
    }

    /// Positions of a block.
    fn count(&self, block: usize) -> usize {
        BLOCK.min(self.length - block * BLOCK)
    }
}

/// The online softmax of each query head of a group.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Softmax {
    max: [f32; AttentionShape::MAX_GROUP],
    /// Sums of exponentials so far.
    pub total: [f32; AttentionShape::MAX_GROUP],
}

impl Softmax {
    pub(super) fn new() -> Self {
        Self { max: [f32::NEG_INFINITY; AttentionShape::MAX_GROUP], ..Self::default() }
    }
}

/// The three steps, once per vector width.
macro_rules! steps_for {
    ($module:ident, $simd:ident $(, $feature:literal)?) => {
        mod $module {
            use super::super::super::lanes::{LANES, Stored, max_lanes, sum_lanes};
            use super::super::super::simd::$simd::*;
            use super::{BLOCK, Block, Cached, Range, Softmax};

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
            fn exponentials(s: &mut [f32; BLOCK], max_before: f32) -> (f32, f32, f32) {
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
                (new_max, super::super::super::lanes::exp(max_before - new_max), sum_lanes(lanes))
            }

            /// Scores of the query heads `q` `[group][dim]` with the keys of a block.
            $(#[target_feature(enable = $feature)])?
            pub(super) fn score<E: Stored>(head: &Cached<E>, q: &[f32], block: usize, scored: &mut [[f32; BLOCK]]) {
                let (dim, keys, group) = (head.dim, head.keys.as_chunks::<LANES>().0, scored.len());
                for sub in 0..head.count(block).div_ceil(LANES) {
                    let keys = &keys[(block * BLOCK / LANES + sub) * dim..][..dim];
                    for g in (0..group).step_by(2) {
                        let q = &q[g * dim..];
                        if g + 1 < group {
                            let [one, two] = scores([&q[..dim], &q[dim..2 * dim]], keys, head.scale);
                            store(one, &mut scored[g].as_chunks_mut().0[sub]);
                            store(two, &mut scored[g + 1].as_chunks_mut().0[sub]);
                        } else {
                            let [one] = scores([&q[..dim]], keys, head.scale);
                            store(one, &mut scored[g].as_chunks_mut().0[sub]);
                        }
                    }
                }
            }

            /// A block's scores become exponentials; `shrink` gets what each head's earlier sums are multiplied with.
            $(#[target_feature(enable = $feature)])?
            pub(super) fn soften(count: usize, scored: &mut [[f32; BLOCK]], state: &mut Softmax, shrink: &mut [f32]) {
                for (g, s) in scored.iter_mut().enumerate() {
                    s[count..].fill(f32::NEG_INFINITY);
                    let (new_max, by, sum) = exponentials(s, state.max[g]);
                    state.max[g] = new_max;
                    state.total[g] = state.total[g] * by + sum;
                    shrink[g] = by;
                }
            }

            /// Shrinks the sums `[column][head]` of 16 dimensions each and adds the weighted values of a block.
            $(#[target_feature(enable = $feature)])?
            pub(super) fn weigh<E: Stored>(
                head: &Cached<E>,
                block: usize,
                scored: &[[f32; BLOCK]],
                shrink: &[f32],
                columns: Range<usize>,
                sums: &mut [[f32; LANES]],
            ) {
                let (stride, group, count) = (head.dim.div_ceil(LANES), scored.len(), head.count(block));
                let values = head.values.as_chunks::<LANES>().0.as_chunks::<LANES>().0;
                let values = &values[block * BLOCK / LANES * stride..];
                for (c, sums) in columns.zip(sums.chunks_exact_mut(group)) {
                    let values = &values[c..];
                    for g in (0..group).step_by(4) {
                        if let Some([p0, p1, p2, p3]) = scored[g..].first_chunk() {
                            let found = weighted([p0, p1, p2, p3], count, values, stride);
                            for n in 0..4 {
                                let sum = &mut sums[g + n];
                                store(add(mul(load(sum), splat(shrink[g + n])), found[n]), sum);
                            }
                        } else {
                            for n in g..group {
                                let [found] = weighted([&scored[n]], count, values, stride);
                                store(add(mul(load(&sums[n]), splat(shrink[n])), found), &mut sums[n]);
                            }
                        }
                    }
                }
            }
        }
    };
}

steps_for!(portable_steps, portable);
#[cfg(target_arch = "x86_64")]
steps_for!(avx2_steps, avx2, "avx2");
#[cfg(target_arch = "x86_64")]
steps_for!(avx512_steps, avx512, "avx512f");

/// Runs a step in the width of an [`Isa`].
macro_rules! in_width {
    ($isa:expr, $step:ident $args:tt) => {
        match $isa.level() {
            Level::Portable => portable_steps::$step $args,
            // SAFETY: an `Isa` of this level is only made after the CPU was found to have the features.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2_steps::$step $args },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512_steps::$step $args },
        }
    };
}

/// Scores `[group]` of a block.
pub(super) fn score<E: Stored>(isa: Isa, head: &Cached<E>, q: &[f32], block: usize, scored: &mut [[f32; BLOCK]]) {
    in_width!(isa, score(head, q, block, scored))
}

/// Scores of a block become exponentials.
pub(super) fn soften<E>(
    isa: Isa,
    head: &Cached<E>,
    block: usize,
    scored: &mut [[f32; BLOCK]],
    state: &mut Softmax,
    shrink: &mut [f32],
) {
    in_width!(isa, soften(head.count(block), scored, state, shrink))
}

/// Adds a block's weighted values of some columns of 16 dimensions to `sums` `[column][group]`.
pub(super) fn weigh<E: Stored>(
    isa: Isa,
    head: &Cached<E>,
    block: usize,
    scored: &[[f32; BLOCK]],
    shrink: &[f32],
    columns: Range<usize>,
    sums: &mut [[f32; LANES]],
) {
    in_width!(isa, weigh(head, block, scored, shrink, columns, sums))
}

/// Divides sums `[column][group]` by the totals; `put` gets each head's 16 dimensions of a column.
pub(super) fn finish(
    sums: &[[f32; LANES]],
    state: &Softmax,
    group: usize,
    mut put: impl FnMut(usize, usize, [f32; LANES]),
) {
    for (c, sums) in sums.chunks_exact(group).enumerate() {
        for (g, sum) in sums.iter().enumerate() {
            put(c, g, sum.map(|o| o / state.total[g]));
        }
    }
}
