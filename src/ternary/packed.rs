//! The canonical form of a ternary matrix.

use crate::{Error, Result};
use candle_core::{DType, Tensor};
use rayon::prelude::*;

/// Codes in one byte of the canonical form.
pub const CODES_PER_BYTE: usize = 4;

/// What a checkpoint's `weight_scale` does to the integer product. Inverting it gives fluent-looking garbage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scale {
    /// `y = acc / s_x · scale` (`linear_class: autobitlinear`, masters quantised at load, I2_S).
    Multiply(f32),
    /// `y = acc / s_x / scale` (`linear_class` absent or `bitlinear`).
    Divide(f32),
}

impl Scale {
    /// The number as the checkpoint stores it.
    pub fn stored(self) -> f32 {
        match self {
            Self::Multiply(s) | Self::Divide(s) => s,
        }
    }

    /// The factor on the integer product, rounded once for the divide style.
    pub fn multiplier(self) -> f32 {
        match self {
            Self::Multiply(s) => s,
            Self::Divide(s) => 1.0 / s,
        }
    }

    /// What turns an accumulator into an output, given the token's activation scale: `multiplier / s_x`, in f64 so
    /// that the output is rounded once.
    ///
    /// A divide-style scale goes through its f32 multiplier, so that it gives the same bits as the multiply-style
    /// scale that masters are quantised to: a model is the same model in every form that it is stored in.
    /// transformers is no more exact: it rounds the product `s_x · weight_scale` to f32 (or less) before it divides.
    pub fn factor(self, s_x: f32) -> f64 {
        f64::from(self.multiplier()) / f64::from(s_x)
    }

    /// The scale of masters with this `mean|W|`: `s = 1 / max(mean, 1e-5)`, multiplier `1 / s`, each in f32.
    pub fn of_mean(mean: f32) -> Self {
        Self::Multiply(1.0 / absmean_factor(mean))
    }

    /// The same scale as a multiplier; exact.
    pub fn to_multiply(self) -> Self {
        Self::Multiply(self.multiplier())
    }

    /// The same scale as a divisor: the one whose f32 inverse is this multiplier, or the nearest to it where there is
    /// none. There always is one for a multiplier that came from masters; about one f32 in six has none, and is met to
    /// within one unit in the last place.
    pub fn to_divide(self) -> Self {
        match self {
            Self::Divide(_) => self,
            Self::Multiply(m) => Self::Divide(nearest(1.0 / m, |s| 1.0 / s, m)),
        }
    }

    /// The `mean|W|` that the quantiser turns into this multiplier, or into the nearest to it; see [`Scale::of_mean`].
    pub fn mean(self) -> f32 {
        let m = self.multiplier();
        nearest(m, |mean| Self::of_mean(mean).multiplier(), m)
    }
}

/// Among the f32 next to `guess`, the one that `f` brings closest to `wanted`; the first of equals, `guess` before all.
fn nearest(guess: f32, f: impl Fn(f32) -> f32, wanted: f32) -> f32 {
    let error = |x: f32| (f64::from(f(x)) - f64::from(wanted)).abs();
    let near = [-1i32, 1, -2, 2, -3, 3].map(|ulps| f32::from_bits(guess.to_bits().saturating_add_signed(ulps)));
    near.into_iter().fold(guess, |best, x| if error(x) < error(best) { x } else { best })
}

/// Values that are worth a thread's while.
const PIECE: usize = 1 << 16;

/// What masters with this `mean|W|` are multiplied by before they are rounded.
fn absmean_factor(mean: f32) -> f32 {
    1.0 / mean.max(1e-5)
}

/// A ternary matrix `[rows, cols]`: codes {0, 1, 2} for {−1, 0, 1} and one scale.
///
/// Canonical layout: row-major, each row padded to whole bytes, four consecutive columns in a byte, the first
/// in the low bits. Padding codes are 0. Holds no device and no kernel layout.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedTernary {
    rows: usize,
    cols: usize,
    codes: Vec<u8>,
    scale: Scale,
}

impl PackedTernary {
    /// Takes canonical codes, `rows · ceil(cols / 4)` bytes.
    ///
    /// # Errors
    /// [`Error::Shape`] for a wrong length or an empty matrix, [`Error::InvalidCode`] for a code 3.
    pub fn new(rows: usize, cols: usize, mut codes: Vec<u8>, scale: Scale) -> Result<Self> {
        let row_bytes = cols.div_ceil(CODES_PER_BYTE);
        if rows == 0 || cols == 0 || Some(codes.len()) != rows.checked_mul(row_bytes) {
            return Err(Error::Shape {
                op: "PackedTernary",
                reason: format!("{rows}×{cols} needs {row_bytes} bytes a row, got {} bytes in all", codes.len()),
            });
        }
        if !cols.is_multiple_of(CODES_PER_BYTE) {
            let mask = (1u8 << (2 * (cols % CODES_PER_BYTE))) - 1;
            for row in codes.chunks_exact_mut(row_bytes) {
                row[row_bytes - 1] &= mask;
            }
        }
        let packed = Self { rows, cols, codes, scale };
        packed.check_codes()?;
        Ok(packed)
    }

    fn check_codes(&self) -> Result<()> {
        let row_bytes = self.row_bytes();
        let bad = |b: u8| b & (b >> 1) & 0x55;
        // The whole buffer first, which vectorises; the place only when there is one to name.
        if self.codes.iter().fold(0, |any, b| any | bad(*b)) == 0 {
            return Ok(());
        }
        let at = self.codes.iter().position(|b| bad(*b) != 0).unwrap_or(0);
        let within = (bad(self.codes[at]).trailing_zeros() / 2) as usize;
        Err(Error::InvalidCode { row: at / row_bytes, col: at % row_bytes * CODES_PER_BYTE + within })
    }

    /// Packs weights given as −1, 0 or 1, row-major.
    ///
    /// # Errors
    /// [`Error::Shape`] if the count is not `rows · cols` or a value is not ternary.
    pub fn from_weights(rows: usize, cols: usize, weights: &[i8], scale: Scale) -> Result<Self> {
        let shape_error = |reason| Error::Shape { op: "PackedTernary::from_weights", reason };
        if Some(weights.len()) != rows.checked_mul(cols) || weights.is_empty() {
            return Err(shape_error(format!("{rows}×{cols} needs one weight each, got {}", weights.len())));
        }
        if let Some(w) = weights.iter().find(|w| !(-1..=1).contains(*w)) {
            return Err(shape_error(format!("weight {w} is not -1, 0 or 1")));
        }
        let codes = weights
            .chunks_exact(cols)
            .flat_map(|row| row.chunks(CODES_PER_BYTE))
            .map(|four| four.iter().rev().fold(0, |byte, w| byte << 2 | (w + 1) as u8))
            .collect();
        Self::new(rows, cols, codes, scale)
    }

    /// Quantises a master weight `[rows, cols]` by its absolute mean (BitNet b1.58, eq. 1–3):
    /// `s = 1 / max(mean|W|, 1e-5)`, `w = clamp(round_half_even(W · s), −1, 1)`, multiplier `1 / s`.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the tensor has two dimensions and finite values.
    pub fn quantize(weight: &Tensor) -> Result<Self> {
        let (rows, cols) = weight.dims2()?;
        let values = weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Self::quantize_slice(rows, cols, &values)
    }

    /// [`PackedTernary::quantize`] on row-major values.
    ///
    /// # Errors
    /// [`Error::Shape`] if the count is not `rows · cols` or a value is not finite.
    pub fn quantize_slice(rows: usize, cols: usize, values: &[f32]) -> Result<Self> {
        let shape_error = |reason| Error::Shape { op: "PackedTernary::quantize", reason };
        if Some(values.len()) != rows.checked_mul(cols) || values.is_empty() {
            return Err(shape_error(format!("{rows}×{cols} needs one value each, got {}", values.len())));
        }
        let mean = mean_abs(values);
        if !mean.is_finite() {
            return Err(shape_error("the weights hold NaN or infinite values".into()));
        }
        let s = absmean_factor(mean);
        // Rounded half to even and clamped, that is: a half is 0.
        let code = |v: &f32| 1 + u8::from(v * s > 0.5) - u8::from(v * s < -0.5);
        let row_bytes = cols.div_ceil(CODES_PER_BYTE);
        let mut codes = vec![0; rows * row_bytes];
        let lines = values.par_chunks_exact(cols).zip(codes.par_chunks_exact_mut(row_bytes));
        lines.with_min_len(PIECE.div_ceil(cols)).for_each(|(row, out)| {
            let (fours, rest) = row.as_chunks::<CODES_PER_BYTE>();
            let (bytes, last) = out.split_at_mut(fours.len());
            for (four, byte) in fours.iter().zip(bytes) {
                *byte = code(&four[0]) | code(&four[1]) << 2 | code(&four[2]) << 4 | code(&four[3]) << 6;
            }
            if let Some(byte) = last.first_mut() {
                *byte = rest.iter().rev().fold(0, |byte, v| byte << 2 | code(v));
            }
        });
        Self::new(rows, cols, codes, Scale::of_mean(mean))
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The matrix's scale.
    pub fn scale(&self) -> Scale {
        self.scale
    }

    /// Canonical codes of all rows.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Bytes of one canonical row.
    pub fn row_bytes(&self) -> usize {
        self.cols.div_ceil(CODES_PER_BYTE)
    }

    /// Canonical codes of one row.
    ///
    /// # Panics
    /// If `row` is out of range.
    pub fn row(&self, row: usize) -> &[u8] {
        &self.codes[row * self.row_bytes()..][..self.row_bytes()]
    }

    /// One weight: −1, 0 or 1.
    ///
    /// # Panics
    /// If `row` or `col` is out of range.
    pub fn weight(&self, row: usize, col: usize) -> i8 {
        assert!(col < self.cols, "column {col} of {}", self.cols);
        (self.row(row)[col / CODES_PER_BYTE] >> (2 * (col % CODES_PER_BYTE)) & 3) as i8 - 1
    }

    /// The matrix as f32 values `{−m, 0, m}`, row-major, with `m` the multiplier.
    pub fn dequantize(&self) -> Vec<f32> {
        let m = self.scale.multiplier();
        let at = |i| f32::from(self.weight(i / self.cols, i % self.cols)) * m;
        (0..self.rows * self.cols).map(at).collect()
    }

    /// The same codes with another scale.
    #[must_use]
    pub fn with_scale(self, scale: Scale) -> Self {
        Self { scale, ..self }
    }

    /// The rows in another order: row `i` of the result is row `source(i)`.
    ///
    /// # Panics
    /// If `source` names a row that is not there.
    #[must_use]
    pub fn with_rows(self, source: impl Fn(usize) -> usize) -> Self {
        let codes = (0..self.rows).flat_map(|i| self.row(source(i))).copied().collect();
        Self { codes, ..self }
    }

    /// Number of zero weights in a row.
    pub(crate) fn zeros_in(&self, row: usize) -> usize {
        self.row(row).iter().map(|b| (b & 0x55).count_ones() as usize).sum()
    }

    /// Counts of the weights −1, 0 and 1.
    pub fn histogram(&self) -> [usize; 3] {
        let ones = |mask: u8| self.codes.iter().map(|b| (b & mask).count_ones() as usize).sum::<usize>();
        let (zero, plus) = (ones(0x55), ones(0xaa));
        [self.rows * self.cols - zero - plus, zero, plus]
    }
}

/// The absmean scale `s = 1 / max(mean|W|, 1e-5)` of a master weight (BitNet b1.58, eq. 2–3); `1 / s` is the multiplier.
pub fn absmean_scale(values: &[f32]) -> f32 {
    absmean_factor(mean_abs(values))
}

/// `mean|x|` in f32, as torch computes it to within an ulp or two: over fixed blocks in f64, so that the result does
/// not depend on threads or vector width.
fn mean_abs(values: &[f32]) -> f32 {
    const BLOCK: usize = 4096;
    // f64 partial sums are exact to far below an f32 ulp for any matrix that fits in memory.
    let block = |b: &[f32]| b.iter().map(|v| f64::from(v.abs())).sum::<f64>();
    let sums: Vec<f64> = values.par_chunks(BLOCK).with_min_len(PIECE / BLOCK).map(block).collect();
    let total: f64 = sums.iter().sum();
    (total / values.len() as f64) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quantize_follows_the_paper() {
        // mean|W| = 1: halves go to even, everything saturates at ±1.
        let w = [0.5, -0.5, 1.5, -1.5, 0.51, -0.51, 0.49, 2.49];
        let mean = w.iter().map(|v: &f32| v.abs()).sum::<f32>() / 8.0;
        assert_eq!(mean, 1.0);
        let p = PackedTernary::quantize_slice(2, 4, &w).unwrap();
        let got: Vec<i8> = (0..8).map(|i| p.weight(i / 4, i % 4)).collect();
        assert_eq!(got, [0, 0, 1, -1, 1, -1, 0, 1]);
        assert_eq!(p.scale(), Scale::Multiply(1.0));
    }

    /// Deterministic numbers from 2⁻²⁰ to 2²⁰, every mantissa as likely as any other.
    fn scales() -> impl Iterator<Item = f32> {
        (0..200_000u32).map(|i| {
            let bits = i.wrapping_mul(2_654_435_761);
            f32::from_bits((107 + bits % 40) << 23 | bits.rotate_left(11) >> 9)
        })
    }

    #[test]
    fn both_styles_of_one_scale_are_the_same_bits() {
        for mean in scales() {
            let multiply = Scale::of_mean(mean);
            let divide = multiply.to_divide();
            assert!(matches!(divide, Scale::Divide(_)));
            assert_eq!(divide.multiplier().to_bits(), multiply.multiplier().to_bits(), "{mean}");
            assert_eq!(divide.to_multiply(), multiply);
            assert_eq!((divide.to_divide(), multiply.to_multiply()), (divide, multiply));
            for s_x in [0.37f32, 127.0, 12_700_000.0, mean] {
                assert_eq!(divide.factor(s_x).to_bits(), multiply.factor(s_x).to_bits());
            }
            if mean >= 1e-5 {
                assert_eq!(Scale::of_mean(multiply.mean()), multiply, "a mean that gives it back");
            }
        }
    }

    #[test]
    fn a_multiplier_that_is_no_inverse_is_met_within_one_unit() {
        let mut inexact = 0;
        for m in scales() {
            let divide = Scale::Multiply(m).to_divide().multiplier();
            inexact += usize::from(divide != m);
            assert!(divide.to_bits().abs_diff(m.to_bits()) <= 1, "{m} became {divide}");
            if m > 1.1e-5 {
                let mean = Scale::of_mean(Scale::Multiply(m).mean()).multiplier();
                assert_eq!(mean, divide, "masters reach just the multipliers that have an inverse");
            }
        }
        assert!((20_000..60_000).contains(&inexact), "{inexact} of 200,000");
    }

    #[test]
    fn tiny_masters_are_finite() {
        let p = PackedTernary::quantize_slice(1, 3, &[1e-34, -1e-34, 0.0]).unwrap();
        assert_eq!(p.histogram(), [0, 3, 0]);
        assert!(p.scale().stored() > 0.0);
        assert!(PackedTernary::quantize_slice(1, 2, &[f32::NAN, 1.0]).is_err());
    }

    #[test]
    fn code_three_is_refused_by_place() {
        let err = PackedTernary::new(2, 6, vec![0, 0, 0b0010_0001, 0b11 << 2], Scale::Multiply(1.0)).unwrap_err();
        assert!(matches!(err, Error::InvalidCode { row: 1, col: 5 }), "{err}");
        // The same bits in the padding of a row are no codes at all.
        let ok = PackedTernary::new(1, 5, vec![0, 0b11 << 2], Scale::Multiply(1.0)).unwrap();
        assert_eq!(ok.codes(), [0, 0]);
    }

    proptest! {
        #[test]
        fn weights_round_trip(rows in 1usize..9, cols in 1usize..40, seed: u64) {
            let w: Vec<i8> = (0..rows * cols).map(|i| ((seed >> (i % 61)) % 3) as i8 - 1).collect();
            let p = PackedTernary::from_weights(rows, cols, &w, Scale::Divide(2.0)).unwrap();
            let back: Vec<i8> = (0..w.len()).map(|i| p.weight(i / cols, i % cols)).collect();
            prop_assert_eq!(&back, &w);
            let count = |x| w.iter().filter(|v| **v == x).count();
            prop_assert_eq!(p.histogram(), [count(-1), count(0), count(1)]);
            prop_assert_eq!(p.dequantize(), w.iter().map(|v| f32::from(*v) * 0.5).collect::<Vec<_>>());
        }
    }
}
