//! Products whose operands are rounded to bf16 and whose sums are f32: mixed precision for training.
//!
//! Rows and columns can be scaled before the rounding, so that quantised operands are rounded to their integer codes, that
//! is, not at all: with λ = 1 the forward product is as exact as inference's. Where the CPU has no bf16 instructions the
//! rounded operands go through the f32 product, which differs only in the order of its sums.

use super::gemm::{Matrix, matmul};
use crate::Result;
use half::bf16;

/// Whether this CPU multiplies bf16 itself; elsewhere such products cost more than f32 ones.
pub fn has_bf16_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    return crate::backend::cpu::x86_64::avx512_bf16::Avx512Bf16::new().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// A matrix that is scaled and rounded to bf16 before it is multiplied.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    /// As it lies in memory.
    pub matrix: Matrix<'a>,
    /// A factor for each of its rows.
    pub row_factors: Option<&'a [f32]>,
    /// A factor for each of its columns.
    pub col_factors: Option<&'a [f32]>,
    /// Whether its transpose is meant.
    pub transposed: bool,
}

impl<'a> Operand<'a> {
    /// The matrix as it is.
    pub fn new(matrix: Matrix<'a>) -> Self {
        Self { matrix, row_factors: None, col_factors: None, transposed: false }
    }

    /// With a factor for each row.
    #[must_use]
    pub fn rows(self, factors: &'a [f32]) -> Self {
        Self { row_factors: Some(factors), ..self }
    }

    /// With a factor for each column.
    #[must_use]
    pub fn cols(self, factors: &'a [f32]) -> Self {
        Self { col_factors: Some(factors), ..self }
    }

    /// The transpose.
    #[must_use]
    pub fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    fn shape(&self) -> (usize, usize) {
        let (rows, cols) = self.matrix.shape();
        if self.transposed { (cols, rows) } else { (rows, cols) }
    }

    fn check(&self) -> Result<()> {
        let (rows, cols) = self.matrix.shape();
        let fits = |factors: Option<&[f32]>, n: usize| factors.is_none_or(|f| f.len() == n);
        match fits(self.row_factors, rows) && fits(self.col_factors, cols) {
            true => Ok(()),
            false => Err(crate::Error::Shape { op: "bf16 product", reason: format!("factors for {rows}×{cols}") }),
        }
    }

    /// Scaled and rounded, row-major in its stored orientation.
    fn rounded(&self) -> Vec<f32> {
        let (rows, cols) = self.matrix.shape();
        let mut out = Vec::with_capacity(rows * cols);
        for r in 0..rows {
            let factor = self.row_factors.map_or(1.0, |f| f[r]);
            let row = self.matrix.row(r).iter().enumerate();
            out.extend(row.map(|(c, x)| {
                let x = self.col_factors.map_or(x * factor, |f| x * factor * f[c]);
                bf16::from_f32(x).to_f32()
            }));
        }
        out
    }
}

/// What a product does with its sums.
#[derive(Debug, Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// A factor for each row of the result.
    pub row_factors: Option<&'a [f32]>,
    /// A factor for each column of the result.
    pub col_factors: Option<&'a [f32]>,
    /// Whether the result is added to what is there.
    pub accumulate: bool,
}

/// `out (+)= a · b`, rows `out_stride` apart.
///
/// # Errors
/// [`crate::Error::Shape`] if shapes or factors do not fit together.
pub fn matmul_bf16(a: Operand, b: Operand, epilogue: Epilogue, out: &mut [f32], out_stride: usize) -> Result<()> {
    a.check()?;
    b.check()?;
    let ((m, k), (inner, n)) = (a.shape(), b.shape());
    let fits = |factors: Option<&[f32]>, n: usize| factors.is_none_or(|f| f.len() == n);
    if k != inner || !fits(epilogue.row_factors, m) || !fits(epilogue.col_factors, n) {
        return Err(crate::Error::Shape { op: "bf16 product", reason: format!("{m}×{k} times {inner}×{n}") });
    }
    Matrix::new(out, m, n, out_stride)?;
    #[cfg(target_arch = "x86_64")]
    if let Some(cpu) = crate::backend::cpu::x86_64::avx512_bf16::Avx512Bf16::new() {
        packed::matmul(cpu, a, b, epilogue, out, out_stride);
        return Ok(());
    }
    portable(a, b, epilogue, out, out_stride)
}

fn portable(a: Operand, b: Operand, epilogue: Epilogue, out: &mut [f32], out_stride: usize) -> Result<()> {
    let ((m, _), (_, n)) = (a.shape(), b.shape());
    let (left, right) = (a.rounded(), b.rounded());
    let mut product = vec![0.0; m * n];
    let view = |op: &Operand, data| -> Result<Matrix> {
        let (rows, cols) = op.matrix.shape();
        let matrix = Matrix::new(data, rows, cols, cols)?;
        Ok(if op.transposed { matrix.t() } else { matrix })
    };
    matmul(view(&a, &left)?, view(&b, &right)?, 1.0, &mut product, n, false)?;
    for (i, row) in product.chunks_exact(n).enumerate() {
        finish(row, i, 0, epilogue, &mut out[i * out_stride..i * out_stride + n]);
    }
    Ok(())
}

/// Scales a row of sums, whose first column is `col`, into the result.
#[inline(always)]
fn finish(sums: &[f32], row: usize, col: usize, epilogue: Epilogue, out: &mut [f32]) {
    let factor = epilogue.row_factors.map_or(1.0, |f| f[row]);
    let scaled = |j: usize, sum: f32| epilogue.col_factors.map_or(sum * factor, |f| sum * (factor * f[col + j]));
    for (j, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
        *out = if epilogue.accumulate { *out + scaled(j, *sum) } else { scaled(j, *sum) };
    }
}

#[cfg(target_arch = "x86_64")]
mod packed {
    use super::{Epilogue, Operand, finish};
    use crate::backend::cpu::x86_64::avx512_bf16::{Avx512Bf16, COLS, ROWS};
    use std::cell::RefCell;

    /// Steps of the contraction that are packed at a time: a right panel of 16 KiB stays in the first-level cache.
    const STEPS: usize = 256;

    thread_local! {
        static PANELS: RefCell<(Vec<u32>, Vec<u32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
    }

    pub(super) fn matmul(cpu: Avx512Bf16, a: Operand, b: Operand, epilogue: Epilogue, out: &mut [f32], stride: usize) {
        let ((m, k), (_, n)) = (a.shape(), b.shape());
        PANELS.with_borrow_mut(|(left, right)| {
            for begin in (0..k).step_by(STEPS) {
                let steps = STEPS.min(k - begin);
                let pairs = steps.div_ceil(2);
                // Lines of the left operand are its rows, of the right one its columns.
                pack::<ROWS>(cpu, a, !a.transposed, m, begin, steps, left);
                pack::<COLS>(cpu, b, b.transposed, n, begin, steps, right);
                let epilogue = Epilogue { accumulate: epilogue.accumulate || begin > 0, ..epilogue };
                let mut tile = [[0.0; COLS]; ROWS];
                for (j, right) in right.chunks_exact(COLS * pairs).enumerate() {
                    let col = j * COLS;
                    let cols = COLS.min(n - col);
                    for (i, left) in left.chunks_exact(ROWS * pairs).enumerate() {
                        cpu.tile(left, right, pairs, &mut tile);
                        let first = i * ROWS;
                        for (row, sums) in (first..m).zip(&tile) {
                            let at = row * stride + col;
                            finish(&sums[..cols], row, col, epilogue, &mut out[at..at + cols]);
                        }
                    }
                }
            }
        });
    }

    /// Packs `lines` lines of `steps` steps into panels of `W`; `by_row` says that a line is a row in memory. What a last
    /// panel lacks is zero.
    fn pack<const W: usize>(
        cpu: Avx512Bf16,
        op: Operand,
        by_row: bool,
        lines: usize,
        begin: usize,
        steps: usize,
        out: &mut Vec<u32>,
    ) {
        let pairs = steps.div_ceil(2);
        out.clear();
        out.resize(lines.div_ceil(W) * W * pairs, 0);
        for (i, panel) in out.chunks_exact_mut(W * pairs).enumerate() {
            let first = i * W;
            let count = W.min(lines - first);
            if by_row {
                for line in 0..count {
                    let row = &op.matrix.row(first + line)[begin..begin + steps];
                    let factor = op.row_factors.map_or(1.0, |f| f[first + line]);
                    match op.col_factors {
                        None => cpu.spread(row, factor, W, &mut panel[line..]),
                        Some(f) => {
                            let mut scaled = [0.0; STEPS];
                            let factors = &f[begin..begin + steps];
                            scaled.iter_mut().zip(row).zip(factors).for_each(|((s, x), f)| *s = x * factor * f);
                            cpu.spread(&scaled[..steps], 1.0, W, &mut panel[line..]);
                        }
                    }
                }
            } else {
                const ZEROS: [f32; COLS] = [0.0; COLS];
                let range = first..first + count;
                let lines = op.col_factors.map(|f| &f[range.clone()]);
                for (pair, out) in panel.chunks_exact_mut(W).enumerate() {
                    let step = begin + 2 * pair;
                    let factor = |step: usize| op.row_factors.map_or(1.0, |f| f[step]);
                    let a = &op.matrix.row(step)[range.clone()];
                    let (b, b_factor) = match 2 * pair + 1 < steps {
                        true => (&op.matrix.row(step + 1)[range.clone()], factor(step + 1)),
                        false => (&ZEROS[..count], 0.0),
                    };
                    cpu.interleave(a, b, (factor(step), b_factor), lines, &mut out[..count]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        (0..n as u64).map(|i| (super::super::mix(seed * 1_000_003 + i) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    #[test]
    fn products_follow_the_definition_in_every_orientation() {
        for (m, n, k) in [(1, 1, 1), (14, 32, 256), (15, 33, 257), (3, 70, 31), (29, 5, 600), (40, 64, 2)] {
            for case in 0..64u32 {
                let bit = |i: u32| case >> i & 1 == 1;
                let (ta, tb) = (bit(0), bit(1));
                let stored = |rows: usize, cols: usize, t: bool| if t { (cols, rows) } else { (rows, cols) };
                let ((ar, ac), (br, bc)) = (stored(m, k, ta), stored(k, n, tb));
                let (a, b) = (values(ar * (ac + 3), 1), values(br * (bc + 1), 2));
                let factors = |n: usize, seed, on: bool| on.then(|| values(n, seed));
                let (fa, ga) = (factors(ar, 3, bit(2)), factors(ac, 4, bit(3)));
                let (fb, gb) = (factors(br, 5, bit(3)), factors(bc, 6, bit(2)));
                let (er, ec) = (factors(m, 7, bit(4)), factors(n, 8, bit(4)));
                let operand = |data, rows, cols, stride, row, col, t| Operand {
                    matrix: Matrix::new(data, rows, cols, stride).unwrap(),
                    row_factors: row,
                    col_factors: col,
                    transposed: t,
                };
                let left = operand(&a, ar, ac, ac + 3, fa.as_deref(), ga.as_deref(), ta);
                let right = operand(&b, br, bc, bc + 1, fb.as_deref(), gb.as_deref(), tb);
                let epilogue = Epilogue { row_factors: er.as_deref(), col_factors: ec.as_deref(), accumulate: bit(5) };
                let (l, r) = (left.rounded(), right.rounded());
                let before = values(m * (n + 2), 9);
                let mut got = before.clone();
                matmul_bf16(left, right, epilogue, &mut got, n + 2).unwrap();
                let mut slow = before.clone();
                portable(left, right, epilogue, &mut slow, n + 2).unwrap();
                for i in 0..m {
                    for j in 0..n {
                        let at = |v: &[f32], cols: usize, t: bool, i: usize, j: usize| {
                            f64::from(if t { v[j * cols + i] } else { v[i * cols + j] })
                        };
                        let terms = (0..k).map(|x| at(&l, ac, ta, i, x) * at(&r, bc, tb, x, j));
                        let (sum, size) = terms.fold((0.0, 0.0), |(s, t), x| (s + x, t + x.abs()));
                        let scale = f64::from(er.as_ref().map_or(1.0, |f| f[i]) * ec.as_ref().map_or(1.0, |f| f[j]));
                        let old = if bit(5) { f64::from(before[i * (n + 2) + j]) } else { 0.0 };
                        let want = old + sum * scale;
                        for found in [got[i * (n + 2) + j], slow[i * (n + 2) + j]] {
                            let error = (f64::from(found) - want).abs();
                            assert!(
                                error <= 1e-5 * (size * scale.abs() + old.abs()) + 1e-7,
                                "{m} {n} {k} {case}: {found} {want}"
                            );
                        }
                    }
                    // What lies between the rows is not touched.
                    assert_eq!(got[i * (n + 2) + n..][..2], before[i * (n + 2) + n..][..2]);
                }
            }
        }
    }

    #[test]
    fn integers_are_exact() {
        let (m, n, k) = (20, 40, 700);
        let q: Vec<f32> = values(m * k, 1).iter().map(|v| (v * 127.0).round()).collect();
        let w: Vec<f32> = values(n * k, 2).iter().map(|v| (v * 1.5).round()).collect();
        let mut out = vec![0.0; m * n];
        let (a, b) = (Matrix::new(&q, m, k, k).unwrap(), Matrix::new(&w, n, k, k).unwrap());
        matmul_bf16(Operand::new(a), Operand::new(b).t(), Epilogue::default(), &mut out, n).unwrap();
        for i in 0..m {
            for j in 0..n {
                let want: f32 = (0..k).map(|x| q[i * k + x] * w[j * k + x]).sum();
                assert_eq!(out[i * n + j], want);
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let data = [0.0; 12];
        let a = Operand::new(Matrix::new(&data, 3, 4, 4).unwrap());
        let mut out = [0.0; 9];
        assert!(matmul_bf16(a, a, Epilogue::default(), &mut out, 3).is_err());
        assert!(matmul_bf16(a, a.t(), Epilogue::default(), &mut out[..8], 3).is_err());
        assert!(matmul_bf16(a.rows(&data), a.t(), Epilogue::default(), &mut out, 3).is_err());
        assert!(matmul_bf16(a, a.t(), Epilogue::default(), &mut out, 3).is_ok());
    }
}
