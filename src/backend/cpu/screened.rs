//! The output head, screened: which rows can be among the k largest logits is decided from fewer bits, and only those rows
//! are computed from the stored weights, by the same arithmetic as the whole head.
//!
//! # Which rows
//! Every row has an estimate of its logit and an upper bound. The k rows with the largest estimates are computed: the least
//! of their logits is a threshold that each of the k largest logits reaches, and so does its row's upper bound. No other
//! row needs to be computed. Ties are kept: an equal logit reaches the threshold as well.
//!
//! # The certain bound
//! A row `w` of the head (its stored values, exactly) has eight-bit codes: with `s = max|w| / 127` and
//! `u = round(w / s) + 128`, `w = s · (u − 128) + e`. The upper six bits of `u` are read for every row, the lower two
//! only where it matters. With the upper six alone, `w = s · (4 ⌊u/4⌋ + 1.5 − 128) + e₆`. The input is `x = t · X + f` with
//! integers `|X| ≤ 32000`. So, writing `c` for either form of the codes and `e` for its remainder,
//!
//! `w·x = s t (c·X) + s (c·f) + e·x`, and by Cauchy and Schwarz `|w·x − s t (c·X)| ≤ ‖s c‖ ‖f‖ + ‖e‖ ‖x‖`.
//!
//! `c·X` is an integer and computed exactly. `‖s c‖ ≤ ‖w‖ + ‖e‖`. The logit that the head computes in f32 is a sum of
//! products in a chain of at most `n = cols / 64 + 8` roundings: it differs from `w·x` by at most
//! `γₙ Σ|wᵢ||xᵢ| ≤ γₙ ‖w‖ ‖x‖` with `γₙ = n u / (1 − n u)`, `u = 2⁻²⁴` (Higham, *Accuracy and Stability of Numerical
//! Algorithms*, §3.1), and by what products lose below the smallest f32. Norms are rounded up, bounds computed in f64
//! and widened by far more than f64's own rounding. `‖w‖ ‖x‖` is within f32, or nothing is screened.
//!
//! # The probable bound
//! Cauchy and Schwarz allow for a remainder that points along `x`, which a random one does not. Let `s = max|w| / 7.5` and
//! `c = ⌊w / s + 7.5 + U⌋`, four bits, with `U` from [0, 1) drawn anew for each weight when the model is loaded. Then
//! `s (c − 7.5)` has two possible values `s` apart, and the mean `w`, and by Hoeffding's inequality (*Probability
//! Inequalities for Sums of Bounded Random Variables*, 1963, theorem 2), for any `x` that does not depend on `U`,
//!
//! `P(w·x − s (c − 7.5)·x ≥ s h ‖x‖) ≤ exp(−2 h²)`.
//!
//! The k largest logits, of equal ones the first, are certain rows whatever `U` is; a token comes out wrong only if one of
//! these k has an upper bound below the threshold, which is at most its logit. So `h = √(ln(k / p) / 2)` keeps the
//! probability of that at or below `p` a token: [`FAILURE`]. To the upper bound `s h ‖x‖` is added, for certain, what the
//! input's integers leave, `s ‖c − 7.5‖ ‖f‖ ≤ 7.5 s √cols ‖f‖`, the rounding above, and `0.002 s ‖x‖₁` for a `U` that is a
//! multiple of 1/256 (see `encode`).
//!
//! That `x` does not depend on `U`: up to the first wrong token everything is as with the whole head, and `U` comes from
//! keys that the operating system draws, so neither the author of a checkpoint nor that of a prompt can know it. `p` bounds
//! each token's probability of being the first wrong one; those of several tokens add up. The random numbers are ChaCha8's,
//! taken for independent.

mod coarse;
mod encode;
mod fine;
mod top;

use super::dense::{CpuDense, rows_times_tokens};
use super::isa::Isa;
use super::lanes::Stored;
use super::pool::{Pool, SendPtr};
use super::tiles::MAX_COLS;
use crate::backend::DenseType;
use crate::backend::host::AlignedBuffer;
use crate::{Error, Result};
use coarse::{BLOCK_COLS, Bits, TILE_ROWS};
use half::{bf16, f16};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use top::Largest;

pub(super) use encode::largest;

/// Most rows whose order can be asked for.
pub const MAX_TOP: usize = 64;

/// The probability with which a token may be wrong under the probable bound, at most.
pub const FAILURE: f64 = 1e-9;

/// The largest magnitude of a code.
const LIMIT: f64 = 127.0;
/// What is added to codes so that they are not negative.
const OFFSET: i64 = 128;
/// What four times the upper six bits lack on average.
const MIDDLE: f64 = 1.5;
/// The largest integer that stands for an input.
const INPUT_LIMIT: f64 = 32_000.0;
/// Rows of a task: whole tiles.
const TASK_ROWS: usize = 32 * TILE_ROWS;
/// By how much f64 computations are widened, relative: 2⁴⁰ times smaller errors than this are made.
const SLACK: f64 = 1e-9;

/// What an upper bound says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    /// No row is left out that matters, whatever head and input are.
    Certain,
    /// One is left out with at most this probability a token, and fewer bits are read.
    Probable(f64),
}

/// What is known of a row.
#[derive(Debug, Clone, Copy, Default)]
struct Row {
    /// What a code of 1 is worth.
    scale: f32,
    /// Norm of what six bits leave, rounded up.
    coarse_error: f32,
    /// Norm of what eight bits leave, rounded up.
    fine_error: f32,
    /// Norm of the row, rounded up.
    norm: f32,
}

/// Codes of an output head's rows.
#[derive(Debug)]
pub struct CpuScreened {
    rows: usize,
    cols: usize,
    bound: Bound,
    /// The upper bits, in tiles of 16 rows.
    coarse: AlignedBuffer,
    /// Under the certain bound the lower two bits, row by row.
    fine: AlignedBuffer,
    about: Vec<Row>,
    /// Of the rows' norms.
    largest_norm: f64,
}

/// How many rows were read in which form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Screening {
    /// Rows of the head, of all of which the upper bits were read.
    pub rows: usize,
    /// Rows of which the other two bits were read.
    pub refined: usize,
    /// Rows that were computed from the stored weights.
    pub rescored: usize,
}

/// Buffers of one product.
#[derive(Debug, Default)]
pub(super) struct ScreenScratch {
    input: Input,
    dots: Vec<i64>,
    upper: Vec<f64>,
}

/// The input as integers, in two planes of eight bits: `256 · high + low`.
#[derive(Debug, Default)]
struct Input {
    high: Vec<i8>,
    low: Vec<i8>,
    sum: i64,
    /// What an integer of 1 is worth.
    unit: f64,
    norm: f64,
    /// Sum of magnitudes.
    norm1: f64,
    /// Norm of what the integers leave.
    rest: f64,
}

impl Input {
    /// None if an element is not finite.
    fn set(&mut self, x: &[f32], padded: usize) -> Option<()> {
        let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        if !x.iter().all(|v| v.is_finite()) {
            return None;
        }
        self.unit = if largest > 0.0 { f64::from(largest) / INPUT_LIMIT } else { 1.0 };
        self.high.clear();
        self.low.clear();
        let (mut norm, mut norm1, mut rest) = (0.0, 0.0, 0.0);
        self.sum = 0;
        for v in x {
            let v = f64::from(*v);
            let n = (v / self.unit).round_ties_even();
            norm += v * v;
            norm1 += v.abs();
            rest += (v - n * self.unit).powi(2);
            let n = n as i32;
            self.sum += i64::from(n);
            let low = (n as u8) as i8;
            self.low.push(low);
            self.high.push(((n - i32::from(low)) >> 8) as i8);
        }
        self.high.resize(padded, 0);
        self.low.resize(padded, 0);
        self.norm = norm.sqrt() * (1.0 + SLACK);
        self.norm1 = norm1 * (1.0 + SLACK);
        self.rest = rest.sqrt() * (1.0 + SLACK);
        Some(())
    }

    fn planes(&self) -> [&[i8]; 2] {
        [&self.high, &self.low]
    }
}

/// 256 bits from the operating system that nobody outside this process knows.
fn secret() -> Result<[u8; 32]> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|e| Error::Unavailable {
        what: "the head `screened-probable`".into(),
        reason: format!("the system gives no random numbers: {e}; use `screened`, which needs none"),
    })?;
    Ok(seed)
}

impl CpuScreened {
    /// Codes of the rows of `head`. None if a value is not finite, so small that a scale would not be normal, or if there
    /// are more than [`MAX_COLS`] columns.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if memory is short, or the system gives none of the random numbers that [`Bound::Probable`] rounds by.
    pub(super) fn new(isa: Isa, pool: &Pool, head: &CpuDense, bound: Bound) -> Result<Option<Self>> {
        let seed = match bound {
            Bound::Certain => [0; 32],
            Bound::Probable(_) => secret()?,
        };
        Self::seeded(isa, pool, head, bound, seed)
    }

    fn seeded(isa: Isa, pool: &Pool, head: &CpuDense, bound: Bound, seed: [u8; 32]) -> Result<Option<Self>> {
        if head.cols() > MAX_COLS {
            return Ok(None);
        }
        match head.dtype() {
            DenseType::F32 => Self::encode::<f32>(isa, pool, head, bound, seed),
            DenseType::F16 => Self::encode::<f16>(isa, pool, head, bound, seed),
            DenseType::BF16 => Self::encode::<bf16>(isa, pool, head, bound, seed),
        }
    }

    fn encode<E: Stored>(isa: Isa, pool: &Pool, head: &CpuDense, bound: Bound, seed: [u8; 32]) -> Result<Option<Self>> {
        let (rows, cols, values) = (head.rows(), head.cols(), head.values::<E>());
        let (tiles, blocks) = (rows.div_ceil(TILE_ROWS), cols.div_ceil(BLOCK_COLS));
        let (bits, fine_row) = match bound {
            Bound::Certain => (Bits::Six, fine::row_bytes(cols)),
            Bound::Probable(_) => (Bits::Four, 0),
        };
        let tile_bytes = blocks * bits.block_bytes();
        let size = |n: usize, each: usize| {
            n.checked_mul(each).ok_or_else(|| Error::Shape { op: "screened head", reason: format!("{rows} rows") })
        };
        let mut coarse = AlignedBuffer::huge(size(tiles, tile_bytes)?)?;
        let mut fine = AlignedBuffer::huge(size(rows, fine_row)?)?;
        let mut about = vec![Row::default(); rows];
        let sound = AtomicUsize::new(0);
        let (coarse_at, fine_at, about_at) =
            (SendPtr(coarse.as_mut_ptr()), SendPtr(fine.as_mut_ptr()), SendPtr(about.as_mut_ptr()));
        // A task's codes, and what stays zero beyond the columns.
        let padded = fine::row_bytes(cols) * fine::CODES;
        pool.run(rows.div_ceil(TASK_ROWS), &|task| {
            let (mut codes, mut random) = (vec![0; padded], Vec::new());
            let mut generator = ChaCha8Rng::from_seed(seed);
            generator.set_stream(task as u64);
            for tile in (task * TASK_ROWS / TILE_ROWS..tiles).take(TASK_ROWS / TILE_ROWS) {
                let first = tile * TILE_ROWS;
                let count = TILE_ROWS.min(rows - first);
                // SAFETY: `run` calls each task once; a tile's lines, its rows' bits and what is known of them lie inside
                // the buffers made above, and no other tile's overlap them.
                let (lines, bits_of_rows, about) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(coarse_at.get().add(tile * tile_bytes), tile_bytes),
                        std::slice::from_raw_parts_mut(fine_at.get().add(first * fine_row), count * fine_row),
                        std::slice::from_raw_parts_mut(about_at.get().add(first), count),
                    )
                };
                for (r, about) in about.iter_mut().enumerate() {
                    let w = &values[(first + r) * cols..][..cols];
                    let row = match bound {
                        Bound::Certain => encode::certain(isa, w, &mut codes),
                        Bound::Probable(_) => {
                            random.resize(cols, 0);
                            generator.fill_bytes(&mut random);
                            encode::probable(isa, w, &random, &mut codes)
                        }
                    };
                    let Some(row) = row else { return };
                    *about = row;
                    coarse::put(bits, lines, r, &codes);
                    if fine_row > 0 {
                        fine::put(isa, &mut bits_of_rows[r * fine_row..][..fine_row], &codes);
                    }
                    sound.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let largest_norm = about.iter().fold(0f64, |most, row| most.max(f64::from(row.norm)));
        let screened = Self { rows, cols, bound, coarse, fine, about, largest_norm };
        Ok((sound.into_inner() == rows).then_some(screened))
    }

    /// Rows of the head.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the head.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// What the upper bounds say.
    pub fn bound(&self) -> Bound {
        self.bound
    }

    fn bits(&self) -> Bits {
        match self.bound {
            Bound::Certain => Bits::Six,
            Bound::Probable(_) => Bits::Four,
        }
    }

    /// Bytes that every product reads.
    pub fn bytes(&self) -> usize {
        self.coarse.len() + self.about.len() * size_of::<Row>()
    }

    /// Bytes that are read of a row where its other two bits are.
    pub fn fine_row_bytes(&self) -> usize {
        self.fine.len() / self.rows
    }

    /// Bytes in memory.
    pub fn resident_bytes(&self) -> usize {
        self.bytes() + self.fine.len()
    }

    /// What every product reads.
    pub fn data(&self) -> &[u8] {
        &self.coarse
    }

    /// Logits `out` of one input `x`: those of every row that can be among the `k` largest, exactly as the whole head gives
    /// them, and −∞ for the others. `scanned` is called when all rows have been looked at, before those that are left are
    /// computed. None if `x` is not finite, or so large that logits could be too large for f32; `out` is then as it was.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn top(
        &self,
        isa: Isa,
        pool: &Pool,
        head: &CpuDense,
        x: &[f32],
        k: usize,
        scratch: &mut ScreenScratch,
        out: &mut [f32],
        scanned: impl FnOnce(),
    ) -> Option<Screening> {
        debug_assert!(x.len() == self.cols && out.len() == self.rows && head.rows() == self.rows);
        let padded = fine::row_bytes(self.cols) * fine::CODES;
        let ScreenScratch { input, dots, upper } = scratch;
        input.set(x, padded)?;
        let (input, k) = (&*input, k.clamp(1, MAX_TOP).min(self.rows));
        let bounds = Bounds::new(self.cols, input, self.bound, k);
        if self.largest_norm * input.norm >= f64::from(f32::MAX) * 0.99 {
            return None;
        }
        dots.resize(self.rows.next_multiple_of(TILE_ROWS), 0);
        upper.resize(self.rows, 0.0);
        let tasks = self.rows.div_ceil(TASK_ROWS);
        let range = |task: usize| task * TASK_ROWS..((task + 1) * TASK_ROWS).min(self.rows);

        // The upper bits of every row.
        let best = Mutex::new(Largest::new(k));
        let (dots_at, upper_at) = (SendPtr(dots.as_mut_ptr()), SendPtr(upper.as_mut_ptr()));
        let bits = self.bits();
        let blocks = self.cols.div_ceil(BLOCK_COLS);
        let tile_bytes = blocks * bits.block_bytes();
        pool.run(tasks, &|task| {
            let rows = range(task);
            let tiles = rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS);
            let lines = &self.coarse[tiles.start * tile_bytes..tiles.end * tile_bytes];
            // SAFETY: tasks are whole tiles, which `dots` has room for, `upper` has an element for each row, and no other
            // task has the same.
            let (dots, upper) = unsafe {
                (
                    std::slice::from_raw_parts_mut(dots_at.get().add(rows.start), tiles.len() * TILE_ROWS),
                    std::slice::from_raw_parts_mut(upper_at.get().add(rows.start), rows.len()),
                )
            };
            coarse::dots(isa, bits, lines, blocks, input.planes(), dots);
            let mut largest = Largest::new(k);
            for ((row, dot), upper) in rows.zip(dots).zip(upper) {
                let (estimate, width) = bounds.coarse(&self.about[row], *dot);
                largest.offer(estimate, row);
                *upper = estimate + width;
            }
            best.lock().unwrap_or_else(PoisonError::into_inner).merge(&largest);
        });
        scanned();

        // The logits of those that seem to be the largest.
        let best = best.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut reached = [f32::INFINITY; MAX_TOP];
        let reached_at = SendPtr(reached.as_mut_ptr());
        pool.run(k, &|i| {
            // SAFETY: there are at most `MAX_TOP` of them, and each has one task.
            let at = SendPtr(unsafe { reached_at.get().add(i) });
            exact(isa, head, best.row(i), x, at);
        });
        let reached = f64::from(reached[..k].iter().fold(f32::INFINITY, |least, v| least.min(*v)));

        // The other two bits of those that can reach the least of these, and the stored weights of those that still can.
        let (refined, rescored) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let (dots, upper, out_at) = (&*dots, &*upper, SendPtr(out.as_mut_ptr()));
        let fine_row = self.fine_row_bytes();
        pool.run(tasks, &|task| {
            let (mut fine_count, mut count) = (0, 0);
            for row in range(task) {
                let mut can = upper[row] >= reached;
                if can && fine_row > 0 {
                    let bits = &self.fine[row * fine_row..][..fine_row];
                    let dot = 4 * dots[row] + fine::dot(isa, bits, &input.high, &input.low);
                    let (estimate, width) = bounds.fine(&self.about[row], dot);
                    can = estimate + width >= reached;
                    fine_count += 1;
                }
                // SAFETY: `out` has an element for each row, and each row one task.
                let at = SendPtr(unsafe { out_at.get().add(row) });
                match can {
                    true => {
                        exact(isa, head, row, x, at);
                        count += 1;
                    }
                    // SAFETY: as above.
                    false => unsafe { *at.get() = f32::NEG_INFINITY },
                }
            }
            refined.fetch_add(fine_count, Ordering::Relaxed);
            rescored.fetch_add(count, Ordering::Relaxed);
        });
        Some(Screening { rows: self.rows, refined: refined.into_inner(), rescored: rescored.into_inner() })
    }
}

/// One logit, as the whole head computes it.
fn exact(isa: Isa, head: &CpuDense, row: usize, x: &[f32], out: SendPtr<f32>) {
    fn typed<E: Stored>(isa: Isa, head: &CpuDense, row: usize, x: &[f32], out: SendPtr<f32>) {
        let cols = head.cols();
        rows_times_tokens::<E>(isa, &head.values::<E>()[row * cols..][..cols], cols, x, 1, false, out);
    }
    match head.dtype() {
        DenseType::F32 => typed::<f32>(isa, head, row, x, out),
        DenseType::F16 => typed::<f16>(isa, head, row, x, out),
        DenseType::BF16 => typed::<bf16>(isa, head, row, x, out),
    }
}

/// Bounds of logits from dot products of integers.
struct Bounds {
    unit: f64,
    sum: f64,
    norm: f64,
    rest: f64,
    /// Share of ‖w‖ by which computed logits may differ from exact ones.
    rounding: f64,
    /// By which they may differ where products are below the smallest f32.
    least: f64,
    /// Scales by which the probable bound is above the estimate; none under the certain one.
    probable: Option<f64>,
}

impl Bounds {
    fn new(cols: usize, input: &Input, bound: Bound, k: usize) -> Self {
        let n = (cols / 64 + 8) as f64 * 2f64.powi(-24);
        let Input { unit, norm, norm1, rest, sum, .. } = *input;
        let (rounding, least) = (n / (1.0 - n) * norm, cols as f64 * 2f64.powi(-148));
        let probable = match bound {
            Bound::Certain => None,
            Bound::Probable(failure) => {
                let h = ((k as f64 / failure).ln().max(0.0) / 2.0).sqrt();
                Some(h * norm + encode::BIAS * norm1 + f64::from(encode::HALF_RANGE) * (cols as f64).sqrt() * rest)
            }
        };
        Self { unit, sum: sum as f64, norm, rest, rounding, least, probable }
    }

    /// From the dot product of the upper bits: an estimate, and by how much the logit can exceed it.
    #[inline(always)]
    fn coarse(&self, row: &Row, dot: i64) -> (f64, f64) {
        let (integers, width) = match self.probable {
            None => {
                let integers = 4.0 * dot as f64 + (MIDDLE - OFFSET as f64) * self.sum;
                (integers, self.certain_width(row, row.coarse_error))
            }
            Some(scales) => {
                let integers = dot as f64 - f64::from(encode::HALF_RANGE) * self.sum;
                (integers, scales * f64::from(row.scale))
            }
        };
        self.around(row, integers, width)
    }

    /// From that of all eight.
    fn fine(&self, row: &Row, dot: i64) -> (f64, f64) {
        self.around(row, dot as f64 - OFFSET as f64 * self.sum, self.certain_width(row, row.fine_error))
    }

    #[inline(always)]
    fn certain_width(&self, row: &Row, error: f32) -> f64 {
        f64::from(error) * (self.norm + self.rest) + f64::from(row.norm) * self.rest
    }

    #[inline(always)]
    fn around(&self, row: &Row, integers: f64, width: f64) -> (f64, f64) {
        let estimate = f64::from(row.scale) * self.unit * integers;
        let width = width + f64::from(row.norm) * self.rounding + self.least;
        (estimate, width * (1.0 + SLACK) + estimate.abs() * SLACK * 1e-3)
    }
}

#[cfg(test)]
mod tests;
