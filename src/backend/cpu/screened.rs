//! The output head, screened: which rows can be among the k largest logits is decided from fewer bits with rigorous bounds,
//! and only those rows are computed from the stored weights, by the same arithmetic as the whole head.
//!
//! # The bound
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
//! and widened by far more than f64's own rounding. The k-th largest of all lower bounds is a threshold that every one of
//! the k largest logits reaches, and so does its row's upper bound: no other row needs to be computed. Ties are kept.

mod coarse;
mod fine;
mod top;

use super::dense::{CpuDense, rows_times_tokens};
use super::isa::Isa;
use super::lanes::Stored;
use super::pool::{Pool, SendPtr};
use crate::backend::DenseType;
use crate::backend::host::AlignedBuffer;
use crate::{Error, Result};
use coarse::{BLOCK_BYTES, BLOCK_COLS, TILE_ROWS};
use half::{bf16, f16};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use top::Largest;

/// Most rows whose order can be asked for.
pub const MAX_TOP: usize = 64;

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
    /// The upper six bits, in tiles of 16 rows.
    coarse: AlignedBuffer,
    /// The lower two bits, row by row.
    fine: AlignedBuffer,
    about: Vec<Row>,
}

/// How many rows were read in which form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Screening {
    /// Rows of the head, of all of which six bits were read.
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
        let (mut norm, mut rest) = (0.0, 0.0);
        self.sum = 0;
        for v in x {
            let v = f64::from(*v);
            let n = (v / self.unit).round_ties_even();
            norm += v * v;
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
        self.rest = rest.sqrt() * (1.0 + SLACK);
        Some(())
    }
}

impl CpuScreened {
    /// Codes of the rows of `head`. None if a value is not finite, or so small that a scale would not be normal.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if memory is short.
    pub fn new(head: &CpuDense, pool: &Pool) -> Result<Option<Self>> {
        let (rows, cols) = (head.rows(), head.cols());
        let (tiles, blocks) = (rows.div_ceil(TILE_ROWS), cols.div_ceil(BLOCK_COLS));
        let fine_row = fine::row_bytes(cols);
        let size = |n: usize, each: usize| {
            n.checked_mul(each).ok_or_else(|| Error::Shape { op: "screened head", reason: format!("{rows} rows") })
        };
        let mut coarse = AlignedBuffer::huge(size(tiles, blocks * BLOCK_BYTES)?)?;
        let mut fine = AlignedBuffer::huge(size(rows, fine_row)?)?;
        let mut about = vec![Row::default(); rows];
        let sound = AtomicUsize::new(0);
        let (coarse_at, fine_at, about_at) =
            (SendPtr(coarse.as_mut_ptr()), SendPtr(fine.as_mut_ptr()), SendPtr(about.as_mut_ptr()));
        pool.run(tiles, &|tile| {
            let first = tile * TILE_ROWS;
            let count = TILE_ROWS.min(rows - first);
            // SAFETY: `run` calls each tile once; a tile's lines, its rows' bits and what is known of them lie inside the
            // buffers made above, and no other tile's overlap them.
            let (lines, bits, about) = unsafe {
                (
                    std::slice::from_raw_parts_mut(
                        coarse_at.get().add(tile * blocks * BLOCK_BYTES),
                        blocks * BLOCK_BYTES,
                    ),
                    std::slice::from_raw_parts_mut(fine_at.get().add(first * fine_row), count * fine_row),
                    std::slice::from_raw_parts_mut(about_at.get().add(first), count),
                )
            };
            let (mut values, mut codes) = (vec![0f32; cols], vec![0u8; cols]);
            for (r, (about, bits)) in about.iter_mut().zip(bits.chunks_exact_mut(fine_row)).enumerate() {
                head.row(first + r, &mut values);
                if let Some(row) = encode(&values, &mut codes) {
                    *about = row;
                    coarse::put(lines, r, &codes);
                    fine::put(bits, &codes);
                    sound.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Ok((sound.into_inner() == rows).then_some(Self { rows, cols, coarse, fine, about }))
    }

    /// Bytes that every product reads.
    pub fn bytes(&self) -> usize {
        self.coarse.len() + self.about.len() * size_of::<Row>()
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
    /// them, and −∞ for the others. None if `x` is not finite; `out` is then as it was.
    pub(super) fn top(
        &self,
        isa: Isa,
        pool: &Pool,
        head: &CpuDense,
        x: &[f32],
        k: usize,
        scratch: &mut ScreenScratch,
        out: &mut [f32],
    ) -> Option<Screening> {
        debug_assert!(x.len() == self.cols && out.len() == self.rows && head.rows() == self.rows);
        let padded = fine::row_bytes(self.cols) * fine::CODES;
        let ScreenScratch { input, dots, upper } = scratch;
        input.set(x, padded)?;
        let (input, k) = (&*input, k.clamp(1, MAX_TOP).min(self.rows));
        dots.resize(self.rows.next_multiple_of(TILE_ROWS), 0);
        upper.resize(self.rows, 0.0);
        let bounds = Bounds::new(self.cols, input);
        let tasks = self.rows.div_ceil(TASK_ROWS);
        let range = |task: usize| task * TASK_ROWS..((task + 1) * TASK_ROWS).min(self.rows);

        // Six bits of every row.
        let threshold = Mutex::new(Largest::new(k));
        let dots_at = SendPtr(dots.as_mut_ptr());
        let blocks = self.cols.div_ceil(BLOCK_COLS);
        pool.run(tasks, &|task| {
            let rows = range(task);
            let tiles = rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS);
            let lines = &self.coarse[tiles.start * blocks * BLOCK_BYTES..tiles.end * blocks * BLOCK_BYTES];
            // SAFETY: tasks are whole tiles, which `dots` has room for, and no other task has the same.
            let dots =
                unsafe { std::slice::from_raw_parts_mut(dots_at.get().add(rows.start), tiles.len() * TILE_ROWS) };
            coarse::dots(isa, lines, blocks, &input.high, &input.low, dots);
            let mut largest = Largest::new(k);
            for (row, dot) in rows.zip(dots) {
                largest.offer(bounds.coarse(&self.about[row], *dot).0);
            }
            merge(&threshold, &largest);
        });
        let reached = least(threshold);

        // All eight bits of those that reach it.
        let threshold = Mutex::new(Largest::new(k));
        let refined = AtomicUsize::new(0);
        let upper_at = SendPtr(upper.as_mut_ptr());
        let (dots, fine_row) = (&*dots, fine::row_bytes(self.cols));
        pool.run(tasks, &|task| {
            let (mut largest, mut count) = (Largest::new(k), 0);
            for row in range(task) {
                let mut bound = f64::NEG_INFINITY;
                if bounds.coarse(&self.about[row], dots[row]).1 >= reached {
                    let bits = &self.fine[row * fine_row..][..fine_row];
                    let dot = 4 * dots[row] + fine::dot(isa, bits, &input.high, &input.low);
                    let (low, high) = bounds.fine(&self.about[row], dot);
                    largest.offer(low);
                    (bound, count) = (high, count + 1);
                }
                // SAFETY: `upper` has an element for each row, and each row one task.
                unsafe { *upper_at.get().add(row) = bound };
            }
            refined.fetch_add(count, Ordering::Relaxed);
            merge(&threshold, &largest);
        });
        let reached = least(threshold);

        // The stored weights of those that still do.
        let rescored = AtomicUsize::new(0);
        let (upper, out_at) = (&*upper, SendPtr(out.as_mut_ptr()));
        pool.run(tasks, &|task| {
            let mut count = 0;
            for row in range(task) {
                // SAFETY: `out` has an element for each row, and each row one task.
                let at = SendPtr(unsafe { out_at.get().add(row) });
                match upper[row] >= reached {
                    true => {
                        exact(isa, head, row, x, at);
                        count += 1;
                    }
                    // SAFETY: as above.
                    false => unsafe { *at.get() = f32::NEG_INFINITY },
                }
            }
            rescored.fetch_add(count, Ordering::Relaxed);
        });
        Some(Screening { rows: self.rows, refined: refined.into_inner(), rescored: rescored.into_inner() })
    }
}

/// One logit, as the whole head computes it.
fn exact(isa: Isa, head: &CpuDense, row: usize, x: &[f32], out: SendPtr<f32>) {
    fn typed<E: Stored>(isa: Isa, head: &CpuDense, row: usize, x: &[f32], out: SendPtr<f32>) {
        let weights: &[E] = bytemuck::cast_slice(head.bytes());
        let cols = head.cols();
        rows_times_tokens::<E>(isa, &weights[row * cols..][..cols], cols, x, 1, false, out);
    }
    match head.dtype() {
        DenseType::F32 => typed::<f32>(isa, head, row, x, out),
        DenseType::F16 => typed::<f16>(isa, head, row, x, out),
        DenseType::BF16 => typed::<bf16>(isa, head, row, x, out),
    }
}

fn merge(all: &Mutex<Largest>, some: &Largest) {
    all.lock().unwrap_or_else(PoisonError::into_inner).merge(some);
}

fn least(all: Mutex<Largest>) -> f64 {
    all.into_inner().unwrap_or_else(PoisonError::into_inner).least()
}

/// Bounds of logits from dot products of integers.
struct Bounds {
    unit: f64,
    sum: f64,
    norm: f64,
    rest: f64,
    /// Share of ‖w‖ ‖x‖ by which computed logits may differ from exact ones.
    rounding: f64,
    /// By which they may differ where products are below the smallest f32.
    least: f64,
}

impl Bounds {
    fn new(cols: usize, input: &Input) -> Self {
        let n = (cols / 64 + 8) as f64 * 2f64.powi(-24);
        let Input { unit, norm, rest, sum, .. } = *input;
        let (rounding, least) = (n / (1.0 - n), cols as f64 * 2f64.powi(-148));
        Self { unit, sum: sum as f64, norm, rest, rounding, least }
    }

    /// From the dot product of the upper six bits: the lower and the upper bound.
    fn coarse(&self, row: &Row, dot: i64) -> (f64, f64) {
        self.around(row, 4.0 * dot as f64 + (MIDDLE - OFFSET as f64) * self.sum, row.coarse_error)
    }

    /// From that of all eight.
    fn fine(&self, row: &Row, dot: i64) -> (f64, f64) {
        self.around(row, dot as f64 - OFFSET as f64 * self.sum, row.fine_error)
    }

    fn around(&self, row: &Row, integers: f64, error: f32) -> (f64, f64) {
        let logit = f64::from(row.scale) * self.unit * integers;
        let (error, norm) = (f64::from(error), f64::from(row.norm));
        let width = error * self.norm + (norm + error) * self.rest + self.rounding * norm * self.norm + self.least;
        let width = width * (1.0 + SLACK) + logit.abs() * SLACK * 1e-3;
        (logit - width, logit + width)
    }
}

/// The codes of a row, with an offset of 128. None if it cannot be bounded.
fn encode(values: &[f32], codes: &mut [u8]) -> Option<Row> {
    let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
    if !values.iter().all(|v| v.is_finite()) {
        return None;
    }
    let scale = if largest > 0.0 { (f64::from(largest) / LIMIT) as f32 } else { 1.0 };
    if !scale.is_normal() {
        return None;
    }
    let s = f64::from(scale);
    let (mut coarse, mut fine, mut norm) = (0.0, 0.0, 0.0);
    for (v, code) in values.iter().zip(codes) {
        let v = f64::from(*v);
        let c = (v / s).round_ties_even().clamp(-LIMIT, LIMIT);
        *code = (c as i64 + OFFSET) as u8;
        let upper = f64::from(*code & !3) + MIDDLE - OFFSET as f64;
        fine += (v - s * c).powi(2);
        coarse += (v - s * upper).powi(2);
        norm += v * v;
    }
    let up = |square: f64| ((square.sqrt() * (1.0 + SLACK)) as f32).next_up();
    Some(Row { scale, coarse_error: up(coarse), fine_error: up(fine), norm: up(norm) })
}

#[cfg(test)]
mod tests;
