//! Dense matrices in device memory: embeddings, output heads, unconverted projections.
//!
//! A product takes up to 8 tokens at a time and reads the matrix once for them, which is what an output head needs.

use super::launch::{Launch, arg};
use super::norm::groups;
use super::params::HeadParams;
use super::{Cuda, CudaBatch, CudaSlice, CudaView, CudaViewMut, failure, int, plan, shape};
use crate::backend::DenseType;
use crate::backend::host::{AlignedBuffer, MappedFile};
use crate::{Error, Result};
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Bytes of a row that kernels read at once.
const ROW_UNIT: usize = 16;
/// Bytes that are uploaded at once, so that a mapped file need not be resident as a whole.
const PIECE: usize = 32 << 20;

/// A dense matrix `[rows, cols]` in device memory.
#[derive(Debug)]
pub struct CudaDense {
    dtype: DenseType,
    rows: usize,
    cols: usize,
    data: CudaSlice<u8>,
}

impl CudaDense {
    /// Uploads a matrix from a mapped file, in pieces; the file's pages are released.
    ///
    /// # Errors
    /// [`Error::Shape`] if the range does not hold `rows · cols` elements or a row is no multiple of 16 bytes,
    /// [`Error::Unavailable`] if device memory is short.
    pub fn mapped(
        cuda: &Cuda,
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
        let matrix = Self::upload(cuda, dtype, rows, cols, bytes, |done| {
            file.release(range.start + done.start..range.start + done.end);
        })?;
        Ok(matrix)
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
        let mut buffer = AlignedBuffer::zeroed(checked_size(dtype, rows, cols)?)?;
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
        self.data.len()
    }
}

fn checked_size(dtype: DenseType, rows: usize, cols: usize) -> Result<usize> {
    let row = cols.checked_mul(dtype.size()).filter(|b| *b > 0);
    let Some(size) = row.and_then(|b| b.checked_mul(rows)).filter(|n| *n > 0) else {
        return Err(shape("dense matrix", format!("[{rows}, {cols}] {dtype} is no matrix")));
    };
    if !(cols * dtype.size()).is_multiple_of(ROW_UNIT) {
        let reason = format!(
            "rows of {cols} {dtype} values are {} bytes, but the CUDA kernels need a multiple of {ROW_UNIT}; use --device cpu",
            cols * dtype.size()
        );
        return Err(shape("dense matrix", reason));
    }
    int("dense matrix", "rows", rows)?;
    int("dense matrix", "columns", cols)?;
    Ok(size)
}

/// The kernel for up to `tokens` tokens: 1, 2, 4 or 8.
fn head_kernel(dtype: DenseType, tokens: usize) -> &'static str {
    let names = match dtype {
        DenseType::F32 => ["bitnet_head_f32_1", "bitnet_head_f32_2", "bitnet_head_f32_4", "bitnet_head_f32_8"],
        DenseType::F16 => ["bitnet_head_f16_1", "bitnet_head_f16_2", "bitnet_head_f16_4", "bitnet_head_f16_8"],
        DenseType::BF16 => ["bitnet_head_bf16_1", "bitnet_head_bf16_2", "bitnet_head_bf16_4", "bitnet_head_bf16_8"],
    };
    names[(tokens.clamp(1, 8).next_power_of_two()).ilog2() as usize]
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
pub(super) struct Columns {
    /// Address of the first one.
    pub to: u64,
    /// Elements between the results of two tokens.
    pub stride: usize,
    /// Whether they are added.
    pub add: bool,
}

impl Cuda {
    /// Dense product in f32: `Σ_k w[r][k] · x[t][k]`, as columns `first_column ..` of rows of `width`, replaced or added
    /// to. `x` is f32 `[tokens, cols]`, `out` f32 `[tokens, width]`.
    ///
    /// Whole rows are written where they belong; others go through scratch memory.
    ///
    /// # Errors
    /// [`Error::Shape`] for operands that do not fit or rows too long for the chip's shared memory,
    /// [`Error::Device`] for what fails on the device.
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
        columns: Columns,
    ) -> Result<()> {
        let (rows, cols, element) = (weight.rows, weight.cols, weight.dtype.size());
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
                weights: self.read(&weight.data),
                scales,
                x: x + (first * cols * size_of::<f32>()) as u64,
                logits,
                tokens: int(op, "tokens", count)?,
                hidden: int(op, "columns", cols)?,
                vocab: int(op, "rows", rows)?,
            };
            let bytes = weight.bytes() + count * (rows + cols) * size_of::<f32>();
            let launch = Launch::new(head_kernel(weight.dtype, plan.tokens), (plan.grid, 1, 1), plan::HEAD_THREADS)
                .shared(plan.shared)
                .bytes(bytes);
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
    /// [`Error::Request`] for an id outside the vocabulary, [`Error::Shape`] for an output that does not fit,
    /// [`Error::Device`] for what fails on the device.
    pub fn embed(&self, weight: &CudaDense, batch: &CudaBatch, out: &mut CudaViewMut<'_, f32>) -> Result<()> {
        let (rows, cols, tokens) = (weight.rows, weight.cols, batch.len());
        if let Some(id) = batch.largest_id().filter(|id| *id as usize >= rows) {
            return Err(Error::request("token id", format!("{id} is outside the vocabulary of {rows}")));
        }
        if tokens.checked_mul(cols) != Some(out.len()) {
            return Err(shape("embedding", format!("{tokens} tokens of {cols} values into {}", out.len())));
        }
        let (table, ids, out) = (self.read(&weight.data), batch.ids_address(self), self.write(out));
        // SAFETY: a table of [rows, cols] of this type, as many ids as tokens, an output of [tokens, cols], checked above.
        unsafe { self.gather(embed_kernel(weight.dtype), weight.dtype.size(), table, ids, out, tokens, cols, rows) }
    }

    /// Rows `rows` of f32 `x` `[tokens, cols]`: f32 `[rows.len(), cols]`. Uploads the numbers, so it cannot be captured.
    ///
    /// # Errors
    /// [`Error::Shape`] for a row that is not there or an output that does not fit, [`Error::Device`] for what fails
    /// on the device or while a graph is being captured.
    pub fn select_rows(
        &self,
        x: &CudaView<'_, f32>,
        cols: usize,
        rows: &[u32],
        out: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
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
        if self.capturing.load(Ordering::Relaxed) {
            return Err(failure::unavailable("selecting rows", "row numbers cannot be uploaded into a graph"));
        }
        let numbers: Vec<i32> = rows.iter().map(|r| *r as i32).collect();
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
        let (hidden, rows) = (int("embedding", "columns", cols)?, int("embedding", "rows", vocab)?);
        let launch = Launch::new(kernel, (tokens, 1, 1), cols.next_multiple_of(32).clamp(32, 512))
            .bytes(tokens * cols * (element + size_of::<f32>()));
        // SAFETY: the arguments of bitnet_embed_*; the caller vouches for the memory.
        unsafe { self.launch(launch, &mut [arg(&table), arg(&ids), arg(&out), arg(&hidden), arg(&rows)]) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::images::known;
    use super::*;

    #[test]
    fn every_type_has_its_kernels() {
        for dtype in [DenseType::F32, DenseType::F16, DenseType::BF16] {
            assert_eq!(known(embed_kernel(dtype)), Some(false));
            for (tokens, suffix) in [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)] {
                let kernel = head_kernel(dtype, tokens);
                assert_eq!(kernel, format!("bitnet_head_{dtype}_{suffix}"));
                assert_eq!(known(kernel), Some(true));
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
