//! Dense matrices: embeddings, output heads, unconverted projections.
//!
//! A product takes up to 8 tokens at a time and reads the matrix once for them, which is what an output head needs.

use super::batch::GpuBatch;
use super::params::Head;
use super::plan::{by_tokens, form_of};
use super::{Memory, int, shape};
use crate::backend::DenseType;
use crate::backend::host::MappedFile;
use crate::{Error, Result};
use std::ops::Range;

/// Bytes of a row that kernels read at once.
pub(crate) const ROW_UNIT: usize = 16;
/// Bytes that are copied at once, so that a mapped file need not be resident as a whole.
pub(crate) const PIECE: usize = 32 << 20;

/// A dense matrix `[rows, cols]`.
#[derive(Debug)]
pub struct Dense<M> {
    dtype: DenseType,
    rows: usize,
    cols: usize,
    data: M,
}

impl<M> Dense<M> {
    /// A matrix of checked size.
    pub(in crate::backend) fn of(dtype: DenseType, rows: usize, cols: usize, data: M) -> Self {
        Self { dtype, rows, cols, data }
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

    pub(in crate::backend) fn data(&self) -> &M {
        &self.data
    }

    /// What the kernels take of sizes.
    pub(in crate::backend) fn sizes(&self, op: &'static str, tokens: usize) -> Result<Head> {
        sizes(op, tokens, self.cols, self.rows)
    }

    /// The tokens of a product, whose results are columns `first_column ..` of rows of `width`.
    ///
    /// # Errors
    /// [`Error::Shape`] for operands that do not fit.
    pub(in crate::backend) fn tokens(
        &self,
        op: &'static str,
        inputs: usize,
        outputs: usize,
        first_column: usize,
        width: usize,
    ) -> Result<usize> {
        let (rows, cols) = (self.rows, self.cols);
        let tokens = inputs / cols;
        let fits = inputs == tokens * cols
            && tokens.checked_mul(width) == Some(outputs)
            && first_column.checked_add(rows).is_some_and(|end| end <= width);
        if !fits {
            let reason = format!(
                "weight [{rows}, {cols}], {inputs} inputs, {outputs} outputs in rows of {width} from column {first_column}"
            );
            return Err(shape(op, reason));
        }
        Ok(tokens)
    }

    /// Refuses a batch that is none of this embedding's, and an output of another size.
    ///
    /// # Errors
    /// [`Error::Request`] for an id outside the vocabulary, [`Error::Shape`] for an output that does not fit.
    pub(in crate::backend) fn embeds<B>(&self, batch: &GpuBatch<B>, outputs: usize) -> Result<()> {
        let (rows, cols, tokens) = (self.rows, self.cols, batch.len());
        if let Some(id) = batch.ids().iter().max().filter(|id| **id as usize >= rows) {
            return Err(Error::request("token id", format!("{id} is outside the vocabulary of {rows}")));
        }
        if tokens.checked_mul(cols) != Some(outputs) {
            return Err(shape("embedding", format!("{tokens} tokens of {cols} values into {outputs}")));
        }
        Ok(())
    }
}

impl<M: Memory> Dense<M> {
    /// Stored bytes.
    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }

    /// Bytes that a product of so many tokens moves.
    pub(in crate::backend) fn moved(&self, tokens: usize) -> usize {
        self.bytes() + tokens * (self.rows + self.cols) * size_of::<f32>()
    }
}

/// What the kernels take of a product's or an embedding's sizes.
pub(crate) fn sizes(op: &'static str, tokens: usize, cols: usize, rows: usize) -> Result<Head> {
    let (tokens, hidden) = (int(op, "tokens", tokens)?, int(op, "columns", cols)?);
    Ok(Head { tokens, hidden, vocab: int(op, "rows", rows)? })
}

/// Bytes of a matrix for the `kernels` of a kind of GPU.
///
/// # Errors
/// [`Error::Shape`] for no matrix, or one whose rows are no multiple of 16 bytes.
pub(crate) fn checked_size(kernels: &str, dtype: DenseType, rows: usize, cols: usize) -> Result<usize> {
    const OP: &str = "dense matrix";
    let row = cols.checked_mul(dtype.size()).filter(|b| *b > 0);
    let Some((row, size)) = row.and_then(|b| Some((b, b.checked_mul(rows).filter(|n| *n > 0)?))) else {
        return Err(shape(OP, format!("[{rows}, {cols}] {dtype} is no matrix")));
    };
    if !row.is_multiple_of(ROW_UNIT) {
        let reason = format!(
            "rows of {cols} {dtype} values are {row} bytes, but the {kernels} kernels need a multiple of {ROW_UNIT}; use \
             --device cpu"
        );
        return Err(shape(OP, reason));
    }
    int(OP, "rows", rows)?;
    int(OP, "columns", cols)?;
    Ok(size)
}

/// A matrix in a mapped file, for the `kernels` of a kind of GPU.
///
/// # Errors
/// As [`checked_size`], and [`Error::Shape`] if the range does not hold `rows · cols` elements.
pub(crate) fn mapped<'a>(
    kernels: &str,
    dtype: DenseType,
    rows: usize,
    cols: usize,
    file: &'a MappedFile,
    range: Range<usize>,
) -> Result<&'a [u8]> {
    let size = checked_size(kernels, dtype, rows, cols)?;
    file.bytes().get(range.clone()).filter(|b| b.len() == size).ok_or_else(|| {
        let reason = format!("[{rows}, {cols}] {dtype} needs {size} bytes, the file gives {range:?}");
        shape("dense matrix", reason)
    })
}

/// The kernel for up to `tokens` tokens: 1, 2, 4 or 8.
pub(crate) fn head_kernel(dtype: DenseType, tokens: usize) -> &'static str {
    let names = match dtype {
        DenseType::F32 => by_tokens!("bitnet_head_f32"),
        DenseType::F16 => by_tokens!("bitnet_head_f16"),
        DenseType::BF16 => by_tokens!("bitnet_head_bf16"),
    };
    form_of(names, tokens)
}

/// The kernel that looks rows up.
pub(crate) fn embed_kernel(dtype: DenseType) -> &'static str {
    match dtype {
        DenseType::F32 => "bitnet_embed_f32",
        DenseType::F16 => "bitnet_embed_f16",
        DenseType::BF16 => "bitnet_embed_bf16",
    }
}

/// Where a dense product's results go.
#[derive(Clone, Copy)]
pub(crate) struct Columns<T> {
    /// The first of them.
    pub to: T,
    /// Elements between the results of two tokens.
    pub stride: usize,
    /// Whether they are added.
    pub add: bool,
}

/// Row numbers of f32 `[tokens, cols]`, of `inputs` values in all, as kernels take them: with `tokens`.
///
/// # Errors
/// [`Error::Shape`] for a row that is not there or an output that does not fit.
pub(crate) fn selected(inputs: usize, cols: usize, rows: &[u32], outputs: usize) -> Result<(Vec<i32>, usize)> {
    let tokens = inputs / cols.max(1);
    let fits = cols > 0 && inputs == tokens * cols && rows.len().checked_mul(cols) == Some(outputs);
    if !fits || rows.iter().any(|r| *r as usize >= tokens) {
        let (count, largest) = (rows.len(), rows.iter().max());
        let reason = format!("{count} rows up to {largest:?} of [{tokens}, {cols}] ({inputs} elements) into {outputs}");
        return Err(shape("select_rows", reason));
    }
    Ok((rows.iter().map(|r| *r as i32).collect(), tokens))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_its_kernels() {
        for dtype in [DenseType::F32, DenseType::F16, DenseType::BF16] {
            assert!(embed_kernel(dtype).ends_with(dtype.name()));
            for (tokens, suffix) in [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)] {
                assert_eq!(head_kernel(dtype, tokens), format!("bitnet_head_{dtype}_{suffix}"));
            }
        }
    }

    #[test]
    fn rows_are_whole_vectors() {
        let size = |dtype, rows, cols| checked_size("CUDA", dtype, rows, cols);
        assert_eq!(size(DenseType::BF16, 3, 8).unwrap(), 48);
        assert_eq!(size(DenseType::F32, 3, 4).unwrap(), 48);
        let message = size(DenseType::F16, 3, 12).unwrap_err().to_string();
        assert!(message.contains("24 bytes") && message.contains("16"), "{message}");
        assert!(size(DenseType::F32, 0, 4).is_err() && size(DenseType::F32, 4, 0).is_err());
        assert!(size(DenseType::F32, usize::MAX, 4).is_err());
    }
}
