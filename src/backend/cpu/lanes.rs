//! Fixed 16-lane arithmetic, which compilers turn into vectors of any width with the same result.

use crate::backend::DenseType;
use half::{bf16, f16};

/// Lanes of every reduction, on every instruction set.
pub(super) const LANES: usize = 16;

/// Sums 16 lanes pairwise, in one fixed order.
#[inline(always)]
pub(super) fn sum_lanes(mut v: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            v[i] += v[i + width];
        }
        width /= 2;
    }
    v[0]
}

/// The largest of 16 lanes.
#[inline(always)]
pub(super) fn max_lanes(mut v: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            v[i] = if v[i] > v[i + width] { v[i] } else { v[i + width] };
        }
        width /= 2;
    }
    v[0]
}

/// 1.5 · 2^23: adding and subtracting it rounds |x| < 2^22 to the nearest integer, halves to even.
const ROUND: f32 = 12_582_912.0;

/// Rounds half to even, for |x| < 2^22.
#[inline(always)]
pub(super) fn round_small(x: f32) -> f32 {
    (x + ROUND) - ROUND
}

/// [`round_small`] as an integer, from the low bits of the sum: a conversion that saturates costs several instructions.
#[inline(always)]
pub(super) fn round_to_int(x: f32) -> i32 {
    (x + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32
}

/// e^x to about one unit in the last place; 0 below −87.3, e^88 above 88. Exactly 1 at 0.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Cephes: x = n·ln2 + r with ln2 in two parts, a polynomial of degree 6 in r, scaled by 2^n.
    let clamped = x.clamp(-87.3, 88.0);
    let n = round_small(clamped * std::f32::consts::LOG2_E);
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = ((((1.987_569_1e-4 * r + 1.398_199_9e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r + 1.666_666_5e-1)
        * r
        + 0.5;
    let e = p * (r * r) + r + 1.0;
    let power = (round_to_int(clamped * std::f32::consts::LOG2_E) + 127) << 23;
    let scaled = e * f32::from_bits(power as u32);
    if x < -87.3 { 0.0 } else { scaled }
}

/// A stored floating-point type of the head, the embedding or the KV cache.
pub trait Stored: bytemuck::Pod + Send + Sync {
    /// Widens exactly.
    fn widen(self) -> f32;
    /// Rounds to the nearest value, halves to even.
    fn narrow(x: f32) -> Self;
    /// The type as a value.
    const KIND: DenseType;
}

/// What a product in f32 can be made of: a stored type, or codes.
pub(super) trait Factor: bytemuck::Pod + Send + Sync {
    /// Widens exactly.
    fn value(self) -> f32;
}

impl<E: Stored> Factor for E {
    #[inline(always)]
    fn value(self) -> f32 {
        self.widen()
    }
}

impl Factor for i8 {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from(self)
    }
}

impl Stored for f32 {
    const KIND: DenseType = DenseType::F32;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }
}

impl Stored for bf16 {
    const KIND: DenseType = DenseType::BF16;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

impl Stored for f16 {
    const KIND: DenseType = DenseType::F16;

    // Without a branch, so that it vectorises: shift into place and rebias by a multiplication, which is exact
    // for normal and subnormal values; infinities and NaN, which no checkpoint or cache holds, become ≥ 65536.
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
        f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        f16::from_f32(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulps() {
        assert_eq!((exp(0.0), exp(-1000.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let want = f64::from(x).exp();
            let error = (f64::from(exp(x)) - want).abs() / want;
            assert!(error < 2.5e-7, "exp({x}): relative error {error:e}");
        }
    }

    #[test]
    fn f16_widens_exactly() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits);
            if x.is_finite() {
                assert_eq!(x.widen().to_bits(), x.to_f32().to_bits(), "{bits:#x}");
            }
        }
    }

    #[test]
    fn rounding_is_to_even() {
        for x in [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 0.499_999_97, -126.5, 3.7] {
            assert_eq!(round_small(x), x.round_ties_even(), "{x}");
            assert_eq!(round_to_int(x), x.round_ties_even() as i32, "{x}");
        }
    }
}
