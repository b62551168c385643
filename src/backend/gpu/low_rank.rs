//! Low-rank updates, `out += scaling · (B · (A · x))`, with A and B in f32, as two dense products.

use super::dense::Dense;
use super::{Memory, shape};
use crate::Result;

const OP: &str = "low-rank update";

/// A low-rank update of a weight `[rows, cols]`. `S` is where the kernels take the scaling from, unless it is in B.
#[derive(Debug)]
pub struct LowRank<M, S = ()> {
    rank: usize,
    /// `[padded rank, cols]`: rows of zeros at the end.
    pub(in crate::backend) a: Dense<M>,
    /// `[rows, padded rank]`: rows of B that are whole vectors of 16 bytes.
    pub(in crate::backend) b: Dense<M>,
    pub(in crate::backend) scaling: S,
}

impl<M, S> LowRank<M, S> {
    /// Row-major A `[rank, cols]` and B `[rows, rank]` times `factor`; `filled` makes a matrix of rows and columns, `scaling`
    /// what kernels take it from, by the rows of B.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if `a` or `b` is not a matrix with `rank` rows or columns; those of `filled` and `scaling`.
    pub(in crate::backend) fn of(
        rank: usize,
        (a, b): (&[f32], &[f32]),
        factor: f32,
        filled: impl Fn(usize, usize, &dyn Fn(&mut [u8])) -> Result<Dense<M>>,
        scaling: impl FnOnce(usize) -> Result<S>,
    ) -> Result<Self> {
        if rank == 0 || a.is_empty() || b.is_empty() || !a.len().is_multiple_of(rank) || !b.len().is_multiple_of(rank) {
            let reason = format!("A of {} and B of {} elements do not fit rank {rank}", a.len(), b.len());
            return Err(shape(OP, reason));
        }
        let (rows, cols, padded) = (b.len() / rank, a.len() / rank, padded(rank));
        let a = filled(padded, cols, &|to| write_rows(a, cols, cols, 1.0, to))?;
        let b = filled(rows, padded, &|to| write_rows(b, rank, padded, factor, to))?;
        Ok(Self { rank, a, b, scaling: scaling(rows)? })
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
}

impl<M: Memory, S: Memory> LowRank<M, S> {
    /// Stored bytes.
    pub fn bytes(&self) -> usize {
        self.a.bytes() + self.b.bytes() + self.scaling.bytes()
    }
}

/// Nothing.
impl Memory for () {
    fn len(&self) -> usize {
        0
    }

    fn bytes(&self) -> usize {
        0
    }
}

/// The tokens of an input of `inputs` values for updates of the columns that stand beside them, in rows of `stride`.
///
/// # Errors
/// [`crate::Error::Shape`] for operands that do not fit, and updates that are out of order or overlap.
pub(crate) fn tokens<M, S>(
    updates: &[(usize, &LowRank<M, S>)],
    inputs: usize,
    stride: usize,
    outputs: usize,
) -> Result<usize> {
    let Some(cols) = updates.first().map(|(_, w)| w.cols()) else { return Ok(0) };
    let tokens = inputs / cols;
    let mut end = 0;
    let apart = updates.iter().all(|(at, w)| {
        let starts = *at >= end;
        end = at.saturating_add(w.rows());
        starts && w.cols() == cols
    });
    if !apart || end > stride || inputs != tokens * cols || tokens.checked_mul(stride) != Some(outputs) {
        let reason = format!("{inputs} inputs of {cols}, {outputs} outputs in rows of {stride}");
        return Err(shape(OP, reason));
    }
    Ok(tokens)
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
