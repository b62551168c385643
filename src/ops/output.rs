//! Where an operation's result goes.

use super::{matrix, shape_error};
use crate::Result;
use candle_core::Tensor;

/// Columns of a tensor that exists, replaced or added to.
#[derive(Debug, Clone, Copy)]
pub struct Output<'a> {
    /// f32 `[tokens, width]`.
    pub tensor: &'a Tensor,
    /// The first of the columns.
    pub first_column: usize,
    /// Whether the result, rounded to f32, is added to what is there.
    pub add: bool,
}

impl<'a> Output<'a> {
    /// The columns of `tensor` from 0 on, replaced.
    pub fn replace(tensor: &'a Tensor) -> Self {
        Self { tensor, first_column: 0, add: false }
    }

    /// The columns of `tensor` from 0 on, added to.
    pub fn add_to(tensor: &'a Tensor) -> Self {
        Self { tensor, first_column: 0, add: true }
    }

    /// The same, `columns` further to the right.
    pub fn skip(self, columns: usize) -> Self {
        Self { first_column: self.first_column.saturating_add(columns), ..self }
    }

    /// The width of the tensor, which has `tokens` rows and the `columns`.
    pub(super) fn check(&self, op: &'static str, tokens: usize, columns: usize) -> Result<usize> {
        let (rows, width) = matrix(op, "output", self.tensor)?;
        let end = self.first_column.checked_add(columns);
        if rows != tokens || end.is_none_or(|end| end > width) {
            let first = self.first_column;
            let reason = format!("output [{rows}, {width}] for [{tokens}, {columns}] from column {first} on");
            return Err(shape_error(op, reason));
        }
        Ok(width)
    }
}
