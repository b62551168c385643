//! A kernel's first products with weights that were just packed, against the reference.

use super::generic::Generic;
use super::kernel::{Line, PanelGemm, TernaryKernel, WeightTiles, Words};
use super::tiles::{CpuTernary, LINE_BYTES, LINE_COLS, TILE_ROWS};
use crate::backend::activation::{QuantizedRows, row_stride};
use crate::{Error, Result};

/// Tokens of the prefill that is compared with the reference.
const TOKENS: usize = 3;
/// Tokens of a prefill for which a kernel that has panels uses them.
const MANY: usize = 64;
/// Tiles that go through panels.
const TILES: usize = 2;

/// Runs the first tile through this kernel and through the reference, and the first two through a whole panel of this
/// kernel, if it has panels.
///
/// # Errors
/// [`Error::SelfCheck`] if a sum differs.
pub(super) fn self_check(kernel: &dyn TernaryKernel, w: &CpuTernary) -> Result<()> {
    let groups = w.groups();
    let tile = &w.data()[..groups * LINE_BYTES];
    let mut codes = codes();
    // The reference reads two bits.
    let reference = w.packing().to_two_bits(tile);
    let lines = reference.len() / LINE_BYTES;
    let q: Vec<i8> = (0..lines * LINE_COLS).map(|_| codes()).collect();
    let words = q.as_chunks::<4>().0.iter().map(|w| i32::from_le_bytes(w.map(|q| q as u8)));
    let panel: Vec<i32> = words.flat_map(|w| [w, w.rotate_left(8), w.rotate_left(16)]).collect();
    let sums = |kernel: &dyn TernaryKernel, tile: &[u8], groups: usize| {
        let mut sums = vec![0; (1 + TOKENS) * TILE_ROWS];
        let (one, many) = sums.split_at_mut(TILE_ROWS);
        kernel.gemv(tile, groups, &q, one);
        kernel.gemm(tile, groups, &panel, TOKENS, many);
        sums
    };
    compare(kernel, w, &sums(kernel, tile, groups), &sums(&Generic, &reference, lines))?;
    let Some(gemm) = kernel.panel_gemm(MANY) else { return Ok(()) };
    let (tokens, stride) = (gemm.panel_tokens(), row_stride(w.cols()));
    let mut rows = vec![0; tokens * stride];
    for row in rows.chunks_exact_mut(stride) {
        row[..w.cols()].fill_with(|| codes() as u8);
    }
    let x = QuantizedRows::new(&rows, w.cols())?;
    compare(kernel, w, &product(gemm, w, &x), &product(&Words(kernel), w, &x))
}

/// Activations that look random, of all magnitudes.
fn codes() -> impl FnMut() -> i8 {
    let mut state = 0x9e37_79b9u32;
    move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (((state >> 16) % 255) as i32 - 127) as i8
    }
}

/// The sums of the first tiles, `[tile][token][16]`, a panel at a time.
fn product(gemm: &dyn PanelGemm, w: &CpuTernary, x: &QuantizedRows) -> Vec<i32> {
    let (groups, tiles, tokens) = (w.groups(), w.tiles().min(TILES), x.rows());
    let data = &w.data()[..tiles * groups * LINE_BYTES];
    let terms: Vec<_> = data.chunks_exact(groups * LINE_BYTES).map(|tile| gemm.row_terms(tile, groups)).collect();
    let weights = WeightTiles { data, groups, terms: &terms };
    let mut all = vec![0; tiles * tokens * TILE_ROWS];
    for first in (0..tokens).step_by(gemm.panel_tokens()) {
        let n = gemm.panel_tokens().min(tokens - first);
        let mut panel = vec![Line::default(); gemm.panel_lines(groups, n)];
        gemm.fill(x, first..first + n, groups, &mut panel);
        let mut sums = vec![0; tiles * n * TILE_ROWS];
        gemm.multiply(weights, &panel, n, n, &mut sums);
        for (all, sums) in all.chunks_exact_mut(tokens * TILE_ROWS).zip(sums.chunks_exact(n * TILE_ROWS)) {
            all[first * TILE_ROWS..][..sums.len()].copy_from_slice(sums);
        }
    }
    all
}

fn compare(kernel: &dyn TernaryKernel, w: &CpuTernary, got: &[i32], want: &[i32]) -> Result<()> {
    match got.iter().zip(want).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(i) => Err(Error::SelfCheck {
            kernel: kernel.name(),
            reason: format!("{} columns, sum {i}: {} instead of {}", w.cols(), got[i], want[i]),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Arrangement;
    use crate::backend::cpu::kernel::Block;
    use crate::backend::cpu::packing::Packing;
    use crate::backend::cpu::pool::Pool;
    use crate::ternary::{PackedTernary, Scale};
    use std::ops::Range;

    /// The reference with an error in one of its products.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Wrong {
        Nowhere,
        Decode,
        Prefill,
        Panels,
    }

    impl Wrong {
        fn spoil(self, here: Self, sums: &mut [i32]) {
            if let (true, Some(last)) = (self == here, sums.last_mut()) {
                *last += 1;
            }
        }
    }

    impl TernaryKernel for Wrong {
        fn name(&self) -> &'static str {
            "wrong"
        }
        fn gemv(&self, tiles: &[u8], groups: usize, q: &[i8], sums: &mut [i32]) {
            Generic.gemv(tiles, groups, q, sums);
            self.spoil(Self::Decode, sums);
        }
        fn gemm(&self, tiles: &[u8], groups: usize, panel: &[i32], tokens: usize, sums: &mut [i32]) {
            Generic.gemm(tiles, groups, panel, tokens, sums);
            self.spoil(Self::Prefill, sums);
        }
        fn panel_gemm(&self, _tokens: usize) -> Option<&dyn PanelGemm> {
            Some(self)
        }
    }

    impl PanelGemm for Wrong {
        fn panel_tokens(&self) -> usize {
            7
        }
        fn panel_lines(&self, groups: usize, tokens: usize) -> usize {
            Words(&Generic).panel_lines(groups, tokens)
        }
        fn block(&self) -> Block {
            Words(&Generic).block()
        }
        fn fill(&self, x: &QuantizedRows, rows: Range<usize>, groups: usize, panel: &mut [Line]) {
            Words(&Generic).fill(x, rows, groups, panel);
        }
        fn multiply(&self, tiles: WeightTiles<'_>, panels: &[Line], size: usize, tokens: usize, sums: &mut [i32]) {
            Words(&Generic).multiply(tiles, panels, size, tokens, sums);
            self.spoil(Self::Panels, sums);
        }
    }

    fn weight(rows: usize, cols: usize, packing: Packing) -> CpuTernary {
        let values: Vec<i8> = (0..rows * cols).map(|k| (k * k % 3) as i8 - 1).collect();
        let w = PackedTernary::from_weights(rows, cols, &values, Scale::Multiply(1.0)).unwrap();
        CpuTernary::pack(&[w], Arrangement::Stacked, packing, &Pool::new(1)).unwrap()
    }

    #[test]
    fn a_wrong_product_is_found_wherever_it_is() {
        for rows in [1, 16, 40] {
            let w = weight(rows, 100, Packing::TwoBits);
            assert!(self_check(&Wrong::Nowhere, &w).is_ok());
            for wrong in [Wrong::Decode, Wrong::Prefill, Wrong::Panels] {
                let found = self_check(&wrong, &w);
                assert!(matches!(found, Err(Error::SelfCheck { kernel: "wrong", .. })), "{wrong:?} {rows}: {found:?}");
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn kernels_of_other_packings_and_panels_pass() {
        use crate::backend::cpu::x86_64::{Amx, Avx512Vbmi, Model};
        for (rows, cols) in [(1, 1), (16, 64), (33, 333)] {
            if let Some(kernel) = Avx512Vbmi::new() {
                self_check(&kernel, &weight(rows, cols, Packing::Base3)).unwrap();
            }
            if let Some(kernel) = Amx::<Model>::new() {
                self_check(&kernel, &weight(rows, cols, Packing::TwoBits)).unwrap();
            }
        }
    }
}
