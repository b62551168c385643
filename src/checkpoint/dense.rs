//! Dense matrices that stay in the mapped file: embeddings, output heads, master weights.

use crate::backend::DenseType;
use crate::backend::host::MappedFile;
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
}
