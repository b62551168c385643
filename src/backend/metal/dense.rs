//! Dense matrices in the memory of the CPU and the GPU: embeddings, output heads, unconverted projections.

use super::scratch::Buffer;
use super::{Metal, MetalBatch, MetalBuffer, MetalSlice, aligned, plan};
use crate::Result;
use crate::backend::DenseType;
use crate::backend::gpu::dense::{self, Columns, Dense, PIECE, ROW_UNIT};
use crate::backend::gpu::{Launch, groups, shape};
use crate::backend::host::MappedFile;
use std::ops::Range;

/// Whose kernels they are.
const KERNELS: &str = "Metal";

/// A dense matrix `[rows, cols]` on the device.
pub type MetalDense = Dense<MetalBuffer<u8>>;

impl MetalDense {
    /// Copies a matrix from a mapped file, in pieces; the file's pages are released.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if the range does not hold `rows · cols` elements or a row is no multiple of 16 bytes,
    /// [`crate::Error::Unavailable`] if memory is short.
    pub fn mapped(
        metal: &Metal,
        dtype: DenseType,
        rows: usize,
        cols: usize,
        file: &MappedFile,
        range: Range<usize>,
    ) -> Result<Self> {
        let bytes = dense::mapped(KERNELS, dtype, rows, cols, file, range.clone())?;
        Self::filled(metal, dtype, rows, cols, |to| {
            for (first, count) in groups(bytes.len(), PIECE) {
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
        let size = dense::checked_size(KERNELS, dtype, rows, cols)?;
        let mut data = metal.zeroed::<u8>(size, "a dense matrix")?;
        data.fill(fill);
        Ok(Self::of(dtype, rows, cols, data))
    }
}

impl Metal {
    /// Dense product in f32: `Σ_k w[r][k] · x[t][k]`, as columns `first_column ..` of rows of `width`, replaced or added
    /// to. `x` is f32 `[tokens, cols]`, `out` f32 `[tokens, width]`.
    ///
    /// Whole rows are written where they belong; others go through scratch memory.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for operands that do not fit, [`crate::Error::Device`] for what fails on the device.
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
        let tokens = weight.tokens(OP, x.len(), out.len(), first_column, width)?;
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
        columns: Columns<MetalSlice<'_>>,
    ) -> Result<()> {
        let (rows, cols) = (weight.rows(), weight.cols());
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
            let kernel = dense::head_kernel(weight.dtype(), count);
            let launch = Launch::new(kernel, (plan::head_grid(rows), 1, 1), plan::THREADS).bytes(weight.moved(count));
            let (weights, params) = (weight.data().as_slice().input(), weight.sizes(op, count)?);
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
    /// [`crate::Error::Request`] for an id outside the vocabulary, [`crate::Error::Shape`] for an output that does not fit,
    /// [`crate::Error::Device`] for what fails on the device.
    pub fn embed(&self, weight: &MetalDense, batch: &MetalBatch, out: MetalSlice<'_>) -> Result<()> {
        weight.embeds(batch, out.len())?;
        let (rows, cols, table) = (weight.rows(), weight.cols(), weight.data().as_slice());
        let (kernel, element) = (dense::embed_kernel(weight.dtype()), weight.dtype().size());
        // SAFETY: a table of [rows, cols] of this type, as many ids below `rows` as tokens, an output of [tokens, cols],
        // checked above.
        unsafe { self.gather(kernel, element, table, batch.ids_slice(), out, cols, rows) }
    }

    /// Rows `rows` of f32 `x` `[tokens, cols]`: f32 `[rows.len(), cols]`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for a row that is not there or an output that does not fit, [`crate::Error::Device`] for what
    /// fails on the device.
    pub fn select_rows(&self, x: MetalSlice<'_>, cols: usize, rows: &[u32], out: MetalSlice<'_>) -> Result<()> {
        let (numbers, tokens) = dense::selected(x.len(), cols, rows, out.len())?;
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
        let tokens = ids.len();
        if tokens == 0 {
            return Ok(());
        }
        let params = dense::sizes("embedding", tokens, cols, vocab)?;
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
            assert!(kernel(dense::embed_kernel(dtype)).is_ok());
            assert!([1, 2, 4, 8].iter().all(|tokens| kernel(dense::head_kernel(dtype, *tokens)).is_ok()));
        }
    }
}
