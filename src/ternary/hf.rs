//! The strided layout of packed safetensors checkpoints (transformers `integrations/bitnet.py`).
//!
//! U8 `[R, cols]` with `R = rows / 4`: byte `P[r, c]` holds rows `r, r + R, r + 2R, r + 3R` of column `c`, low
//! bits first.

use super::{CODES_PER_BYTE, PackedTernary, Scale, transpose4x4};
use crate::{Error, Result};

impl PackedTernary {
    /// Decodes the strided layout: `bytes` is `[packed_rows, cols]`, the result `[4 · packed_rows, cols]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a wrong length, [`Error::InvalidCode`] for a code 3.
    pub fn from_hf(packed_rows: usize, cols: usize, bytes: &[u8], scale: Scale) -> Result<Self> {
        if Some(bytes.len()) != packed_rows.checked_mul(cols) || bytes.is_empty() {
            return Err(Error::Shape {
                op: "PackedTernary::from_hf",
                reason: format!("[{packed_rows}, {cols}] bytes expected, got {}", bytes.len()),
            });
        }
        let row_bytes = cols.div_ceil(CODES_PER_BYTE);
        let mut codes = vec![0u8; 4 * packed_rows * row_bytes];
        let (q01, q23) = codes.split_at_mut(2 * packed_rows * row_bytes);
        let (q0, q1) = q01.split_at_mut(packed_rows * row_bytes);
        let (q2, q3) = q23.split_at_mut(packed_rows * row_bytes);
        let rows = q0
            .chunks_exact_mut(row_bytes)
            .zip(q1.chunks_exact_mut(row_bytes))
            .zip(q2.chunks_exact_mut(row_bytes).zip(q3.chunks_exact_mut(row_bytes)));
        for (((q0, q1), (q2, q3)), packed) in rows.zip(bytes.chunks_exact(cols)) {
            let out = q0.iter_mut().zip(q1).zip(q2.iter_mut().zip(q3));
            for (((b0, b1), (b2, b3)), four) in out.zip(packed.chunks(CODES_PER_BYTE)) {
                let mut word = [0; 4];
                word[..four.len()].copy_from_slice(four);
                [*b0, *b1, *b2, *b3] = transpose4x4(u32::from_le_bytes(word)).to_le_bytes();
            }
        }
        Self::new(4 * packed_rows, cols, codes, scale)
    }

    /// Encodes into the strided layout, `[rows / 4, cols]` bytes.
    ///
    /// # Errors
    /// [`Error::Shape`] unless `rows` is a multiple of four, which the layout demands.
    pub fn to_hf(&self) -> Result<Vec<u8>> {
        if !self.rows().is_multiple_of(4) {
            return Err(Error::Shape {
                op: "PackedTernary::to_hf",
                reason: format!("{} rows are not a multiple of 4, as the packed layout demands", self.rows()),
            });
        }
        let packed_rows = self.rows() / 4;
        let mut out = Vec::with_capacity(packed_rows * self.cols());
        for r in 0..packed_rows {
            let rows: [&[u8]; 4] = std::array::from_fn(|i| self.row(r + i * packed_rows));
            for (at, left) in (0..self.row_bytes()).zip((1..=self.cols()).rev().step_by(CODES_PER_BYTE)) {
                let word = transpose4x4(u32::from_le_bytes(rows.map(|row| row[at])));
                out.extend_from_slice(&word.to_le_bytes()[..left.min(CODES_PER_BYTE)]);
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn follows_the_formula_both_ways(r in 1usize..6, cols in 1usize..30, seed: u64) {
            let w: Vec<i8> = (0..4 * r * cols).map(|i| ((seed >> (i % 59)) % 3) as i8 - 1).collect();
            let p = PackedTernary::from_weights(4 * r, cols, &w, Scale::Multiply(1.0)).unwrap();
            let bytes = p.to_hf().unwrap();
            for i in 0..4 {
                for row in 0..r {
                    for c in 0..cols {
                        let code = bytes[row * cols + c] >> (2 * i) & 3;
                        prop_assert_eq!(code as i8 - 1, w[(i * r + row) * cols + c]);
                    }
                }
            }
            prop_assert_eq!(PackedTernary::from_hf(r, cols, &bytes, p.scale()).unwrap(), p);
        }
    }

    #[test]
    fn code_three_is_refused_with_its_row() {
        // Byte [1, 2] of a [2, 3] packing, bit pair 3: row 1 + 3·2 = 7, column 2.
        let err = PackedTernary::from_hf(2, 3, &[0, 0, 0, 0, 0, 0b1100_0000], Scale::Multiply(1.0)).unwrap_err();
        assert!(matches!(err, Error::InvalidCode { row: 7, col: 2 }), "{err}");
    }
}
