//! Dense f32 products of the training passes, by the `gemm` crate that candle uses too, on the calling thread.

use crate::{Error, Result};
use gemm::Parallelism;

/// A matrix in borrowed memory: element `(i, j)` is `data[i · row_stride + j · col_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix whose rows begin `row_stride` elements apart.
    ///
    /// # Errors
    /// [`Error::Shape`] if it does not lie inside `data`.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Result<Self> {
        check(data.len(), rows, cols, row_stride)?;
        Ok(Self { data, rows, cols, row_stride, col_stride: 1 })
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// A row of a matrix that was not transposed.
    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.row_stride..][..self.cols]
    }

    /// The transposed matrix, without moving anything.
    #[must_use]
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

fn check(len: usize, rows: usize, cols: usize, row_stride: usize) -> Result<()> {
    let end = rows.saturating_sub(1).checked_mul(row_stride).and_then(|n| n.checked_add(cols));
    if rows == 0 || cols == 0 || cols > row_stride || end.is_none_or(|end| end > len) {
        let reason = format!("{rows}×{cols} with a stride of {row_stride} in {len} elements");
        return Err(Error::Shape { op: "matmul", reason });
    }
    Ok(())
}

/// `out = alpha · a · b`, or `out += alpha · a · b` with `accumulate`. `out` is row-major, its rows `out_stride` apart.
///
/// # Errors
/// [`Error::Shape`] if the shapes do not fit together or `out` is too short.
pub fn matmul(a: Matrix, b: Matrix, alpha: f32, out: &mut [f32], out_stride: usize, accumulate: bool) -> Result<()> {
    check(out.len(), a.rows, b.cols, out_stride)?;
    if a.cols != b.rows {
        let reason = format!("{}×{} times {}×{}", a.rows, a.cols, b.rows, b.cols);
        return Err(Error::Shape { op: "matmul", reason });
    }
    // SAFETY: `check` has shown for a, b (when they were made; transposing keeps the set of elements) and out that
    // every element lies inside its slice; out is borrowed mutably, so it overlaps neither.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            if accumulate { 1.0 } else { 0.0 },
            alpha,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
    Ok(())
}
