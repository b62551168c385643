//! Dense matrices in device memory: embeddings, output heads, unconverted projections.

use super::launch::arg;
use super::params::HeadParams;
use super::{Cuda, CudaBatch, CudaSlice, CudaView, CudaViewMut, failure, plan};
use crate::Result;
use crate::backend::DenseType;
use crate::backend::gpu::dense::{self, Columns, Dense, PIECE};
use crate::backend::gpu::{Launch, groups, shape};
use crate::backend::host::{AlignedBuffer, MappedFile};
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Whose kernels they are.
const KERNELS: &str = "CUDA";

/// A dense matrix `[rows, cols]` in device memory.
pub type CudaDense = Dense<CudaSlice<u8>>;

impl CudaDense {
    /// Uploads a matrix from a mapped file, in pieces; the file's pages are released.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if the range does not hold `rows · cols` elements or a row is no multiple of 16 bytes,
    /// [`crate::Error::Unavailable`] if device memory is short.
    pub fn mapped(
        cuda: &Cuda,
        dtype: DenseType,
        rows: usize,
        cols: usize,
        file: &MappedFile,
        range: Range<usize>,
    ) -> Result<Self> {
        let bytes = dense::mapped(KERNELS, dtype, rows, cols, file, range.clone())?;
        Self::upload(cuda, dtype, rows, cols, bytes, |done| {
            file.release(range.start + done.start..range.start + done.end);
        })
    }

    /// A matrix that `fill` writes (row-major, little-endian) into host memory first.
    ///
    /// # Errors
    /// As [`CudaDense::mapped`].
    pub fn filled(
        cuda: &Cuda,
        dtype: DenseType,
        rows: usize,
        cols: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<Self> {
        let mut buffer = AlignedBuffer::zeroed(dense::checked_size(KERNELS, dtype, rows, cols)?)?;
        fill(&mut buffer);
        Self::upload(cuda, dtype, rows, cols, &buffer, |_| ())
    }

    fn upload(
        cuda: &Cuda,
        dtype: DenseType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
        uploaded: impl Fn(Range<usize>),
    ) -> Result<Self> {
        let mut data = cuda.zeroed::<u8>(bytes.len(), "a dense matrix")?;
        for (first, count) in groups(bytes.len(), PIECE) {
            let mut to = data.slice_mut(first..first + count);
            cuda.copy_in(&bytes[first..first + count], &mut to, "a dense matrix")?;
            uploaded(first..first + count);
        }
        Ok(Self::of(dtype, rows, cols, data))
    }
}

impl Cuda {
    /// Dense product in f32: `Σ_k w[r][k] · x[t][k]`, as columns `first_column ..` of rows of `width`, replaced or added
    /// to. `x` is f32 `[tokens, cols]`, `out` f32 `[tokens, width]`.
    ///
    /// Whole rows are written where they belong; others go through scratch memory.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for operands that do not fit or rows too long for the chip's shared memory,
    /// [`crate::Error::Device`] for what fails on the device.
    pub fn dense_linear(
        &self,
        weight: &CudaDense,
        x: &CudaView<'_, f32>,
        out: &mut CudaViewMut<'_, f32>,
        first_column: usize,
        width: usize,
        add: bool,
    ) -> Result<()> {
        const OP: &str = "dense_linear";
        let tokens = weight.tokens(OP, x.len(), out.len(), first_column, width)?;
        let to = self.write(out) + (first_column * size_of::<f32>()) as u64;
        let columns = Columns { to, stride: width, add };
        let mut scratch = self.scratch();
        // SAFETY: input and output have the sizes that tokens, rows, columns and width say, checked above.
        unsafe { self.dense_columns(OP, weight, 0, self.read(x), tokens, &mut scratch.columns, columns) }
    }

    /// A dense product in groups of tokens; `scales` is 0 or the address of a factor for each row.
    ///
    /// # Safety
    /// `x` is f32 `[tokens, cols]`, `scales` f32 `[rows]` if not 0, and `columns` has room for `rows` values of each
    /// token; all live until the kernels have run.
    #[allow(clippy::too_many_arguments)]
    pub(super) unsafe fn dense_columns(
        &self,
        op: &'static str,
        weight: &CudaDense,
        scales: u64,
        x: u64,
        tokens: usize,
        scratch: &mut super::scratch::Buffer<f32>,
        columns: Columns<u64>,
    ) -> Result<()> {
        let (rows, cols, element) = (weight.rows(), weight.cols(), weight.dtype().size());
        let too_long = || {
            let most = self.chip.shared_per_block;
            shape(op, format!("a row of {cols} inputs does not fit in the {most} bytes of shared memory of this GPU"))
        };
        let most = plan::head(&self.chip, element, rows, cols, tokens).ok_or_else(too_long)?.tokens;
        let direct = columns.stride == rows && !columns.add;
        for (first, count) in groups(tokens, most) {
            let plan = plan::head(&self.chip, element, rows, cols, count).ok_or_else(too_long)?;
            let to = columns.to + (first * columns.stride * size_of::<f32>()) as u64;
            let logits = if direct { to } else { scratch.address(self, most * rows, "a dense product")? };
            let params = HeadParams {
                weights: self.read(weight.data()),
                scales,
                x: x + (first * cols * size_of::<f32>()) as u64,
                logits,
                sizes: weight.sizes(op, count)?,
            };
            let kernel = dense::head_kernel(weight.dtype(), plan.tokens);
            let launch =
                Launch::new(kernel, (plan.grid, 1, 1), plan::THREADS).shared(plan.shared).bytes(weight.moved(count));
            // SAFETY: the kernel takes one HeadParams and holds `plan.tokens` ≥ `count` tokens; the caller vouches for
            // input and output, and the scratch holds [most, rows].
            unsafe { self.launch(launch, &mut [arg(&params)]) }?;
            if !direct {
                // SAFETY: the product just written, [count, rows], and the caller's columns of these tokens.
                unsafe { self.place(logits, to, count, rows, columns.stride, columns.add) }?;
            }
        }
        Ok(())
    }

    /// The batch's rows of an embedding, widened to f32 `[tokens, cols]`.
    ///
    /// # Errors
    /// [`crate::Error::Request`] for an id outside the vocabulary, [`crate::Error::Shape`] for an output that does not fit,
    /// [`crate::Error::Device`] for what fails on the device.
    pub fn embed(&self, weight: &CudaDense, batch: &CudaBatch, out: &mut CudaViewMut<'_, f32>) -> Result<()> {
        weight.embeds(batch, out.len())?;
        let (rows, cols, tokens) = (weight.rows(), weight.cols(), batch.len());
        let (table, ids, out) = (self.read(weight.data()), batch.ids_address(self), self.write(out));
        let (kernel, element) = (dense::embed_kernel(weight.dtype()), weight.dtype().size());
        // SAFETY: a table of [rows, cols] of this type, as many ids as tokens, an output of [tokens, cols], checked above.
        unsafe { self.gather(kernel, element, table, ids, out, tokens, cols, rows) }
    }

    /// Rows `rows` of f32 `x` `[tokens, cols]`: f32 `[rows.len(), cols]`. Uploads the numbers, so it cannot be captured.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for a row that is not there or an output that does not fit, [`crate::Error::Device`] for what
    /// fails on the device or while a graph is being captured.
    pub fn select_rows(
        &self,
        x: &CudaView<'_, f32>,
        cols: usize,
        rows: &[u32],
        out: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let (numbers, tokens) = dense::selected(x.len(), cols, rows, out.len())?;
        if self.capturing.load(Ordering::Relaxed) {
            return Err(failure::unavailable("selecting rows", "row numbers cannot be uploaded into a graph"));
        }
        let mut scratch = self.scratch();
        let memory = scratch.rows.at_least(self, numbers.len(), "row numbers")?;
        self.copy_in(&numbers, &mut memory.as_view_mut(), "row numbers")?;
        let (table, ids, out) = (self.read(x), self.write(memory), self.write(out));
        // SAFETY: an f32 table of [tokens, cols], row numbers below `tokens`, an output of [rows, cols], checked above.
        unsafe { self.gather("bitnet_embed_f32", size_of::<f32>(), table, ids, out, rows.len(), cols, tokens) }
    }

    /// Rows `ids` of a table `[vocab, cols]` to f32 `[tokens, cols]`.
    ///
    /// # Safety
    /// Table, ids and output are as large as that, the table's elements are `element` bytes and what the kernel reads.
    #[allow(clippy::too_many_arguments)]
    unsafe fn gather(
        &self,
        kernel: &'static str,
        element: usize,
        table: u64,
        ids: u64,
        out: u64,
        tokens: usize,
        cols: usize,
        vocab: usize,
    ) -> Result<()> {
        if tokens == 0 {
            return Ok(());
        }
        let sizes = dense::sizes("embedding", tokens, cols, vocab)?;
        let launch = Launch::new(kernel, (tokens, 1, 1), cols.next_multiple_of(32).clamp(32, 512))
            .bytes(tokens * cols * (element + size_of::<f32>()));
        // SAFETY: the arguments of bitnet_embed_*; the caller vouches for the memory.
        unsafe { self.launch(launch, &mut [arg(&table), arg(&ids), arg(&out), arg(&sizes.hidden), arg(&sizes.vocab)]) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::images::known;
    use super::*;

    #[test]
    fn every_type_has_its_kernels() {
        for dtype in [DenseType::F32, DenseType::F16, DenseType::BF16] {
            assert_eq!(known(dense::embed_kernel(dtype)), Some(false));
            assert!([1, 2, 4, 8].iter().all(|tokens| known(dense::head_kernel(dtype, *tokens)) == Some(true)));
        }
    }
}
