//! NEON with dotprod: a line is four registers of four rows, `sdot` sums four columns of four rows.
//!
//! ```text
//! line:         | q0: rows 0–3 | q1: rows 4–7 | q2: rows 8–11 | q3: rows 12–15 |      one row per 32-bit lane
//! activations:  | x: columns 0–3 | 4–7 | 8–11 | 12–15 |                             lane p for bit position p
//! ```
//!
//! Decode, per 64-byte line (256 weights): 4 loads, 1 load of activations, 1 prefetch, 12 AND, 4 shifts, 16 dots,
//! which take their activations by lane. Codes of positions 0 to 2 stay in place (masks 3, 12, 48) and their sums
//! are divided by 4^p at the end: exact, they are multiples, and below 48 · 127 · 132 104 / 4 < 2^31. `sdot` reads
//! codes as signed, so that position 3, where code 2 is 0x80, is shifted down.
//! Prefill: T tokens' words of a group are T registers, read by lane. Codes are shifted down once per pass of R
//! registers, 4 for up to 4 tokens, else 2: per line 4 loads, 12 AND, 12 shifts, 4/R · T loads and 16 · T dots, with
//! R · T ≤ 24 of the 32 registers as accumulators.

use std::arch::aarch64::*;
use std::arch::asm;

use super::for_tokens;
use crate::backend::cpu::kernel::{TernaryKernel, check_gemm, check_gemv};
use crate::backend::cpu::prefetch;
use crate::backend::cpu::tiles::{LINE_BYTES, TILE_ROWS};

/// The NEON kernel for CPUs with dotprod.
#[derive(Debug, Clone, Copy)]
pub struct NeonDotprod(());

impl NeonDotprod {
    /// The kernel, if this CPU has NEON and dotprod.
    pub fn new() -> Option<Self> {
        let has = std::arch::is_aarch64_feature_detected!("neon") && std::arch::is_aarch64_feature_detected!("dotprod");
        has.then_some(Self(()))
    }
}

impl TernaryKernel for NeonDotprod {
    fn name(&self) -> &'static str {
        "neon-dotprod"
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

/// Adds codes times the word of position P and token I of T; `words` is the register that holds word P · T + I.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(in crate::backend::cpu) fn dot<const T: usize, const P: usize, const I: usize>(
    mut acc: int32x4_t,
    codes: uint8x16_t,
    words: int8x16_t,
) -> int32x4_t {
    // SAFETY: this function's features include dotprod; the instruction changes `acc` alone.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {codes:v}.16b, {words:v}.4b[{lane}]",
            acc = inout(vreg) acc,
            codes = in(vreg) codes,
            words = in(vreg) words,
            lane = const (P * T + I) % 4,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// Adds codes times as many inputs, four of them in each lane.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(in crate::backend::cpu) fn dot_columns(mut acc: int32x4_t, codes: uint8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: as in `dot`.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {codes:v}.16b, {x:v}.16b",
            acc = inout(vreg) acc,
            codes = in(vreg) codes,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// # Safety
/// NEON and dotprod; `tiles` holds `sums.len() / 16 · groups` lines, `q` `16 · groups` codes.
#[target_feature(enable = "neon,dotprod")]
unsafe fn gemv(tiles: *const u8, groups: usize, q: *const i8, sums: &mut [i32]) {
    let masks = [3, 3 << 2, 3 << 4].map(|m| vdupq_n_u8(m));
    let mut line = tiles;
    for sums in sums.chunks_exact_mut(TILE_ROWS) {
        let mut acc = [[vdupq_n_s32(0); 4]; 4];
        let mut q = q;
        for _ in 0..groups {
            prefetch::ahead(line);
            // SAFETY: `line` walks over the lines that the caller vouches for, `q` over its codes.
            unsafe {
                let x = vld1q_s8(q);
                for (r, acc) in acc.iter_mut().enumerate() {
                    let w = vld1q_u8(line.add(16 * r));
                    acc[0] = dot::<1, 0, 0>(acc[0], vandq_u8(w, masks[0]), x);
                    acc[1] = dot::<1, 1, 0>(acc[1], vandq_u8(w, masks[1]), x);
                    acc[2] = dot::<1, 2, 0>(acc[2], vandq_u8(w, masks[2]), x);
                    acc[3] = dot::<1, 3, 0>(acc[3], vshrq_n_u8::<6>(w), x);
                }
                line = line.add(LINE_BYTES);
                q = q.add(16);
            }
        }
        for (sums, acc) in sums.chunks_exact_mut(4).zip(acc) {
            let low = vaddq_s32(acc[0], vshrq_n_s32::<2>(acc[1]));
            let high = vaddq_s32(vshrq_n_s32::<4>(acc[2]), acc[3]);
            // SAFETY: the chunk has 4 elements.
            unsafe { vst1q_s32(sums.as_mut_ptr(), vaddq_s32(low, high)) };
        }
    }
}

/// # Safety
/// NEON and dotprod; `sums` is whole tiles of `[T][16]`, `tiles` holds as many tiles of `groups` lines, `panel`
/// `4 · groups · T` words.
#[target_feature(enable = "neon,dotprod")]
unsafe fn gemm<const T: usize>(tiles: *const u8, groups: usize, panel: *const i32, sums: &mut [i32]) {
    let mut tile = tiles;
    for sums in sums.chunks_exact_mut(T * TILE_ROWS) {
        // SAFETY: one more tile is there, as `sums` has its place; 32 is half a line, 8 half a tile's rows.
        unsafe {
            if T <= 4 {
                pass::<T, 4>(tile, groups, panel, sums);
            } else {
                pass::<T, 2>(tile, groups, panel, sums);
                pass::<T, 2>(tile.wrapping_add(32), groups, panel, &mut sums[8..]);
            }
        }
        tile = tile.wrapping_add(groups * LINE_BYTES);
    }
}

/// R of a line's registers times T tokens; writes the first 4 · R of every 16 of `sums`.
///
/// # Safety
/// As [`gemm`], for one tile, of which `tile` points at one of the first 5 − R registers.
#[target_feature(enable = "neon,dotprod")]
// Position 3's `+ 3` looks like a rounded-up division; it is token 3.
#[allow(clippy::manual_div_ceil)]
unsafe fn pass<const T: usize, const R: usize>(tile: *const u8, groups: usize, panel: *const i32, sums: &mut [i32]) {
    /// Adds the dots of one bit position for the tokens below T, unrolled, as lanes are constants.
    macro_rules! position {
        ($p:literal, $codes:expr, $acc:ident, $words:ident, [$($t:literal)*]) => {
            let codes = $codes;
            $(if $t < T {
                // The compiler reads each register of words once.
                let words = vld1q_s8($words.add(($p * T + $t) / 4 * 4).cast());
                for r in 0..R {
                    $acc[$t][r] = dot::<T, $p, $t>($acc[$t][r], codes[r], words);
                }
            })*
        };
    }
    let mask = vdupq_n_u8(3);
    let mut acc = [[vdupq_n_s32(0); R]; T];
    let (mut line, mut words) = (tile, panel);
    for _ in 0..groups {
        // SAFETY: R registers of line g and the 4 · T words of group g, which are T registers, are inside the
        // operands.
        unsafe {
            let w: [uint8x16_t; R] = std::array::from_fn(|r| vld1q_u8(line.add(16 * r)));
            position!(0, w.map(|w| vandq_u8(w, mask)), acc, words, [0 1 2 3 4 5 6 7 8 9 10 11]);
            position!(1, w.map(|w| vandq_u8(vshrq_n_u8::<2>(w), mask)), acc, words, [0 1 2 3 4 5 6 7 8 9 10 11]);
            position!(2, w.map(|w| vandq_u8(vshrq_n_u8::<4>(w), mask)), acc, words, [0 1 2 3 4 5 6 7 8 9 10 11]);
            position!(3, w.map(|w| vshrq_n_u8::<6>(w)), acc, words, [0 1 2 3 4 5 6 7 8 9 10 11]);
        }
        line = line.wrapping_add(LINE_BYTES);
        words = words.wrapping_add(4 * T);
    }
    for (sums, acc) in sums.chunks_mut(TILE_ROWS).zip(acc) {
        for (sums, acc) in sums.chunks_exact_mut(4).zip(acc) {
            // SAFETY: the chunk has 4 elements.
            unsafe { vst1q_s32(sums.as_mut_ptr(), acc) };
        }
    }
}
