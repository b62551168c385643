//! Rows times several tokens: a few rows stay in the first-level cache while all tokens pass by.
//!
//! The 64 sums of a (row, token) are independent chains, so they are computed a vector of `LANES` at a time, for
//! `ROWS` rows and up to `TOKENS` tokens together. What a step multiplies lies together, in the order of the steps:
//!
//! ```text
//!   rows     [64 / LANES groups][cols / 64 steps][ROWS][LANES]      f32, of one thread: written anew for every few rows
//!   tokens   [tiles][64 / LANES groups][cols / 64 steps][a tile's tokens][LANES]      f32, of all threads
//! ```
//!
//! Where all tokens are one tile, rows are not written anew but widened on their way from where they are stored.
//!
//! A step loads `ROWS + tokens` vectors and multiplies and adds `ROWS · tokens` of them; at 4 rows and 6 tokens the
//! multipliers of AVX-512 are the limit. Meanwhile the stored rows that come next are fetched from memory, so that each is
//! read once and nobody waits for it: without that, three to eight tokens take 1.4 times as long on an EPYC 9004. Columns are
//! zeros from the last one to a whole step: a sum that starts at +0 is never −0, so adding 0 · 0 changes none, and every sum
//! has the bits that `pass` gives it.

use super::{SUMS, finish};
use crate::backend::cpu::isa::{Isa, Level};
use crate::backend::cpu::lanes::Factor;
use crate::backend::cpu::pool::{Pool, SendPtr};
use crate::backend::cpu::prefetch;
use crate::backend::cpu::scratch::{grown, with_scratch};
use std::ops::Range;

/// Bytes of tokens that pass by all rows of a task before the next ones come: what the second-level cache keeps.
const BLOCK_BYTES: usize = 384 << 10;

/// Most tiles of tokens that meet rows as they are stored, each widening them for itself: at two, both ways take as long.
const STORED_TILES: usize = 1;

/// Rows of a tile: what a step multiplies.
trait Rows<E, const LANES: usize, const ROWS: usize>: Copy {
    /// One group of lanes of row `row`.
    fn at(&self, step: usize, row: usize) -> &[E; LANES];
}

/// Rows widened and laid out, of one group of lanes.
#[derive(Clone, Copy)]
struct Wide<'a, const LANES: usize, const ROWS: usize>(&'a [[[f32; LANES]; ROWS]]);

impl<const LANES: usize, const ROWS: usize> Rows<f32, LANES, ROWS> for Wide<'_, LANES, ROWS> {
    #[inline(always)]
    fn at(&self, step: usize, row: usize) -> &[f32; LANES] {
        &self.0[step][row]
    }
}

/// Rows as they are stored, in steps of all groups.
#[derive(Clone, Copy)]
struct Stored<'a, E, const ROWS: usize> {
    rows: [&'a [[E; SUMS]]; ROWS],
    group: usize,
}

impl<E: Factor, const LANES: usize, const ROWS: usize> Rows<E, LANES, ROWS> for Stored<'_, E, ROWS> {
    #[inline(always)]
    fn at(&self, step: usize, row: usize) -> &[E; LANES] {
        &self.rows[row][step].as_chunks::<LANES>().0[self.group]
    }
}

/// Where tokens are cut.
#[derive(Debug, Clone, Copy)]
struct Cut {
    tokens: usize,
    tiles: usize,
}

impl Cut {
    /// Tiles of at most `most` tokens, none of them more than one smaller than another.
    fn new(tokens: usize, most: usize) -> Self {
        Self { tokens, tiles: tokens.div_ceil(most) }
    }

    /// The first token of a tile; of the tile after the last one, where it would be.
    fn start(self, tile: usize) -> usize {
        tile * (self.tokens / self.tiles) + tile.min(self.tokens % self.tiles)
    }
}

/// What is fetched from memory while something else is computed.
struct Ahead {
    at: *const i8,
    /// Bytes left.
    left: usize,
    /// Cache lines of each step.
    lines: usize,
}

impl Ahead {
    /// So that so many bytes have been asked for after so many steps.
    fn new(at: *const i8, bytes: usize, steps: usize) -> Self {
        Self { at, left: bytes, lines: bytes.div_ceil(64).div_ceil(steps.max(1)) }
    }

    /// The share of `steps` steps: where it begins and the lines of each step.
    fn share(&mut self, steps: usize) -> (*const i8, usize) {
        let (at, bytes) = (self.at, (steps * self.lines * 64).min(self.left));
        let lines = if bytes == 0 { 0 } else { self.lines };
        (self.at, self.left) = (at.wrapping_add(bytes), self.left - bytes);
        (at, lines)
    }
}

/// One module per vector width: lanes, rows and tokens of a tile (all accumulators, a vector of each row and two more are to
/// fit in the registers), every number of tokens up to that, and the vector's operations.
macro_rules! tiled {
    ($module:ident, $lanes:literal, $rows:literal, $most:literal, [$($count:literal)*], $vector:ty $(, feature $feature:literal)?
     $(, use $arch:path)? ; zero $zero:expr; load |$from:ident| $load:expr; store |$value:ident, $to:ident| $store:expr;
     add |$a:ident, $b:ident| $add:expr; mul |$c:ident, $d:ident| $mul:expr; last |$lanes_of_rows:ident| $last:expr) => {
        mod $module {
            use super::*;
            $(use $arch::*;)?

            const LANES: usize = $lanes;
            const GROUPS: usize = SUMS / LANES;
            /// Rows that are widened together.
            const ROWS: usize = $rows;
            /// Most tokens of a tile.
            pub(super) const TOKENS: usize = $most;

            type Lanes = [f32; LANES];

            #[inline]
            $(#[target_feature(enable = $feature)])?
            fn zero() -> $vector {
                $zero
            }

            #[inline]
            $(#[target_feature(enable = $feature)])?
            fn load($from: &Lanes) -> $vector {
                $load
            }

            #[inline]
            $(#[target_feature(enable = $feature)])?
            fn store($value: $vector, $to: &mut Lanes) {
                $store
            }

            #[inline]
            $(#[target_feature(enable = $feature)])?
            fn add($a: $vector, $b: $vector) -> $vector {
                $add
            }

            #[inline]
            $(#[target_feature(enable = $feature)])?
            fn mul($c: $vector, $d: $vector) -> $vector {
                $mul
            }

            /// The products of a token from their sums: the last three steps, in the order of `finish`.
            #[inline]
            $(#[target_feature(enable = $feature)])?
            fn last($lanes_of_rows: &[[f32; SUMS]; ROWS]) -> [f32; ROWS] {
                $last
            }

            /// Lays out rows of `cols` values, of which each step takes `together` (there may be fewer).
            $(#[target_feature(enable = $feature)])?
            pub(super) fn lay_out<E: Factor>(rows: &[E], cols: usize, together: usize, out: &mut [f32]) {
                let steps = cols.div_ceil(SUMS);
                let out = out.as_chunks_mut::<LANES>().0;
                for (r, row) in rows.chunks_exact(cols).enumerate() {
                    let mut put = |step: usize, wide: &[f32; SUMS]| {
                        for (group, lanes) in wide.as_chunks::<LANES>().0.iter().enumerate() {
                            out[(group * steps + step) * together + r] = *lanes;
                        }
                    };
                    let (chunks, tail) = row.as_chunks::<SUMS>();
                    for (step, chunk) in chunks.iter().enumerate() {
                        let mut wide = [0f32; SUMS];
                        for i in 0..SUMS {
                            wide[i] = chunk[i].value();
                        }
                        put(step, &wide);
                    }
                    if !tail.is_empty() {
                        let mut wide = [0f32; SUMS];
                        wide.iter_mut().zip(tail).for_each(|(wide, v)| *wide = v.value());
                        put(chunks.len(), &wide);
                    }
                }
            }

            /// One group of lanes of a row.
            #[inline]
            $(#[target_feature(enable = $feature)])?
            fn widen<E: Factor>(values: &[E; LANES]) -> $vector {
                let mut wide = [0f32; LANES];
                for i in 0..LANES {
                    wide[i] = values[i].value();
                }
                load(&wide)
            }

            /// The sums of one group of lanes.
            #[inline]
            $(#[target_feature(enable = $feature)])?
            fn tile<E: Factor, W: Rows<E, LANES, ROWS>, const T: usize>(
                w: W,
                x: &[Lanes],
                group: usize,
                sums: &mut [[[f32; SUMS]; ROWS]],
                (next, lines): (*const i8, usize),
            ) {
                let mut acc = [[zero(); ROWS]; T];
                for (step, x) in x.as_chunks::<T>().0.iter().enumerate() {
                    for line in 0..lines {
                        prefetch::to_level_2(next.wrapping_add((step * lines + line) * 64));
                    }
                    let mut rows = [zero(); ROWS];
                    for r in 0..ROWS {
                        rows[r] = widen(w.at(step, r));
                    }
                    for t in 0..T {
                        let x = load(&x[t]);
                        for r in 0..ROWS {
                            acc[t][r] = add(acc[t][r], mul(rows[r], x));
                        }
                    }
                }
                for (acc, sums) in acc.iter().zip(sums) {
                    for (acc, sums) in acc.iter().zip(sums) {
                        store(*acc, &mut sums.as_chunks_mut().0[group]);
                    }
                }
            }

            /// All tokens of some tiles by one group of lanes of a few rows.
            #[inline]
            $(#[target_feature(enable = $feature)])?
            fn group<E: Factor, W: Rows<E, LANES, ROWS>>(
                w: W,
                x: &[f32],
                (cut, tiles, steps): (Cut, &Range<usize>, usize),
                group: usize,
                sums: &mut [[[f32; SUMS]; ROWS]],
                ahead: &mut Ahead,
            ) {
                for at in tiles.clone() {
                    let (first, end) = (cut.start(at), cut.start(at + 1));
                    let count = end - first;
                    let x = x[first * steps * SUMS..end * steps * SUMS].as_chunks::<LANES>().0;
                    let x = &x[group * steps * count..][..steps * count];
                    let before = cut.start(tiles.start);
                    let sums = &mut sums[first - before..end - before];
                    let ahead = ahead.share(steps);
                    match count {
                        $($count => tile::<E, W, $count>(w, x, group, sums, ahead),)*
                        _ => {}
                    }
                }
            }

            /// `put(t, r, product)` for all rows of `w` and all tokens.
            $(#[target_feature(enable = $feature)])?
            pub(super) fn rows<E: Factor>(w: &[E], cols: usize, x: &[f32], tokens: usize, put: impl Fn(usize, usize, f32)) {
                let steps = cols.div_ceil(SUMS);
                let cut = Cut::new(tokens, TOKENS);
                let padded = steps * SUMS;
                let at_once = (BLOCK_BYTES / size_of::<f32>() / padded / TOKENS).max(1);
                let block_tokens = tokens.min(at_once * TOKENS);
                // Rows that few tokens meet do not pay for being written anew.
                let as_stored = cut.tiles <= STORED_TILES && cols == padded;
                with_scratch(with_slack(ROWS * padded + block_tokens * ROWS * SUMS), |scratch| {
                    let (wide, sums) = from_line(scratch).split_at_mut(ROWS * padded);
                    let sums = sums.as_chunks_mut::<SUMS>().0.as_chunks_mut::<ROWS>().0;
                    for first_tile in (0..cut.tiles).step_by(at_once) {
                        let tiles = first_tile..cut.tiles.min(first_tile + at_once);
                        let first_token = cut.start(first_tile);
                        for (i, few) in w.chunks(ROWS * cols).enumerate() {
                            let count = few.len() / cols;
                            // The rows that follow, or those of the next task. Tokens that follow find them in the cache.
                            let next = w.as_ptr().wrapping_add((i + 1) * ROWS * cols).cast();
                            let bytes = if first_tile == 0 { size_of::<E>() * ROWS * cols } else { 0 };
                            let mut ahead = Ahead::new(next, bytes, GROUPS * tiles.len() * steps);
                            let about = (cut, &tiles, steps);
                            if as_stored && count == ROWS {
                                let mut rows = [&few.as_chunks::<SUMS>().0[..steps]; ROWS];
                                for r in 1..ROWS {
                                    rows[r] = &few[r * cols..].as_chunks::<SUMS>().0[..steps];
                                }
                                for g in 0..GROUPS {
                                    group(Stored { rows, group: g }, x, about, g, sums, &mut ahead);
                                }
                            } else {
                                if count < ROWS {
                                    wide.fill(0.0);
                                }
                                lay_out(few, cols, ROWS, wide);
                                let wide = wide.as_chunks::<LANES>().0.as_chunks::<ROWS>().0;
                                for g in 0..GROUPS {
                                    group(Wide(&wide[g * steps..][..steps]), x, about, g, sums, &mut ahead);
                                }
                            }
                            let end_token = cut.start(tiles.end);
                            for (t, sums) in (first_token..end_token).zip(sums.iter()) {
                                for (r, product) in last(sums).into_iter().enumerate().take(count) {
                                    put(t, i * ROWS + r, product);
                                }
                            }
                        }
                    }
                });
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
tiled!(
    avx512, 16, 4, 6, [1 2 3 4 5 6], __m512, feature "avx512f,avx512bw,avx512dq,avx512vl", use std::arch::x86_64;
    zero _mm512_setzero_ps();
    // SAFETY: the array holds 16 floats.
    load |x| unsafe { _mm512_loadu_ps(x.as_ptr()) };
    // SAFETY: as above.
    store |v, x| unsafe { _mm512_storeu_ps(x.as_mut_ptr(), v) };
    add |a, b| _mm512_add_ps(a, b);
    mul |a, b| _mm512_mul_ps(a, b);
    last |sums| {
        let [a, b, c, d] = sums.each_ref().map(|sums| sums.as_chunks::<LANES>().0);
        // 16 lanes of each row.
        let row = |v: &[Lanes]| add(add(load(&v[0]), load(&v[1])), add(load(&v[2]), load(&v[3])));
        let halves = |v, w| add(_mm512_shuffle_f32x4::<0x44>(v, w), _mm512_shuffle_f32x4::<0xee>(v, w));
        let (ab, cd) = (halves(row(a), row(b)), halves(row(c), row(d)));
        // Four of each, then two, then one.
        let v = add(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
        let v = add(v, _mm512_permute_ps::<0x4e>(v));
        let mut out = [0.0; LANES];
        store(add(v, _mm512_permute_ps::<0xb1>(v)), &mut out);
        [out[0], out[4], out[8], out[12]]
    }
);

#[cfg(target_arch = "x86_64")]
tiled!(
    avx2, 8, 2, 5, [1 2 3 4 5], __m256, feature "avx2", use std::arch::x86_64;
    zero _mm256_setzero_ps();
    // SAFETY: the array holds 8 floats.
    load |x| unsafe { _mm256_loadu_ps(x.as_ptr()) };
    // SAFETY: as above.
    store |v, x| unsafe { _mm256_storeu_ps(x.as_mut_ptr(), v) };
    add |a, b| _mm256_add_ps(a, b);
    mul |a, b| _mm256_mul_ps(a, b);
    last |sums| {
        let [a, b] = sums.each_ref().map(|sums| sums.as_chunks::<LANES>().0);
        // Lanes 0 … 7 and 8 … 15 of each row, added.
        let half = |v: &[Lanes], i: usize| {
            add(add(load(&v[i]), load(&v[2 + i])), add(load(&v[4 + i]), load(&v[6 + i])))
        };
        let (a, b) = (add(half(a, 0), half(a, 1)), add(half(b, 0), half(b, 1)));
        // Four of each, then two, then one.
        let v = add(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
        let v = add(v, _mm256_permute_ps::<0x4e>(v));
        let mut out = [0.0; LANES];
        store(add(v, _mm256_permute_ps::<0xb1>(v)), &mut out);
        [out[0], out[4]]
    }
);

#[cfg(target_arch = "aarch64")]
tiled!(
    neon, 4, 4, 6, [1 2 3 4 5 6], float32x4_t, feature "neon", use std::arch::aarch64;
    zero vdupq_n_f32(0.0);
    // SAFETY: the array holds 4 floats.
    load |x| unsafe { vld1q_f32(x.as_ptr()) };
    // SAFETY: as above.
    store |v, x| unsafe { vst1q_f32(x.as_mut_ptr(), v) };
    add |a, b| vaddq_f32(a, b);
    mul |a, b| vmulq_f32(a, b);
    last |sums| sums.each_ref().map(finish)
);

#[cfg(not(target_arch = "aarch64"))]
tiled!(
    portable, 4, 2, 5, [1 2 3 4 5], [f32; 4];
    zero [0.0; 4];
    load |x| *x;
    store |v, x| *x = v;
    add |a, b| [a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]];
    mul |a, b| [a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]];
    last |sums| sums.each_ref().map(finish)
);

/// Calls a function of the module for a vector width.
macro_rules! dispatch {
    ($isa:expr, $function:ident $(::<$gen:ident>)? ($($arg:expr),*)) => {
        match $isa.level() {
            #[cfg(not(target_arch = "aarch64"))]
            Level::Portable => portable::$function $(::<$gen>)? ($($arg),*),
            // SAFETY: NEON is part of this target.
            #[cfg(target_arch = "aarch64")]
            Level::Portable => unsafe { neon::$function $(::<$gen>)? ($($arg),*) },
            // SAFETY: an `Isa` of this level is only made after the CPU was found to have the features.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2::$function $(::<$gen>)? ($($arg),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512::$function $(::<$gen>)? ($($arg),*) },
        }
    };
}

/// Tokens in the order in which rows meet them.
pub(super) struct Panel<'a> {
    values: &'a [f32],
    tokens: usize,
}

/// A step's columns at a time.
fn padded(cols: usize) -> usize {
    cols.next_multiple_of(SUMS)
}

/// Elements of a cache line.
const LINE: usize = 16;

/// So many elements, wherever a cache line begins.
fn with_slack(len: usize) -> usize {
    len + LINE - 1
}

/// From where the first cache line begins, so that no vector lies on two of them.
fn from_line(values: &mut [f32]) -> &mut [f32] {
    let start = values.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE - 1);
    values.get_mut(start..).unwrap_or_default()
}

impl<'a> Panel<'a> {
    /// Most tokens of so many columns that fit in so many bytes.
    pub(super) fn tokens_in(bytes: usize, cols: usize) -> usize {
        bytes / size_of::<f32>() / padded(cols)
    }

    /// Lays out `x`, rows of `cols` elements, in `buffer`.
    pub(super) fn new(isa: Isa, pool: &Pool, x: &[f32], cols: usize, buffer: &'a mut Vec<f32>) -> Self {
        let (tokens, padded) = (x.len() / cols, padded(cols));
        let values = from_line(grown(buffer, with_slack(tokens * padded)));
        let cut = Cut::new(tokens, most_tokens(isa));
        let at = SendPtr(values.as_mut_ptr());
        pool.run(cut.tiles, &|tile| {
            let (first, count) = (cut.start(tile), cut.start(tile + 1) - cut.start(tile));
            // SAFETY: tiles are parts of the panel, one after the other, and each has one task.
            let out = unsafe { std::slice::from_raw_parts_mut(at.get().add(first * padded), count * padded) };
            let x = &x[first * cols..][..count * cols];
            dispatch!(isa, lay_out::<f32>(x, cols, count, out));
        });
        Self { values, tokens }
    }
}

/// Most tokens of a tile.
fn most_tokens(isa: Isa) -> usize {
    match isa.level() {
        #[cfg(not(target_arch = "aarch64"))]
        Level::Portable => portable::TOKENS,
        #[cfg(target_arch = "aarch64")]
        Level::Portable => neon::TOKENS,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => avx2::TOKENS,
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => avx512::TOKENS,
    }
}

/// Calls `put(t, r, Σ_k w[r][k] · x[t][k])` for all rows of `w` and all tokens of the panel.
pub(super) fn rows_times_panel<E: Factor>(isa: Isa, w: &[E], cols: usize, x: &Panel, put: impl Fn(usize, usize, f32)) {
    dispatch!(isa, rows::<E>(w, cols, x.values, x.tokens, put));
}
