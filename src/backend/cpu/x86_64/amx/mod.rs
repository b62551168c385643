//! AMX: prefill by tile registers, `tdpbsud` of 16 tokens by 64 columns by 16 rows; decode as AVX-512 VNNI.
//!
//! ```text
//! weights:      lines 4s … 4s+3 of a tile, decoded: quad p of line g is row 4·(g − 4s) + p of
//! B:            16 rows of 64 bytes: | 4 columns of weight row 0 | … of weight row 15 |         codes {0, 1, 2}
//! panel, A:     per step s of 64 columns, a row of 64 bytes for each token                      codes, signed
//! sums, C:      a row for each token: 16 sums of 32 bits, `[tile][token][16]` as they are wanted
//! ```
//!
//! What a line holds at one bit pair is a row of B as it is, so that decoding is a shift and an AND. Four C, two A and two
//! B take all eight registers: per step of 64 columns, 2 · 16 tokens and 2 · 16 weight rows, 4 loads and 4 dots of 16
//! cycles. [`STEPS`] steps of two weight tiles are decoded at a time, stay in the first-level cache (20 KB) and meet every
//! panel of the block, each of which brings as much; a block's panels and sums stay in the second level.
//! A panel of more than 16 tokens is split in halves, so that no register has a row that is not a token.

mod tiles;

#[cfg(test)]
mod model;
#[cfg(all(test, target_os = "linux"))]
mod trap;

use std::arch::x86_64::*;
use std::ops::Range;

use super::Avx512Vnni;
use crate::backend::activation::QuantizedRows;
use crate::backend::cpu::kernel::{Block, Line, PanelGemm, TernaryKernel, WeightTiles};
use crate::backend::cpu::tiles::{LINE_BYTES, TILE_ROWS};
use tiles::{Config, Permission, REGISTER_ROWS, Row, Tiles, Unit};

#[cfg(test)]
pub(in crate::backend::cpu) use model::Model;
#[cfg(all(test, target_os = "linux"))]
pub(in crate::backend::cpu) use trap::Trapped;

/// Lines of a step: 64 columns.
const LINES: usize = 4;
/// Steps that are decoded at a time.
const STEPS: usize = 10;
/// Tokens of a panel: two registers.
const PANEL_TOKENS: usize = 2 * REGISTER_ROWS;
/// Tokens from which on tiles are used. A dot of n tokens takes n cycles where AVX-512 VNNI takes 8n, but two loads of 8
/// cycles come with it (by the instructions' latencies; not measured).
const MIN_TOKENS: usize = 4;
/// A call's weight tiles and panels: 128 KB of sums, and of panels in use at a time.
const BLOCK: Block = Block { tiles: 8, tile_step: 2, panels: 8 };

/// The AMX kernel: products by the tile registers of `U`.
#[derive(Debug, Clone, Copy)]
pub struct Amx<U> {
    vnni: Avx512Vnni,
    unit: U,
}

/// The AMX kernel on this CPU's tile registers.
pub type AmxInt8 = Amx<Permission>;

impl AmxInt8 {
    /// The kernel, if this CPU has AMX for bytes and AVX-512 F, BW and VNNI, and the system lets this process use it.
    pub fn new() -> Option<Self> {
        Self::on(Permission::ask()?)
    }
}

impl<U: Unit> Amx<U> {
    fn on(unit: U) -> Option<Self> {
        Some(Self { vnni: Avx512Vnni::new()?, unit })
    }
}

impl<U: Unit> TernaryKernel for Amx<U> {
    fn name(&self) -> &'static str {
        "amx-int8"
    }

    fn gemv(&self, tiles: &[u8], groups: usize, q: &[i8], sums: &mut [i32]) {
        self.vnni.gemv(tiles, groups, q, sums);
    }

    fn gemm(&self, tiles: &[u8], groups: usize, panel: &[i32], tokens: usize, sums: &mut [i32]) {
        self.vnni.gemm(tiles, groups, panel, tokens, sums);
    }

    fn panel_gemm(&self, tokens: usize) -> Option<&dyn PanelGemm> {
        (tokens >= MIN_TOKENS).then_some(self)
    }
}

impl<U: Unit> PanelGemm for Amx<U> {
    fn panel_tokens(&self) -> usize {
        PANEL_TOKENS
    }

    fn panel_lines(&self, groups: usize, tokens: usize) -> usize {
        groups.div_ceil(LINES) * tokens
    }

    fn block(&self) -> Block {
        BLOCK
    }

    fn fill(&self, x: &QuantizedRows, rows: Range<usize>, groups: usize, panel: &mut [Line]) {
        let (tokens, steps) = (rows.len(), groups.div_ceil(LINES));
        let panel: &mut [Row] = &mut bytemuck::cast_slice_mut(panel)[..steps * tokens];
        for (t, row) in rows.enumerate() {
            let mut codes = x.codes(row).chunks(size_of::<Row>());
            for to in panel.iter_mut().skip(t).step_by(tokens) {
                let to: &mut [i8] = bytemuck::cast_slice_mut(to);
                let from = codes.next().unwrap_or_default();
                to[..from.len()].copy_from_slice(from);
                to[from.len()..].fill(0);
            }
        }
    }

    fn multiply(&self, tiles: WeightTiles<'_>, panels: &[Line], size: usize, tokens: usize, sums: &mut [i32]) {
        let WeightTiles { data: tiles, groups, .. } = tiles;
        let count = sums.len() / (TILE_ROWS * tokens);
        assert!((1..=PANEL_TOKENS).contains(&size), "1 to {PANEL_TOKENS} tokens a panel");
        assert!(
            sums.len() == count * tokens * TILE_ROWS && tiles.len() == count * groups * LINE_BYTES,
            "operand sizes"
        );
        let mut product = Product { tiles, groups, tokens, sums: sums.as_chunks_mut().0 };
        let (panels, whole): (&[Row], _) = (bytemuck::cast_slice(panels), tokens / size);
        let (panels, last) = panels.split_at(whole * self.panel_lines(groups, size));
        let mut registers = self.unit.open();
        if whole > 0 {
            product.run(&mut registers, panels, size, 0);
        }
        if !tokens.is_multiple_of(size) {
            let rest = tokens % size;
            product.run(&mut registers, &last[..self.panel_lines(groups, rest)], rest, whole * size);
        }
    }
}

/// Steps of two weight tiles as rows of B.
#[repr(C, align(64))]
struct Decoded([[Row; STEPS * REGISTER_ROWS]; 2]);

/// One call's weights and sums.
struct Product<'a> {
    tiles: &'a [u8],
    groups: usize,
    /// Tokens of a weight tile's sums.
    tokens: usize,
    sums: &'a mut [Row],
}

impl Product<'_> {
    /// All weight tiles times panels of n tokens, whose sums are at tokens `at …`.
    fn run(&mut self, registers: &mut impl Tiles, panels: &[Row], n: usize, at: usize) {
        // Tokens of the two A; the second has none if the first can take all.
        let split = if n > REGISTER_ROWS { [n.div_ceil(2), n / 2] } else { [n, 0] };
        registers.configure(&config(split));
        let (steps, tile_bytes) = (self.groups.div_ceil(LINES), self.groups * LINE_BYTES);
        let mut decoded = Decoded([[[0; 16]; STEPS * REGISTER_ROWS]; 2]);
        for first in (0..steps).step_by(STEPS) {
            let now = STEPS.min(steps - first);
            let lines = first * LINES..self.groups.min((first + now) * LINES);
            for (pair, sums) in self.sums.chunks_mut(2 * self.tokens).enumerate() {
                let (low, high) = sums.split_at_mut(self.tokens);
                let both = !high.is_empty();
                for (j, decoded) in decoded.0[..1 + usize::from(both)].iter_mut().enumerate() {
                    let tile = &self.tiles[(2 * pair + j) * tile_bytes..][..tile_bytes];
                    // SAFETY: the kernel holds the proof of AVX-512 VNNI, which has these features.
                    unsafe { decode(&tile[lines.start * LINE_BYTES..lines.end * LINE_BYTES], decoded) };
                }
                for (i, panel) in panels.chunks_exact(steps * n).enumerate() {
                    let tokens = at + i * n..at + (i + 1) * n;
                    let a = &panel[first * n..][..now * n];
                    let mut step = Steps {
                        a,
                        b: decoded.0.each_ref().map(|b| &b[..now * REGISTER_ROWS]),
                        c: [&mut low[tokens.clone()], if both { &mut high[tokens] } else { &mut [] }],
                        split,
                        fresh: first == 0,
                    };
                    match (split[1] > 0, both) {
                        (false, false) => step.run::<1, 1>(registers),
                        (false, true) => step.run::<1, 2>(registers),
                        (true, false) => step.run::<2, 1>(registers),
                        (true, true) => step.run::<2, 2>(registers),
                    }
                }
            }
        }
    }
}

/// Registers 0 to 3 are C (low and high weight tile for the first tokens, then for the second), 4 and 5 A, 6 and 7 B.
fn config(split: [usize; 2]) -> Config {
    let [first, second] = split.map(|tokens| tokens as u8);
    Config::new([first, first, second, second, first, second, 16, 16])
}

/// Two bits to bytes: rows 4g + p of `out` are the codes at bit pair p of line g. Rows after the last line become zero.
///
/// # Safety
/// AVX-512 F and BW.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn decode(lines: &[u8], out: &mut [Row; STEPS * REGISTER_ROWS]) {
    let mask = _mm512_set1_epi8(3);
    let (quads, rest) = out.split_at_mut(lines.len() / LINE_BYTES * 4);
    for (line, rows) in lines.as_chunks::<LINE_BYTES>().0.iter().zip(quads.as_chunks_mut::<4>().0) {
        // SAFETY: a line and a row have 64 bytes. Bits that cross into the next byte land outside the mask.
        unsafe {
            let w = _mm512_loadu_si512(line.as_ptr().cast());
            let codes = [w, _mm512_srli_epi16::<2>(w), _mm512_srli_epi16::<4>(w), _mm512_srli_epi16::<6>(w)];
            for p in 0..4 {
                _mm512_storeu_si512(rows[p].as_mut_ptr().cast(), _mm512_and_si512(codes[p], mask));
            }
        }
    }
    let open = rest.len() % REGISTER_ROWS;
    rest[..open].fill([0; 16]);
}

/// Some steps of one or two weight tiles times one panel.
struct Steps<'a> {
    /// `[step][token]`.
    a: &'a [Row],
    /// `[step][16]` of each weight tile.
    b: [&'a [Row]; 2],
    /// A row for each token.
    c: [&'a mut [Row]; 2],
    split: [usize; 2],
    /// Whether sums start at zero.
    fresh: bool,
}

impl Steps<'_> {
    /// M registers of tokens, N of weight rows.
    #[inline]
    fn run<const M: usize, const N: usize>(&mut self, t: &mut impl Tiles) {
        let (first, n) = (self.split[0], self.split[0] + self.split[1]);
        let [low, high] = &mut self.c;
        if self.fresh {
            t.zero::<0>();
            if N == 2 {
                t.zero::<1>();
            }
            if M == 2 {
                t.zero::<2>();
                if N == 2 {
                    t.zero::<3>();
                }
            }
        } else {
            t.load::<0>(&low[..first]);
            if N == 2 {
                t.load::<1>(&high[..first]);
            }
            if M == 2 {
                t.load::<2>(&low[first..]);
                if N == 2 {
                    t.load::<3>(&high[first..]);
                }
            }
        }
        let steps = self.a.chunks_exact(n).zip(self.b[0].chunks_exact(REGISTER_ROWS));
        for ((a, b), b2) in steps.zip(self.b[1].chunks_exact(REGISTER_ROWS)) {
            t.load::<4>(&a[..first]);
            t.load::<6>(b);
            t.dot::<0, 4, 6>();
            if N == 2 {
                t.load::<7>(b2);
                t.dot::<1, 4, 7>();
            }
            if M == 2 {
                t.load::<5>(&a[first..]);
                t.dot::<2, 5, 6>();
                if N == 2 {
                    t.dot::<3, 5, 7>();
                }
            }
        }
        t.store::<0>(&mut low[..first]);
        if N == 2 {
            t.store::<1>(&mut high[..first]);
        }
        if M == 2 {
            t.store::<2>(&mut low[first..]);
            if N == 2 {
                t.store::<3>(&mut high[first..]);
            }
        }
    }
}
