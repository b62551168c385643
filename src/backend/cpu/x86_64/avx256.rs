//! What the 256-bit kernels share: the product of tiles and panels.
//!
//! A tile's codes are decoded to a byte each, 256 columns at a time (4 KB), and met by four panels of twelve tokens. Six tokens with
//! both halves of a tile take 12 of 16 registers for their sums; a word of four columns is then 2 loads, 6 broadcasts, which
//! are loads too, and 12 products. The codes of up to [`FEW`] tokens, each decoded once anyway, stay in registers.

use std::arch::x86_64::*;

use crate::backend::cpu::kernel::{Block, MAX_TOKENS};
use crate::backend::cpu::prefetch;
use crate::backend::cpu::tiles::LINE_BYTES;

/// Lines that are decoded at a time; sums of 16 bits hold as many.
pub(super) const LINES: usize = 16;
/// Most tokens whose sums are in registers at a time.
pub(super) const TOKENS: usize = 6;
/// Tokens whose sums leave registers for codes.
pub(super) const FEW: usize = 5;
/// A call's tiles and panels: at most 24 KB of sums.
pub(super) const BLOCK: Block = Block { tiles: 8, tile_step: 1, panels: 4 };
/// Tokens of a panel.
pub(super) const PANEL_TOKENS: usize = MAX_TOKENS;

/// Codes of [`LINES`] lines, a byte each: rows 0 to 7 and 8 to 15 of a word of four columns.
pub(super) type Codes = [[__m256i; 2]; 4 * LINES];

/// Decodes at most [`LINES`] lines; gives their words.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn decode<'a>(lines: &[u8], codes: &'a mut Codes) -> &'a [[__m256i; 2]] {
    let lines = lines.as_chunks().0;
    for (line, codes) in lines.iter().zip(codes.as_chunks_mut::<4>().0) {
        let mut w = load(line);
        for codes in codes {
            *codes = next(&mut w);
        }
    }
    &codes[..4 * lines.len()]
}

/// A line, of whose words [`next`] gives the first.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load(line: &[u8; LINE_BYTES]) -> [__m256i; 2] {
    // Few tokens are bound by memory, as one is.
    prefetch::ahead(line.as_ptr());
    // SAFETY: a line is two registers.
    unsafe { [0, 32].map(|at| _mm256_loadu_si256(line.as_ptr().add(at).cast())) }
}

/// Takes the next word from a line: a byte for each code.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn next(line: &mut [__m256i; 2]) -> [__m256i; 2] {
    let codes = line.map(|w| _mm256_and_si256(w, _mm256_set1_epi8(3)));
    // Bits that cross into the next byte land outside the mask.
    *line = line.map(|w| _mm256_srli_epi16::<2>(w));
    codes
}

/// Defines `product`, of tiles and panels, and implements `PanelGemm` by it. `$dot(sums, codes, four)` adds the products of a word,
/// at most `4 · LINES` of them; `$widen` makes sums of 32 bits of that. A macro, as all of it needs the kernel's own
/// features to be inlined.
macro_rules! gemm256 {
    ($features:literal, $kernel:ident, $dot:path, $widen:path) => {
        impl PanelGemm for $kernel {
            fn panel_tokens(&self) -> usize {
                avx256::PANEL_TOKENS
            }

            fn panel_lines(&self, groups: usize, tokens: usize) -> usize {
                Words(self).panel_lines(groups, tokens)
            }

            fn block(&self) -> Block {
                avx256::BLOCK
            }

            fn fill(&self, x: &QuantizedRows, rows: Range<usize>, groups: usize, panel: &mut [Line]) {
                Words(self).fill(x, rows, groups, panel);
            }

            fn multiply(&self, tiles: WeightTiles<'_>, panels: &[Line], size: usize, tokens: usize, sums: &mut [i32]) {
                let WeightTiles { data, groups, .. } = tiles;
                assert!((1..=avx256::PANEL_TOKENS).contains(&size) && tokens > 0, "tokens of a panel");
                let panel = self.panel_lines(groups, size) * size_of::<Line>() / size_of::<i32>();
                let last = (tokens - 1) / size * panel;
                let panels: &[i32] = bytemuck::cast_slice(panels);
                assert!(panels.len() >= last + 4 * groups * ((tokens - 1) % size + 1), "operand sizes");
                assert!(data.len() * tokens * TILE_ROWS == sums.len() * groups * LINE_BYTES, "operand sizes");
                // SAFETY: `new` found the features; all panels are there.
                unsafe { product(data, groups, panels.as_ptr(), panel, size, tokens, sums) }
            }
        }

        /// Whole tiles of `groups` lines times `tokens` tokens in panels of `size`, `panel` words apart; `sums` is
        /// `[tile][token][16]`.
        ///
        /// # Safety
        /// The kernel's features; each panel holds `4 · groups` words of each of its tokens.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn product(
            tiles: &[u8],
            groups: usize,
            panels: *const i32,
            panel: usize,
            size: usize,
            tokens: usize,
            sums: &mut [i32],
        ) {
            sums.fill(0);
            let mut codes = [[_mm256_setzero_si256(); 2]; 4 * avx256::LINES];
            let per_tile = tiles.chunks_exact(groups * LINE_BYTES).zip(sums.chunks_exact_mut(tokens * TILE_ROWS));
            for (tile, sums) in per_tile {
                for (i, lines) in tile.chunks(avx256::LINES * LINE_BYTES).enumerate() {
                    if tokens <= size.min(avx256::FEW) {
                        let words = panels.wrapping_add(i * 4 * avx256::LINES * tokens);
                        // The features; the words of these lines and all tokens are there.
                        for_tokens!(tokens, [1 2 3 4 5], few(lines, words, sums));
                        continue;
                    }
                    let codes = avx256::decode(lines, &mut codes);
                    for (p, sums) in sums.chunks_mut(size * TILE_ROWS).enumerate() {
                        let n = sums.len() / TILE_ROWS;
                        let words = panels.wrapping_add(p * panel + i * 4 * avx256::LINES * n);
                        // Parts of nearly the same size, as few as possible.
                        let part = n.div_ceil(n.div_ceil(avx256::TOKENS));
                        for (t, sums) in sums.chunks_mut(part * TILE_ROWS).enumerate() {
                            let words = words.wrapping_add(t * part);
                            // The features; `codes.len()` words of `n` tokens are there, from these lines' first on.
                            for_tokens!(sums.len() / TILE_ROWS, [1 2 3 4 5 6], pass(codes, words, n, sums))
                        }
                    }
                }
            }
        }

        /// Adds the products of some words of a tile and N tokens to `sums`; a token's words are `step` apart.
        ///
        /// # Safety
        /// The kernel's features; `codes.len()` words of N tokens at `words`.
        #[target_feature(enable = $features)]
        unsafe fn pass<const N: usize>(codes: &[[__m256i; 2]], words: *const i32, step: usize, sums: &mut [i32]) {
            let mut acc = [[_mm256_setzero_si256(); 2]; N];
            let mut words = words;
            for codes in codes {
                // SAFETY: this word of N tokens is there.
                unsafe { word(&mut acc, *codes, words) };
                words = words.wrapping_add(step);
            }
            add(&acc, sums);
        }

        /// As [`pass`], with codes that are decoded on the way; at most [`avx256::LINES`] lines.
        ///
        /// # Safety
        /// The kernel's features; the lines' words of N tokens at `words`.
        #[target_feature(enable = $features)]
        unsafe fn few<const N: usize>(lines: &[u8], words: *const i32, sums: &mut [i32]) {
            let mut acc = [[_mm256_setzero_si256(); 2]; N];
            let mut words = words;
            for line in lines.as_chunks().0 {
                let mut w = avx256::load(line);
                for _ in 0..4 {
                    // SAFETY: this word of N tokens is there.
                    unsafe { word(&mut acc, avx256::next(&mut w), words) };
                    words = words.wrapping_add(N);
                }
            }
            add(&acc, sums);
        }

        /// Adds a word's products with N tokens.
        ///
        /// # Safety
        /// The kernel's features; N tokens' words at `words`.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn word<const N: usize>(acc: &mut [[__m256i; 2]; N], codes: [__m256i; 2], words: *const i32) {
            for n in 0..N {
                // SAFETY: the caller's contract.
                let four = _mm256_set1_epi32(unsafe { words.add(n).read_unaligned() });
                acc[n] = [0, 1].map(|half| $dot(acc[n][half], codes[half], four));
            }
        }

        /// Adds what was accumulated to the tokens' sums.
        #[inline]
        #[target_feature(enable = $features)]
        fn add<const N: usize>(acc: &[[__m256i; 2]; N], sums: &mut [i32]) {
            for (sums, acc) in sums.as_chunks_mut::<8>().0.iter_mut().zip(acc.as_flattened()) {
                let at = sums.as_mut_ptr().cast();
                // SAFETY: eight sums are a register.
                unsafe { _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), $widen(*acc))) };
            }
        }
    };
}
pub(super) use gemm256;
