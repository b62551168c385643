//! Dense matrices that stay in the mapped file: embeddings, output heads, master weights.

use crate::backend::DenseType;
use crate::backend::host::MappedFile;
use crate::ternary::{CODES_PER_BYTE, PackedTernary, Scale};
use std::ops::Range;
use std::sync::Arc;

/// A dense matrix `[rows, cols]`, row-major, in a mapped file. Cloning shares the mapping.
///
/// Values are not checked: they may be NaN.
#[derive(Debug, Clone)]
pub struct DenseView {
    /// Element type.
    pub dtype: DenseType,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// The file that holds the values.
    pub file: Arc<MappedFile>,
    /// Their bytes in it.
    pub range: Range<usize>,
}

impl DenseView {
    /// `range` must hold `rows · cols` elements.
    pub(super) fn new(dtype: DenseType, rows: usize, cols: usize, file: Arc<MappedFile>, range: Range<usize>) -> Self {
        Self { dtype, rows, cols, file, range }
    }

    /// The values' bytes, little-endian, `rows · cols · dtype.size()` of them, at any alignment.
    pub fn bytes(&self) -> &[u8] {
        // The range was checked against the mapping when the checkpoint was opened.
        self.file.bytes().get(self.range.clone()).unwrap_or_default()
    }

    /// The bytes of one row; empty if there is no such row.
    pub fn row(&self, row: usize) -> &[u8] {
        let stride = self.cols * self.dtype.size();
        row.checked_mul(stride).and_then(|at| self.bytes().get(at..at.checked_add(stride)?)).unwrap_or_default()
    }

    /// All values as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        self.dtype.widen(self.bytes(), &mut out);
        out
    }

    /// Tells the system that the mapped bytes have been read and need not stay in memory.
    pub fn release(&self) {
        self.file.release(self.range.clone());
    }

    /// A matrix whose values are −m, 0 and m for one m, exactly, as codes and the scale m; 1 if all are zero. `reason` words
    /// the first value that is not one of them.
    ///
    /// # Errors
    /// That reason.
    pub(crate) fn three_valued(&self, reason: impl FnOnce(NotTernary) -> String) -> Result<PackedTernary, String> {
        let mut codes = Vec::with_capacity(self.rows * self.cols.div_ceil(CODES_PER_BYTE));
        let (mut row, mut m) = (vec![0f32; self.cols], None);
        for r in 0..self.rows {
            self.dtype.widen(self.row(r), &mut row);
            for (at, four) in row.chunks(CODES_PER_BYTE).enumerate() {
                let mut byte = 0;
                for (i, value) in four.iter().enumerate() {
                    let code = match (*value, m) {
                        (0.0, _) => 1,
                        (v, Some(m)) if v.abs() == m => 1 + v.signum() as i8,
                        (v, None) if v.is_normal() => {
                            m = Some(v.abs());
                            1 + v.signum() as i8
                        }
                        (value, magnitude) => {
                            return Err(reason(NotTernary { row: r, col: at * CODES_PER_BYTE + i, value, magnitude }));
                        }
                    };
                    byte |= (code as u8) << (2 * i);
                }
                codes.push(byte);
            }
        }
        let scale = Scale::Multiply(m.unwrap_or(1.0));
        PackedTernary::new(self.rows, self.cols, codes, scale).map_err(|e| e.to_string())
    }
}

/// A value that keeps a matrix from being ternary.
pub(crate) struct NotTernary {
    pub row: usize,
    pub col: usize,
    pub value: f32,
    /// What the values before it are, where they are not zero; without one, the value cannot be a scale.
    pub magnitude: Option<f32>,
}
