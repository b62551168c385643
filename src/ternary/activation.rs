//! Per-token absmax quantisation of activations to 8 bits (BitNet b1.58, eq. 4–5).

/// Largest magnitude of a quantised activation; −128 never occurs.
pub const ACTIVATION_MAX: f32 = 127.0;

/// Smallest absmax that is divided by, so that an all-zero token stays finite.
pub const MIN_ABSMAX: f32 = 1e-5;

/// Rounds to the nearest integer, halves to even, as `torch.round` does.
#[inline(always)]
pub fn round_half_even(x: f32) -> f32 {
    x.round_ties_even()
}

/// Quantises one token: `s = 127 / max(absmax(x), 1e-5)`, `q = round_half_even(x · s)` in [−127, 127].
///
/// Returns the scale `s` and `Σq`, which kernels on unsigned codes subtract. This is the definition that the
/// kernels' own fused versions are tested against.
///
/// # Panics
/// If `x` and `q` differ in length.
pub fn quantize_activations(x: &[f32], q: &mut [i8]) -> (f32, i32) {
    assert_eq!(x.len(), q.len(), "one code per activation");
    let absmax = x.iter().fold(0f32, |m, v| m.max(v.abs()));
    let scale = ACTIVATION_MAX / absmax.max(MIN_ABSMAX);
    let mut sum = 0;
    for (q, x) in q.iter_mut().zip(x) {
        // Rounding of x * s can exceed 127 by less than half a unit only through overflow; `as` saturates.
        *q = round_half_even(x * scale).clamp(-ACTIVATION_MAX, ACTIVATION_MAX) as i8;
        sum += i32::from(*q);
    }
    (scale, sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_round_to_even_and_the_extremes_are_127() {
        // absmax 127 makes the scale exactly 1, so the halves are exact.
        let x = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0];
        let mut q = [0; 8];
        let (scale, sum) = quantize_activations(&x, &mut q);
        assert_eq!(scale, 1.0);
        assert_eq!(q, [127, 0, 2, 2, 0, -2, -2, -127]);
        assert_eq!(sum, 0);
    }

    #[test]
    fn scale_is_one_division_not_a_reciprocal() {
        // 127 / a and 127 * (1 / a) differ in the last bit here, and x * s lands on the other side of a half.
        let found = (1..20_000u32).map(|i| i as f32 * 0.001).find(|a| 127.0 / a != 127.0 * (1.0 / a)).unwrap();
        let mut q = [0; 1];
        assert_eq!(quantize_activations(&[found], &mut q).0, 127.0 / found);
    }

    #[test]
    fn zero_token_is_zero_with_a_finite_scale() {
        let mut q = [1; 3];
        let (scale, sum) = quantize_activations(&[0.0; 3], &mut q);
        assert_eq!((scale, sum, q), (127.0 / 1e-5, 0, [0; 3]));
    }

    #[test]
    fn the_largest_magnitude_is_always_127() {
        for i in 1..5000u32 {
            let a = f32::from_bits(0x3000_0000 + i * 40_503);
            let mut q = [0; 2];
            quantize_activations(&[a, -a], &mut q);
            if a > MIN_ABSMAX {
                assert_eq!(q, [127, -127], "{a}");
            }
        }
    }
}
