//! Low-rank updates, `out += scaling · (B · (A · x))`, with A and B in f32, as two dense products.

use super::dense::{Columns, MetalDense};
use super::{Metal, MetalSlice, shape};
use crate::Result;
use crate::backend::DenseType;

/// A low-rank update of a weight `[rows, cols]` on the device.
#[derive(Debug)]
pub struct MetalLowRank {
    rank: usize,
    /// `[padded rank, cols]`: rows of zeros at the end.
    a: MetalDense,
    /// `[rows, padded rank]`, times the scaling: rows of B that are whole vectors of 16 bytes.
    b: MetalDense,
}

impl MetalLowRank {
    /// Takes row-major A `[rank, cols]` and B `[rows, rank]`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if `a` or `b` is not a matrix with `rank` rows or columns, or `cols` is no multiple of 4,
    /// [`crate::Error::Unavailable`] if memory is short.
    pub fn pack(metal: &Metal, rank: usize, a: &[f32], b: &[f32], scaling: f32) -> Result<Self> {
        if rank == 0 || a.is_empty() || b.is_empty() || !a.len().is_multiple_of(rank) || !b.len().is_multiple_of(rank) {
            let reason = format!("A of {} and B of {} elements do not fit rank {rank}", a.len(), b.len());
            return Err(shape("low-rank update", reason));
        }
        let (rows, cols, padded) = (b.len() / rank, a.len() / rank, padded(rank));
        Ok(Self {
            rank,
            a: MetalDense::filled(metal, DenseType::F32, padded, cols, |to| write_rows(a, cols, cols, 1.0, to))?,
            b: MetalDense::filled(metal, DenseType::F32, rows, padded, |to| write_rows(b, rank, padded, scaling, to))?,
        })
    }

    /// Inner dimension.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.b.rows()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.a.cols()
    }

    /// Stored bytes.
    pub fn bytes(&self) -> usize {
        self.a.bytes() + self.b.bytes()
    }
}

/// The rank that makes rows of B whole vectors.
fn padded(rank: usize) -> usize {
    rank.next_multiple_of(4)
}

/// Writes rows of `len` values times `factor`, `stride` apart; the rest stays zero.
fn write_rows(values: &[f32], len: usize, stride: usize, factor: f32, to: &mut [u8]) {
    for (row, to) in values.chunks_exact(len).zip(to.chunks_exact_mut(stride * size_of::<f32>())) {
        for (v, to) in row.iter().zip(to.as_chunks_mut::<4>().0) {
            *to = (v * factor).to_le_bytes();
        }
    }
}

impl Metal {
    /// Adds low-rank updates of f32 `x` `[tokens, cols]` to f32 `out` `[tokens, stride]`, each to the columns from the one
    /// on that stands beside it; they are in order and do not overlap.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for operands that do not fit, [`crate::Error::Device`] for what fails on the device.
    pub fn low_rank(
        &self,
        updates: &[(usize, &MetalLowRank)],
        x: MetalSlice<'_>,
        stride: usize,
        out: MetalSlice<'_>,
    ) -> Result<()> {
        const OP: &str = "low-rank update";
        let Some(cols) = updates.first().map(|(_, w)| w.cols()) else { return Ok(()) };
        let tokens = x.len() / cols;
        let mut end = 0;
        let apart = updates.iter().all(|(at, w)| {
            let starts = *at >= end;
            end = at.saturating_add(w.rows());
            starts && w.cols() == cols
        });
        if !apart || end > stride || x.len() != tokens * cols || tokens.checked_mul(stride) != Some(out.len()) {
            let reason = format!("{} inputs of {cols}, {} outputs in rows of {stride}", x.len(), out.len());
            return Err(shape(OP, reason));
        }
        let scratch = &mut *self.scratch();
        for (at, w) in updates {
            let width = w.a.rows();
            let inner = scratch.inner.first(self, tokens * width, "an adapter's inner vectors")?;
            let columns = Columns { to: inner, stride: width, add: false };
            self.dense_columns(OP, &w.a, x, tokens, &mut scratch.columns, columns)?;
            let columns = Columns { to: out.slice(*at..), stride, add: true };
            self.dense_columns(OP, &w.b, inner, tokens, &mut scratch.columns, columns)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_scaled_and_padded_with_zeros() {
        assert_eq!([1, 4, 5, 16].map(padded), [4, 4, 8, 16]);
        let mut bytes = [0u8; 32];
        write_rows(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3, 4, 0.5, &mut bytes);
        let floats: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        assert_eq!(floats, [0.5, 1.0, 1.5, 0.0, 2.0, 2.5, 3.0, 0.0]);
    }
}
