//! The exponential of the sampler, made of additions and multiplications only: it vectorises on every CPU, and gives
//! the same bits on every platform, so that the same seed gives the same tokens.

/// e^x for x ≤ 0 within 2 units in the last place; 0 below −87 (where the result would leave the normal range).
///
/// Cephes' `expf`: x = n ln 2 + f, a polynomial of degree 6 in f, and n put into the exponent.
#[inline(always)]
pub(super) fn exp_nonpositive(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer in the low bits of the mantissa.
    const MAGIC: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let f = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * f + 1.398_199_9e-3;
    p = p * f + 8.333_452e-3;
    p = p * f + 4.166_579_6e-2;
    p = p * f + 1.666_666_5e-1;
    p = p * f + 0.5;
    p = p * f * f + f + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(127) << 23;
    if x < -87.0 { 0.0 } else { p * f32::from_bits(exponent) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_to_f64() {
        let mut x = 0.0f32;
        while x >= -87.0 {
            let (got, want) = (f64::from(exp_nonpositive(x)), f64::from(x).exp());
            assert!(((got - want) / want).abs() < 2.5e-7, "{x}: {got} {want}");
            x -= 0.000_917;
        }
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(-0.0), 1.0);
        assert_eq!(exp_nonpositive(-87.5), 0.0);
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_nonpositive(f32::MIN), 0.0);
    }

    #[test]
    fn the_bits_are_those_of_the_devices() {
        // tests/emulator/head.cpp has the same numbers for kernels/cuda/sample.cu.
        for (x, bits) in [
            (-0.3, 0x3f3d_a643),
            (-1.0, 0x3ebc_5ab2),
            (-7.7, 0x39ed_6972),
            (-33.3, 0x2778_b2ea),
            (-86.9, 0x00c6_0f89),
            (-87.5, 0),
        ] {
            assert_eq!(exp_nonpositive(x).to_bits(), bits, "{x}");
        }
    }
}
