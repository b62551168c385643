//! Dense matrices that stay in the mapped file: embeddings, output heads, master weights.

use crate::backend::host::MappedFile;
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

/// Element type of a dense weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum DenseType {
    F32,
    F16,
    BF16,
}

impl DenseType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Widens little-endian elements to f32, as many as both sides have.
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        fn each<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
                *out = value(*b);
            }
        }
        match self {
            Self::F32 => each(bytes, out, f32::from_le_bytes),
            Self::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Self::BF16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        }
    }
}

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
    /// A copy, for files whose header was not padded and left the values misaligned. Words of 4 bytes keep it
    /// aligned for every type.
    aligned: Option<Arc<[u32]>>,
}

impl DenseView {
    /// `range` must hold `rows · cols` elements.
    pub(super) fn new(dtype: DenseType, rows: usize, cols: usize, file: Arc<MappedFile>, range: Range<usize>) -> Self {
        let mut view = Self { dtype, rows, cols, file, range, aligned: None };
        let bytes = view.bytes();
        if !bytes.as_ptr().addr().is_multiple_of(dtype.size()) {
            let word = |b: &[u8]| {
                let mut word = [0; 4];
                word.iter_mut().zip(b).for_each(|(w, b)| *w = *b);
                u32::from_ne_bytes(word)
            };
            view.aligned = Some(bytes.chunks(4).map(word).collect());
        }
        view
    }

    /// The values' bytes, little-endian, aligned to the element type, `rows · cols · dtype.size()` of them.
    pub fn bytes(&self) -> &[u8] {
        match &self.aligned {
            Some(words) => bytemuck::cast_slice::<u32, u8>(words).get(..self.range.len()).unwrap_or_default(),
            // The range was checked against the mapping when the checkpoint was opened.
            None => self.file.bytes().get(self.range.clone()).unwrap_or_default(),
        }
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
