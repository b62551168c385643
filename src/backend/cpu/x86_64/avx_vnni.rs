//! 256-bit VNNI: a line is two registers of eight rows; otherwise as AVX-512 VNNI.
//!
//! Decode, per half line (128 weights): 1 load, 4 AND, 4 broadcasts, 4 dots. The body is written once; tests also
//! run it in the EVEX encoding, on CPUs that have AVX-512 VNNI but not AVX-VNNI, and with AVX2's instructions in place of the dot.

use std::arch::x86_64::*;
use std::ops::Range;

use super::avx256::{self, gemm256};
use super::for_tokens;
use crate::backend::activation::QuantizedRows;
use crate::backend::cpu::kernel::{
    Block, Line, MAX_TOKENS, PanelGemm, TernaryKernel, WeightTiles, Words, check_gemm, check_gemv,
};
use crate::backend::cpu::prefetch;
use crate::backend::cpu::tiles::{LINE_BYTES, TILE_ROWS};

macro_rules! vnni256 {
    ($(#[$doc:meta])* $kernel:ident, $name:literal, $module:ident, $features:literal, $detect:expr, $dot:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        pub struct $kernel(());

        impl $kernel {
            /// The kernel, if this CPU has its features.
            pub fn new() -> Option<Self> {
                $detect.then_some(Self(()))
            }
        }

        impl TernaryKernel for $kernel {
            fn name(&self) -> &'static str {
                $name
            }

            fn gemv(&self, tiles: &[u8], groups: usize, q: &[i8], sums: &mut [i32]) {
                check_gemv(tiles, groups, q, sums);
                // SAFETY: `new` found the features; `check_gemv` found the sizes that the reads rely on.
                unsafe { $module::gemv(tiles.as_ptr(), groups, q.as_ptr(), sums) }
            }

            fn gemm(&self, tiles: &[u8], groups: usize, panel: &[i32], tokens: usize, sums: &mut [i32]) {
                check_gemm(tiles, groups, panel, tokens, sums);
                // SAFETY: `new` found the features; `check_gemm` found the sizes that the reads rely on.
                unsafe { $module::product(tiles, groups, panel.as_ptr(), 0, tokens, tokens, sums) }
            }

            fn panel_gemm(&self, tokens: usize) -> Option<&dyn PanelGemm> {
                (tokens > MAX_TOKENS).then_some(self)
            }
        }

        mod $module {
            use super::*;

            /// # Safety
            /// The kernel's features; `tiles` holds `sums.len() / 16 · groups` lines, `q` `16 · groups` codes.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn gemv(tiles: *const u8, groups: usize, q: *const i8, sums: &mut [i32]) {
                let masks =
                    [0x0303_0303, 0x0c0c_0c0c, 0x3030_3030, 0xc0c0_c0c0u32].map(|m| _mm256_set1_epi32(m as i32));
                let mut line = tiles;
                for sums in sums.chunks_exact_mut(TILE_ROWS) {
                    let mut acc = [[_mm256_setzero_si256(); 4]; 2];
                    let mut q = q.cast::<i32>();
                    for _ in 0..groups {
                        // SAFETY: `line` walks over the lines that the caller vouches for, `q` over its codes.
                        unsafe {
                            prefetch::ahead(line);
                            let w = [_mm256_loadu_si256(line.cast()), _mm256_loadu_si256(line.add(32).cast())];
                            for p in 0..4 {
                                let four = _mm256_set1_epi32(q.add(p).read_unaligned());
                                for half in 0..2 {
                                    acc[half][p] = $dot(acc[half][p], _mm256_and_si256(w[half], masks[p]), four);
                                }
                            }
                            line = line.add(LINE_BYTES);
                            q = q.add(4);
                        }
                    }
                    for (sums, acc) in sums.chunks_exact_mut(8).zip(acc) {
                        let low = _mm256_add_epi32(acc[0], _mm256_srai_epi32::<2>(acc[1]));
                        let high = _mm256_add_epi32(_mm256_srai_epi32::<4>(acc[2]), _mm256_srai_epi32::<6>(acc[3]));
                        // SAFETY: the chunk has 8 elements.
                        unsafe { _mm256_storeu_si256(sums.as_mut_ptr().cast(), _mm256_add_epi32(low, high)) };
                    }
                }
            }

            gemm256!($features, $kernel, $dot, std::convert::identity);
        }
    };
}

vnni256! {
    /// The AVX-VNNI kernel.
    AvxVnni, "avx-vnni", vex, "avx2,avxvnni",
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("avxvnni"),
    _mm256_dpbusd_avx_epi32
}

#[cfg(test)]
vnni256! {
    /// The same body with the instruction's EVEX encoding, for tests.
    EvexVnni, "avx-vnni (EVEX)", evex, "avx2,avx512f,avx512vl,avx512vnni",
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512vnni"),
    _mm256_dpbusd_epi32
}

/// The dot in AVX2, for codes of at most 128: no pair's sum saturates then.
#[cfg(test)]
#[inline]
#[target_feature(enable = "avx2")]
fn dot_of_avx2(sums: __m256i, codes: __m256i, four: __m256i) -> __m256i {
    _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, four), _mm256_set1_epi16(1)))
}

#[cfg(test)]
vnni256! {
    /// The same body with another dot, for tests on CPUs that have neither encoding.
    Avx2ForVnni, "avx-vnni (AVX2)", stand_in, "avx2", is_x86_feature_detected!("avx2"), dot_of_avx2
}
