//! AVX2: `maddubs` sums pairs of columns into i16, `madd` pairs of those into i32.
//!
//! Codes are shifted down to {0, 1, 2}, so one `maddubs` adds at most 2·2·127 = 508 to an i16: 64 of them fit
//! (32 512). Decode, per half line (128 weights): 1 load, 3 shifts, 4 AND, 4 broadcasts, 4 maddubs, 4 adds, and
//! every 16 lines one madd + add.

use std::arch::x86_64::*;

use super::{for_tokens, gemm_by_fours};
use crate::backend::cpu::kernel::{TernaryKernel, check_gemm, check_gemv};
use crate::backend::cpu::prefetch;
use crate::backend::cpu::tiles::{LINE_BYTES, TILE_ROWS};

/// Lines between two widenings: 4 positions · 508 · 16 = 32 512 ≤ 32 767.
const BUDGET: usize = 16;

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
        // A token's codes are their own panel of one token.
        // SAFETY: `new` found AVX2; `check_gemv` found the sizes that the reads rely on.
        unsafe { gemm::<1>(tiles.as_ptr(), groups, q.as_ptr().cast(), sums) }
    }

    fn gemm(&self, tiles: &[u8], groups: usize, panel: &[i32], tokens: usize, sums: &mut [i32]) {
        check_gemm(tiles, groups, panel, tokens, sums);
        // `new` found AVX2; `check_gemm` found the sizes that the reads rely on.
        for_tokens!(tokens, [1 2 3 4 5 6 7 8 9 10 11 12], gemm(tiles.as_ptr(), groups, panel.as_ptr(), sums))
    }
}

gemm_by_fours!("avx2");

/// # Safety
/// As [`gemm`], for one tile and N of the T tokens; `panel` at any alignment.
#[target_feature(enable = "avx2")]
unsafe fn pass<const N: usize, const T: usize>(tile: *const u8, groups: usize, panel: *const i32, sums: &mut [i32]) {
    let (mask, ones) = (_mm256_set1_epi8(3), _mm256_set1_epi16(1));
    let mut wide = [[_mm256_setzero_si256(); 2]; N];
    let (mut line, mut words) = (tile, panel);
    let mut left = groups;
    while left > 0 {
        let now = left.min(BUDGET);
        left -= now;
        let mut acc = [[_mm256_setzero_si256(); 2]; N];
        for _ in 0..now {
            // SAFETY: line g of the tile and the words of group g are inside the operands.
            unsafe {
                prefetch::ahead(line);
                let mut w = [_mm256_loadu_si256(line.cast()), _mm256_loadu_si256(line.add(32).cast())];
                for _ in 0..4 {
                    let codes = w.map(|w| _mm256_and_si256(w, mask));
                    for n in 0..N {
                        let four = _mm256_set1_epi32(words.add(n).read_unaligned());
                        for half in 0..2 {
                            let pairs = _mm256_maddubs_epi16(codes[half], four);
                            acc[n][half] = _mm256_add_epi16(acc[n][half], pairs);
                        }
                    }
                    w = w.map(|w| _mm256_srli_epi16::<2>(w));
                    words = words.add(T);
                }
                line = line.add(LINE_BYTES);
            }
        }
        for (wide, acc) in wide.as_flattened_mut().iter_mut().zip(acc.as_flattened()) {
            *wide = _mm256_add_epi32(*wide, _mm256_madd_epi16(*acc, ones));
        }
    }
    for (sums, wide) in sums.chunks_exact_mut(8).zip(wide.as_flattened()) {
        // SAFETY: the chunk has 8 elements.
        unsafe { _mm256_storeu_si256(sums.as_mut_ptr().cast(), *wide) };
    }
}
