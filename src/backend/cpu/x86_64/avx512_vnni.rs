//! AVX-512 VNNI: a line is one register, `vpdpbusd` sums four columns of 16 rows.
//!
//! Decode, per 64-byte line (256 weights): 1 load, 4 AND, 4 broadcasts, 4 dots. Codes stay in place
//! (mask 3 << 2p), one accumulator per bit position, divided by 4^p at the end: exact, they are multiples.
//! Prefill: codes are shifted down once per pass and reused for up to 12 tokens from registers.

use std::arch::x86_64::*;
use std::ops::Range;

use super::avx512::{field_masks, gemm512, sum_fields};
use super::for_tokens;
use super::pairs::{self, pairs512};
use crate::backend::activation::QuantizedRows;
use crate::backend::cpu::kernel::{Block, Line, PanelGemm, TernaryKernel, WeightTiles, check_gemm, check_gemv};
use crate::backend::cpu::prefetch;
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

    fn panel_gemm(&self, tokens: usize) -> Option<&dyn PanelGemm> {
        (tokens >= pairs::MIN_TOKENS).then_some(self)
    }
}

/// # Safety
/// AVX-512 F, BW and VNNI; `tiles` holds `sums.len() / 16 · groups` lines, `q` `16 · groups` codes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn gemv(tiles: *const u8, groups: usize, q: *const i8, sums: &mut [i32]) {
    let masks = field_masks();
    let mut line = tiles;
    for sums in sums.chunks_exact_mut(TILE_ROWS) {
        let mut acc = [_mm512_setzero_si512(); 4];
        let mut q = q.cast::<i32>();
        for _ in 0..groups {
            // SAFETY: `line` walks over the lines that the caller vouches for, `q` over its codes.
            unsafe {
                prefetch::ahead(line);
                let w = _mm512_loadu_si512(line.cast());
                for p in 0..4 {
                    let four = _mm512_set1_epi32(q.add(p).read_unaligned());
                    acc[p] = _mm512_dpbusd_epi32(acc[p], _mm512_and_si512(w, masks[p]), four);
                }
                line = line.add(LINE_BYTES);
                q = q.add(4);
            }
        }
        // SAFETY: the chunk has 16 elements.
        unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), sum_fields(acc)) };
    }
}

/// Codes of two bits: a line's next four columns are in the low bits of its bytes.
#[derive(Clone, Copy)]
struct Decoder {
    mask: __m512i,
}

impl Decoder {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new() -> Self {
        Self { mask: _mm512_set1_epi8(3) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn decode(self, bytes: __m512i) -> __m512i {
        bytes
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn codes(self, fields: &mut __m512i, _: usize) -> __m512i {
        let codes = _mm512_and_si512(*fields, self.mask);
        // Bits that cross into the next byte land outside the mask.
        *fields = _mm512_srli_epi16::<2>(*fields);
        codes
    }
}

gemm512!("avx512f,avx512bw,avx512vnni", 4, Decoder);

pairs512!("avx512f,avx512bw,avx512vnni", Avx512Vnni, Decoder, 1, 4, [(0 0, 0 1) (0 2, 0 3)]);
