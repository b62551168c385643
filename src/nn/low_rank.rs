//! LoRA's update of a linear layer (Hu et al., 2021), kept beside the weight and not merged into it.

use crate::backend::{Backend, DenseType, DenseWeight};
use crate::{Error, Result, ops};
use candle_core::{D, Tensor};

/// `scaling · B · (A · h)`, with A `[rank, cols]` and B `[rows, rank]` in f32.
///
/// `h` is the layer's own input before its activations are quantised, as PEFT wraps a module: nothing of the update
/// is quantised. A token's update does not depend on what is computed with it, nor on threads or kernel.
#[derive(Debug)]
pub struct LowRank {
    a: DenseWeight,
    b: DenseWeight,
    scaling: f32,
}

impl LowRank {
    /// An update with row-major A `[rank, cols]` and B `[rows, rank]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `a` and `b` do not hold a whole number of columns and rows for `rank`;
    /// [`Error::Unavailable`] if memory is short.
    pub fn new(backend: &Backend, rank: usize, a: &[f32], b: &[f32], scaling: f32) -> Result<Self> {
        if rank == 0 || a.is_empty() || b.is_empty() || !a.len().is_multiple_of(rank) || !b.len().is_multiple_of(rank) {
            let reason = format!("A of {} and B of {} elements do not fit rank {rank}", a.len(), b.len());
            return Err(Error::Shape { op: "low-rank update", reason });
        }
        let matrix = |values: &[f32], rows: usize, cols: usize| {
            backend.dense_filled(DenseType::F32, rows, cols, |out| {
                out.as_chunks_mut::<4>().0.iter_mut().zip(values).for_each(|(out, v)| *out = v.to_le_bytes());
            })
        };
        let (rows, cols) = (b.len() / rank, a.len() / rank);
        Ok(Self { a: matrix(a, rank, cols)?, b: matrix(b, rows, rank)?, scaling })
    }

    /// Inner dimension.
    pub fn rank(&self) -> usize {
        self.a.rows()
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.b.rows()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.a.cols()
    }

    /// Bytes that a decode step reads.
    pub fn bytes(&self) -> usize {
        self.a.bytes() + self.b.bytes()
    }

    /// The stored bytes, where this machine's memory holds them.
    pub fn host_bytes(&self) -> impl Iterator<Item = &[u8]> {
        [&self.a, &self.b].into_iter().filter_map(DenseWeight::host_bytes)
    }

    /// The update for f32 `h` `[tokens, cols]`: f32 `[tokens, rows]`.
    ///
    /// # Errors
    /// Of candle, if shapes or types do not fit.
    pub fn forward(&self, backend: &Backend, h: &Tensor) -> Result<Tensor> {
        if h.dim(D::Minus1)? != self.cols() {
            let reason = format!("A has {} input features, the activations {:?}", self.cols(), h.dims());
            return Err(Error::Shape { op: "low-rank update", reason });
        }
        let inner = ops::dense_linear(backend, &self.a, h)?;
        let inner = if self.scaling == 1.0 { inner } else { (inner * f64::from(self.scaling))? };
        ops::dense_linear(backend, &self.b, &inner)
    }

    /// Refuses an update for a layer of another shape.
    pub(super) fn check(&self, rows: usize, cols: usize) -> Result<()> {
        if (self.rows(), self.cols()) == (rows, cols) {
            return Ok(());
        }
        let reason = format!("of [{}, {}] for a layer of [{rows}, {cols}]", self.rows(), self.cols());
        Err(Error::Shape { op: "low-rank update", reason })
    }
}
