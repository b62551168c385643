//! NEON with i8mm: `smmla` multiplies 2 tokens by 2 rows of 8 columns. Decode as NEON with dotprod.
//!
//! ```text
//! line register w:   | row 0: 4 bytes | row 1 | row 2 | row 3 |     byte b: bit pair p is column 4p + b
//! zip1(w, w >> 2):   | row 0: w | row 0: w >> 2 | row 1: w | row 1: w >> 2 |   zip2: rows 2 and 3
//!   & 3:             | row 0: columns 0–7 | row 1: columns 0–7 |       >> 4, & 3: columns 8–15
//! panel:             | token 0: columns 0–7 | token 1: columns 0–7 |   `[line][columns 0–7, 8–15][pair of tokens]`
//! smmla:             | token 0 · row 0 | token 0 · row 1 | token 1 · row 0 | token 1 · row 1 |
//! ```
//!
//! A `smmla` is 32 multiplications, a `sdot` 16. A pass is 8 rows by N ≤ 6 pairs of tokens: 4 · N of the 32 registers are
//! sums, 4 weights, 1 tokens. For 16 columns of half a tile, with T = 2N tokens:
//! - one panel of up to 10 tokens, its codes decoded where they are met: 2 loads, 1 prefetch, 18 instructions that decode, T
//!   loads, 4 T `smmla`; NEON with dotprod decodes by 12, then has T loads and 8 T `sdot`. Arithmetic is 58 instructions for
//!   10 tokens where dotprod has 92, and 34 for 4 where it has 44. For 3 there is hardly a difference: left to dotprod.
//! - otherwise [`LINES`] lines of a tile are decoded at a time and stay in the first-level cache (10 KB) for all panels of
//!   the block, each of which brings 7.5 KB: 8 loads, T loads, 4 T `smmla`. Decoding (2 loads, 18 instructions, 8 stores)
//!   is once for all panels: arithmetic is 66 instructions for one panel of 12 tokens, 57 for each of two and 50.25 for each
//!   of 8, where dotprod has 108. Where a core starts as many `smmla` a cycle as `sdot`, as LLVM's models of Neoverse N2, V1
//!   and V2 do, that is 1.9 times dotprod's rate from 24 tokens on and 2.1 times from 96 on. Counted, not measured.

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use super::NeonDotprod;
use crate::backend::activation::QuantizedRows;
use crate::backend::cpu::kernel::{Block, Line, PanelGemm, TernaryKernel, WeightTiles};
use crate::backend::cpu::prefetch;
use crate::backend::cpu::tiles::{LINE_BYTES, LINE_COLS, TILE_ROWS};

/// Rows of a pass.
const HALF_ROWS: usize = TILE_ROWS / 2;
/// Bytes of a line that are the rows of a pass.
const HALF_LINE: usize = LINE_BYTES / 2;
/// Bytes of the same, decoded.
const DECODED_LINE: usize = 4 * HALF_LINE;
/// Lines that are decoded at a time.
const LINES: usize = 40;
/// Tokens of a panel: six pairs.
const PANEL_TOKENS: usize = 12;
/// Most tokens with which codes, decoded where they are met, fit into the registers.
const DIRECT_TOKENS: usize = 10;
/// Tokens from which on pairs are faster, by the instructions above.
const MIN_TOKENS: usize = 4;
/// A call's tiles and panels: 48 KB of sums, and 60 KB of panels in use at a time.
const BLOCK: Block = Block { tiles: 8, tile_step: 1, panels: 8 };

/// The NEON kernel for CPUs with i8mm.
#[derive(Debug, Clone, Copy)]
pub struct NeonI8mm {
    dotprod: NeonDotprod,
}

impl NeonI8mm {
    /// The kernel, if this CPU has NEON, dotprod and i8mm.
    pub fn new() -> Option<Self> {
        let dotprod = NeonDotprod::new()?;
        std::arch::is_aarch64_feature_detected!("i8mm").then_some(Self { dotprod })
    }
}

impl TernaryKernel for NeonI8mm {
    fn name(&self) -> &'static str {
        "neon-i8mm"
    }

    fn gemv(&self, tiles: &[u8], groups: usize, q: &[i8], sums: &mut [i32]) {
        self.dotprod.gemv(tiles, groups, q, sums);
    }

    fn gemm(&self, tiles: &[u8], groups: usize, panel: &[i32], tokens: usize, sums: &mut [i32]) {
        self.dotprod.gemm(tiles, groups, panel, tokens, sums);
    }

    fn panel_gemm(&self, tokens: usize) -> Option<&dyn PanelGemm> {
        (tokens >= MIN_TOKENS).then_some(self)
    }
}

/// Bytes of a panel's line: 16 columns of whole pairs of tokens.
fn panel_line(tokens: usize) -> usize {
    LINE_COLS * tokens.next_multiple_of(2)
}

impl PanelGemm for NeonI8mm {
    fn panel_tokens(&self) -> usize {
        PANEL_TOKENS
    }

    fn panel_lines(&self, groups: usize, tokens: usize) -> usize {
        (groups * panel_line(tokens)).div_ceil(size_of::<Line>())
    }

    fn block(&self) -> Block {
        BLOCK
    }

    fn fill(&self, x: &QuantizedRows, rows: Range<usize>, groups: usize, panel: &mut [Line]) {
        let tokens = rows.len().next_multiple_of(2);
        let panel = &mut bytemuck::cast_slice_mut::<Line, [i8; 8]>(panel)[..2 * groups * tokens];
        for (t, row) in rows.clone().enumerate() {
            for (eight, to) in x.codes(row).as_chunks::<8>().0.iter().zip(panel.iter_mut().skip(t).step_by(tokens)) {
                *to = *eight;
            }
        }
        // The last token's partner.
        if rows.len() < tokens {
            panel.iter_mut().skip(rows.len()).step_by(tokens).for_each(|to| *to = [0; 8]);
        }
    }

    fn multiply(&self, tiles: WeightTiles<'_>, panels: &[Line], size: usize, tokens: usize, sums: &mut [i32]) {
        let WeightTiles { data: tiles, groups, .. } = tiles;
        assert!((1..=PANEL_TOKENS).contains(&size) && tokens > 0, "1 to {PANEL_TOKENS} tokens a panel");
        let count = sums.len() / (TILE_ROWS * tokens);
        let last = (tokens - 1) % size + 1;
        let panel = self.panel_lines(groups, size);
        let panel_lines = (tokens - 1) / size * panel + self.panel_lines(groups, last);
        assert!(
            sums.len() == count * tokens * TILE_ROWS
                && tiles.len() == count * groups * LINE_BYTES
                && panels.len() >= panel_lines,
            "operand sizes"
        );
        // SAFETY: `new` found the features; tiles, panels and sums have the sizes above.
        unsafe {
            if tokens <= size.min(DIRECT_TOKENS) {
                direct(tiles, groups, panels.as_ptr().cast(), tokens, sums);
            } else {
                by_panels(tiles, groups, panels, size, tokens, sums);
            }
        }
    }
}

/// Adds 2 tokens times 2 rows of 8 columns.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn multiply_add(mut acc: int32x4_t, tokens: int8x16_t, codes: uint8x16_t) -> int32x4_t {
    // SAFETY: this function's features include i8mm; the instruction changes `acc` alone.
    unsafe {
        asm!(
            "smmla {acc:v}.4s, {tokens:v}.16b, {codes:v}.16b",
            acc = inout(vreg) acc,
            tokens = in(vreg) tokens,
            codes = in(vreg) codes,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// Half a line as pairs of rows, columns 0 to 7 in the low two bits of each byte, columns 8 to 15 four bits above.
///
/// # Safety
/// NEON; 32 bytes at `line`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn pairs(line: *const u8) -> [uint8x16_t; 4] {
    // SAFETY: as the caller vouches.
    let [a, b] = unsafe { [vld1q_u8(line), vld1q_u8(line.add(16))] };
    let ([a, next_a], [b, next_b]) = (beside(a), beside(b));
    [vzip1q_u32(a, next_a), vzip2q_u32(a, next_a), vzip1q_u32(b, next_b), vzip2q_u32(b, next_b)]
        .map(|v| vreinterpretq_u8_u32(v))
}

/// Four rows with bit pairs 0 and 2 in place, and with 1 and 3.
#[inline]
#[target_feature(enable = "neon")]
fn beside(w: uint8x16_t) -> [uint32x4_t; 2] {
    [vreinterpretq_u32_u8(w), vreinterpretq_u32_u8(vshrq_n_u8::<2>(w))]
}

/// The codes of columns 0 to 7 of [`pairs`].
#[inline]
#[target_feature(enable = "neon")]
fn first_columns(z: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
    let mask = vdupq_n_u8(3);
    [vandq_u8(z[0], mask), vandq_u8(z[1], mask), vandq_u8(z[2], mask), vandq_u8(z[3], mask)]
}

/// The codes of columns 8 to 15 of [`pairs`].
#[inline]
#[target_feature(enable = "neon")]
fn last_columns(z: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
    first_columns([vshrq_n_u8::<4>(z[0]), vshrq_n_u8::<4>(z[1]), vshrq_n_u8::<4>(z[2]), vshrq_n_u8::<4>(z[3])])
}

/// Runs `$pass::<N>` for the pairs of `$tokens` tokens, as many as the caller has checked.
macro_rules! for_pairs {
    ($tokens:expr, [$($n:literal)*], $pass:ident::<$decoded:literal> $args:tt) => {
        match $tokens.div_ceil(2) {
            $($n => $pass::<$n, $decoded> $args,)*
            _ => unreachable!("checked by multiply"),
        }
    };
}

/// # Safety
/// NEON and i8mm; `tiles` holds as many tiles of `groups` lines as `sums` of `tokens` ≤ 10 tokens, `panel` a panel of them.
#[target_feature(enable = "neon,i8mm")]
unsafe fn direct(tiles: &[u8], groups: usize, panel: *const i8, tokens: usize, sums: &mut [i32]) {
    let per_tile = sums.chunks_exact_mut(tokens * TILE_ROWS);
    for (tile, sums) in tiles.chunks_exact(groups * LINE_BYTES).zip(per_tile) {
        for half in 0..2 {
            let (w, sums) = (tile[half * HALF_LINE..].as_ptr(), &mut sums[half * HALF_ROWS..]);
            // SAFETY: the half's bytes of all lines are in the tile, the panel is the caller's.
            unsafe { for_pairs!(tokens, [1 2 3 4 5], pass::<false>(w, groups, panel, sums, false)) };
        }
    }
}

/// Decoded lines of both halves of a tile.
#[repr(C, align(64))]
struct Decoded([[u8; LINES * DECODED_LINE]; 2]);

/// # Safety
/// NEON and i8mm; `tiles` holds as many tiles of `groups` lines as `sums` of `tokens` tokens, `panels` panels of all of
/// them, of `size` ≤ 12 tokens each but the last.
#[target_feature(enable = "neon,i8mm")]
unsafe fn by_panels(tiles: &[u8], groups: usize, panels: &[Line], size: usize, tokens: usize, sums: &mut [i32]) {
    let mut decoded = Decoded([[0; LINES * DECODED_LINE]; 2]);
    let panel_lines = (groups * panel_line(size)).div_ceil(size_of::<Line>());
    for first in (0..groups).step_by(LINES) {
        let now = LINES.min(groups - first);
        let per_tile = sums.chunks_exact_mut(tokens * TILE_ROWS);
        for (tile, sums) in tiles.chunks_exact(groups * LINE_BYTES).zip(per_tile) {
            decode(&tile[first * LINE_BYTES..][..now * LINE_BYTES], &mut decoded);
            for (panel, sums) in panels.chunks(panel_lines).zip(sums.chunks_mut(size * TILE_ROWS)) {
                let tokens = sums.len() / TILE_ROWS;
                for (half, w) in decoded.0.iter().enumerate() {
                    let (w, sums) = (w.as_ptr(), &mut sums[half * HALF_ROWS..]);
                    // SAFETY: `now` lines of the half are decoded, and as many are in this panel from line `first` on.
                    unsafe {
                        let panel = panel.as_ptr().cast::<i8>().add(first * panel_line(tokens));
                        for_pairs!(tokens, [1 2 3 4 5 6], pass::<true>(w, now, panel, sums, first > 0));
                    }
                }
            }
        }
    }
}

/// Decodes at most [`LINES`] lines.
#[target_feature(enable = "neon")]
fn decode(lines: &[u8], out: &mut Decoded) {
    for (half, out) in out.0.iter_mut().enumerate() {
        for (line, out) in lines.chunks_exact(LINE_BYTES).zip(out.as_chunks_mut::<DECODED_LINE>().0) {
            // SAFETY: a half of a line has 32 bytes, the same decoded 128.
            unsafe {
                let z = pairs(line[half * HALF_LINE..].as_ptr());
                for (codes, at) in [first_columns(z), last_columns(z)].as_flattened().iter().zip(0..) {
                    vst1q_u8(out.as_mut_ptr().add(16 * at), *codes);
                }
            }
        }
    }
}

/// Four registers.
///
/// # Safety
/// NEON; 64 bytes at `at`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load(at: *const u8) -> [uint8x16_t; 4] {
    // SAFETY: as the caller vouches.
    unsafe { [vld1q_u8(at), vld1q_u8(at.add(16)), vld1q_u8(at.add(32)), vld1q_u8(at.add(48))] }
}

/// Half a tile times N pairs of tokens over some lines; `sums` is their `[token][16]` from the half's first row on, and
/// added to or replaced. The last pair may be one token.
///
/// # Safety
/// NEON and i8mm; `w` points at the half's first byte of the first of `lines` lines, or at as many decoded ones if
/// DECODED; `panel` holds as many lines of N pairs.
#[target_feature(enable = "neon,i8mm")]
unsafe fn pass<const N: usize, const DECODED: bool>(
    w: *const u8,
    lines: usize,
    panel: *const i8,
    sums: &mut [i32],
    add: bool,
) {
    let mut acc = [[vdupq_n_s32(0); 4]; N];
    let (mut w, mut x) = (w, panel);
    for _ in 0..lines {
        // SAFETY: the half's part of a line, or all of it decoded, and a line of the panel are inside the operands.
        unsafe {
            let codes = if DECODED {
                [load(w), load(w.add(64))]
            } else {
                prefetch::ahead(w);
                let z = pairs(w);
                [first_columns(z), last_columns(z)]
            };
            for codes in codes {
                for acc in &mut acc {
                    let tokens = vld1q_s8(x);
                    for i in 0..4 {
                        acc[i] = multiply_add(acc[i], tokens, codes[i]);
                    }
                    x = x.wrapping_add(16);
                }
            }
        }
        w = w.wrapping_add(if DECODED { DECODED_LINE } else { LINE_BYTES });
    }
    for (n, acc) in acc.into_iter().enumerate() {
        let [a, b, c, d] = acc.map(|v| vreinterpretq_s64_s32(v));
        put(sums, 2 * n, [vzip1q_s64(a, b), vzip1q_s64(c, d)], add);
        put(sums, 2 * n + 1, [vzip2q_s64(a, b), vzip2q_s64(c, d)], add);
    }
}

/// Adds a token's eight sums to those that are there, or replaces them; drops those of a token that is none.
#[inline]
#[target_feature(enable = "neon")]
fn put(sums: &mut [i32], token: usize, rows: [int64x2_t; 2], add: bool) {
    if let Some(sums) = sums.get_mut(token * TILE_ROWS..token * TILE_ROWS + HALF_ROWS) {
        let (at, mut rows) = (sums.as_mut_ptr(), rows.map(|rows| vreinterpretq_s32_s64(rows)));
        // SAFETY: these are eight elements.
        unsafe {
            if add {
                rows = [vaddq_s32(rows[0], vld1q_s32(at)), vaddq_s32(rows[1], vld1q_s32(at.add(4)))];
            }
            vst1q_s32(at, rows[0]);
            vst1q_s32(at.add(4), rows[1]);
        }
    }
}
