//! Dense matrices in the memory of the CPU and the GPU: embeddings, output heads, unconverted projections.
//!
//! A product takes up to 8 tokens at a time and reads the matrix once for them, which is what an output head needs.

use super::kernels::{by_tokens, form_of};
use super::launch::Launch;
use super::norm::groups;
use super::params::Head;
use super::scratch::Buffer;
use super::{Metal, MetalBatch, MetalBuffer, MetalSlice, aligned, int, plan, shape};
use crate::backend::DenseType;
use crate::backend::host::MappedFile;
use crate::{Error, Result};
use std::ops::Range;

/// Bytes of a row that kernels read at once.
const ROW_UNIT: usize = 16;
/// Bytes that are copied at once, so that a mapped file need not be resident as a whole.
const PIECE: usize = 32 << 20;

/// A dense matrix `[rows, cols]` on the device.
#[derive(Debug)]
pub struct MetalDense {
    dtype: DenseType,
    rows: usize,
    cols: usize,
    data: MetalBuffer<u8>,
}

impl MetalDense {
    /// Copies a matrix from a mapped file, in pieces; the file's pages are released.
    ///
    /// # Errors
    /// [`Error::Shape`] if the range does not hold `rows · cols` elements or a row is no multiple of 16 bytes,
    /// [`Error::Unavailable`] if memory is short.
    pub fn mapped(
        metal: &Metal,
        dtype: DenseType,
        rows: usize,
        cols: usize,
        file: &MappedFile,
        range: Range<usize>,
    ) -> Result<Self> {
        let size = checked_size(dtype, rows, cols)?;
        let Some(bytes) = file.bytes().get(range.clone()).filter(|b| b.len() == size) else {
            let reason = format!("[{rows}, {cols}] {dtype} needs {size} bytes, the file gives {range:?}");
            return Err(shape("dense matrix", reason));
        };
        Self::filled(metal, dtype, rows, cols, |to| {
            for (first, count) in groups(size, PIECE) {
                let piece = first..first + count;
                to[piece.clone()].copy_from_slice(&bytes[piece.clone()]);
                file.release(range.start + piece.start..range.start + piece.end);
            }
        })
    }

    /// A matrix that `fill` writes (row-major, little-endian) where it stays.
    ///
    /// # Errors
    /// As [`MetalDense::mapped`].
    pub fn filled(
        metal: &Metal,
        dtype: DenseType,
        rows: usize,
        cols: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<Self> {
        let mut data = metal.zeroed::<u8>(checked_size(dtype, rows, cols)?, "a dense matrix")?;
        data.fill(fill);
        Ok(Self { dtype, rows, cols, data })
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

    /// Stored bytes.
    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }
}

fn checked_size(dtype: DenseType, rows: usize, cols: usize) -> Result<usize> {
    let row = cols.checked_mul(dtype.size()).filter(|b| *b > 0);
    let Some(size) = row.and_then(|b| b.checked_mul(rows)).filter(|n| *n > 0) else {
        return Err(shape("dense matrix", format!("[{rows}, {cols}] {dtype} is no matrix")));
    };
    if !(cols * dtype.size()).is_multiple_of(ROW_UNIT) {
        let reason = format!(
            "rows of {cols} {dtype} values are {} bytes, but the Metal kernels need a multiple of {ROW_UNIT}; use \
             --device cpu",
            cols * dtype.size()
        );
        return Err(shape("dense matrix", reason));
    }
    int("dense matrix", "rows", rows)?;
    int("dense matrix", "columns", cols)?;
    Ok(size)
}

/// The kernel for up to `tokens` tokens.
fn head_kernel(dtype: DenseType, tokens: usize) -> &'static str {
    let names = match dtype {
        DenseType::F32 => by_tokens!("bitnet_head_f32"),
        DenseType::F16 => by_tokens!("bitnet_head_f16"),
        DenseType::BF16 => by_tokens!("bitnet_head_bf16"),
    };
    form_of(names, tokens)
}

fn embed_kernel(dtype: DenseType) -> &'static str {
    match dtype {
        DenseType::F32 => "bitnet_embed_f32",
        DenseType::F16 => "bitnet_embed_f16",
        DenseType::BF16 => "bitnet_embed_bf16",
    }
}

/// Where a dense product's results go.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a> {
    /// From the first of them on.
    pub to: MetalSlice<'a>,
    /// Elements between the results of two tokens.
    pub stride: usize,
    /// Whether they are added.
    pub add: bool,
}

impl Metal {
    /// Dense product in f32: `Σ_k w[r][k] · x[t][k]`, as columns `first_column ..` of rows of `width`, replaced or added
    /// to. `x` is f32 `[tokens, cols]`, `out` f32 `[tokens, width]`.
    ///
    /// Whole rows are written where they belong; others go through scratch memory.
    ///
    /// # Errors
    /// [`Error::Shape`] for operands that do not fit, [`Error::Device`] for what fails on the device.
    pub fn dense_linear(
        &self,
        weight: &MetalDense,
        x: MetalSlice<'_>,
        out: MetalSlice<'_>,
        first_column: usize,
        width: usize,
        add: bool,
    ) -> Result<()> {
        const OP: &str = "dense_linear";
        let (rows, cols) = (weight.rows, weight.cols);
        let tokens = x.len() / cols;
        let fits = x.len() == tokens * cols
            && tokens.checked_mul(width) == Some(out.len())
            && first_column.checked_add(rows).is_some_and(|end| end <= width);
        if !fits {
            let reason = format!(
                "weight [{rows}, {cols}], {} inputs, {} outputs in rows of {width} from column {first_column}",
                x.len(),
                out.len()
            );
            return Err(shape(OP, reason));
        }
        let columns = Columns { to: out.slice(first_column..), stride: width, add };
        self.dense_columns(OP, weight, x, tokens, &mut self.scratch().columns, columns)
    }

    /// A dense product in groups of tokens. `x` is f32 `[tokens, cols]`.
    pub(super) fn dense_columns(
        &self,
        op: &'static str,
        weight: &MetalDense,
        x: MetalSlice<'_>,
        tokens: usize,
        scratch: &mut Buffer<f32>,
        columns: Columns<'_>,
    ) -> Result<()> {
        let (rows, cols) = (weight.rows, weight.cols);
        let most = tokens.min(plan::DECODE_TOKENS);
        let direct = columns.stride == rows && !columns.add;
        for (first, count) in groups(tokens, plan::DECODE_TOKENS) {
            let to = columns.to.slice(first * columns.stride..);
            let logits = match direct {
                true => to.slice(..count * rows),
                false => scratch.first(self, most * rows, "a dense product")?.slice(..count * rows),
            };
            let x = x.slice(first * cols..(first + count) * cols);
            if logits.len() != count * rows || x.len() != count * cols {
                return Err(shape(op, format!("{} inputs, {} outputs for {count} tokens", x.len(), logits.len())));
            }
            aligned(op, [x])?;
            let params = Head {
                tokens: int(op, "tokens", count)?,
                hidden: int(op, "columns", cols)?,
                vocab: int(op, "rows", rows)?,
            };
            let bytes = weight.bytes() + count * (rows + cols) * size_of::<f32>();
            let launch = Launch::new(head_kernel(weight.dtype, count), (plan::head_grid(rows), 1, 1), plan::THREADS)
                .bytes(bytes);
            let weights = weight.data.as_slice().input();
            // SAFETY: the bindings and parameters of bitnet_head_*, for dense types the second of them unused; input and
            // output were checked, the matrix is [rows, cols] of this type.
            unsafe { self.launch(launch, &[weights, weights, x.input(), logits.output()], &params) }?;
            if !direct {
                self.place(logits, to, count, rows, columns.stride, columns.add)?;
            }
        }
        Ok(())
    }

    /// The batch's rows of an embedding, widened to f32 `[tokens, cols]`.
    ///
    /// # Errors
    /// [`Error::Request`] for an id outside the vocabulary, [`Error::Shape`] for an output that does not fit,
    /// [`Error::Device`] for what fails on the device.
    pub fn embed(&self, weight: &MetalDense, batch: &MetalBatch, out: MetalSlice<'_>) -> Result<()> {
        let (rows, cols, tokens) = (weight.rows, weight.cols, batch.len());
        if let Some(id) = batch.largest_id().filter(|id| *id as usize >= rows) {
            return Err(Error::request("token id", format!("{id} is outside the vocabulary of {rows}")));
        }
        if tokens.checked_mul(cols) != Some(out.len()) {
            return Err(shape("embedding", format!("{tokens} tokens of {cols} values into {}", out.len())));
        }
        let table = weight.data.as_slice();
        // SAFETY: a table of [rows, cols] of this type, as many ids below `rows` as tokens, an output of [tokens, cols],
        // checked above.
        unsafe {
            self.gather(embed_kernel(weight.dtype), weight.dtype.size(), table, batch.ids_slice(), out, cols, rows)
        }
    }

    /// Rows `rows` of f32 `x` `[tokens, cols]`: f32 `[rows.len(), cols]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a row that is not there or an output that does not fit, [`Error::Device`] for what fails
    /// on the device.
    pub fn select_rows(&self, x: MetalSlice<'_>, cols: usize, rows: &[u32], out: MetalSlice<'_>) -> Result<()> {
        let tokens = x.len() / cols.max(1);
        let fits = cols > 0 && x.len() == tokens * cols && rows.len().checked_mul(cols) == Some(out.len());
        if !fits || rows.iter().any(|r| *r as usize >= tokens) {
            let largest = rows.iter().max();
            let reason = format!(
                "{} rows up to {largest:?} of [{tokens}, {cols}] ({} elements) into {}",
                rows.len(),
                x.len(),
                out.len()
            );
            return Err(shape("select_rows", reason));
        }
        let numbers: Vec<i32> = rows.iter().map(|r| *r as i32).collect();
        // Memory of their own: kernels of the step before may still read the last ones.
        let numbers = self.upload(&numbers, "row numbers")?;
        let ids = numbers.slice(..rows.len());
        if !cols.is_multiple_of(ROW_UNIT / size_of::<f32>()) {
            return Err(shape("select_rows", format!("rows of {cols} values are no multiple of {ROW_UNIT} bytes")));
        }
        aligned("select_rows", [x, out])?;
        // SAFETY: an f32 table of [tokens, cols], row numbers below `tokens`, an output of [rows, cols], checked above.
        unsafe { self.gather("bitnet_embed_f32", size_of::<f32>(), x, ids, out, cols, tokens) }
    }

    /// Rows `ids` of a table `[vocab, cols]` to f32 `[tokens, cols]`.
    ///
    /// # Safety
    /// Table and output are as large as that, the ids below `vocab`, the table's elements what the kernel reads.
    #[allow(clippy::too_many_arguments)]
    unsafe fn gather<T: bytemuck::Pod>(
        &self,
        kernel: &'static str,
        element: usize,
        table: MetalSlice<'_, T>,
        ids: MetalSlice<'_, i32>,
        out: MetalSlice<'_>,
        cols: usize,
        vocab: usize,
    ) -> Result<()> {
        const OP: &str = "embedding";
        let tokens = ids.len();
        if tokens == 0 {
            return Ok(());
        }
        let params = Head {
            tokens: int(OP, "tokens", tokens)?,
            hidden: int(OP, "columns", cols)?,
            vocab: int(OP, "rows", vocab)?,
        };
        let launch =
            Launch::new(kernel, (tokens, 1, 1), plan::THREADS).bytes(tokens * cols * (element + size_of::<f32>()));
        let table = table.input();
        // SAFETY: the bindings and parameters of bitnet_embed_*, for dense types the second of them unused; the caller
        // vouches for the memory.
        unsafe { self.launch(launch, &[table, table, ids.input(), out.output()], &params) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernels::kernel;
    use super::*;

    #[test]
    fn every_type_has_its_kernels() {
        for dtype in [DenseType::F32, DenseType::F16, DenseType::BF16] {
            assert!(kernel(embed_kernel(dtype)).is_ok());
            for (tokens, suffix) in [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)] {
                let name = head_kernel(dtype, tokens);
                assert_eq!(name, format!("bitnet_head_{dtype}_{suffix}"));
                assert!(kernel(name).is_ok());
            }
        }
    }

    #[test]
    fn rows_are_whole_vectors() {
        assert_eq!(checked_size(DenseType::BF16, 3, 8).unwrap(), 48);
        assert_eq!(checked_size(DenseType::F32, 3, 4).unwrap(), 48);
        let message = checked_size(DenseType::F16, 3, 12).unwrap_err().to_string();
        assert!(message.contains("24 bytes") && message.contains("16"), "{message}");
        assert!(checked_size(DenseType::F32, 0, 4).is_err() && checked_size(DenseType::F32, 4, 0).is_err());
        assert!(checked_size(DenseType::F32, usize::MAX, 4).is_err());
    }
}
