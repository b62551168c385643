//! Vectors of 16 floats with explicit instructions, for loops that compilers vectorise across the wrong axis.
//!
//! One module per vector width, with the same functions: every operation is one IEEE operation per lane (no fused
//! multiply-add), so all of them give the same bits. Code over them is instantiated once per module by a macro.

/// The operations that are built from the others, in the order that every width shares.
macro_rules! derived {
    ($(#[$attr:meta])*) => {
        /// e^x; the vector form of `lanes::exp`.
        #[inline]
        $(#[$attr])*
        pub(in crate::backend::cpu) fn exp(x: V) -> V {
            let clamped = min(max(x, splat(-87.3)), splat(88.0));
            let round = splat(12_582_912.0);
            let n = sub(add(mul(clamped, splat(std::f32::consts::LOG2_E)), round), round);
            let r = add(sub(clamped, mul(n, splat(0.693_359_4))), mul(n, splat(2.121_944_4e-4)));
            let mut p = splat(1.987_569_1e-4);
            for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                p = add(mul(p, r), splat(c));
            }
            let e = add(add(mul(p, mul(r, r)), r), splat(1.0));
            zero_below(mul(e, power_of_two(n)), x, -87.3)
        }

        /// Widens 16 stored values.
        #[inline]
        $(#[$attr])*
        pub(in crate::backend::cpu) fn load_stored<E: Stored>(values: &[E; LANES]) -> V {
            match E::KIND {
                DenseType::F32 => load(bytemuck::cast_ref(values)),
                DenseType::BF16 => load_bf16(bytemuck::cast_ref(values)),
                DenseType::F16 => load_f16(bytemuck::cast_ref(values)),
            }
        }
    };
}

/// 512-bit vectors.
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512 {
    use crate::backend::DenseType;
    use crate::backend::cpu::lanes::{LANES, Stored};
    use std::arch::x86_64::*;

    pub(in crate::backend::cpu) type V = __m512;

    macro_rules! ops {
        ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty $body:block)*) => {$(
            $(#[$doc])*
            #[inline]
            #[target_feature(enable = "avx512f")]
            pub(in crate::backend::cpu) fn $name($($arg: $ty),*) -> $ret $body
        )*};
    }

    ops! {
        fn splat(x: f32) -> V { _mm512_set1_ps(x) }
        fn add(a: V, b: V) -> V { _mm512_add_ps(a, b) }
        fn sub(a: V, b: V) -> V { _mm512_sub_ps(a, b) }
        fn mul(a: V, b: V) -> V { _mm512_mul_ps(a, b) }
        fn max(a: V, b: V) -> V { _mm512_max_ps(a, b) }
        fn min(a: V, b: V) -> V { _mm512_min_ps(a, b) }
        fn load(x: &[f32; LANES]) -> V {
            // SAFETY: the array holds 16 floats.
            unsafe { _mm512_loadu_ps(x.as_ptr()) }
        }
        fn store(v: V, out: &mut [f32; LANES]) -> () {
            // SAFETY: the array holds 16 floats.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
        }
        fn load_bf16(x: &[u16; LANES]) -> V {
            // SAFETY: the array holds 32 bytes.
            let bits = unsafe { _mm256_loadu_si256(x.as_ptr().cast()) };
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
        }
        fn load_f16(x: &[u16; LANES]) -> V {
            // SAFETY: the array holds 32 bytes.
            _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(x.as_ptr().cast()) })
        }
        /// 2^n for whole n in the exponent's range.
        fn power_of_two(n: V) -> V {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        }
        /// `v` where x ≥ limit, else 0.
        fn zero_below(v: V, x: V, limit: f32) -> V {
            _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, splat(limit)), v)
        }
    }
    derived!(#[target_feature(enable = "avx512f")]);
}

/// Pairs of 256-bit vectors.
#[cfg(target_arch = "x86_64")]
pub(super) mod avx2 {
    use crate::backend::DenseType;
    use crate::backend::cpu::lanes::{LANES, Stored};
    use half::f16;
    use std::arch::x86_64::*;

    /// Lanes 0 … 7 and 8 … 15.
    #[derive(Clone, Copy)]
    pub(in crate::backend::cpu) struct V(__m256, __m256);

    macro_rules! ops {
        ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty $body:block)*) => {$(
            $(#[$doc])*
            #[inline]
            #[target_feature(enable = "avx2")]
            pub(in crate::backend::cpu) fn $name($($arg: $ty),*) -> $ret $body
        )*};
    }

    ops! {
        fn splat(x: f32) -> V { V(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        fn add(a: V, b: V) -> V { V(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
        fn sub(a: V, b: V) -> V { V(_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
        fn mul(a: V, b: V) -> V { V(_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
        fn max(a: V, b: V) -> V { V(_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
        fn min(a: V, b: V) -> V { V(_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)) }
        fn load(x: &[f32; LANES]) -> V {
            // SAFETY: the array holds 16 floats.
            unsafe { V(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
        }
        fn store(v: V, out: &mut [f32; LANES]) -> () {
            // SAFETY: the array holds 16 floats.
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), v.0);
                _mm256_storeu_ps(out.as_mut_ptr().add(8), v.1);
            }
        }
        fn widen_bf16(bits: __m128i) -> __m256 {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
        }
        fn load_bf16(x: &[u16; LANES]) -> V {
            // SAFETY: the array holds 32 bytes.
            let (low, high) =
                unsafe { (_mm_loadu_si128(x.as_ptr().cast()), _mm_loadu_si128(x.as_ptr().add(8).cast())) };
            V(widen_bf16(low), widen_bf16(high))
        }
        /// AVX2 does not imply F16C.
        fn load_f16(x: &[u16; LANES]) -> V { load(&x.map(|bits| f16::from_bits(bits).widen())) }
        fn exponent(n: __m256) -> __m256 {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        }
        /// 2^n for whole n in the exponent's range.
        fn power_of_two(n: V) -> V { V(exponent(n.0), exponent(n.1)) }
        /// `v` where x ≥ limit, else 0.
        fn zero_below(v: V, x: V, limit: f32) -> V {
            let limit = _mm256_set1_ps(limit);
            let keep = |v, x| _mm256_and_ps(v, _mm256_cmp_ps::<_CMP_NLT_UQ>(x, limit));
            V(keep(v.0, x.0), keep(v.1, x.1))
        }
    }
    derived!(#[target_feature(enable = "avx2")]);
}

/// Arrays, for the target's baseline.
pub(super) mod portable {
    use crate::backend::DenseType;
    use crate::backend::cpu::lanes::{LANES, Stored};
    use half::{bf16, f16};

    pub(in crate::backend::cpu) type V = [f32; LANES];

    #[inline(always)]
    fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
        let mut out = a;
        for i in 0..LANES {
            out[i] = f(a[i], b[i]);
        }
        out
    }

    macro_rules! ops {
        ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty $body:block)*) => {$(
            $(#[$doc])*
            #[inline(always)]
            pub(in crate::backend::cpu) fn $name($($arg: $ty),*) -> $ret $body
        )*};
    }

    ops! {
        fn splat(x: f32) -> V { [x; LANES] }
        fn add(a: V, b: V) -> V { zip(a, b, |a, b| a + b) }
        fn sub(a: V, b: V) -> V { zip(a, b, |a, b| a - b) }
        fn mul(a: V, b: V) -> V { zip(a, b, |a, b| a * b) }
        fn max(a: V, b: V) -> V { zip(a, b, |a, b| if a > b { a } else { b }) }
        fn min(a: V, b: V) -> V { zip(a, b, |a, b| if a < b { a } else { b }) }
        fn load(x: &[f32; LANES]) -> V { *x }
        fn store(v: V, out: &mut [f32; LANES]) -> () { *out = v; }
        fn load_bf16(x: &[u16; LANES]) -> V { x.map(|bits| bf16::from_bits(bits).widen()) }
        fn load_f16(x: &[u16; LANES]) -> V { x.map(|bits| f16::from_bits(bits).widen()) }
        /// 2^n for whole n in the exponent's range.
        fn power_of_two(n: V) -> V { n.map(|n| f32::from_bits(((n as i32 + 127) << 23) as u32)) }
        /// `v` where x ≥ limit, else 0.
        fn zero_below(v: V, x: V, limit: f32) -> V { zip(v, x, |v, x| if x < limit { 0.0 } else { v }) }
    }
    derived!();
}
