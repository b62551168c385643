//! AVX2: `maddubs` sums pairs of columns into i16, `madd` pairs of those into i32.
//!
//! Codes are shifted down to {0, 1, 2}, so one `maddubs` adds at most 2·2·127 = 508 to an i16: 64 of them fit
//! (32 512). Decode, per half line (128 weights): 1 load, 3 shifts, 4 AND, 4 broadcasts, 4 maddubs, 4 adds, and
//! every 16 lines one madd + add. Prefill: per word of four columns of six tokens, 12 maddubs and 12 adds.

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

/// Lines between two widenings: 4 positions · 508 · 16 = 32 512 ≤ 32 767.
const BUDGET: usize = avx256::LINES;

/// The AVX2 kernel.
#[derive(Debug, Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    /// The kernel, if this CPU has AVX2.
    pub fn new() -> Option<Self> {
        is_x86_feature_detected!("avx2").then_some(Self(()))
    }
}

impl TernaryKernel for Avx2 {
    fn name(&self) -> &'static str {
        "avx2"
    }

    fn gemv(&self, tiles: &[u8], groups: usize, q: &[i8], sums: &mut [i32]) {
        check_gemv(tiles, groups, q, sums);
        // SAFETY: `new` found AVX2; `check_gemv` found the sizes that the reads rely on.
        unsafe { gemv(tiles.as_ptr(), groups, q.as_ptr().cast(), sums) }
    }

    fn gemm(&self, tiles: &[u8], groups: usize, panel: &[i32], tokens: usize, sums: &mut [i32]) {
        check_gemm(tiles, groups, panel, tokens, sums);
        // SAFETY: `new` found AVX2; `check_gemm` found the sizes that the reads rely on.
        unsafe { product(tiles, groups, panel.as_ptr(), 0, tokens, tokens, sums) }
    }

    fn panel_gemm(&self, tokens: usize) -> Option<&dyn PanelGemm> {
        (tokens > MAX_TOKENS).then_some(self)
    }
}

/// # Safety
/// AVX2; `tiles` holds `sums.len() / 16 · groups` lines, `q` `4 · groups` words of codes, at any alignment.
#[target_feature(enable = "avx2")]
unsafe fn gemv(tiles: *const u8, groups: usize, q: *const i32, sums: &mut [i32]) {
    let mask = _mm256_set1_epi8(3);
    let mut line = tiles;
    for sums in sums.chunks_exact_mut(TILE_ROWS) {
        let mut wide = [_mm256_setzero_si256(); 2];
        let mut q = q;
        let mut left = groups;
        while left > 0 {
            let now = left.min(BUDGET);
            left -= now;
            let mut acc = [_mm256_setzero_si256(); 2];
            for _ in 0..now {
                // SAFETY: `line` walks over the lines that the caller vouches for, `q` over its codes.
                unsafe {
                    prefetch::ahead(line);
                    let mut w = [_mm256_loadu_si256(line.cast()), _mm256_loadu_si256(line.add(32).cast())];
                    for _ in 0..4 {
                        let four = _mm256_set1_epi32(q.read_unaligned());
                        acc = [0, 1].map(|half| dot(acc[half], _mm256_and_si256(w[half], mask), four));
                        w = w.map(|w| _mm256_srli_epi16::<2>(w));
                        q = q.add(1);
                    }
                    line = line.add(LINE_BYTES);
                }
            }
            wide = [0, 1].map(|half| _mm256_add_epi32(wide[half], widen(acc[half])));
        }
        for (sums, wide) in sums.as_chunks_mut::<8>().0.iter_mut().zip(wide) {
            // SAFETY: eight sums are a register.
            unsafe { _mm256_storeu_si256(sums.as_mut_ptr().cast(), wide) };
        }
    }
}

/// Adds products of pairs of columns to sums of 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn dot(sums: __m256i, codes: __m256i, four: __m256i) -> __m256i {
    _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, four))
}

/// Sums of 32 bits of [`dot`]'s.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(sums: __m256i) -> __m256i {
    _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
}

gemm256!("avx2", Avx2, dot, widen);
