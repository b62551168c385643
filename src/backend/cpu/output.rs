//! Where a product goes: columns of rows that exist, replaced or added to.

use super::pool::SendPtr;
use crate::{Error, Result};

/// Columns of f32 rows.
#[derive(Debug)]
pub struct OutputColumns<'a> {
    /// Whole rows, one after the other.
    pub values: &'a mut [f32],
    /// Elements of a row.
    pub width: usize,
    /// The first of the columns.
    pub first: usize,
    /// Whether the product is added to what is there; it is rounded to f32 before.
    pub add: bool,
}

impl<'a> OutputColumns<'a> {
    /// All columns of rows of `width`, replaced.
    pub fn whole(values: &'a mut [f32], width: usize) -> Self {
        Self { values, width, first: 0, add: false }
    }

    /// Where row 0 begins; row t follows `t · width` elements later. All `columns` of all `rows` rows lie inside `values`.
    pub(super) fn begin(self, op: &'static str, rows: usize, columns: usize) -> Result<SendPtr<f32>> {
        let end = self.first.checked_add(columns);
        let fits = end.is_some_and(|end| end <= self.width) && rows.checked_mul(self.width) == Some(self.values.len());
        if !fits || rows == 0 || columns == 0 {
            let (len, width, first) = (self.values.len(), self.width, self.first);
            return Err(Error::Shape {
                op,
                reason: format!(
                    "{rows} rows of {columns} from column {first} on, in {len} elements of rows of {width}"
                ),
            });
        }
        Ok(SendPtr(self.values[self.first..].as_mut_ptr()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_outside_the_rows_are_refused() {
        let mut values = [0.0; 12];
        let mut begin = |width, first, rows, columns| {
            OutputColumns { values: &mut values, width, first, add: false }.begin("op", rows, columns).is_ok()
        };
        assert!(begin(4, 0, 3, 4) && begin(4, 3, 3, 1) && begin(12, 5, 1, 7));
        assert!(!begin(4, 1, 3, 4) && !begin(4, 4, 3, 1) && !begin(4, usize::MAX, 3, 1), "past the row");
        assert!(!begin(4, 0, 2, 4) && !begin(4, 0, 4, 4) && !begin(usize::MAX, 0, 2, 4), "other rows");
        assert!(!begin(4, 0, 3, 0) && !begin(4, 0, 0, 4), "nothing");
    }
}
