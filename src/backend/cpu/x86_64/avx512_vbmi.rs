//! AVX-512 VBMI + VNNI on weights at 1.6 bits: five base-3 digits a byte, a line is 16 rows by 20 columns.
//!
//! ```text
//! byte:    b = r + 83·t4,  r = t0 + 3·t1 + 9·t2 + 27·t3 < 81
//! t4:      vpermi2b's 128 entries, b / 2 → 83·t4: as r is never 81 or 82, no b / 2 belongs to two t4
//! fields:  vpermi2b, r = b − 83·t4 → t3 t2 t1 t0 in bits 7:6 5:4 3:2 1:0, as two-bit codes lie
//! ```
//!
//! Decode, per 64-byte line (320 weights): 1 load, 1 shift, 2 permutes, 1 subtraction; 4 AND, 4 broadcasts and 4 dots
//! for the fields, in place as in AVX-512 VNNI; 1 broadcast and 1 dot for the fifth digit, whose sums are multiples of 83, so
//! that multiplying by the inverse of 83 modulo 2^32 divides them. 14 instructions beside the broadcasts, which are operands,
//! for 320 weights; two bits take 9 for 256. No sum reaches 166 · 127 · 132 104 / 5 < 2^30.
//! Prefill: digits are decoded once per pass, the fifth as `83·t4 >> 6`, and reused for up to 12 tokens from registers.

use std::arch::x86_64::*;
use std::ops::Range;

use super::avx512::{field_masks, gemm512, sum_fields};
use super::for_tokens;
use super::pairs::{self, pairs512};
use crate::backend::activation::QuantizedRows;
use crate::backend::cpu::kernel::{Block, Line, PanelGemm, TernaryKernel, WeightTiles, check_gemm, check_gemv};
use crate::backend::cpu::packing::{LAST_DIGIT, Packing};
use crate::backend::cpu::prefetch;
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

/// 83·t4 of a byte's upper seven bits.
static FIFTHS: [u8; 128] = {
    let mut table = [0; 128];
    let mut half = 0;
    while half < 128 {
        // The odd one of the two bytes: of 82 and 83, only that can be.
        table[half] = (2 * half as u8 + 1) / LAST_DIGIT * LAST_DIGIT;
        half += 1;
    }
    table
};

/// The inverse of 83 modulo 2^32, by Newton's steps; each doubles the bits that are right, and 83 · 83 = 1 modulo 8.
const INVERSE: i32 = {
    let (of, mut inverse) = (LAST_DIGIT as i32, LAST_DIGIT as i32);
    let mut step = 0;
    while step < 4 {
        inverse = inverse.wrapping_mul(2i32.wrapping_sub(inverse.wrapping_mul(of)));
        step += 1;
    }
    assert!(inverse.wrapping_mul(of) == 1);
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

/// The tables in registers, and a mask.
#[derive(Clone, Copy)]
struct Decoder {
    fifths: [__m512i; 2],
    fields: [__m512i; 2],
    mask: __m512i,
}

impl Decoder {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn new() -> Self {
        // SAFETY: a table has 128 bytes.
        let half = |table: &[u8; 128], i: usize| unsafe { _mm512_loadu_si512(table.as_ptr().add(64 * i).cast()) };
        Self {
            fifths: [half(&FIFTHS, 0), half(&FIFTHS, 1)],
            fields: [half(&FIELDS, 0), half(&FIELDS, 1)],
            mask: _mm512_set1_epi8(3),
        }
    }

    /// Fields of the first four digits, and 83 times the fifth.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn decode(self, b: __m512i) -> (__m512i, __m512i) {
        // Bits that cross into the next byte are its uppermost, which a permute does not look at.
        let fifth = _mm512_permutex2var_epi8(self.fifths[0], _mm512_srli_epi16::<1>(b), self.fifths[1]);
        let fields = _mm512_permutex2var_epi8(self.fields[0], _mm512_sub_epi8(b, fifth), self.fields[1]);
        (fields, fifth)
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
            // SAFETY: `line` walks over the lines that the caller vouches for, `q` over its codes.
            unsafe {
                prefetch::ahead(line);
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
        let fifth = _mm512_mullo_epi32(fifth, _mm512_set1_epi32(INVERSE));
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
            for (i, b) in bytes.into_iter().enumerate().filter(|(_, b)| *b <= 246 && b % LAST_DIGIT < 81) {
                let (last, r) = (b / LAST_DIGIT, b % LAST_DIGIT);
                let digits = [fields[i] & 3, fields[i] >> 2 & 3, fields[i] >> 4 & 3, fields[i] >> 6];
                assert_eq!(digits, [r % 3, r / 3 % 3, r / 9 % 3, r / 27], "byte {b}");
                assert_eq!((fifth[i], fifth[i] >> 6), (last * LAST_DIGIT, last), "byte {b}");
            }
        }
    }
}
