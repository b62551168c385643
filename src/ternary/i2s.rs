//! I2_S, the GGUF type of microsoft/BitNet (`src/ggml-bitnet-mad.cpp`): 2-bit codes {0, 1, 2}, then 32 bytes whose
//! first four are the scale, an f32 that multiplies. A file does not say in which of three layouts its codes are.

use super::planes::{self, Order};
use super::{CODES_PER_BYTE, PackedTernary, Scale, transpose4x4};
use crate::{Error, Result};

/// Bytes behind the codes, of which four are the scale.
const TAIL: usize = 32;

/// The order of the codes of an I2_S tensor.
///
/// | name | value of the flattened tensor |
/// | --- | --- |
/// | `128` | `j` of 128 in byte `j % 32`, bits `6 - 2·(j / 32)` and up |
/// | `64` | `j` of 64 in byte `j % 16`, bits `6 - 2·(j / 16)` and up |
/// | `rows` | rows `4r`, `4r + 1`, `4r + 2`, `4r + 3` of column `c` from high to low bits of byte `r · cols + c` |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum I2sLayout {
    /// Blocks of 128 values: microsoft's published files and x86 builds.
    #[default]
    Blocks128,
    /// Blocks of 64 values: Arm builds since late 2025.
    Blocks64,
    /// Four rows interleaved: some x86 builds.
    Rows4,
}

impl I2sLayout {
    /// All three.
    pub const ALL: [Self; 3] = [Self::Blocks128, Self::Blocks64, Self::Rows4];

    /// The name that `--i2s-layout` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Blocks128 => "128",
            Self::Blocks64 => "64",
            Self::Rows4 => "rows",
        }
    }

    /// Bytes of a run, for the block layouts.
    fn lane(self) -> usize {
        match self {
            Self::Blocks64 => 16,
            _ => 32,
        }
    }
}

impl std::fmt::Display for I2sLayout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for I2sLayout {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|l| l.name() == s).ok_or_else(|| {
            Error::request("I2_S layout", format!("'{s}' is not one of 128 (the usual one), 64 (Arm builds), rows"))
        })
    }
}

impl PackedTernary {
    /// Decodes I2_S: `rows · cols / 4` bytes of codes and 32 with the scale.
    ///
    /// Codes that cannot be right are refused: any code 3, and rows that all but repeat one sign, as a hole in a file or
    /// another layout of other data gives them. Another order of good codes cannot be told from the right one.
    ///
    /// # Errors
    /// [`Error::Shape`] for a wrong length, a shape that the layout cannot hold, a scale that is no positive normal number,
    /// or codes as above.
    pub fn from_i2s(rows: usize, cols: usize, bytes: &[u8], layout: I2sLayout) -> Result<Self> {
        let error = |reason| Error::Shape { op: "I2_S", reason };
        let count = check_shape(rows, cols, layout)?;
        let Some((codes, tail)) = bytes.split_at_checked(count / CODES_PER_BYTE).filter(|(_, t)| t.len() == TAIL)
        else {
            let needed = count / CODES_PER_BYTE + TAIL;
            return Err(error(format!("{rows}×{cols} needs {needed} bytes, got {}", bytes.len())));
        };
        let scale = tail.first_chunk().map_or(0.0, |b| f32::from_le_bytes(*b));
        if !(scale.is_normal() && scale > 0.0) {
            return Err(error(format!("{scale} is no scale: it must be positive, finite and not denormal")));
        }
        let invalid: u64 = codes.iter().map(|b| u64::from((b & (b >> 1) & 0x55).count_ones())).sum();
        if invalid > 0 {
            let share = 100.0 * invalid as f64 / count as f64;
            return Err(error(format!(
                "{invalid} of {count} codes ({share:.2} %) are 3, which no weight has: these are not the codes of a b1.58 \
                 weight, or the file is damaged"
            )));
        }
        let mut flat = vec![0; count / CODES_PER_BYTE];
        match layout {
            I2sLayout::Blocks128 | I2sLayout::Blocks64 => {
                let lane = layout.lane();
                for (run, out) in codes.chunks_exact(lane).zip(flat.chunks_exact_mut(lane)) {
                    planes::to_canonical(run, Order::HighFirst, out);
                }
                flat = rows_of_flat(rows, cols, flat);
            }
            I2sLayout::Rows4 => {
                let row_bytes = cols.div_ceil(CODES_PER_BYTE);
                flat = vec![0; rows * row_bytes];
                for (run, out) in codes.chunks_exact(cols).zip(flat.chunks_exact_mut(4 * row_bytes)) {
                    for (at, four) in run.chunks(CODES_PER_BYTE).enumerate() {
                        let mut word = [0; 4];
                        word[..four.len()].copy_from_slice(four);
                        let pairs = transpose4x4(u32::from_le_bytes(word)).to_le_bytes();
                        for (row, pair) in pairs.into_iter().rev().enumerate() {
                            out[row * row_bytes + at] = pair;
                        }
                    }
                }
            }
        }
        let packed = Self::new(rows, cols, flat, Scale::Multiply(scale))?;
        packed.check_spread()?;
        Ok(packed)
    }

    /// Whether a matrix can be written in this layout.
    ///
    /// # Errors
    /// [`Error::Shape`] if not.
    pub(crate) fn check_i2s(rows: usize, cols: usize, layout: I2sLayout) -> Result<()> {
        check_shape(rows, cols, layout).map(drop)
    }

    /// Encodes I2_S; the scale is stored as a multiplier.
    ///
    /// # Errors
    /// [`Error::Shape`] for a shape that the layout cannot hold.
    pub fn to_i2s(&self, layout: I2sLayout) -> Result<Vec<u8>> {
        let (rows, cols) = (self.rows(), self.cols());
        let count = check_shape(rows, cols, layout)?;
        let mut out = vec![0; count / CODES_PER_BYTE + TAIL];
        let (codes, tail) = out.split_at_mut(count / CODES_PER_BYTE);
        match layout {
            I2sLayout::Blocks128 | I2sLayout::Blocks64 => {
                let lane = layout.lane();
                let flat = flat_of_rows(self);
                for (canonical, run) in flat.chunks_exact(lane).zip(codes.chunks_exact_mut(lane)) {
                    planes::from_canonical(canonical, Order::HighFirst, run);
                }
            }
            I2sLayout::Rows4 => {
                for (group, run) in codes.chunks_exact_mut(cols).enumerate() {
                    for (at, four) in run.chunks_mut(CODES_PER_BYTE).enumerate() {
                        let word: [u8; 4] = std::array::from_fn(|i| self.row(4 * group + 3 - i)[at]);
                        let bytes = transpose4x4(u32::from_le_bytes(word)).to_le_bytes();
                        four.copy_from_slice(&bytes[..four.len()]);
                    }
                }
            }
        }
        tail[..4].copy_from_slice(&self.scale().multiplier().to_le_bytes());
        Ok(out)
    }

    /// Sums of signs over rows of weights: of random signs they are about the root of what is not zero. Where they come to
    /// more than half of it, most rows repeat one sign, which no trained weight does.
    fn check_spread(&self) -> Result<()> {
        // Few weights may well have one sign by chance.
        const FEW: usize = 64;
        if self.cols() < FEW {
            return Ok(());
        }
        let (mut sums, mut others) = (0u64, 0u64);
        for row in 0..self.rows() {
            let ones = |mask: u8| self.row(row).iter().map(|b| u64::from((b & mask).count_ones())).sum::<u64>();
            let (zero, plus) = (ones(0x55), ones(0xaa));
            let minus = self.cols() as u64 - zero - plus;
            sums += plus.abs_diff(minus);
            others += plus + minus;
        }
        if 2 * sums > others {
            let share = 100.0 * sums as f64 / others as f64;
            return Err(Error::Shape {
                op: "I2_S",
                reason: format!(
                    "the sums of its rows are {share:.0} % of what one sign alone would give, while a trained weight has \
                     about as many -1 as 1: the file is damaged (a download with holes?), or in another layout \
                     (--i2s-layout)"
                ),
            });
        }
        Ok(())
    }
}

/// The number of codes.
fn check_shape(rows: usize, cols: usize, layout: I2sLayout) -> Result<usize> {
    let error = |reason| Err(Error::Shape { op: "I2_S", reason });
    let Some(count) = rows.checked_mul(cols).filter(|n| *n > 0) else {
        return error(format!("{rows}×{cols} has no size"));
    };
    let block = CODES_PER_BYTE * layout.lane();
    match layout {
        I2sLayout::Rows4 if !rows.is_multiple_of(4) => {
            error(format!("{rows} rows are not a multiple of 4, as the layout 'rows' demands"))
        }
        I2sLayout::Blocks128 | I2sLayout::Blocks64 if !count.is_multiple_of(block) => {
            error(format!("{rows}×{cols} values are not a multiple of {block}, as the layout '{layout}' demands"))
        }
        _ => Ok(count),
    }
}

/// Canonical rows, padded to whole bytes, of codes without padding.
pub(super) fn rows_of_flat(rows: usize, cols: usize, flat: Vec<u8>) -> Vec<u8> {
    if cols.is_multiple_of(CODES_PER_BYTE) {
        return flat;
    }
    let row_bytes = cols.div_ceil(CODES_PER_BYTE);
    let mut out = vec![0; rows * row_bytes];
    for (row, bytes) in out.chunks_exact_mut(row_bytes).enumerate() {
        for col in 0..cols {
            let at = row * cols + col;
            bytes[col / 4] |= (flat[at / 4] >> (2 * (at % 4)) & 3) << (2 * (col % 4));
        }
    }
    out
}

/// The codes without padding between rows.
fn flat_of_rows(packed: &PackedTernary) -> std::borrow::Cow<'_, [u8]> {
    let (rows, cols) = (packed.rows(), packed.cols());
    if cols.is_multiple_of(CODES_PER_BYTE) {
        return packed.codes().into();
    }
    let mut flat = vec![0; (rows * cols).div_ceil(CODES_PER_BYTE)];
    for at in 0..rows * cols {
        let (row, col) = (at / cols, at % cols);
        flat[at / 4] |= (packed.row(row)[col / 4] >> (2 * (col % 4)) & 3) << (2 * (at % 4));
    }
    flat.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn weights(count: usize, seed: u64) -> Vec<i8> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % 3
        };
        (0..count).map(|_| next() as i8 - 1).collect()
    }

    /// Where formats say a weight is: byte and shift.
    fn place(layout: I2sLayout, cols: usize, row: usize, col: usize) -> (usize, usize) {
        let i = row * cols + col;
        match layout {
            I2sLayout::Blocks128 => (i / 128 * 32 + i % 128 % 32, 6 - 2 * (i % 128 / 32)),
            I2sLayout::Blocks64 => (i / 64 * 16 + i % 64 % 16, 6 - 2 * (i % 64 / 16)),
            I2sLayout::Rows4 => (row / 4 * cols + col, 6 - 2 * (row % 4)),
        }
    }

    proptest! {
        #[test]
        fn follows_the_layouts_both_ways(which in 0usize..3, r in 1usize..4, c in 1usize..40, seed: u64) {
            let layout = I2sLayout::ALL[which];
            let (rows, cols) = match layout {
                // Every remainder of a row by four and by a block.
                I2sLayout::Blocks128 => (128 * r, c),
                I2sLayout::Blocks64 => (64 * r, c),
                I2sLayout::Rows4 => (4 * r, c),
            };
            let w = weights(rows * cols, seed);
            let p = PackedTernary::from_weights(rows, cols, &w, Scale::Multiply(0.37)).unwrap();
            let bytes = p.to_i2s(layout).unwrap();
            prop_assert_eq!(bytes.len(), rows * cols / 4 + 32);
            for (i, w) in w.iter().enumerate() {
                let (byte, shift) = place(layout, cols, i / cols, i % cols);
                prop_assert_eq!((bytes[byte] >> shift & 3) as i8 - 1, *w);
            }
            prop_assert_eq!(&bytes[rows * cols / 4..][..4], &0.37f32.to_le_bytes());
            prop_assert_eq!(PackedTernary::from_i2s(rows, cols, &bytes, layout).unwrap(), p);
        }
    }

    #[test]
    fn what_cannot_be_right_is_refused() {
        let w = weights(8 * 256, 3);
        let p = PackedTernary::from_weights(8, 256, &w, Scale::Divide(4.0)).unwrap();
        let good = p.to_i2s(I2sLayout::Blocks128).unwrap();
        let back = PackedTernary::from_i2s(8, 256, &good, I2sLayout::Blocks128).unwrap();
        assert_eq!((back.codes(), back.scale()), (p.codes(), Scale::Multiply(0.25)));
        let fails = |bytes: &[u8]| {
            PackedTernary::from_i2s(8, 256, bytes, I2sLayout::Blocks128).map(|_| ()).unwrap_err().to_string()
        };
        assert!(fails(&good[1..]).contains("needs 544 bytes, got 543"));
        assert!(fails(&vec![0; good.len()]).contains("no scale"));
        for scale in [f32::NAN, -1.0, f32::INFINITY, 1e-40] {
            let mut bad = good.clone();
            bad[512..516].copy_from_slice(&scale.to_le_bytes());
            assert!(fails(&bad).contains("no scale"));
        }
        let mut three = good.clone();
        three[7] |= 3;
        assert!(fails(&three).contains("1 of 2048 codes"));
        // A hole in the file, and random bytes.
        let mut hole = good.clone();
        hole[..512].fill(0);
        assert!(fails(&hole).contains("holes"));
        let mut noise = good;
        noise[..512].iter_mut().zip(0u32..).for_each(|(b, i)| *b = (i.wrapping_mul(2_654_435_761) >> 24) as u8);
        assert!(fails(&noise).contains("are 3"));
        // All zero is dead, not damaged.
        let dead = PackedTernary::from_weights(4, 128, &[0; 512], Scale::Multiply(1.0)).unwrap();
        let bytes = dead.to_i2s(I2sLayout::Rows4).unwrap();
        assert_eq!(PackedTernary::from_i2s(4, 128, &bytes, I2sLayout::Rows4).unwrap(), dead);
    }

    #[test]
    fn shapes_that_do_not_fit_a_layout_are_refused() {
        let fails = |rows, cols, layout| check_shape(rows, cols, layout).is_err();
        assert!(fails(3, 128, I2sLayout::Rows4) && !fails(4, 3, I2sLayout::Rows4));
        assert!(fails(3, 64, I2sLayout::Blocks128) && !fails(3, 64, I2sLayout::Blocks64));
        assert!(fails(0, 128, I2sLayout::Blocks128) && fails(usize::MAX, 2, I2sLayout::Blocks64));
        assert_eq!("rows".parse::<I2sLayout>().unwrap(), I2sLayout::Rows4);
        assert!("256".parse::<I2sLayout>().unwrap_err().to_string().contains("128"));
    }
}
