//! NEON without dotprod: `smlal` multiplies bytes into i16, `sadalp` sums pairs of those into i32.
//!
//! ```text
//! line:        | q0: rows 0–3 | q1: rows 4–7 | q2: rows 8–11 | q3: rows 12–15 |       one row per 32-bit lane
//! q0 · x:      low  | row 0: b0 b1 b2 b3 | row 1: b0 b1 b2 b3 |     high | row 2 | row 3 |           8 i16 each
//! widened:     low  | row 0: b0+b1, b2+b3 | row 1 … |    added in pairs at the end: rows 0–3
//! ```
//!
//! Codes are shifted down to {0, 1, 2}, so one `smlal` adds at most 2 · 127 = 254 to an i16: 128 of them fit
//! (32 512). Decode, per 64-byte line (256 weights): 4 loads, 4 broadcasts of activations, 1 prefetch, 12 AND,
//! 12 shifts, 32 multiply-adds, and every 32 lines 8 pairwise additions.
//! Prefill: passes of up to 4 tokens, 2 · R · N ≤ 16 of the 32 registers as i16 accumulators, so that half lines are
//! decoded at a time (R = 2) for 3 and 4 tokens.

use std::arch::aarch64::*;
use std::arch::asm;

use super::for_tokens;
use crate::backend::cpu::kernel::{TernaryKernel, check_gemm, check_gemv};
use crate::backend::cpu::prefetch;
use crate::backend::cpu::tiles::{LINE_BYTES, TILE_ROWS};

/// Lines between two widenings: 4 positions · 254 · 32 = 32 512 ≤ 32 767.
const BUDGET: usize = 32;

/// The NEON kernel.
#[derive(Debug, Clone, Copy)]
pub struct Neon(());

impl Neon {
    /// The kernel, if this CPU has NEON.
    pub fn new() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

impl TernaryKernel for Neon {
    fn name(&self) -> &'static str {
        "neon"
    }

    fn gemv(&self, tiles: &[u8], groups: usize, q: &[i8], sums: &mut [i32]) {
        check_gemv(tiles, groups, q, sums);
        // A token's codes are their own panel of one token.
        // SAFETY: `new` found NEON; `check_gemv` found the sizes that the reads rely on.
        unsafe { gemm::<1>(tiles.as_ptr(), groups, q.as_ptr().cast(), sums) }
    }

    fn gemm(&self, tiles: &[u8], groups: usize, panel: &[i32], tokens: usize, sums: &mut [i32]) {
        check_gemm(tiles, groups, panel, tokens, sums);
        // `new` found NEON; `check_gemm` found the sizes that the reads rely on.
        for_tokens!(tokens, [1 2 3 4 5 6 7 8 9 10 11 12], gemm(tiles.as_ptr(), groups, panel.as_ptr(), sums))
    }
}

/// `vmlal_high_s8`, which the compiler would turn into an extraction and a `vmlal_s8`, as both halves of a broadcast
/// are the same to it.
#[inline]
#[target_feature(enable = "neon")]
fn multiply_add_high(mut acc: int16x8_t, codes: int8x16_t, four: int8x16_t) -> int16x8_t {
    // SAFETY: `smlal2` is part of NEON, which this function enables; it changes `acc` alone.
    unsafe {
        asm!(
            "smlal2 {acc:v}.8h, {codes:v}.16b, {four:v}.16b",
            acc = inout(vreg) acc,
            codes = in(vreg) codes,
            four = in(vreg) four,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// # Safety
/// NEON; `sums` is whole tiles of `[T][16]`, `tiles` holds as many tiles of `groups` lines, `panel`
/// `4 · groups · T` words, at any alignment.
#[target_feature(enable = "neon")]
unsafe fn gemm<const T: usize>(tiles: *const u8, groups: usize, panel: *const i32, sums: &mut [i32]) {
    let mut tile = tiles;
    for sums in sums.chunks_exact_mut(T * TILE_ROWS) {
        for first in (0..T).step_by(4) {
            let sums = &mut sums[first * TILE_ROWS..];
            // SAFETY: one tile and tokens `first …` of its T are inside the operands; 32 is half a line, 8 half a
            // tile's rows.
            unsafe {
                let panel = panel.add(first);
                match T - first {
                    1 => pass::<1, T, 4>(tile, groups, panel, sums),
                    2 => pass::<2, T, 4>(tile, groups, panel, sums),
                    3 => {
                        pass::<3, T, 2>(tile, groups, panel, sums);
                        pass::<3, T, 2>(tile.wrapping_add(32), groups, panel, &mut sums[8..]);
                    }
                    _ => {
                        pass::<4, T, 2>(tile, groups, panel, sums);
                        pass::<4, T, 2>(tile.wrapping_add(32), groups, panel, &mut sums[8..]);
                    }
                }
            }
        }
        tile = tile.wrapping_add(groups * LINE_BYTES);
    }
}

/// R of a line's registers times N of T tokens; writes the first 4 · R of every 16 of `sums`.
///
/// # Safety
/// As [`gemm`], for one tile, of which `tile` points at one of the first 5 − R registers, and N tokens from `panel`.
#[target_feature(enable = "neon")]
unsafe fn pass<const N: usize, const T: usize, const R: usize>(
    tile: *const u8,
    groups: usize,
    panel: *const i32,
    sums: &mut [i32],
) {
    let mask = vdupq_n_u8(3);
    let mut wide = [[[vdupq_n_s32(0); 2]; R]; N];
    let (mut line, mut words) = (tile, panel);
    let mut left = groups;
    while left > 0 {
        let now = left.min(BUDGET);
        left -= now;
        let mut acc = [[[vdupq_n_s16(0); 2]; R]; N];
        for _ in 0..now {
            prefetch::ahead(line);
            // SAFETY: R registers of line g of the tile and the words of group g are inside the operands.
            unsafe {
                let mut w: [uint8x16_t; R] = std::array::from_fn(|r| vld1q_u8(line.add(16 * r)));
                for p in 0..4 {
                    let codes = w.map(|w| vreinterpretq_s8_u8(vandq_u8(w, mask)));
                    for n in 0..N {
                        let four = vreinterpretq_s8_s32(vdupq_n_s32(words.add(p * T + n).read_unaligned()));
                        for r in 0..R {
                            let [low, high] = acc[n][r];
                            let low = vmlal_s8(low, vget_low_s8(codes[r]), vget_low_s8(four));
                            acc[n][r] = [low, multiply_add_high(high, codes[r], four)];
                        }
                    }
                    w = w.map(|w| vshrq_n_u8::<2>(w));
                }
            }
            line = line.wrapping_add(LINE_BYTES);
            words = words.wrapping_add(4 * T);
        }
        let (wide, acc) = (wide.as_flattened_mut().as_flattened_mut(), acc.as_flattened().as_flattened());
        for (wide, acc) in wide.iter_mut().zip(acc) {
            *wide = vpadalq_s16(*wide, *acc);
        }
    }
    for (sums, wide) in sums.chunks_mut(TILE_ROWS).zip(wide) {
        for (sums, [low, high]) in sums.chunks_exact_mut(4).zip(wide) {
            // SAFETY: the chunk has 4 elements.
            unsafe { vst1q_s32(sums.as_mut_ptr(), vpaddq_s32(low, high)) };
        }
    }
}
