//! AVX-512 VNNI: a line is one register, `vpdpbusd` sums four columns of 16 rows.
//!
//! Decode, per 64-byte line (256 weights): 1 load, 4 AND, 4 broadcasts, 4 dots. Codes stay in place
//! (mask 3 << 2p), one accumulator per bit position, divided by 4^p at the end: exact, they are multiples.
//! Prefill: codes are shifted down once per pass and reused for up to 12 tokens from registers.

use std::arch::x86_64::*;

use super::{PREFETCH, for_tokens};
use crate::backend::cpu::kernel::{TernaryKernel, check_gemm, check_gemv};
use crate::backend::cpu::tiles::{LINE_BYTES, TILE_ROWS};

/// The AVX-512 VNNI kernel.
#[derive(Debug, Clone, Copy)]
pub struct Avx512Vnni(());

impl Avx512Vnni {
    /// The kernel, if this CPU has AVX-512 F, BW and VNNI.
    pub fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni");
        has.then_some(Self(()))
    }
}

impl TernaryKernel for Avx512Vnni {
    fn name(&self) -> &'static str {
        "avx512-vnni"
    }

    fn gemv(&self, tiles: &[u8], groups: usize, q: &[i8], sums: &mut [i32]) {
        check_gemv(tiles, groups, q, sums);
        // SAFETY: `new` found the features; `check_gemv` found the sizes that the reads rely on.
        unsafe { gemv(tiles.as_ptr(), groups, q.as_ptr(), sums) }
    }

    fn gemm(&self, tiles: &[u8], groups: usize, panel: &[i32], tokens: usize, sums: &mut [i32]) {
        check_gemm(tiles, groups, panel, tokens, sums);
        // `new` found the features; `check_gemm` found the sizes that the reads rely on.
        for_tokens!(tokens, [1 2 3 4 5 6 7 8 9 10 11 12], gemm(tiles.as_ptr(), groups, panel.as_ptr(), sums))
    }
}

/// # Safety
/// AVX-512 F, BW and VNNI; `tiles` holds `sums.len() / 16 · groups` lines, `q` `16 · groups` codes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn gemv(tiles: *const u8, groups: usize, q: *const i8, sums: &mut [i32]) {
    let masks = [0x0303_0303, 0x0c0c_0c0c, 0x3030_3030, 0xc0c0_c0c0u32].map(|m| _mm512_set1_epi32(m as i32));
    let mut line = tiles;
    for sums in sums.chunks_exact_mut(TILE_ROWS) {
        let mut acc = [_mm512_setzero_si512(); 4];
        let mut q = q.cast::<i32>();
        for _ in 0..groups {
            // SAFETY: `line` walks over the lines that the caller vouches for, `q` over its codes; the prefetch
            // may point anywhere.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(PREFETCH).cast());
                let w = _mm512_loadu_si512(line.cast());
                for p in 0..4 {
                    let four = _mm512_set1_epi32(q.add(p).read_unaligned());
                    acc[p] = _mm512_dpbusd_epi32(acc[p], _mm512_and_si512(w, masks[p]), four);
                }
                line = line.add(LINE_BYTES);
                q = q.add(4);
            }
        }
        let low = _mm512_add_epi32(acc[0], _mm512_srai_epi32::<2>(acc[1]));
        let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(acc[2]), _mm512_srai_epi32::<6>(acc[3]));
        // SAFETY: the chunk has 16 elements.
        unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), _mm512_add_epi32(low, high)) };
    }
}

/// # Safety
/// AVX-512 F, BW and VNNI; `sums` is whole tiles of `[T][16]`, `tiles` holds as many tiles of `groups` lines,
/// `panel` `4 · groups · T` words.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn gemm<const T: usize>(tiles: *const u8, groups: usize, panel: *const i32, sums: &mut [i32]) {
    let tile_bytes = groups * LINE_BYTES;
    let mut tile = tiles;
    for pair in sums.chunks_mut(2 * T * TILE_ROWS) {
        if pair.len() == 2 * T * TILE_ROWS {
            // SAFETY: two more tiles are there, as `pair` is whole; sizes as the caller vouches.
            unsafe { pass::<T, 2>(tile, tile_bytes, groups, panel, pair) };
        } else {
            // SAFETY: one more tile is there.
            unsafe { pass::<T, 1>(tile, tile_bytes, groups, panel, pair) };
        }
        tile = tile.wrapping_add(2 * tile_bytes);
    }
}

/// R tiles times T tokens, accumulators in registers (2 · 12 of 32).
///
/// # Safety
/// As [`gemm`], for R tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn pass<const T: usize, const R: usize>(
    tiles: *const u8,
    tile_bytes: usize,
    groups: usize,
    panel: *const i32,
    sums: &mut [i32],
) {
    let mask = _mm512_set1_epi8(3);
    let mut acc = [[_mm512_setzero_si512(); T]; R];
    let (mut line, mut words) = (tiles, panel);
    for _ in 0..groups {
        // SAFETY: line g of each of the R tiles and the 4 · T words of group g are inside the operands.
        unsafe {
            let mut w: [__m512i; R] = std::array::from_fn(|r| _mm512_loadu_si512(line.add(r * tile_bytes).cast()));
            for _ in 0..4 {
                let codes = w.map(|w| _mm512_and_si512(w, mask));
                for t in 0..T {
                    let four = _mm512_set1_epi32(words.add(t).read());
                    for r in 0..R {
                        acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], codes[r], four);
                    }
                }
                // Bits that cross into the next byte land outside the mask.
                w = w.map(|w| _mm512_srli_epi16::<2>(w));
                words = words.add(T);
            }
            line = line.add(LINE_BYTES);
        }
    }
    for (sums, acc) in sums.chunks_exact_mut(TILE_ROWS).zip(acc.as_flattened()) {
        // SAFETY: the chunk has 16 elements.
        unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), *acc) };
    }
}
