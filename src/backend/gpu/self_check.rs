//! Small products, by the decode and by the prefill kernel, compared with the reference sum by sum before a device is used.

use super::plan;
use crate::ternary::{PackedTernary, Scale};
use crate::{Error, Result};

/// What is multiplied.
pub(crate) struct SelfCheck {
    /// f32 `[TOKENS, COLS]`.
    pub x: Vec<f32>,
    weights: Vec<i8>,
}

impl SelfCheck {
    /// Two and a half row tiles, one and a bit column tiles.
    pub(crate) const ROWS: usize = 40;
    pub(crate) const COLS: usize = 300;
    /// More than a decode product takes.
    pub(crate) const TOKENS: usize = plan::DECODE_TOKENS + 3;

    pub(crate) fn new() -> Self {
        let mut state = 0x9e37_79b9u32;
        let mut next = |n: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % n
        };
        let weights = (0..Self::ROWS * Self::COLS).map(|_| next(3) as i8 - 1).collect();
        // Whole numbers with 127 as the largest are their own codes, with a scale of 1: results are the sums themselves.
        let value = |i: usize, v: u32| if i.is_multiple_of(Self::COLS) { 127.0 } else { v as f32 - 127.0 };
        let x = (0..Self::TOKENS * Self::COLS).map(|i| value(i, next(255))).collect();
        Self { x, weights }
    }

    /// The weights, to be packed.
    pub(crate) fn weights(&self) -> Result<PackedTernary> {
        PackedTernary::from_weights(Self::ROWS, Self::COLS, &self.weights, Scale::Multiply(1.0))
    }

    /// Compares the products of the first tokens.
    ///
    /// # Errors
    /// [`Error::SelfCheck`] with the first that is wrong.
    pub(crate) fn compare(&self, kernel: &'static str, got: &[f32]) -> Result<()> {
        let (rows, cols) = (Self::ROWS, Self::COLS);
        for (i, got) in got.iter().enumerate() {
            let (row, x) = (&self.weights[i % rows * cols..][..cols], &self.x[i / rows * cols..][..cols]);
            let want: f32 = row.iter().zip(x).map(|(w, x)| f32::from(*w) * x).sum();
            if *got != want {
                let reason = format!("{cols} columns, token {}, row {}: {got} instead of {want}", i / rows, i % rows);
                return Err(Error::SelfCheck { kernel, reason });
            }
        }
        Ok(())
    }
}
