//! Products with dense weights (the output head, unconverted projections) and embedding rows.
//!
//! Weights stay in their stored type and are widened in registers, 16 at a time. Every (row, token) is one
//! chain of 16 lanes in one order, so a token's logits do not depend on how many tokens are computed with it.

use super::isa::{Isa, per_isa};
use super::lanes::{Factor, LANES, Stored, sum_lanes};
use super::output::OutputColumns;
use super::pool::{Pool, SendPtr};
use crate::backend::DenseType;
use crate::backend::host::{AlignedBuffer, MappedFile};
use crate::{Error, Result};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

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
/// Rows of a task: 128 KB of a bf16 head of width 2560.
pub(super) const TASK_ROWS: usize = 32;

/// One row times T tokens.
#[inline(always)]
fn pass<E: Factor, const T: usize>(w: &[E], x: [&[f32]; T]) -> [f32; T] {
    let mut acc = [[0f32; SUMS]; T];
    // Arrays by reference, all of one count: no bounds check stands in the way of vectors.
    let (chunks, tail) = w.as_chunks::<SUMS>();
    let tokens = x.map(|x| &x.as_chunks::<SUMS>().0[..chunks.len()]);
    for (k, w) in chunks.iter().enumerate() {
        prefetch(w);
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
    acc.map(|a| {
        let mut sums = [0f32; LANES];
        for i in 0..LANES {
            sums[i] = (a[i] + a[LANES + i]) + (a[2 * LANES + i] + a[3 * LANES + i]);
        }
        sum_lanes(sums)
    })
}

/// Asks for the cache lines 4 KiB ahead; see the ternary kernels for why.
#[inline(always)]
fn prefetch<E>(w: &[E; SUMS]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        for line in (0..size_of_val(w)).step_by(64) {
            let ahead = w.as_ptr().cast::<i8>().wrapping_add(4096 + line);
            // SAFETY: SSE is part of x86-64, and a prefetch may point anywhere.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = w;
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
    let out = out.begin("dense linear", tokens, w.rows)?;
    fn typed<E: Stored>(isa: Isa, pool: &Pool, m: &CpuDense, x: &[f32], width: usize, add: bool, base: SendPtr<f32>) {
        let weights = m.values::<E>();
        pool.run(m.rows.div_ceil(TASK_ROWS), &|task| {
            let first = task * TASK_ROWS;
            let count = TASK_ROWS.min(m.rows - first);
            // SAFETY: first < rows; this task alone writes the columns first … first + count of every token,
            // all inside the output by the check of `begin`.
            let out = SendPtr(unsafe { base.get().add(first) });
            rows_times_tokens::<E>(isa, &weights[first * m.cols..][..count * m.cols], m.cols, x, width, add, out);
        });
    }
    match w.dtype {
        DenseType::F32 => typed::<f32>(isa, pool, w, x, width, add, out),
        DenseType::F16 => typed::<f16>(isa, pool, w, x, width, add, out),
        DenseType::BF16 => typed::<bf16>(isa, pool, w, x, width, add, out),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matrix(dtype: DenseType, rows: usize, cols: usize, seed: u64) -> CpuDense {
        let value = |i: usize| ((i as u64).wrapping_mul(seed | 1) >> 40) as f32 / 8e6 - 1.0;
        CpuDense::owned(dtype, rows, cols, |bytes| {
            for (i, b) in bytes.chunks_exact_mut(dtype.size()).enumerate() {
                match dtype {
                    DenseType::F32 => b.copy_from_slice(&value(i).to_le_bytes()),
                    DenseType::F16 => b.copy_from_slice(&f16::from_f32(value(i)).to_le_bytes()),
                    DenseType::BF16 => b.copy_from_slice(&bf16::from_f32(value(i)).to_le_bytes()),
                }
            }
        })
        .unwrap()
    }

    proptest! {
        #[test]
        fn equals_a_double_precision_product_and_itself_in_any_batch(
            rows in 1usize..90, cols in 1usize..80, tokens in 1usize..7, seed: u64,
        ) {
            let pool = Pool::new(2);
            let x: Vec<f32> = (0..tokens * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 20.0).collect();
            for dtype in [DenseType::F32, DenseType::F16, DenseType::BF16] {
                let m = matrix(dtype, rows, cols, seed);
                let mut wide = vec![0.0; rows * cols];
                wide.chunks_exact_mut(cols).enumerate().for_each(|(r, out)| m.row(r, out));
                let mut first = None;
                for isa in Isa::available() {
                    let mut out = vec![0.0; tokens * rows];
                    dense_linear(isa, &pool, &m, &x, OutputColumns::whole(&mut out, rows)).unwrap();
                    for t in 0..tokens {
                        let mut alone = vec![0.0; rows];
                        let columns = OutputColumns::whole(&mut alone, rows);
                        dense_linear(isa, &pool, &m, &x[t * cols..][..cols], columns).unwrap();
                        prop_assert_eq!(&alone[..], &out[t * rows..][..rows]);
                        for r in 0..rows {
                            let terms = (0..cols).map(|k| f64::from(wide[r * cols + k]) * f64::from(x[t * cols + k]));
                            let size: f64 = terms.clone().map(f64::abs).sum();
                            let want: f64 = terms.sum();
                            prop_assert!((f64::from(out[t * rows + r]) - want).abs() <= 1e-5 * size + 1e-30);
                        }
                    }
                    prop_assert_eq!(first.get_or_insert(out.clone()), &out);
                }
            }
        }
    }
}
