//! The upper six or four bits of 16 rows at a time.
//!
//! A block of 16 rows and 16 columns is three lines of 64 bytes, or two, in each of which the four bytes at `4 r` belong to
//! row `r`. With `u` the eight bits and `q` the quad of a column (`column / 4`), byte `column % 4` of row `r` holds
//! - in line 0, for q = 0 and 1: bits 4–7 of `u` in the lower and the upper four bits;
//! - in line 1, for q = 2 and 3: the same;
//! - in line 2, of six bits: bits 2–3 of `u` at bits `2 q`.
//!
//! Columns beyond the matrix meet inputs of zero, and rows beyond it are not looked at.

use crate::backend::cpu::isa::{Isa, Level};
use crate::backend::cpu::prefetch;

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 16;
/// Columns of a block.
pub(super) const BLOCK_COLS: usize = 16;
const LINE: usize = 64;

/// Which bits of a code are there, by the lines of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bits {
    /// Bits 4–7.
    Four,
    /// Bits 2–7.
    Six,
}

impl Bits {
    const fn lines(self) -> usize {
        match self {
            Self::Four => 2,
            Self::Six => 3,
        }
    }

    /// Bytes of a block.
    pub(super) const fn block_bytes(self) -> usize {
        self.lines() * LINE
    }
}

/// Writes row `r` of a tile; `codes` have eight bits, and as many columns as the blocks.
pub(super) fn put(bits: Bits, lines: &mut [u8], r: usize, codes: &[u8]) {
    for (block, codes) in lines.chunks_exact_mut(bits.block_bytes()).zip(codes.as_chunks::<BLOCK_COLS>().0) {
        // A quad of columns in a word.
        let quads: [u32; 4] = bytemuck::cast(*codes);
        let upper = |q: usize| quads[q] >> 4 & 0x0f0f_0f0f;
        let two = |q: usize| (quads[q] >> 2 & 0x0303_0303) << (2 * q);
        let words = [upper(0) | upper(1) << 4, upper(2) | upper(3) << 4, two(0) | two(1) | two(2) | two(3)];
        for (line, word) in block.chunks_exact_mut(LINE).zip(words) {
            // Native order, as the quads were read.
            line[4 * r..4 * r + 4].copy_from_slice(&word.to_ne_bytes());
        }
    }
}

/// `out[r] = Σ c[r] · (256 · high + low)` for all rows of some tiles of `blocks` blocks each; `c` are the bits that are
/// there, as a number.
pub(super) fn dots(isa: Isa, bits: Bits, lines: &[u8], blocks: usize, input: [&[i8]; 2], out: &mut [i64]) {
    match bits {
        Bits::Four => dots_of::<2>(isa, lines, blocks, input, out),
        Bits::Six => dots_of::<3>(isa, lines, blocks, input, out),
    }
}

fn dots_of<const LINES: usize>(isa: Isa, lines: &[u8], blocks: usize, [high, low]: [&[i8]; 2], out: &mut [i64]) {
    let tile_bytes = blocks * LINES * LINE;
    assert!(tile_bytes > 0 && lines.len() == out.len() / TILE_ROWS * tile_bytes);
    assert!(out.len().is_multiple_of(TILE_ROWS) && high.len().min(low.len()) >= blocks * BLOCK_COLS);
    for (tile, out) in lines.chunks_exact(tile_bytes).zip(out.as_chunks_mut::<TILE_ROWS>().0) {
        let sums = match isa.level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 if is_x86_feature_detected!("avx512vnni") => {
                // SAFETY: the level and the line above found the features, the assertions the sizes.
                unsafe { avx512::tile::<LINES>(tile.as_ptr(), blocks, high.as_ptr(), low.as_ptr()) }
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx2 => {
                // SAFETY: either level has AVX2; the assertions found the sizes.
                unsafe { avx2::tile::<LINES>(tile.as_ptr(), blocks, high.as_ptr(), low.as_ptr()) }
            }
            #[cfg(target_arch = "aarch64")]
            Level::Portable if isa.has_dotprod() => {
                // SAFETY: the line above found the features, the assertions the sizes.
                unsafe { dotprod::tile::<LINES>(tile.as_ptr(), blocks, high.as_ptr(), low.as_ptr()) }
            }
            Level::Portable => portable::<LINES>(tile, high, low),
        };
        for (out, [high, low]) in out.iter_mut().zip(sums) {
            *out = 256 * i64::from(high) + i64::from(low);
        }
    }
}

/// Sums of both planes.
type Sums = [[i32; 2]; TILE_ROWS];

fn portable<const LINES: usize>(tile: &[u8], high: &[i8], low: &[i8]) -> Sums {
    let mut sums = [[0; 2]; TILE_ROWS];
    let inputs = high.as_chunks::<BLOCK_COLS>().0.iter().zip(low.as_chunks::<BLOCK_COLS>().0);
    for (block, (high, low)) in tile.chunks_exact(LINES * LINE).zip(inputs) {
        for (r, sums) in sums.iter_mut().enumerate() {
            for column in 0..BLOCK_COLS {
                let (quad, at) = (column / 4, 4 * r + column % 4);
                let upper = block[quad / 2 * LINE + at] >> (4 * (quad % 2)) & 15;
                let code = i32::from(match LINES {
                    3 => upper << 2 | block[2 * LINE + at] >> (2 * quad) & 3,
                    _ => upper,
                });
                sums[0] += code * i32::from(high[column]);
                sums[1] += code * i32::from(low[column]);
            }
        }
    }
    sums
}

/// Asks for the block 4 KiB later.
#[inline(always)]
fn ahead<const LINES: usize>(block: *const u8) {
    for line in 0..LINES {
        prefetch::ahead(block.wrapping_add(line * LINE));
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::*;
    use std::arch::x86_64::*;

    /// Per block of six bits: 3 loads, 8 AND, 16 dot products with a broadcast input. Codes stay where they are in a byte,
    /// one sum for each place, which is divided at the end: exact, they are multiples.
    ///
    /// # Safety
    /// AVX-512 F, BW and VNNI; `tile` holds `blocks` blocks of `LINES` lines, the planes 16 inputs for each.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn tile<const LINES: usize>(
        tile: *const u8,
        blocks: usize,
        high: *const i8,
        low: *const i8,
    ) -> Sums {
        let zero = _mm512_setzero_si512();
        // Upper and lower nibbles, then the four places of two bits; for each plane.
        let mut sums = [[zero; 6]; 2];
        let mask = |m: u32| _mm512_set1_epi32(m as i32);
        let nibbles = [mask(0x0f0f_0f0f), mask(0xf0f0_f0f0)];
        let pairs = [0x0303_0303, 0x0c0c_0c0c, 0x3030_3030, 0xc0c0_c0c0].map(mask);
        for block in 0..blocks {
            // SAFETY: the caller vouches for the block and its inputs.
            unsafe {
                let lines = tile.add(block * LINES * LINE);
                ahead::<LINES>(lines);
                let load = |line: usize| _mm512_loadu_si512(lines.add(line * LINE).cast());
                let (a, b, c) = (load(0), load(1), if LINES == 3 { load(2) } else { zero });
                let x = [high, low].map(|plane| plane.add(block * BLOCK_COLS).cast::<i32>());
                for quad in 0..4 {
                    let upper = _mm512_and_si512(if quad < 2 { a } else { b }, nibbles[quad % 2]);
                    let lower = _mm512_and_si512(c, pairs[quad]);
                    for (x, sums) in x.iter().zip(&mut sums) {
                        let x = _mm512_set1_epi32(x.add(quad).read_unaligned());
                        sums[quad % 2] = _mm512_dpbusd_epi32(sums[quad % 2], upper, x);
                        if LINES == 3 {
                            sums[2 + quad] = _mm512_dpbusd_epi32(sums[2 + quad], lower, x);
                        }
                    }
                }
            }
        }
        let mut out = [[0; 2]; TILE_ROWS];
        for (plane, s) in sums.into_iter().enumerate() {
            let upper = _mm512_add_epi32(s[0], _mm512_srai_epi32::<4>(s[1]));
            let even = _mm512_add_epi32(s[2], _mm512_srai_epi32::<2>(s[3]));
            let odd = _mm512_add_epi32(_mm512_srai_epi32::<4>(s[4]), _mm512_srai_epi32::<6>(s[5]));
            let all = match LINES {
                3 => _mm512_add_epi32(_mm512_slli_epi32::<2>(upper), _mm512_add_epi32(even, odd)),
                _ => upper,
            };
            let mut rows = [0i32; TILE_ROWS];
            // SAFETY: the array holds 64 bytes.
            unsafe { _mm512_storeu_si512(rows.as_mut_ptr().cast(), all) };
            rows.into_iter().zip(&mut out).for_each(|(sum, out)| out[plane] = sum);
        }
        out
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::*;
    use std::arch::x86_64::*;

    /// Codes of six bits times eight-bit inputs: pairs are at most 2 · 63 · 128, which 16 bits hold.
    ///
    /// # Safety
    /// AVX2; `tile` holds `blocks` blocks of `LINES` lines, the planes 16 inputs for each.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn tile<const LINES: usize>(
        tile: *const u8,
        blocks: usize,
        high: *const i8,
        low: *const i8,
    ) -> Sums {
        let zero = _mm256_setzero_si256();
        // Rows 0–7 and 8–15, for each plane.
        let mut sums = [[zero; 2]; 2];
        let (ones, nibble, pair) = (_mm256_set1_epi16(1), _mm256_set1_epi8(15), _mm256_set1_epi8(3));
        for block in 0..blocks {
            // SAFETY: the caller vouches for the block and its inputs.
            unsafe {
                let lines = tile.add(block * LINES * LINE);
                ahead::<LINES>(lines);
                let load = |line: usize, half: usize| _mm256_loadu_si256(lines.add(line * LINE + 32 * half).cast());
                let x = [high, low].map(|plane| plane.add(block * BLOCK_COLS).cast::<i32>());
                for half in 0..2 {
                    let (a, b, c) = (load(0, half), load(1, half), if LINES == 3 { load(2, half) } else { zero });
                    let shifted = |v: __m256i, by: i32| _mm256_srl_epi16(v, _mm_cvtsi32_si128(by));
                    for quad in 0..4 {
                        let line = if quad < 2 { a } else { b };
                        let upper = _mm256_and_si256(shifted(line, 4 * (quad % 2)), nibble);
                        let lower = _mm256_and_si256(shifted(c, 2 * quad), pair);
                        let codes = match LINES {
                            3 => _mm256_or_si256(_mm256_slli_epi16::<2>(upper), lower),
                            _ => upper,
                        };
                        for (x, sums) in x.iter().zip(&mut sums) {
                            let x = _mm256_set1_epi32(x.add(quad as usize).read_unaligned());
                            let pairs = _mm256_maddubs_epi16(codes, x);
                            sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, ones));
                        }
                    }
                }
            }
        }
        let mut out = [[0; 2]; TILE_ROWS];
        for (plane, halves) in sums.into_iter().enumerate() {
            for (half, sum) in halves.into_iter().enumerate() {
                let mut rows = [0i32; 8];
                // SAFETY: the array holds 32 bytes.
                unsafe { _mm256_storeu_si256(rows.as_mut_ptr().cast(), sum) };
                rows.into_iter().zip(&mut out[8 * half..]).for_each(|(sum, out)| out[plane] = sum);
            }
        }
        out
    }
}

#[cfg(target_arch = "aarch64")]
mod dotprod {
    use super::*;
    use crate::backend::cpu::aarch64::dot;
    use std::arch::aarch64::*;

    /// Four rows a register. Per block of six bits: 14 loads, 3 prefetches and, for each register of rows, 4 AND or shifts for
    /// nibbles, 3 shifts, 4 `sli` that set two bits beside them, and 8 dot products. Eight rather than the four of
    /// `smmla`, which would have both planes at once: to lay two quads side by side for it takes as many instructions.
    ///
    /// # Safety
    /// NEON and dotprod; `tile` holds `blocks` blocks of `LINES` lines, the planes 16 inputs for each.
    #[target_feature(enable = "neon,dotprod")]
    pub(super) unsafe fn tile<const LINES: usize>(
        tile: *const u8,
        blocks: usize,
        high: *const i8,
        low: *const i8,
    ) -> Sums {
        let nibble = vdupq_n_u8(15);
        // Four registers of rows, for each plane.
        let mut sums = [[vdupq_n_s32(0); 2]; 4];
        for block in 0..blocks {
            // SAFETY: the caller vouches for the block and its inputs.
            unsafe {
                let lines = tile.add(block * LINES * LINE);
                ahead::<LINES>(lines);
                let x = [high, low].map(|plane| vld1q_s8(plane.add(block * BLOCK_COLS)));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let load = |line: usize| vld1q_u8(lines.add(line * LINE + 16 * r));
                    let (a, b) = (load(0), load(1));
                    let mut codes = [vandq_u8(a, nibble), vshrq_n_u8::<4>(a), vandq_u8(b, nibble), vshrq_n_u8::<4>(b)];
                    if LINES == 3 {
                        let c = load(2);
                        let two = [c, vshrq_n_u8::<2>(c), vshrq_n_u8::<4>(c), vshrq_n_u8::<6>(c)];
                        codes = std::array::from_fn(|quad| vsliq_n_u8::<2>(two[quad], codes[quad]));
                    }
                    for (x, sum) in x.iter().zip(sums) {
                        *sum = dot::<1, 0, 0>(*sum, codes[0], *x);
                        *sum = dot::<1, 1, 0>(*sum, codes[1], *x);
                        *sum = dot::<1, 2, 0>(*sum, codes[2], *x);
                        *sum = dot::<1, 3, 0>(*sum, codes[3], *x);
                    }
                }
            }
        }
        let mut out = [[0; 2]; TILE_ROWS];
        for (out, planes) in out.as_chunks_mut::<4>().0.iter_mut().zip(sums) {
            let mut rows = [[0i32; 4]; 2];
            for (rows, sums) in rows.iter_mut().zip(planes) {
                // SAFETY: the array holds 16 bytes.
                unsafe { vst1q_s32(rows.as_mut_ptr(), sums) };
            }
            *out = std::array::from_fn(|r| [rows[0][r], rows[1][r]]);
        }
        out
    }
}
