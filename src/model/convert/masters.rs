//! Masters for codes that have none: values that the absmean quantiser turns back into the codes and their scale.

use crate::backend::DenseType;
use crate::ternary::{CODES_PER_BYTE, PackedTernary, Scale};
use half::bf16;
use rayon::prelude::*;
use std::io::{self, Write};

/// Bytes that are made at a time.
const CHUNK: usize = 4 << 20;

/// How the weights of one matrix are written as masters, so that `mean|W|` is the one that gives its multiplier.
///
/// With `mean` the wanted one, `n` weights and `k` of them not zero, every non-zero weight becomes ±`n · mean / k`: at
/// least the mean, so it rounds to ±1. That number is none of bf16's, so the first `raised` of them take the value above
/// it and all others the one below. What is then missing from the sum goes into the first zeros, as values of at most a
/// quarter of the mean, which round to 0. The quantiser sums in f64, which loses nothing that would show in an f32 mean,
/// whatever the values' places.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Recipe {
    /// BF16, or F32 for a matrix too small to have room for the correction.
    pub dtype: DenseType,
    low: f32,
    high: f32,
    raised: usize,
    fill: f32,
    filled: usize,
    tail: Vec<f32>,
}

impl Recipe {
    /// A recipe for a matrix with these counts of −1, 0 and 1; none if no masters have this multiplier. A matrix of zeros
    /// becomes zeros: whatever its scale is, it multiplies nothing.
    pub fn new([minus, zeros, plus]: [usize; 3], scale: Scale) -> Option<Self> {
        let nonzeros = minus + plus;
        if nonzeros == 0 {
            let (low, dtype) = (0.0, DenseType::BF16);
            return Some(Self { dtype, low, high: low, raised: 0, fill: 0.0, filled: 0, tail: Vec::new() });
        }
        let mean = scale.mean();
        if !super::verify::close(Scale::of_mean(mean).multiplier(), scale.multiplier()) {
            return None;
        }
        [DenseType::BF16, DenseType::F32].into_iter().find_map(|dtype| Self::in_type(dtype, nonzeros, zeros, mean))
    }

    fn in_type(dtype: DenseType, nonzeros: usize, zeros: usize, mean: f32) -> Option<Self> {
        let count = (nonzeros + zeros) as f64;
        let total = count * f64::from(mean);
        // Sums up to a quarter of an ulp of the mean away round to it, even below a power of two; half of that is room.
        let tolerance = count * f64::from(mean.next_up() - mean) / 8.0;
        let low = at_most(total / nonzeros as f64, dtype);
        let high = f32::from_bits(low.to_bits() + step(dtype));
        if !low.is_normal() || !high.is_finite() {
            return None;
        }
        let mut missing = (total - nonzeros as f64 * f64::from(low)).max(0.0);
        let raise = f64::from(high) - f64::from(low);
        let raised = ((missing / raise) as usize).min(nonzeros);
        missing -= raised as f64 * raise;
        let fill = at_most(f64::from(mean) / 4.0, dtype);
        let filled = ((missing / f64::from(fill)) as usize).min(zeros);
        missing -= filled as f64 * f64::from(fill);
        let mut tail = Vec::new();
        while missing > tolerance && filled + tail.len() < zeros {
            // Each takes all but 2⁻⁷ of what is missing, so a few are enough.
            let value = at_most(missing, dtype);
            missing -= f64::from(value);
            tail.push(value);
        }
        (missing <= tolerance).then_some(Self { dtype, low, high, raised, fill, filled, tail })
    }

    /// Writes the matrix's values, row-major; `progress` is called with the bytes of some rows.
    pub fn write(
        &self,
        packed: &PackedTernary,
        out: &mut dyn Write,
        mut progress: impl FnMut(u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let (rows, row_bytes) = (packed.rows(), packed.cols() * self.dtype.size());
        let step = (CHUNK / row_bytes).clamp(1, rows);
        let mut bytes = vec![0; step * row_bytes];
        // Zeros before each row say which of the first zeros and non-zeros are in it.
        let mut before = 0;
        let mut starts = Vec::with_capacity(step);
        for first in (0..rows).step_by(step) {
            let bytes = &mut bytes[..step.min(rows - first) * row_bytes];
            starts.clear();
            for row in first..(first + step).min(rows) {
                starts.push(before);
                before += packed.zeros_in(row);
            }
            let lines = bytes.par_chunks_mut(row_bytes).zip(&starts).enumerate();
            lines.for_each(|(i, (out, zeros))| self.write_row(packed, first + i, *zeros, out));
            out.write_all(bytes)?;
            progress(bytes.len() as u64)?;
        }
        Ok(())
    }

    /// One row, with `zeros` zeros in all rows before it.
    fn write_row(&self, packed: &PackedTernary, row: usize, zeros: usize, out: &mut [u8]) {
        match self.dtype {
            DenseType::BF16 => self.fill(packed, row, zeros, out, |v| bf16::from_f32(v).to_le_bytes()),
            _ => self.fill(packed, row, zeros, out, f32::to_le_bytes),
        }
    }

    fn fill<const N: usize>(
        &self,
        packed: &PackedTernary,
        row: usize,
        mut zeros: usize,
        out: &mut [u8],
        bytes_of: impl Fn(f32) -> [u8; N],
    ) {
        let mut others = row * packed.cols() - zeros;
        let special = self.filled + self.tail.len();
        let out = out.as_chunks_mut::<N>().0;
        // Behind the first ones, of either kind, every code has one value.
        let common = [-self.low, 0.0, self.low, f32::NAN].map(&bytes_of);
        for (out, byte) in out.chunks_mut(CODES_PER_BYTE).zip(packed.row(row)) {
            if zeros >= special && others >= self.raised {
                out.iter_mut().enumerate().for_each(|(i, out)| *out = common[usize::from(byte >> (2 * i) & 3)]);
                continue;
            }
            for (i, out) in out.iter_mut().enumerate() {
                let code = byte >> (2 * i) & 3;
                *out = if code == 1 {
                    zeros += 1;
                    match zeros {
                        n if n <= self.filled => bytes_of(self.fill),
                        n if n <= special => bytes_of(self.tail[n - self.filled - 1]),
                        _ => common[1],
                    }
                } else {
                    others += 1;
                    match others <= self.raised {
                        true => bytes_of((f32::from(code) - 1.0) * self.high),
                        false => common[usize::from(code)],
                    }
                };
            }
        }
    }
}

/// Distance of neighbouring values in the bits of an f32.
fn step(dtype: DenseType) -> u32 {
    if dtype == DenseType::BF16 { 1 << 16 } else { 1 }
}

/// The largest value of the type that is not above `x`, which is not negative.
fn at_most(x: f64, dtype: DenseType) -> f32 {
    let near = x as f32;
    let below = if f64::from(near) > x { near.next_down() } else { near };
    f32::from_bits(below.to_bits() & !(step(dtype) - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Writes the masters and quantises them as loading does.
    fn back(packed: &PackedTernary, recipe: &Recipe) -> PackedTernary {
        let mut bytes = Vec::new();
        recipe.write(packed, &mut bytes, |_| Ok(())).unwrap();
        let mut values = vec![0.0; packed.rows() * packed.cols()];
        assert_eq!(bytes.len(), values.len() * recipe.dtype.size());
        recipe.dtype.widen(&bytes, &mut values);
        PackedTernary::quantize_slice(packed.rows(), packed.cols(), &values).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn any_codes_and_any_scale_of_masters_come_back(
            rows in 1usize..40,
            cols in 1usize..60,
            share in 0u64..101,
            seed: u64,
            mean in 1.1e-5f32..1e6,
            exponent in -16i32..16,
        ) {
            let mean = (mean * 2f32.powi(exponent)).max(1e-5);
            let mut state = seed | 1;
            let mut random = || {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                state >> 33
            };
            let weights: Vec<i8> = (0..rows * cols)
                .map(|_| if random() % 100 >= share { 0 } else if random() % 2 == 0 { 1 } else { -1 })
                .collect();
            for scale in [Scale::of_mean(mean), Scale::of_mean(mean).to_divide()] {
                let packed = PackedTernary::from_weights(rows, cols, &weights, scale).unwrap();
                let recipe = Recipe::new(packed.histogram(), scale).unwrap();
                let again = back(&packed, &recipe);
                prop_assert_eq!(again.codes(), packed.codes());
                if weights.iter().any(|w| *w != 0) {
                    prop_assert_eq!(again.scale().multiplier().to_bits(), scale.multiplier().to_bits());
                }
                prop_assert!(rows * cols < 2048 || weights.iter().filter(|w| **w == 0).count() < 2
                    || recipe.dtype == DenseType::BF16);
            }
        }
    }

    #[test]
    fn what_masters_cannot_say_is_none() {
        assert_eq!(Recipe::new([10, 10, 10], Scale::Multiply(1e-6)), None, "the quantiser's floor is 1e-5");
        assert_eq!(Recipe::new([1, 100_000, 1], Scale::Multiply(3e37)), None, "beyond the largest f32");
        assert!(Recipe::new([0, 12, 0], Scale::Multiply(1e-6)).is_some(), "a scale of zeros scales nothing");
        assert!(Recipe::new([1, 0, 0], Scale::Multiply(1e-3)).is_some());
    }

    #[test]
    fn a_matrix_with_few_nonzeros_fills_its_zeros() {
        let mut weights = vec![0i8; 256 * 256];
        (weights[77], weights[40_000], weights[65_535]) = (1, -1, -1);
        let scale = Scale::of_mean(0.0123);
        let packed = PackedTernary::from_weights(256, 256, &weights, scale).unwrap();
        let recipe = Recipe::new(packed.histogram(), scale).unwrap();
        assert_eq!(back(&packed, &recipe), packed);
        assert!(recipe.filled > 10 && recipe.dtype == DenseType::BF16, "{recipe:?}");
    }
}
