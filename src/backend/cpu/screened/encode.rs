//! Codes of a row, and what is known of what they leave.

use super::{LIMIT, MIDDLE, OFFSET, Row, SLACK};
use crate::backend::cpu::isa::{Isa, per_isa};
use crate::backend::cpu::lanes::{LANES, Stored, round_to_int};

/// Scales with which f32 sums of squares neither overflow nor lose what matters.
const MODERATE: std::ops::RangeInclusive<f32> = MODERATE_LEAST..=1.0 / MODERATE_LEAST;
const MODERATE_LEAST: f32 = 1.0 / (1u64 << 40) as f32;
/// Roundings of a sum of squares besides those of its additions, all relative to what is summed.
const SQUARE_ROUNDINGS: usize = 24;

/// Half of the range of a code of four bits.
pub(super) const HALF_RANGE: f32 = 7.5;
/// By how much the mean of `scale · (code − 7.5)` may miss a value, in scales: random offsets are multiples of 1/256 from
/// 1/512 on, which shifts the mean by at most 1/512; f32 adds less than 2⁻¹⁸.
pub(super) const BIAS: f64 = 0.002;

per_isa! {
    /// The bits of the largest magnitude, which are those of no number if there is a value that is none.
    fn magnitude<E: Stored>(w: &[E], largest: &mut u32) {
        let bits = |v: E| v.widen().to_bits() & (u32::MAX >> 1);
        let mut lanes = [0u32; LANES];
        let (chunks, tail) = w.as_chunks::<LANES>();
        for chunk in chunks {
            for i in 0..LANES {
                lanes[i] = lanes[i].max(bits(chunk[i]));
            }
        }
        let tail = tail.iter().fold(0, |most, v| most.max(bits(*v)));
        *largest = lanes.into_iter().fold(tail, u32::max);
    }
}

/// The largest magnitude of a row. None if a value is not finite.
pub(in crate::backend::cpu) fn largest<E: Stored>(isa: Isa, w: &[E]) -> Option<f32> {
    let mut bits = 0;
    magnitude::<E>(isa, w, &mut bits);
    Some(f32::from_bits(bits)).filter(|v| v.is_finite())
}

/// Rounded up to 16 significant bits, so that products with codes are exact in f32.
fn short(scale: f32) -> f32 {
    f32::from_bits((scale.to_bits() + 0xff) & !0xff)
}

per_isa! {
    /// Codes with an offset of 128, and the sums of the squares of what eight bits leave, of what six leave, and of the row.
    ///
    /// `scale` has 16 bits, so products with codes and with half-integers of eight bits are exact, and a difference is
    /// rounded once.
    fn round<E: Stored>(w: &[E], scale: f32, codes: &mut [u8], squares: &mut [f32; 3 * LANES]) {
        let inverse = 1.0 / scale;
        let one = |v: f32| {
            let c = round_to_int(v * inverse).clamp(-(LIMIT as i32), LIMIT as i32);
            let u = c + OFFSET as i32;
            let fine = v - scale * c as f32;
            let coarse = v - scale * ((u & !3) as f32 + (MIDDLE - OFFSET as f64) as f32);
            (u as u8, fine * fine, coarse * coarse, v * v)
        };
        let (mut fine, mut coarse, mut norm) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
        let (chunks, tail) = w.as_chunks::<LANES>();
        let (code_chunks, _) = codes.as_chunks_mut::<LANES>();
        for (w, codes) in chunks.iter().zip(code_chunks) {
            for i in 0..LANES {
                let (u, f, c, n) = one(w[i].widen());
                codes[i] = u;
                fine[i] += f;
                coarse[i] += c;
                norm[i] += n;
            }
        }
        for (i, (w, code)) in tail.iter().zip(&mut codes[chunks.len() * LANES..]).enumerate() {
            let (u, f, c, n) = one(w.widen());
            *code = u;
            fine[i] += f;
            coarse[i] += c;
            norm[i] += n;
        }
        squares[..LANES].copy_from_slice(&fine);
        squares[LANES..2 * LANES].copy_from_slice(&coarse);
        squares[2 * LANES..].copy_from_slice(&norm);
    }
}

/// A norm that is no less than the root of a sum of squares.
fn up(square: f64) -> f32 {
    ((square.sqrt() * (1.0 + SLACK)) as f32).next_up()
}

/// The codes of a row, with an offset of 128. None if it cannot be bounded.
pub(super) fn certain<E: Stored>(isa: Isa, w: &[E], codes: &mut [u8]) -> Option<Row> {
    let largest = largest(isa, w)?;
    // Zeros leave nothing with eight bits, but do with six, so their scale is small.
    let scale = if largest > 0.0 { short((f64::from(largest) / LIMIT) as f32) } else { MODERATE_LEAST };
    if !MODERATE.contains(&scale) {
        return exactly(w, (f64::from(largest) / LIMIT) as f32, codes);
    }
    let mut squares = [0f32; 3 * LANES];
    round::<E>(isa, w, scale, codes, &mut squares);
    // Each lane adds w.len() / 16 squares, all positive, and a square below the smallest f32 loses less than that.
    let relative = 2.0 * (w.len() / LANES + SQUARE_ROUNDINGS) as f64 * 2f64.powi(-24);
    let mut sums = squares.as_chunks::<LANES>().0.iter().map(|lanes| {
        let sum: f64 = lanes.iter().map(|v| f64::from(*v)).sum();
        up(sum * (1.0 + relative) + w.len() as f64 * 2f64.powi(-148))
    });
    let mut next = || sums.next().unwrap_or(f32::INFINITY);
    let (fine_error, coarse_error, norm) = (next(), next(), next());
    Some(Row { scale, coarse_error, fine_error, norm })
}

/// The same in f64, for values of any size.
fn exactly<E: Stored>(w: &[E], scale: f32, codes: &mut [u8]) -> Option<Row> {
    if !scale.is_normal() {
        return None;
    }
    let s = f64::from(scale);
    let (mut coarse, mut fine, mut norm) = (0.0, 0.0, 0.0);
    for (v, code) in w.iter().zip(codes) {
        let v = f64::from(v.widen());
        let c = (v / s).round_ties_even().clamp(-LIMIT, LIMIT);
        *code = (c as i64 + OFFSET) as u8;
        let upper = f64::from(*code & !3) + MIDDLE - OFFSET as f64;
        fine += (v - s * c).powi(2);
        coarse += (v - s * upper).powi(2);
        norm += v * v;
    }
    Some(Row { scale, coarse_error: up(coarse), fine_error: up(fine), norm: up(norm) })
}

per_isa! {
    /// Codes of four bits, in the upper half of a byte: `v / scale + 7.5`, rounded up or down as a random byte says, so that
    /// their mean is that number. `squares` is the row's.
    fn round_at_random<E: Stored>(w: &[E], scale: f32, random: &[u8], codes: &mut [u8], squares: &mut [f64; LANES]) {
        let inverse = 1.0 / scale;
        let code = |v: f32, random: u8| {
            let offset = f32::from(random) * (1.0 / 256.0) + (HALF_RANGE + 1.0 / 512.0);
            // From 1/512 − 2⁻¹⁸ to 16 − 1/512 + 2⁻¹⁸: no code is out of range.
            ((v * inverse + offset) as i32 as u8) << 4
        };
        let (chunks, tail) = w.as_chunks::<LANES>();
        let randoms = random.as_chunks::<LANES>().0;
        for ((w, random), codes) in chunks.iter().zip(randoms).zip(codes.as_chunks_mut::<LANES>().0) {
            for i in 0..LANES {
                let v = w[i].widen();
                codes[i] = code(v, random[i]);
                squares[i] += f64::from(v) * f64::from(v);
            }
        }
        let rest = chunks.len() * LANES;
        for ((w, random), out) in tail.iter().zip(&random[rest..]).zip(&mut codes[rest..]) {
            let v = w.widen();
            *out = code(v, *random);
            squares[0] += f64::from(v) * f64::from(v);
        }
    }
}

/// The codes of a row, with as many random bytes. None if it cannot be bounded.
pub(super) fn probable<E: Stored>(isa: Isa, w: &[E], random: &[u8], codes: &mut [u8]) -> Option<Row> {
    let largest = largest(isa, w)?;
    let scale = if largest > 0.0 { largest / HALF_RANGE } else { MODERATE_LEAST };
    if !scale.is_normal() {
        return None;
    }
    let mut squares = [0f64; LANES];
    round_at_random::<E>(isa, w, scale, random, codes, &mut squares);
    Some(Row { scale, norm: up(squares.iter().sum()), ..Row::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn norm(values: impl Iterator<Item = f64>) -> f64 {
        values.map(|v| v * v).sum::<f64>().sqrt()
    }

    proptest! {
        #[test]
        fn norms_are_bounds_and_hardly_more(
            values in prop::collection::vec(-1f32..1.0, 1..200), size in -36i32..36, zeros in any::<bool>(),
        ) {
            let values: Vec<f32> = values.iter().map(|v| if zeros { 0.0 } else { v * 10f32.powi(size) }).collect();
            let mut first = None;
            for isa in Isa::available() {
                let mut codes = vec![0; values.len()];
                let Some(row) = certain(isa, &values, &mut codes) else {
                    // Only what is close to the smallest or the largest numbers.
                    prop_assert!(!(-30..30).contains(&size));
                    continue;
                };
                let s = f64::from(row.scale);
                let left = |code: &dyn Fn(u8) -> f64| {
                    norm(values.iter().zip(&codes).map(|(v, u)| f64::from(*v) - s * code(*u)))
                };
                let fine = left(&|u| f64::from(u) - 128.0);
                let coarse = left(&|u| f64::from(u & !3) + 1.5 - 128.0);
                let whole = norm(values.iter().map(|v| f64::from(*v)));
                for (bound, exact) in [(row.fine_error, fine), (row.coarse_error, coarse), (row.norm, whole)] {
                    let bound = f64::from(bound);
                    prop_assert!(bound >= exact && bound <= exact * 1.0001 + 1e-20, "{bound} for {exact}");
                }
                prop_assert!(fine <= 0.51 * s * (values.len() as f64).sqrt());
                let got = (codes, row.scale.to_bits(), row.fine_error.to_bits(), row.coarse_error.to_bits());
                prop_assert_eq!(first.get_or_insert(got.clone()), &got);
            }
        }

        #[test]
        fn random_codes_have_the_right_mean(value in -1f32..1.0, largest in 1f32..100.0) {
            let values = [value, -largest, largest];
            let mut mean = [0f64; 3];
            for random in 0..=255u8 {
                let mut codes = [0; 3];
                let row = probable(Isa::best(), &values, &[random; 3], &mut codes).unwrap();
                for ((mean, value), code) in mean.iter_mut().zip(values).zip(codes) {
                    prop_assert_eq!(code & 15, 0);
                    let value = f64::from(value);
                    let coded = f64::from(row.scale) * (f64::from(code >> 4) - f64::from(HALF_RANGE));
                    prop_assert!((coded - value).abs() <= 1.01 * f64::from(row.scale), "{} for {}", coded, value);
                    *mean += (coded - value) / f64::from(row.scale) / 256.0;
                }
                prop_assert!(f64::from(row.norm) >= norm(values.iter().map(|v| f64::from(*v))));
            }
            prop_assert!(mean.iter().all(|m| m.abs() <= BIAS), "{:?}", mean);
        }
    }

    #[test]
    fn what_is_no_number_is_refused() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 17, 40] {
                let mut values = [1f32; 41];
                values[at] = bad;
                for isa in Isa::available() {
                    assert!(certain(isa, &values, &mut [0; 41]).is_none(), "{bad} at {at}");
                    assert!(probable(isa, &values, &[0; 41], &mut [0; 41]).is_none(), "{bad} at {at}");
                }
            }
        }
    }
}
