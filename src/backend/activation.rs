//! Quantised activations as they travel between operations, on every device.
//!
//! One row per token, as bytes (candle has no i8 type):
//!
//! ```text
//! | cols codes, i8, zero-padded to a multiple of 16 | s_x, f32 | Σq, i32 | 8 bytes of zero |
//! ```

use crate::{Error, Result};

/// Bytes after the codes of a row.
pub const TRAILER: usize = 16;

/// Bytes of the codes of a row with `cols` activations, padding included.
pub fn padded_cols(cols: usize) -> usize {
    cols.next_multiple_of(16)
}

/// Bytes of a row with `cols` activations.
pub fn row_stride(cols: usize) -> usize {
    padded_cols(cols) + TRAILER
}

/// A view of quantised rows.
#[derive(Debug, Clone, Copy)]
pub struct QuantizedRows<'a> {
    bytes: &'a [u8],
    cols: usize,
}

impl<'a> QuantizedRows<'a> {
    /// Views `bytes` as rows of `cols` activations.
    ///
    /// # Errors
    /// [`Error::Shape`] unless `bytes` is a whole number of rows.
    pub fn new(bytes: &'a [u8], cols: usize) -> Result<Self> {
        let stride = row_stride(cols);
        if bytes.is_empty() || !bytes.len().is_multiple_of(stride) {
            return Err(Error::Shape {
                op: "quantized activations",
                reason: format!("{} bytes are no rows of {cols} activations ({stride} bytes each)", bytes.len()),
            });
        }
        Ok(Self { bytes, cols })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.bytes.len() / row_stride(self.cols)
    }

    /// Activations of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    fn row(&self, row: usize) -> &'a [u8] {
        let stride = row_stride(self.cols);
        &self.bytes[row * stride..][..stride]
    }

    /// Codes of a row, padded with zeros to a multiple of 16.
    pub fn codes(&self, row: usize) -> &'a [i8] {
        bytemuck::cast_slice(&self.row(row)[..padded_cols(self.cols)])
    }

    /// Codes of a row, their padding and the trailer: for kernels whose lines reach past the padding, by less than the
    /// trailer is long, and multiply what is there by code 0.
    pub fn readable(&self, row: usize) -> &'a [i8] {
        bytemuck::cast_slice(self.row(row))
    }

    /// `s_x` of a row.
    pub fn scale(&self, row: usize) -> f32 {
        f32::from_bits(self.trailer_word(row, 0))
    }

    /// `Σq` of a row.
    pub fn sum(&self, row: usize) -> i32 {
        self.trailer_word(row, 1) as i32
    }

    fn trailer_word(&self, row: usize, word: usize) -> u32 {
        let at = padded_cols(self.cols) + 4 * word;
        let bytes = &self.row(row)[at..at + 4];
        bytes.iter().rev().fold(0, |v, b| v << 8 | u32::from(*b))
    }
}

/// Writes the trailer of a row whose codes and padding are in place.
pub(crate) fn write_trailer(trailer: &mut [u8], scale: f32, sum: i32) {
    trailer[..4].copy_from_slice(&scale.to_le_bytes());
    trailer[4..8].copy_from_slice(&sum.to_le_bytes());
    trailer[8..].fill(0);
}
