//! Products with dense weights (the output head, unconverted projections) and embedding rows.
//!
//! Weights stay in their stored type and are widened in registers, 16 at a time. Every (row, token) is one
//! chain of 16 lanes in one order, so a token's logits do not depend on how many tokens are computed with it: one is computed
//! row by row, several in tiles.

mod tiled;

use super::isa::{Isa, per_isa};
use super::lanes::{Factor, LANES, Stored, sum_lanes};
use super::output::OutputColumns;
use super::pool::{Pool, SendPtr};
use super::prefetch;
use crate::backend::DenseType;
use crate::backend::host::{AlignedBuffer, MappedFile};
use crate::{Error, Result};
use half::{bf16, f16};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use tiled::{Panel, rows_times_panel};

#[derive(Debug)]
enum Bytes {
    Mapped(Arc<MappedFile>, Range<usize>),
    Owned(AlignedBuffer),
}

/// A dense matrix `[rows, cols]`, in a mapped file or in memory.
#[derive(Debug)]
pub struct CpuDense {
    dtype: DenseType,
    rows: usize,
    cols: usize,
    bytes: Bytes,
}

impl CpuDense {
    /// A matrix that stays where it is in a mapped file; copied only if the file does not align it.
    ///
    /// # Errors
    /// [`Error::Shape`] if the range does not hold `rows · cols` elements.
    pub fn mapped(
        dtype: DenseType,
        rows: usize,
        cols: usize,
        file: Arc<MappedFile>,
        range: Range<usize>,
    ) -> Result<Self> {
        let size = checked_size(dtype, rows, cols)?;
        let Some(bytes) = file.bytes().get(range.clone()).filter(|b| b.len() == size) else {
            return Err(Error::Shape {
                op: "dense matrix",
                reason: format!("[{rows}, {cols}] {} needs {size} bytes, the file gives {range:?}", dtype.name()),
            });
        };
        if bytes.as_ptr().align_offset(dtype.size()) == 0 {
            return Ok(Self { dtype, rows, cols, bytes: Bytes::Mapped(file, range) });
        }
        Self::owned(dtype, rows, cols, |out| out.copy_from_slice(bytes))
    }

    /// A matrix in memory, filled by `fill` (row-major, little-endian).
    ///
    /// # Errors
    /// [`Error::Shape`] if the size overflows, [`Error::Unavailable`] if memory is short.
    pub fn owned(dtype: DenseType, rows: usize, cols: usize, fill: impl FnOnce(&mut [u8])) -> Result<Self> {
        let mut buffer = AlignedBuffer::huge(checked_size(dtype, rows, cols)?)?;
        fill(&mut buffer);
        Ok(Self { dtype, rows, cols, bytes: Bytes::Owned(buffer) })
    }

    /// Stored type.
    pub fn dtype(&self) -> DenseType {
        self.dtype
    }

    /// Output features, or embedding entries.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features, or embedding width.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Stored bytes, row-major.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(file, range) => &file.bytes()[range.clone()],
            Bytes::Owned(buffer) => buffer,
        }
    }

    /// The elements, row-major, of the type that they are stored in.
    pub(super) fn values<E: Stored>(&self) -> &[E] {
        debug_assert_eq!(E::KIND, self.dtype);
        bytemuck::cast_slice(self.bytes())
    }

    /// Tells the system that the elements have been read and need not stay in memory, where it can read them again.
    pub(super) fn release(&self) {
        if let Bytes::Mapped(file, range) = &self.bytes {
            file.release(range.clone());
        }
    }

    /// Widens row `row` into `out`.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        fn widen<E: Stored>(m: &CpuDense, row: usize, out: &mut [f32]) {
            for (o, v) in out.iter_mut().zip(&m.values::<E>()[row * m.cols..][..m.cols]) {
                *o = v.widen();
            }
        }
        match self.dtype {
            DenseType::F32 => widen::<f32>(self, row, out),
            DenseType::F16 => widen::<f16>(self, row, out),
            DenseType::BF16 => widen::<bf16>(self, row, out),
        }
    }
}

fn checked_size(dtype: DenseType, rows: usize, cols: usize) -> Result<usize> {
    let size = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size()));
    size.filter(|n| *n > 0).ok_or_else(|| Error::Shape {
        op: "dense matrix",
        reason: format!("[{rows}, {cols}] {} is no matrix", dtype.name()),
    })
}

/// Lanes of one product: four vectors of 16, whose sums are added at the end.
const SUMS: usize = 4 * LANES;
/// Tokens that share one reading of a row.
const PASS_TOKENS: usize = 4;
/// Rows of a task: 160 KB of a bf16 head of width 2560.
pub(super) const TASK_ROWS: usize = 32;
/// Tokens from which on tiles are faster than rows: on a core of an EPYC 9004 by 1.1 at 2, by 1.8 at 3 and 4 and by 2.2 at 32.
const TILED_TOKENS: usize = 2;
/// Most bytes of tokens laid out at a time, so that they stay in the last level of the caches.
const PANEL_BYTES: usize = 8 << 20;

/// One row times T tokens.
#[inline(always)]
fn pass<E: Factor, const T: usize>(w: &[E], x: [&[f32]; T]) -> [f32; T] {
    let mut acc = [[0f32; SUMS]; T];
    // Arrays by reference, all of one count: no bounds check stands in the way of vectors.
    let (chunks, tail) = w.as_chunks::<SUMS>();
    let tokens = x.map(|x| &x.as_chunks::<SUMS>().0[..chunks.len()]);
    for (k, w) in chunks.iter().enumerate() {
        prefetch::ahead(w);
        let mut wide = [0f32; SUMS];
        for i in 0..SUMS {
            wide[i] = w[i].value();
        }
        for t in 0..T {
            let x = &tokens[t][k];
            for i in 0..SUMS {
                acc[t][i] += wide[i] * x[i];
            }
        }
    }
    for t in 0..T {
        for (i, (w, x)) in tail.iter().zip(&x[t][chunks.len() * SUMS..]).enumerate() {
            acc[t][i] += w.value() * x;
        }
    }
    acc.map(|acc| finish(&acc))
}

/// The product from its lanes.
#[inline(always)]
fn finish(a: &[f32; SUMS]) -> f32 {
    let mut sums = [0f32; LANES];
    for i in 0..LANES {
        sums[i] = (a[i] + a[LANES + i]) + (a[2 * LANES + i] + a[3 * LANES + i]);
    }
    sum_lanes(sums)
}

per_isa! {
    /// Rows of `w` times all tokens of `x`: `out[t · stride + r]`, or that added to it.
    pub(super) fn rows_times_tokens<E: Factor>(
        w: &[E],
        cols: usize,
        x: &[f32],
        stride: usize,
        add: bool,
        out: SendPtr<f32>,
    ) {
        let tokens = x.len() / cols;
        let token = |t: usize| &x[t * cols..][..cols];
        let put = |t: usize, r: usize, v: f32| {
            // SAFETY: the caller gives this call the elements t · stride + r for all tokens t and rows r of `w`.
            let out = unsafe { &mut *out.get().add(t * stride + r) };
            *out = if add { *out + v } else { v };
        };
        for (r, row) in w.chunks_exact(cols).enumerate() {
            let mut t = 0;
            while t + PASS_TOKENS <= tokens {
                let y = pass::<E, PASS_TOKENS>(row, std::array::from_fn(|i| token(t + i)));
                (0..PASS_TOKENS).for_each(|i| put(t + i, r, y[i]));
                t += PASS_TOKENS;
            }
            for t in t..tokens {
                put(t, r, pass::<E, 1>(row, [token(t)])[0]);
            }
        }
    }
}

/// `out[t][r] = Σ_k w[r][k] · x[t][k]` in f32, or that added to it.
pub(super) fn dense_linear(isa: Isa, pool: &Pool, w: &CpuDense, x: &[f32], out: OutputColumns<'_>) -> Result<()> {
    let tokens = x.len() / w.cols;
    if x.len() != tokens * w.cols {
        let reason = format!("weight [{}, {}], input of {} elements", w.rows, w.cols, x.len());
        return Err(Error::Shape { op: "dense linear", reason });
    }
    let (width, add) = (out.width, out.add);
    let at = &out.begin("dense linear", tokens, w.rows)?;
    let to = Target { at, width, add, scales: None };
    match w.dtype {
        DenseType::F32 => products(isa, pool, w.values::<f32>(), w.cols, x, to),
        DenseType::F16 => products(isa, pool, w.values::<f16>(), w.cols, x, to),
        DenseType::BF16 => products(isa, pool, w.values::<bf16>(), w.cols, x, to),
    }
    Ok(())
}

/// Where the products of rows and tokens go, as [`OutputColumns::begin`] checked it.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub at: &'a SendPtr<f32>,
    pub width: usize,
    pub add: bool,
    /// What each row's products are multiplied with before.
    pub scales: Option<&'a [f32]>,
}

/// `out[t][r] = Σ_k w[r][k] · x[t][k]` for all rows, on all threads.
pub(super) fn products<E: Factor>(isa: Isa, pool: &Pool, w: &[E], cols: usize, x: &[f32], to: Target<'_>) {
    let (rows, tokens) = (w.len() / cols, x.len() / cols);
    let each_task = |task: &(dyn Fn(usize, &[E]) + Sync)| {
        pool.run(rows.div_ceil(TASK_ROWS), &|i| {
            let first = i * TASK_ROWS;
            task(first, &w[first * cols..][..TASK_ROWS.min(rows - first) * cols]);
        });
    };
    if tokens < TILED_TOKENS {
        each_task(&|first, w| {
            // SAFETY: first < rows; this task alone writes the columns of its rows of every token, all inside the output
            // by the check of `begin`.
            let out = unsafe { to.at.get().add(first) };
            rows_times_tokens::<E>(isa, w, cols, x, to.width, to.add, SendPtr(out));
            for (r, scale) in to.scales.iter().flat_map(|scales| &scales[first..][..w.len() / cols]).enumerate() {
                // SAFETY: as above.
                (0..tokens).for_each(|t| unsafe { *out.add(t * to.width + r) *= scale });
            }
        });
        return;
    }
    thread_local!(static PANEL: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) });
    // Passes of about the same number of tokens.
    let most = Panel::tokens_in(PANEL_BYTES, cols).max(TILED_TOKENS);
    let at_once = tokens.div_ceil(tokens.div_ceil(most));
    PANEL.with_borrow_mut(|buffer| {
        for (pass, x) in x.chunks(at_once * cols).enumerate() {
            let panel = &Panel::new(isa, pool, x, cols, buffer);
            each_task(&|first, w| {
                rows_times_panel(isa, w, cols, panel, |t, r, v| {
                    // SAFETY: this task alone writes the columns of its rows of every token, all inside the output by the
                    // check of `begin`.
                    let out = unsafe { &mut *to.at.get().add((pass * at_once + t) * to.width + first + r) };
                    let v = to.scales.map_or(v, |scales| v * scales[first + r]);
                    *out = if to.add { *out + v } else { v };
                });
            });
        }
    });
}

#[cfg(test)]
mod tests;
