//! Prefill with half of the multiplications: Winograd's inner product (S. Winograd, "A New Algorithm for Inner Product", IEEE
//! Transactions on Computers C-17, 1968), for kernels that decode lines into words of four columns.
//!
//! With activations a₀ and a₁ and weights w₀ and w₁ of two columns,
//!
//! ```text
//! (a₀ + w₁) · (a₁ + w₀ + 128)  =  a₀·w₀ + a₁·w₁  +  a₀·(a₁ + 128)  +  w₁·(w₀ + 128)
//! ```
//!
//! where the last two terms are the token's and the row's own, and are taken off once. Words lie side by side: eight columns
//! of a token are a word of a₀ − 1 and one of a₁ + 127, to which codes w + 1 are added, and a `vpdpbusd` multiplies eight
//! columns instead of four. Two additions more, but those run beside the dots: 16 rows by 8 columns of a token are 2
//! broadcasts, 2 additions and 1 dot, and 24 tokens share what decodes the codes. On Zen 4, up to 280 GMAC/s a core from the
//! second-level cache, where dots alone give 232 (benches/record/2026-11-22-prefill-epyc-2cores.md).
//!
//! The first factor fits i8 and the second u8 for activations from −127 to 126. Quantised rows reach 127 at one end or the other, so a
//! row is negated if it has fewer of −127; what is left of them is clipped, noted, and its code added to the sums. Rows with
//! many at both ends are multiplied without this. All sums are exact modulo 2^32, and so are the results, which fit.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::backend::activation::QuantizedRows;
use crate::backend::cpu::kernel::{Block, Line};

/// Tokens of a panel: their sums take 24 of the 32 registers.
pub(super) const PANEL_TOKENS: usize = 24;
/// Fewest tokens for which this is faster than dots of four columns, measured: with few, one tile a pass decodes too often.
pub(super) const MIN_TOKENS: usize = 48;
/// A call's tiles and panels: at most 96 KB of sums.
pub(super) const BLOCK: Block = Block { tiles: 8, tile_step: 1, panels: 8 };
/// Most clipped activations of a token that are noted.
const NOTES: usize = 13;
/// Columns that are filled at a time.
const FILL: usize = 64;

/// A pair of words of a row of zeros.
pub(super) const ZEROS: [i32; 2] = [-1, 0x7f7f_7f7f];

/// What a token's sums need once they are summed.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct Token {
    /// The token's own term.
    pub term: i32,
    /// −1 if the row was negated, else 1.
    pub sign: i32,
    /// Activations that were clipped; those of a row with more than [`NOTES`] are in the panel as they were.
    pub clipped: i32,
    /// Their columns, times four, and by how much less they were made, plus one.
    notes: [i32; NOTES],
}

impl Token {
    pub const ZERO: Self = Self { term: 0, sign: 1, clipped: 0, notes: [0; NOTES] };

    /// What the first lines of a panel hold.
    pub fn all(lines: &[Line]) -> &[Self] {
        bytemuck::cast_slice(lines)
    }

    /// Columns that were clipped and by how much; None if there are more than could be noted.
    pub fn notes(&self) -> Option<impl Iterator<Item = (usize, i32)>> {
        let notes = self.notes.get(..self.clipped as usize)?;
        Some(notes.iter().map(|note| (*note as usize / 4, note % 4 - 1)))
    }
}

/// Tokens that a panel of so many has room for.
pub(super) fn width(tokens: usize) -> usize {
    tokens.next_multiple_of(2)
}

/// Lines of a panel: a [`Token`] each, then `[pair of words][token]`.
pub(super) fn panel_lines(pairs: usize, tokens: usize) -> usize {
    width(tokens) + (pairs * width(tokens)).div_ceil(8)
}

/// Lays out rows of `8 · pairs` columns, which are as many as the rows have or more.
///
/// # Safety
/// AVX-512 F, BW and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn fill(x: &QuantizedRows, rows: Range<usize>, pairs: usize, panel: &mut [Line]) {
    let width = width(rows.len());
    let (tokens, words) = panel.split_at_mut(width);
    let tokens: &mut [Token] = bytemuck::cast_slice_mut(tokens);
    let words: &mut [u64] = &mut bytemuck::cast_slice_mut(words)[..pairs * width];
    let codes = |t: usize| if t < rows.len() { x.codes(rows.start + t) } else { &[] };
    for (t, token) in tokens.iter_mut().enumerate() {
        let count = |end: i8| codes(t).iter().filter(|q| **q == end).count();
        *token = Token { sign: if count(-127) < count(127) { -1 } else { 1 }, ..Token::ZERO };
    }
    let mut own = [_mm512_setzero_si512(); PANEL_TOKENS];
    // All tokens' part of a run of words, which stays in the first level meanwhile.
    for (block, words) in words.chunks_mut(FILL / 8 * width).enumerate() {
        for (t, (token, own)) in tokens.iter_mut().zip(&mut own).enumerate() {
            let factors = fill_block::<true>(codes(t), block, token, words, t, width);
            // (a₀ − 1)·(a₁ + 127): what code 0 everywhere would give, which has to become 0.
            *own = _mm512_dpbusd_epi32(*own, _mm512_srli_epi64::<32>(factors), factors);
        }
    }
    // Of a row of zeros, 4 · (−1 · 127) a pair.
    let zeros = (pairs.next_multiple_of(FILL / 8) * 4 * 127) as i32;
    for (t, token) in tokens.iter_mut().enumerate() {
        token.term = _mm512_reduce_add_epi32(own[t]).wrapping_add(zeros);
        if token.notes().is_none() {
            for (block, words) in words.chunks_mut(FILL / 8 * width).enumerate() {
                fill_block::<false>(codes(t), block, token, words, t, width);
            }
        }
    }
}

/// Lays out some columns of one row, clipped and noted or as they are; and returns them.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn fill_block<const CLIP: bool>(
    codes: &[i8],
    block: usize,
    token: &mut Token,
    words: &mut [u64],
    t: usize,
    width: usize,
) -> __m512i {
    let codes = codes.get(block * FILL..).unwrap_or_default();
    let here = u64::MAX.checked_shr((FILL - codes.len().min(FILL)) as u32).unwrap_or(0);
    // SAFETY: bytes outside the mask are not read.
    let mut a = unsafe { _mm512_maskz_loadu_epi8(here, codes.as_ptr()) };
    if CLIP {
        if token.sign < 0 {
            a = _mm512_subs_epi8(_mm512_setzero_si512(), a);
        }
        let clipped = _mm512_max_epi8(_mm512_min_epi8(a, _mm512_set1_epi8(126)), _mm512_set1_epi8(-127));
        let mut changed = _mm512_cmpneq_epi8_mask(a, clipped);
        while changed != 0 {
            let i = changed.trailing_zeros() as usize;
            changed &= changed - 1;
            let code = i32::from(codes[i]) * token.sign;
            if let Some(note) = token.notes.get_mut(token.clipped as usize) {
                *note = 4 * (block * FILL + i) as i32 + code - code.clamp(-127, 126) + 1;
            }
            token.clipped += 1;
        }
        a = clipped;
    }
    let offsets = _mm512_set1_epi64(i64::from_le_bytes([255, 255, 255, 255, 127, 127, 127, 127]));
    let factors = _mm512_add_epi8(a, offsets);
    let mut eight = [0u64; 8];
    // SAFETY: eight words of eight bytes.
    unsafe { _mm512_storeu_si512(eight.as_mut_ptr().cast(), factors) };
    for (words, word) in words.chunks_exact_mut(width).zip(eight) {
        words[t] = word;
    }
    factors
}

/// The codes of a row that was laid out as it is, as words of four.
pub(super) fn words_of(panel: &[Line], tokens: usize, t: usize, pairs: usize) -> Vec<i32> {
    let width = width(tokens);
    let words: &[[u8; 8]] = &bytemuck::cast_slice(&panel[width..])[..pairs * width];
    let codes = words.iter().skip(t).step_by(width).flat_map(|[a @ .., e, f, g, h]| {
        [a.map(|a| a.wrapping_add(1)), [e, f, g, h].map(|a: &u8| a.wrapping_sub(127))]
    });
    codes.map(i32::from_le_bytes).collect()
}

/// `$body` for each `$t` below the constant `$T` ≤ 24, without a loop: LLVM gives up unrolling at 24, and then keeps the sums
/// in memory.
macro_rules! for_each_token {
    ($T:ident, $t:ident, $body:block) => {
        pairs::for_each_token!($T, $t, $body,
            0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23)
    };
    ($T:ident, $t:ident, $body:block, $($i:literal)*) => {
        $(if $i < $T {
            let $t: usize = $i;
            $body
        })*
    };
}
pub(super) use for_each_token;

/// Implements `PanelGemm` for a kernel by these products. `$lines` lines together are an even number of words, `$words` each,
/// in pairs of (line, word); `$decoder` is as for `gemm512!`, whose `gemm` multiplies rows that are not clipped.
macro_rules! pairs512 {
    ($features:literal, $kernel:ident, $decoder:ident, $lines:literal, $words:expr,
     [$(($l0:literal $p0:literal, $l1:literal $p1:literal))*]) => {
        /// Pairs of words that `groups` lines meet.
        fn pairs(groups: usize) -> usize {
            groups.div_ceil($lines) * $lines * $words / 2
        }

        impl PanelGemm for $kernel {
            fn panel_tokens(&self) -> usize {
                pairs::PANEL_TOKENS
            }

            fn panel_lines(&self, groups: usize, tokens: usize) -> usize {
                pairs::panel_lines(pairs(groups), tokens)
            }

            fn block(&self) -> Block {
                pairs::BLOCK
            }

            fn fill(&self, x: &QuantizedRows, rows: Range<usize>, groups: usize, panel: &mut [Line]) {
                // SAFETY: `new` found the features.
                unsafe { pairs::fill(x, rows, pairs(groups), panel) }
            }

            fn has_row_terms(&self) -> bool {
                true
            }

            fn row_terms(&self, tile: &[u8], groups: usize) -> [i32; TILE_ROWS] {
                assert_eq!(tile.len(), groups * LINE_BYTES, "one tile");
                let mut terms = [0; TILE_ROWS];
                let (zeros, none) = (pairs::ZEROS.as_ptr(), [0; TILE_ROWS]);
                // SAFETY: `new` found the features; the tile has whole lines, the same pair is read again and again.
                unsafe { pair_pass::<1>(tile.as_ptr(), groups, zeros, 0, &[pairs::Token::ZERO], &none, &mut terms) };
                terms
            }

            fn multiply(&self, tiles: WeightTiles<'_>, panels: &[Line], size: usize, tokens: usize, sums: &mut [i32]) {
                let WeightTiles { data, groups, terms } = tiles;
                assert!((1..=pairs::PANEL_TOKENS).contains(&size) && tokens > 0, "tokens of a panel");
                let (tile_bytes, tile_sums) = (groups * LINE_BYTES, tokens * TILE_ROWS);
                assert!(
                    sums.len() == terms.len() * tile_sums && data.len() == terms.len() * tile_bytes,
                    "operand sizes"
                );
                let lines = self.panel_lines(groups, size);
                for first in (0..tokens).step_by(size) {
                    let n = size.min(tokens - first);
                    let panel = &panels[first / size * lines..][..self.panel_lines(groups, n)];
                    let (all, words) = panel.split_at(pairs::width(n));
                    let all = pairs::Token::all(all);
                    let (words, step) = (words.as_ptr().cast(), 2 * pairs::width(n));
                    let clipped = all[..n].iter().any(|token| token.clipped > 0);
                    let per_tile = data.chunks_exact(tile_bytes).zip(sums.chunks_exact_mut(tile_sums));
                    for ((tile, sums), rows) in per_tile.zip(terms) {
                        let sums = &mut sums[first * TILE_ROWS..][..n * TILE_ROWS];
                        // `new` found the features; the tile has whole lines, the panel `pairs · width` pairs of words.
                        for_tokens!(
                            pairs::width(n),
                            [2 4 6 8 10 12 14 16 18 20 22 24],
                            pair_pass(tile.as_ptr(), groups, words, step, all, rows, sums)
                        );
                        if !clipped {
                            continue;
                        }
                        let sums = sums.as_chunks_mut::<TILE_ROWS>().0;
                        for (t, token) in all[..n].iter().enumerate().filter(|(_, token)| token.clipped > 0) {
                            let Some(notes) = token.notes() else {
                                let words = pairs::words_of(panel, n, t, pairs(groups));
                                // SAFETY: the features; a tile, words of all its lines, and a tile's sums.
                                unsafe { gemm::<1>(tile.as_ptr(), groups, words.as_ptr(), &mut sums[t]) };
                                continue;
                            };
                            for (column, less) in notes {
                                let (line, at) = (column / (4 * $words), column % (4 * $words));
                                let Some(line) = tile.as_chunks::<LINE_BYTES>().0.get(line) else { continue };
                                // SAFETY: the features.
                                let codes = unsafe { codes_of(line, at / 4, at % 4) };
                                for i in 0..TILE_ROWS {
                                    sums[t][i] = sums[t][i].wrapping_add(codes[i] * less * token.sign);
                                }
                            }
                        }
                    }
                }
            }
        }

        /// Codes of 16 rows in one of a line's columns.
        #[target_feature(enable = $features)]
        fn codes_of(line: &[u8; LINE_BYTES], word: usize, byte: usize) -> [i32; TILE_ROWS] {
            let decoder = $decoder::new();
            // SAFETY: a line is a register.
            let mut decoded = decoder.decode(unsafe { _mm512_loadu_si512(line.as_ptr().cast()) });
            let mut codes = _mm512_setzero_si512();
            for p in 0..=word {
                codes = decoder.codes(&mut decoded, p);
            }
            let mut rows = [[0u8; 4]; TILE_ROWS];
            // SAFETY: 64 bytes.
            unsafe { _mm512_storeu_si512(rows.as_mut_ptr().cast(), codes) };
            rows.map(|four| i32::from(four[byte]))
        }

        /// Sums of a tile with T tokens, as many as `sums` has room for: products of pairs less the tokens' terms and the
        /// rows', negated where the token was. `step` words on are those of the next pair.
        ///
        /// # Safety
        /// The kernel's features; `groups` lines at `tile`, and T pairs of words at each of `pairs(groups)` steps.
        #[target_feature(enable = $features)]
        unsafe fn pair_pass<const T: usize>(
            tile: *const u8,
            groups: usize,
            words: *const i32,
            step: usize,
            tokens: &[pairs::Token],
            rows: &[i32; TILE_ROWS],
            sums: &mut [i32],
        ) {
            let decoder = $decoder::new();
            let zero = _mm512_setzero_si512();
            let mut acc = [zero; pairs::PANEL_TOKENS];
            let mut words = words;
            for first in (0..groups).step_by($lines) {
                let mut decoded = [decoder.decode(zero); $lines];
                for l in 0..$lines {
                    if l == 0 || first + l < groups {
                        // SAFETY: the line is one of the tile's.
                        let line = unsafe { _mm512_loadu_si512(tile.add((first + l) * LINE_BYTES).cast()) };
                        decoded[l] = decoder.decode(line);
                    }
                }
                $(
                    let codes = [decoder.codes(&mut decoded[$l0], $p0), decoder.codes(&mut decoded[$l1], $p1)];
                    pairs::for_each_token!(T, t, {
                        // SAFETY: pair `t` of T is there.
                        let [a, b] = unsafe { [words.add(2 * t).read(), words.add(2 * t + 1).read()] };
                        let signed = _mm512_add_epi8(_mm512_set1_epi32(a), codes[1]);
                        let unsigned = _mm512_add_epi8(_mm512_set1_epi32(b), codes[0]);
                        acc[t] = _mm512_dpbusd_epi32(acc[t], unsigned, signed);
                    });
                    words = words.wrapping_add(step);
                )*
            }
            // SAFETY: as many as a register holds.
            let rows = unsafe { _mm512_loadu_si512(rows.as_ptr().cast()) };
            let (sums, tokens) = (sums.as_chunks_mut::<TILE_ROWS>().0, &tokens[..T]);
            pairs::for_each_token!(T, t, {
                if let Some(sums) = sums.get_mut(t) {
                    let own = _mm512_sub_epi32(acc[t], _mm512_set1_epi32(tokens[t].term));
                    let negate = _mm512_set1_epi32(tokens[t].sign >> 1);
                    let sum = _mm512_xor_si512(_mm512_sub_epi32(own, rows), negate);
                    // SAFETY: as above.
                    unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), _mm512_sub_epi32(sum, negate)) };
                }
            });
        }
    };
}
pub(super) use pairs512;

#[cfg(test)]
mod tests {
    use crate::backend::Arrangement;
    use crate::backend::activation::{QuantizedRows, row_stride};
    use crate::backend::cpu::kernel::{Line, TernaryKernel};
    use crate::backend::cpu::pool::Pool;
    use crate::backend::cpu::tiles::{CpuTernary, TILE_ROWS};
    use crate::backend::cpu::x86_64::{Avx512Vbmi, Avx512Vnni};
    use crate::ternary::{PackedTernary, Scale};

    fn kernels() -> Vec<Box<dyn TernaryKernel>> {
        let vnni = Avx512Vnni::new().map(|k| Box::new(k) as Box<dyn TernaryKernel>);
        let vbmi = Avx512Vbmi::new().map(|k| Box::new(k) as Box<dyn TernaryKernel>);
        vnni.into_iter().chain(vbmi).collect()
    }

    /// Rows that clip nothing, something and more than can be noted, at either end and at both.
    fn code(token: usize, column: usize) -> i8 {
        let noise = ((token * 7919 + column * 104_729) % 251) as i32 - 125;
        let (every, rare) = (column.is_multiple_of(2), column % 97 == 5);
        let code = match token % 12 {
            0 => 127,
            1 => -127,
            2 => -128,
            3 if every => 127,
            3 => -127,
            4 if every => -128,
            4 => 127,
            5 if rare => 127,
            6 if rare => -128,
            7 if column % 193 == 1 => -127,
            7 if rare => 127,
            8 => 0,
            9 if column == 0 => 127,
            _ => noise,
        };
        code as i8
    }

    #[test]
    fn pairs_are_exact_at_both_ends() {
        let pool = Pool::new(1);
        for kernel in kernels() {
            let gemm = kernel.panel_gemm(super::MIN_TOKENS).expect("this one");
            for (rows, cols) in [(1, 1), (17, 19), (16, 20), (33, 39), (150, 40), (5, 41), (20, 700), (40, 6912)] {
                let weights: Vec<i8> = (0..rows * cols).map(|i| ((i * i + i / 3) % 3) as i8 - 1).collect();
                let weight = PackedTernary::from_weights(rows, cols, &weights, Scale::Multiply(1.0)).unwrap();
                let packed = CpuTernary::pack(&[weight], Arrangement::Stacked, kernel.packing(), &pool).unwrap();
                let (groups, tiles) = (packed.groups(), packed.tiles());
                for (tokens, size) in [(1, 1), (13, 13), (24, 24), (45, 23), (60, 24)] {
                    let stride = row_stride(cols);
                    let mut bytes = vec![0; tokens * stride];
                    for (t, row) in bytes.chunks_exact_mut(stride).enumerate() {
                        row[..cols].iter_mut().enumerate().for_each(|(k, q)| *q = code(t, k) as u8);
                    }
                    let x = QuantizedRows::new(&bytes, cols).unwrap();
                    let lines = gemm.panel_lines(groups, size);
                    let mut panels = vec![Line([0x5555_5555; 16]); tokens.div_ceil(size) * lines];
                    for (i, panel) in panels.chunks_exact_mut(lines).enumerate() {
                        gemm.fill(&x, i * size..tokens.min((i + 1) * size), groups, panel);
                    }
                    let mut sums = vec![i32::MIN; tiles * tokens * TILE_ROWS];
                    let all = packed.weight_tiles(0..tiles, packed.row_terms(gemm, &pool));
                    gemm.multiply(all, &panels, size, tokens, &mut sums);
                    for (row, t) in (0..rows).flat_map(|row| (0..tokens).map(move |t| (row, t))) {
                        let products =
                            (0..cols).map(|k| i32::from(code(t, k)) * (1 + i32::from(weights[row * cols + k])));
                        let got = sums[(row / TILE_ROWS * tokens + t) * TILE_ROWS + row % TILE_ROWS];
                        let what = format!("{}: [{rows}, {cols}], token {t} of {tokens}, row {row}", kernel.name());
                        assert_eq!(got, products.sum::<i32>(), "{what}");
                    }
                }
            }
        }
    }
}
