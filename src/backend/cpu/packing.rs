//! The bytes of a tile: 16 rows, 64-byte lines, one row per 32-bit lane, in one of two packings.
//!
//! ```text
//! line g of a tile:  | row 0: 4 bytes | row 1: 4 bytes | … | row 15: 4 bytes |
//!
//! two bits:          columns 16g … 16g+15, four codes in byte b of a row:
//!                    bits 7:6 column 12+b | bits 5:4 column 8+b | bits 3:2 column 4+b | bits 1:0 column b
//!
//! base 3:            columns 20g … 20g+19, five codes in byte b of a row:
//!                    t0 + 3·t1 + 9·t2 + 27·t3 + 83·t4 ≤ 246,  ti the code of column 4i+b
//! ```
//!
//! So the codes at one position (bit pair or digit) of a line are 16 rows by 4 consecutive columns: what `vpdpbusd`,
//! `maddubs` + `madd` and `sdot` sum into one lane. Those four activations are one 32-bit broadcast, no horizontal sum
//! is ever needed, and a tile is read front to back. Lanes of 512, 256 and 128 bits all read the same line. Rows and
//! columns are padded with code 0.
//!
//! Base 3 takes 1.6 bits a weight instead of 2. The last digit counts 83, not 81, so that a byte's upper seven bits tell it.
//! Only a kernel with a byte permute over 128 entries (AVX-512 VBMI) decodes this at about the cost of two bits: one look-up
//! gives the last digit, and one of what is left the other four at once, already where two-bit codes lie. AVX2
//! and NEON would need a multiply, a shift and a subtraction for each digit, at a point where their two-bit kernels
//! already keep the core as busy as the memory; they have no base-3 kernel.

use super::tiles::{LINE_BYTES, LINE_COLS, TILE_ROWS};
use crate::backend::layout::LayoutId;
use crate::ternary::{CODES_PER_BYTE, PackedTernary, transpose4x4};

/// Columns of a base-3 line.
const BASE3_COLS: usize = 20;
/// Digits of a byte.
const DIGITS: usize = BASE3_COLS / 4;
/// What the last digit of a byte counts: more than the others together, and odd, so that it has an inverse modulo 2^32.
pub(super) const LAST_DIGIT: u8 = 83;
/// What digit i of a byte counts.
const POWERS: [u8; DIGITS] = [1, 3, 9, 27, LAST_DIGIT];

/// How a tile's codes lie in its lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Packing {
    /// Four codes a byte: 16 columns a line.
    TwoBits,
    /// Five codes a byte: 20 columns a line.
    Base3,
}

impl Packing {
    /// The layout of weights packed so.
    pub fn layout(self) -> LayoutId {
        match self {
            Self::TwoBits => LayoutId::CpuRows16,
            Self::Base3 => LayoutId::CpuBase3Rows16,
        }
    }

    /// Columns of a line.
    pub fn line_cols(self) -> usize {
        match self {
            Self::TwoBits => LINE_COLS,
            Self::Base3 => BASE3_COLS,
        }
    }

    /// Fills one tile, zero before, from rows `first_row …` of `w`; rows past the end stay zero.
    pub(super) fn pack_tile(self, w: &PackedTernary, first_row: usize, out: &mut [u8]) {
        for row in first_row..w.rows().min(first_row + TILE_ROWS) {
            let at = 4 * (row - first_row);
            let lines = out.chunks_exact_mut(LINE_BYTES).map(|line| &mut line[at..at + 4]);
            match self {
                Self::TwoBits => pack_row::<4>(w.row(row), lines, |four| transpose4x4(u32::from_le_bytes(four))),
                Self::Base3 => pack_row::<DIGITS>(w.row(row), lines, base3_word),
            }
        }
    }

    /// The codes of row `lane` of a line, by column; the first [`Packing::line_cols`] of the result.
    pub(super) fn line_codes(self, line: &[u8], lane: usize) -> [u8; BASE3_COLS] {
        let mut codes = [0; BASE3_COLS];
        for (i, byte) in line[4 * lane..4 * lane + 4].iter().enumerate() {
            for (position, code) in codes[i..].iter_mut().step_by(4).take(self.line_cols() / 4).enumerate() {
                *code = match self {
                    Self::TwoBits => byte >> (2 * position) & 3,
                    Self::Base3 if position == DIGITS - 1 => byte / LAST_DIGIT,
                    Self::Base3 => byte % LAST_DIGIT / POWERS[position] % 3,
                };
            }
        }
        codes
    }

    /// A tile in two bits, with as many zeros after its columns as a line needs: what the reference reads.
    pub(super) fn to_two_bits(self, tile: &[u8]) -> Vec<u8> {
        let lines = tile.chunks_exact(LINE_BYTES);
        let mut out = vec![0; (lines.len() * self.line_cols()).div_ceil(LINE_COLS) * LINE_BYTES];
        for (g, line) in lines.enumerate() {
            for lane in 0..TILE_ROWS {
                let codes = self.line_codes(line, lane);
                for (i, code) in codes[..self.line_cols()].iter().enumerate() {
                    let (to, col) = ((g * self.line_cols() + i) / LINE_COLS, (g * self.line_cols() + i) % LINE_COLS);
                    out[to * LINE_BYTES + 4 * lane + col % 4] |= code << (2 * (col / 4));
                }
            }
        }
        out
    }
}

/// Packs a row of canonical codes, N bytes a line; the last ones are filled up with zeros.
fn pack_row<'a, const N: usize>(
    row: &[u8],
    mut lines: impl Iterator<Item = &'a mut [u8]>,
    word: impl Fn([u8; N]) -> u32,
) {
    let (whole, rest) = row.as_chunks::<N>();
    for (bytes, line) in whole.iter().zip(&mut lines) {
        line.copy_from_slice(&word(*bytes).to_le_bytes());
    }
    if let Some(line) = lines.next() {
        let mut bytes = [0; N];
        bytes[..rest.len()].copy_from_slice(rest);
        line.copy_from_slice(&word(bytes).to_le_bytes());
    }
}

/// Digit i of a lane's four bytes from canonical byte i, which holds the codes of columns 4i … 4i+3.
static DIGIT: [[u32; 256]; DIGITS] = {
    let mut table = [[0; 256]; DIGITS];
    let mut i = 0;
    while i < DIGITS {
        let mut byte = 0;
        while byte < 256 {
            let mut j = 0;
            while j < CODES_PER_BYTE {
                table[i][byte] += (POWERS[i] as u32 * (byte as u32 >> (2 * j) & 3)) << (8 * j);
                j += 1;
            }
            byte += 1;
        }
        i += 1;
    }
    table
};

/// A row's four bytes of a base-3 line. Bytes cannot carry into each other: codes are at most 2, a byte 246.
fn base3_word(bytes: [u8; DIGITS]) -> u32 {
    DIGIT.iter().zip(bytes).map(|(digit, byte)| digit[usize::from(byte)]).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ternary::Scale;

    fn weight(rows: usize, cols: usize) -> PackedTernary {
        let values: Vec<i8> = (0..rows * cols).map(|k| ((k * k + 5 * k) % 11 % 3) as i8 - 1).collect();
        PackedTernary::from_weights(rows, cols, &values, Scale::Multiply(1.0)).unwrap()
    }

    #[test]
    fn a_tile_holds_its_codes_and_zeros_in_both_packings() {
        for (rows, cols) in [(16, 80), (3, 1), (16, 19), (5, 20), (7, 21), (1, 100), (16, 333)] {
            let w = weight(rows, cols);
            let mut two = vec![0; cols.div_ceil(LINE_COLS) * LINE_BYTES];
            Packing::TwoBits.pack_tile(&w, 0, &mut two);
            for packing in [Packing::TwoBits, Packing::Base3] {
                let lines = cols.div_ceil(packing.line_cols());
                let mut tile = vec![0; lines * LINE_BYTES];
                packing.pack_tile(&w, 0, &mut tile);
                for (row, at) in
                    (0..TILE_ROWS).flat_map(|row| (0..lines * packing.line_cols()).map(move |at| (row, at)))
                {
                    let line = &tile[at / packing.line_cols() * LINE_BYTES..][..LINE_BYTES];
                    let want = if row < rows && at < cols { (w.weight(row, at) + 1) as u8 } else { 0 };
                    assert_eq!(packing.line_codes(line, row)[at % packing.line_cols()], want, "{packing:?} {row} {at}");
                }
                let again = packing.to_two_bits(&tile);
                assert_eq!(again[..two.len()], two);
                assert!(again[two.len()..].iter().all(|b| *b == 0));
            }
        }
    }

    #[test]
    fn base_three_is_as_documented() {
        // Byte 1 of a row has columns 1, 5, 9, 13 and 17.
        let mut values = vec![-1i8; 20];
        for (col, code) in [(1, 1), (5, 2), (9, 0), (13, 2), (17, 1)] {
            values[col] = code - 1;
        }
        let w = PackedTernary::from_weights(1, 20, &values, Scale::Multiply(1.0)).unwrap();
        let mut tile = vec![0; LINE_BYTES];
        Packing::Base3.pack_tile(&w, 0, &mut tile);
        assert_eq!(tile[..4], [0, 1 + 2 * 3 + 2 * 27 + 83, 0, 0]);
        let w = PackedTernary::from_weights(1, 20, &[1; 20], Scale::Multiply(1.0)).unwrap();
        let mut tile = vec![0; LINE_BYTES];
        Packing::Base3.pack_tile(&w, 0, &mut tile);
        assert_eq!(tile[..4], [246; 4]);
    }
}
