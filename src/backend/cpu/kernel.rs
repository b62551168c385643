//! The interface of the ternary CPU kernels, and their choice at run time.

use super::packing::Packing;
use super::tiles::{LINE_BYTES, LINE_COLS, TILE_ROWS};
use crate::backend::activation::QuantizedRows;
use crate::backend::layout::LayoutId;
use crate::{Error, Result};
use std::ops::Range;

/// Most tokens that a kernel multiplies in one pass of [`TernaryKernel::gemm`].
pub const MAX_TOKENS: usize = 12;

/// An instruction set's products of tiles and quantised activations.
///
/// An implementation is proof that its CPU features exist: it can only be made by a constructor that checked.
/// Sums are `Σ q · code` with codes {0, 1, 2}; the caller subtracts `Σ q`, which removes the −1.
pub trait TernaryKernel: Send + Sync + std::fmt::Debug {
    /// The kernel's name, as `--kernel` takes it.
    fn name(&self) -> &'static str;

    /// The packing that it reads.
    fn packing(&self) -> Packing {
        Packing::TwoBits
    }

    /// The layout that it reads.
    fn layout(&self) -> LayoutId {
        self.packing().layout()
    }

    /// Decode: whole tiles of `groups` lines times one token's codes; `sums` gets 16 sums a tile.
    ///
    /// `tiles` holds `sums.len() / 16 · groups` lines, `q` at least a line's columns times `groups` codes; those past the
    /// weight's columns may be anything, their weights have code 0.
    fn gemv(&self, tiles: &[u8], groups: usize, q: &[i8], sums: &mut [i32]);

    /// Prefill: whole tiles times `tokens` ≤ 12 tokens; `sums` is `[tile][token][16]`.
    ///
    /// `panel` holds `[words][tokens]` words of four consecutive codes of a token each, `words` as many as `groups` lines
    /// have columns / 4.
    fn gemm(&self, tiles: &[u8], groups: usize, panel: &[i32], tokens: usize, sums: &mut [i32]);

    /// Prefill by other panels than [`TernaryKernel::gemm`]'s, where that is faster for so many tokens.
    fn panel_gemm(&self, _tokens: usize) -> Option<&dyn PanelGemm> {
        None
    }
}

/// 64 bytes of a panel, aligned as vectors are.
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub struct Line(pub [i32; 16]);

/// What one call of [`PanelGemm::multiply`] takes at most.
#[derive(Debug, Clone, Copy)]
pub struct Block {
    /// Tiles of 16 rows; a multiple of [`Block::tile_step`].
    pub tiles: usize,
    /// Tiles that belong together: a call gets a multiple of this, except for the last tiles of a weight.
    pub tile_step: usize,
    /// Panels.
    pub panels: usize,
}

/// Tiles of a weight.
#[derive(Debug, Clone, Copy)]
pub struct WeightTiles<'a> {
    /// Their lines.
    pub data: &'a [u8],
    /// Lines of a tile.
    pub groups: usize,
    /// Their [`PanelGemm::row_terms`], if there are any.
    pub terms: &'a [[i32; TILE_ROWS]],
}

/// Prefill: several tokens' codes are laid out as a kernel wants them, a panel of tokens at a time, and multiplied with
/// blocks of tiles.
pub trait PanelGemm: Sync {
    /// Most tokens of a panel.
    fn panel_tokens(&self) -> usize;

    /// Size of a panel of so many tokens for weights of so many lines a tile.
    fn panel_lines(&self, groups: usize, tokens: usize) -> usize;

    /// The largest product of one call.
    fn block(&self) -> Block;

    /// Lays out the codes of some rows, at most [`PanelGemm::panel_tokens`]; every byte of `panel` is written that
    /// [`PanelGemm::multiply`] reads.
    fn fill(&self, x: &QuantizedRows, rows: Range<usize>, groups: usize, panel: &mut [Line]);

    /// Whether [`PanelGemm::multiply`] needs [`PanelGemm::row_terms`].
    fn has_row_terms(&self) -> bool {
        false
    }

    /// What the product needs of a tile's rows beside their codes: a function of codes and packing alone, computed once for a
    /// weight.
    fn row_terms(&self, _tile: &[u8], _groups: usize) -> [i32; TILE_ROWS] {
        [0; TILE_ROWS]
    }

    /// Whole tiles times panels of `tokens` tokens in all, each but the last of `size`,
    /// one after the other; `sums` is `[tile][token][16]`, as [`TernaryKernel::gemm`]'s.
    fn multiply(&self, tiles: WeightTiles<'_>, panels: &[Line], size: usize, tokens: usize, sums: &mut [i32]);
}

/// [`TernaryKernel::gemm`] and its panels: `[words][tokens]` words of four consecutive codes of a token each.
#[derive(Debug)]
pub struct Words<'a>(pub &'a dyn TernaryKernel);

impl Words<'_> {
    /// Words of a token that `groups` lines meet.
    fn words(&self, groups: usize) -> usize {
        groups * self.0.packing().line_cols() / 4
    }
}

impl PanelGemm for Words<'_> {
    fn panel_tokens(&self) -> usize {
        MAX_TOKENS
    }

    fn panel_lines(&self, groups: usize, tokens: usize) -> usize {
        (self.words(groups) * tokens).div_ceil(16)
    }

    fn block(&self) -> Block {
        Block { tiles: 8, tile_step: 2, panels: 1 }
    }

    fn fill(&self, x: &QuantizedRows, rows: Range<usize>, groups: usize, panel: &mut [Line]) {
        let (panel, count) = (bytemuck::cast_slice_mut::<Line, i32>(panel), rows.len());
        for (t, row) in rows.enumerate() {
            for (k, four) in x.readable(row).as_chunks::<4>().0[..self.words(groups)].iter().enumerate() {
                panel[k * count + t] = i32::from_le_bytes(four.map(|q| q as u8));
            }
        }
    }

    fn multiply(&self, tiles: WeightTiles<'_>, panels: &[Line], size: usize, tokens: usize, sums: &mut [i32]) {
        assert!(tokens <= size, "one panel");
        self.0.gemm(tiles.data, tiles.groups, bytemuck::cast_slice(panels), tokens, sums);
    }
}

/// Checks the operands' sizes once per call, so that kernels may read without bounds checks.
#[inline]
pub(super) fn check_gemv(tiles: &[u8], groups: usize, q: &[i8], sums: &[i32]) {
    let count = sums.len() / TILE_ROWS;
    assert!(sums.len().is_multiple_of(TILE_ROWS), "whole tiles");
    assert!(tiles.len() == count * groups * LINE_BYTES && q.len() >= groups * LINE_COLS, "operand sizes");
}

/// As [`check_gemv`], for a product with several tokens.
#[inline]
pub(super) fn check_gemm(tiles: &[u8], groups: usize, panel: &[i32], tokens: usize, sums: &[i32]) {
    assert!((1..=MAX_TOKENS).contains(&tokens), "1 to {MAX_TOKENS} tokens");
    let count = sums.len() / (TILE_ROWS * tokens);
    assert!(sums.len() == count * TILE_ROWS * tokens, "whole tiles");
    assert!(tiles.len() == count * groups * LINE_BYTES && panel.len() >= groups * 4 * tokens, "operand sizes");
}

/// The ternary kernels of this crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KernelKind {
    /// Portable Rust.
    Generic,
    /// x86-64 `maddubs` + `madd`.
    Avx2,
    /// x86-64 256-bit `vpdpbusd`.
    AvxVnni,
    /// x86-64 512-bit `vpdpbusd`.
    Avx512Vnni,
    /// x86-64 512-bit `vpdpbusd` of weights at 1.6 bits, decoded by `vpermi2b`.
    Avx512Vbmi,
    /// x86-64 512-bit `vpdpbusd` in decode, AMX tiles in prefill.
    AmxInt8,
    /// aarch64 widening multiplies.
    Neon,
    /// aarch64 `sdot`.
    NeonDotprod,
    /// aarch64 `sdot` in decode, `smmla` in prefill.
    NeonI8mm,
}

impl KernelKind {
    /// All kernels, fastest first within an architecture.
    pub const ALL: [Self; 9] = [
        Self::AmxInt8,
        Self::Avx512Vbmi,
        Self::Avx512Vnni,
        Self::AvxVnni,
        Self::Avx2,
        Self::NeonI8mm,
        Self::NeonDotprod,
        Self::Neon,
        Self::Generic,
    ];

    /// The name that `--kernel` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Generic => "generic",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx-vnni",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx512Vbmi => "avx512-vbmi",
            Self::AmxInt8 => "amx-int8",
            Self::Neon => "neon",
            Self::NeonDotprod => "neon-dotprod",
            Self::NeonI8mm => "neon-i8mm",
        }
    }

    /// The CPU features that it needs.
    pub fn needs(self) -> &'static str {
        match self {
            Self::Generic => "nothing",
            Self::Avx2 => "x86-64 with AVX2",
            Self::AvxVnni => "x86-64 with AVX2 and AVX-VNNI",
            Self::Avx512Vnni => "x86-64 with AVX-512 F, BW and VNNI",
            Self::Avx512Vbmi => "x86-64 with AVX-512 F, BW, VNNI and VBMI",
            Self::AmxInt8 => "x86-64 with AVX-512 F, BW and VNNI, AMX for bytes, and Linux's leave to use it",
            Self::Neon => "aarch64 with NEON",
            Self::NeonDotprod => "aarch64 with NEON and dotprod",
            Self::NeonI8mm => "aarch64 with NEON, dotprod and i8mm",
        }
    }

    /// The kernel, if this CPU can run it.
    pub fn instance(self) -> Option<Box<dyn TernaryKernel>> {
        #[cfg(target_arch = "aarch64")]
        use super::aarch64::{Neon, NeonDotprod, NeonI8mm};
        #[cfg(target_arch = "x86_64")]
        use super::x86_64::{AmxInt8, Avx2, Avx512Vbmi, Avx512Vnni, AvxVnni};
        fn boxed<K: TernaryKernel + 'static>(k: Option<K>) -> Option<Box<dyn TernaryKernel>> {
            k.map(|k| Box::new(k) as Box<dyn TernaryKernel>)
        }
        match self {
            Self::Generic => boxed(Some(super::generic::Generic)),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => boxed(Avx2::new()),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => boxed(AvxVnni::new()),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => boxed(Avx512Vnni::new()),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vbmi => boxed(Avx512Vbmi::new()),
            #[cfg(target_arch = "x86_64")]
            Self::AmxInt8 => boxed(AmxInt8::new()),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => boxed(Neon::new()),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDotprod => boxed(NeonDotprod::new()),
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm => boxed(NeonI8mm::new()),
            _ => None,
        }
    }

    /// The kernels that this CPU can run, fastest first.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|k| k.instance().is_some()).collect()
    }
}

impl std::fmt::Display for KernelKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for KernelKind {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|k| k.name() == s).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|k| k.name()).collect();
            Error::request("--kernel", format!("'{s}' is not a kernel; one of {}", names.join(", ")))
        })
    }
}
