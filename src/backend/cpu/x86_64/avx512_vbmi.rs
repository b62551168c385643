//! AVX-512 VBMI + VNNI on weights at 1.6 bits: five base-3 digits a byte, a line is 16 rows by 20 columns.
//!
//! ```text
//! byte:    b = r + 81·t4,  r = t0 + 3·t1 + 9·t2 + 27·t3 < 81
//! r:       min(b, b − 81), twice: where b < 81, b − 81 wraps to more than b
//! fields:  vpermi2b's 128 entries, r → t3 t2 t1 t0 in bits 7:6 5:4 3:2 1:0, as two-bit codes lie
//! t4:      b − r = 81·t4 ≤ 162
//! ```
//!
//! Decode, per 64-byte line (320 weights): 1 load, 2 subtractions, 2 minima, 1 permute; 4 AND, 4 broadcasts and 4 dots
//! for the fields, in place as in AVX-512 VNNI; 1 subtraction, 1 broadcast and 1 dot for the fifth digit, which is not
//! decoded: its sums are multiples of 81, so that multiplying by the inverse of 81 modulo 2^32 divides them. 16
//! instructions beside the broadcasts, which are operands, for 320 weights; two bits take 9 for 256. No sum reaches
//! 162 · 127 · 132 104 / 5 < 2^30.
//! Prefill: digits are decoded once per pass, the fifth as `81·t4 >> 6`, and reused for up to 12 tokens from registers.

use std::arch::x86_64::*;
use std::ops::Range;

use super::avx512::{field_masks, gemm512, sum_fields};
use super::pairs::{self, pairs512};
use super::{PREFETCH, for_tokens};
use crate::backend::activation::QuantizedRows;
use crate::backend::cpu::kernel::{Block, Line, PanelGemm, TernaryKernel, WeightTiles, check_gemm, check_gemv};
use crate::backend::cpu::packing::Packing;
use crate::backend::cpu::tiles::{LINE_BYTES, TILE_ROWS};

/// Words of four activations that a line meets.
const WORDS: usize = 5;

/// Digits 0 to 3 of r, as fields of two bits.
static FIELDS: [u8; 128] = {
    let mut table = [0; 128];
    let mut r = 0;
    while r < 81 {
        table[r] = (r % 3 + r / 3 % 3 * 4 + r / 9 % 3 * 16 + r / 27 * 64) as u8;
        r += 1;
    }
    table
};

/// The inverse of 81 modulo 2^32, by Newton's steps; each doubles the bits that are right, and 81 · 81 = 1 modulo 8.
const INVERSE_OF_81: i32 = {
    let mut inverse = 81i32;
    let mut step = 0;
    while step < 4 {
        inverse = inverse.wrapping_mul(2i32.wrapping_sub(inverse.wrapping_mul(81)));
        step += 1;
    }
    assert!(inverse.wrapping_mul(81) == 1);
    inverse
};

/// The AVX-512 VBMI kernel.
#[derive(Debug, Clone, Copy)]
pub struct Avx512Vbmi(());

impl Avx512Vbmi {
    /// The kernel, if this CPU has AVX-512 F, BW, VNNI and VBMI.
    pub fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512vbmi");
        has.then_some(Self(()))
    }
}

impl TernaryKernel for Avx512Vbmi {
    fn name(&self) -> &'static str {
        "avx512-vbmi"
    }

    fn packing(&self) -> Packing {
        Packing::Base3
    }

    fn gemv(&self, tiles: &[u8], groups: usize, q: &[i8], sums: &mut [i32]) {
        check_gemv(tiles, groups, q, sums);
        assert!(q.len() >= 4 * WORDS * groups, "operand sizes");
        // SAFETY: `new` found the features; the sizes that the reads rely on were just checked.
        unsafe { gemv(tiles.as_ptr(), groups, q.as_ptr(), sums) }
    }

    fn gemm(&self, tiles: &[u8], groups: usize, panel: &[i32], tokens: usize, sums: &mut [i32]) {
        check_gemm(tiles, groups, panel, tokens, sums);
        assert!(panel.len() >= WORDS * groups * tokens, "operand sizes");
        // `new` found the features; the sizes that the reads rely on were just checked.
        for_tokens!(tokens, [1 2 3 4 5 6 7 8 9 10 11 12], gemm(tiles.as_ptr(), groups, panel.as_ptr(), sums))
    }

    fn panel_gemm(&self, tokens: usize) -> Option<&dyn PanelGemm> {
        (tokens >= pairs::MIN_TOKENS).then_some(self)
    }
}

/// The table of [`FIELDS`] in registers, and other constants.
#[derive(Clone, Copy)]
struct Decoder {
    low: __m512i,
    high: __m512i,
    eighty_one: __m512i,
    mask: __m512i,
}

impl Decoder {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn new() -> Self {
        // SAFETY: the table has 128 bytes.
        let half = |i: usize| unsafe { _mm512_loadu_si512(FIELDS.as_ptr().add(64 * i).cast()) };
        Self { low: half(0), high: half(1), eighty_one: _mm512_set1_epi8(81), mask: _mm512_set1_epi8(3) }
    }

    /// Fields of the first four digits, and 81 times the fifth.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn decode(self, b: __m512i) -> (__m512i, __m512i) {
        let r = _mm512_min_epu8(b, _mm512_sub_epi8(b, self.eighty_one));
        let r = _mm512_min_epu8(r, _mm512_sub_epi8(r, self.eighty_one));
        (_mm512_permutex2var_epi8(self.low, r, self.high), _mm512_sub_epi8(b, r))
    }

    /// Digits p of what was decoded.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn codes(self, (fields, fifth): &mut (__m512i, __m512i), p: usize) -> __m512i {
        if p == WORDS - 1 {
            return _mm512_and_si512(_mm512_srli_epi16::<6>(*fifth), self.mask);
        }
        let codes = _mm512_and_si512(*fields, self.mask);
        // Bits that cross into the next byte land outside the mask.
        *fields = _mm512_srli_epi16::<2>(*fields);
        codes
    }
}

/// # Safety
/// AVX-512 F, BW, VNNI and VBMI; `tiles` holds `sums.len() / 16 · groups` lines, `q` `20 · groups` codes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
unsafe fn gemv(tiles: *const u8, groups: usize, q: *const i8, sums: &mut [i32]) {
    let masks = field_masks();
    let decoder = Decoder::new();
    let mut line = tiles;
    for sums in sums.chunks_exact_mut(TILE_ROWS) {
        let mut acc = [_mm512_setzero_si512(); WORDS];
        let mut q = q.cast::<i32>();
        for _ in 0..groups {
            // SAFETY: `line` walks over the lines that the caller vouches for, `q` over its codes; the prefetch
            // may point anywhere.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(PREFETCH).cast());
                let (fields, fifth) = decoder.decode(_mm512_loadu_si512(line.cast()));
                for p in 0..4 {
                    let four = _mm512_set1_epi32(q.add(p).read_unaligned());
                    acc[p] = _mm512_dpbusd_epi32(acc[p], _mm512_and_si512(fields, masks[p]), four);
                }
                let four = _mm512_set1_epi32(q.add(4).read_unaligned());
                acc[4] = _mm512_dpbusd_epi32(acc[4], fifth, four);
                line = line.add(LINE_BYTES);
                q = q.add(WORDS);
            }
        }
        let [a, b, c, d, fifth] = acc;
        let fifth = _mm512_mullo_epi32(fifth, _mm512_set1_epi32(INVERSE_OF_81));
        let sum = _mm512_add_epi32(sum_fields([a, b, c, d]), fifth);
        // SAFETY: the chunk has 16 elements.
        unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), sum) };
    }
}

gemm512!("avx512f,avx512bw,avx512vnni,avx512vbmi", WORDS, Decoder);

pairs512!(
    "avx512f,avx512bw,avx512vnni,avx512vbmi", Avx512Vbmi, Decoder, 2, WORDS,
    [(0 0, 0 1) (0 2, 0 3) (0 4, 1 0) (1 1, 1 2) (1 3, 1 4)]
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_decodes_to_its_digits() {
        if Avx512Vbmi::new().is_none() {
            return eprintln!("this CPU lacks the features, nothing was run");
        }
        for first in (0..=192).step_by(64) {
            let bytes: [u8; 64] = std::array::from_fn(|i| (first + i) as u8);
            let (mut fields, mut fifth) = ([0u8; 64], [0u8; 64]);
            // SAFETY: `new` found the features; all operands have 64 bytes.
            unsafe {
                let (a, b) = Decoder::new().decode(_mm512_loadu_si512(bytes.as_ptr().cast()));
                _mm512_storeu_si512(fields.as_mut_ptr().cast(), a);
                _mm512_storeu_si512(fifth.as_mut_ptr().cast(), b);
            }
            for (i, b) in bytes.into_iter().enumerate().filter(|(_, b)| *b < 243) {
                let digits = [fields[i] & 3, fields[i] >> 2 & 3, fields[i] >> 4 & 3, fields[i] >> 6];
                assert_eq!(digits, [b % 3, b / 3 % 3, b / 9 % 3, b / 27 % 3], "byte {b}");
                assert_eq!((fifth[i], fifth[i] >> 6), (b / 81 * 81, b / 81), "byte {b}");
            }
        }
    }
}
