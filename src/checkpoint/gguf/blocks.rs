//! Dense matrices in ggml's block types, widened by candle.

use super::GgmlType;
use crate::backend::host::MappedFile;
use crate::checkpoint::recode::{PIECE, widen};
use crate::checkpoint::{Checkpoint, DenseView, StoredType};
use crate::{Error, Result};
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// A dense matrix of a checkpoint.
#[derive(Debug, Clone)]
pub enum DenseMatrix {
    /// F32, F16 or BF16, to be used where it lies.
    Values(DenseView),
    /// A block type, to be widened.
    Blocks(BlockView),
}

impl DenseMatrix {
    /// Bytes in memory: of its values, or of the BF16 that it is widened to.
    pub fn resident_bytes(&self) -> usize {
        match self {
            Self::Values(view) => view.range.len(),
            Self::Blocks(view) => 2 * view.rows * view.cols,
        }
    }
}

/// A dense matrix `[rows, cols]` in one of ggml's block types, in a mapped file.
#[derive(Debug, Clone)]
pub struct BlockView {
    /// Its type.
    pub dtype: GgmlType,
    /// Rows.
    pub rows: usize,
    /// Columns; whole blocks.
    pub cols: usize,
    /// The file that holds it.
    pub file: Arc<MappedFile>,
    /// Its bytes there.
    pub range: Range<usize>,
    name: String,
}

impl BlockView {
    /// Widens to BF16, `rows · cols` little-endian values; what the mapping held of it need not stay in memory then.
    ///
    /// BF16 has eight bits of precision, as many as the best of these types.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a type that candle cannot widen, and if `out` has another length.
    pub fn to_bf16(&self, out: &mut [u8]) -> Result<()> {
        let error = |reason: String| Error::tensor(self.file.path(), &self.name, reason);
        let bytes = self.file.bytes().get(self.range.clone()).unwrap_or_default();
        let row_bytes = self.cols / self.dtype.block_values() * self.dtype.block_bytes();
        if out.len() != 2 * self.rows * self.cols || bytes.len() != self.rows * row_bytes || out.is_empty() {
            return Err(error(format!("{} bytes to widen to, {} to widen", out.len(), bytes.len())));
        }
        let rows = PIECE.div_ceil(self.cols);
        let pieces = bytes.par_chunks(rows * row_bytes).zip(out.par_chunks_mut(2 * rows * self.cols));
        pieces.try_for_each(|(blocks, out)| -> Result<()> {
            let wide = widen(StoredType::Ggml(self.dtype), blocks, out.len() / 2).map_err(error)?;
            for (out, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(wide) {
                *out = bf16::from_f32(value).to_le_bytes();
            }
            Ok(())
        })?;
        self.file.release(self.range.clone());
        Ok(())
    }
}

impl Checkpoint {
    /// A dense matrix `[rows, cols]`: [`Checkpoint::dense`], or in one of ggml's block types.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing, of another shape, or ternary.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<DenseMatrix> {
        let view = self.require(name)?;
        let StoredType::Ggml(dtype) = view.info.dtype else {
            return self.dense(name, rows, cols).map(DenseMatrix::Values);
        };
        if view.info.shape != [rows, cols] {
            return Err(view.error(format!("shape {:?} where [{rows}, {cols}] is expected", view.info.shape)));
        }
        if dtype.candle().is_none() {
            return Err(view.error(format!("{dtype} where a dense type (F32, F16, BF16, Q8_0, Q6_K, …) is expected")));
        }
        let (file, range, name) = (Arc::clone(view.file), view.info.range.clone(), view.stored_name().to_owned());
        Ok(DenseMatrix::Blocks(BlockView { dtype, rows, cols, file, range, name }))
    }
}
