//! Grids, blocks and shared memory, by the formulas of `kernels/README.md`.

use super::Chip;

use crate::backend::gpu::plan::k_tiles;
pub(super) use crate::backend::gpu::plan::{
    DECODE_TOKENS, THREADS, decode_attention_blocks, decode_attention_shared, padded, row_tiles,
};

/// Shared memory of `bitnet_norm_quantise`.
pub(super) const QUANTISE_SHARED: usize = 384;
/// Shared memory of `bitnet_rmsnorm`.
pub(super) const RMS_NORM_SHARED: usize = 128;
/// Bucket of the shortest sequences.
const SHORTEST_BUCKET: usize = 256;
/// Most runs that a sequence is cut into.
const MAX_SPLITS: usize = 64;
/// Most runs of all tokens of a decode attention together, where there is more than one a token.
const MAX_RUNS: usize = DECODE_TOKENS * MAX_SPLITS;

/// Threads for one row of `k` values.
pub(super) fn row_threads(k: usize) -> usize {
    if k >= 2048 { 512 } else { k.div_ceil(4).next_multiple_of(32).clamp(32, 512) }
}

/// How a decode product runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gemv {
    /// Tokens of a launch.
    pub tokens: usize,
    pub grid: usize,
    pub block: usize,
    pub shared: usize,
}

/// Shared memory of `bitnet_gemv*`.
fn gemv_shared(tokens: usize, k: usize, row_tiles: usize, grid: usize) -> usize {
    tokens * (padded(k) + 16) + row_tiles.div_ceil(grid) * 512 + 448
}

/// The decode product of up to `tokens` tokens; none if a chip's shared memory does not hold even one.
pub(super) fn gemv(chip: &Chip, row_tiles: usize, k: usize, tokens: usize) -> Option<Gemv> {
    // Where launches overlap, the second place on a multiprocessor is for the next kernel, which fetches its weights
    // there; elsewhere two blocks hide each other's quantisation. The last choice has the fewest sums in a block.
    let per_multiprocessor: &[usize] = if chip.overlaps_launches() { &[1] } else { &[2, 1] };
    let grids = per_multiprocessor.iter().map(|n| (chip.multiprocessors * n, *n)).chain([(row_tiles, 1)]);
    for tokens in (1..=tokens.min(DECODE_TOKENS)).rev() {
        for (blocks, resident) in grids.clone() {
            let grid = blocks.min(row_tiles).max(1);
            let shared = gemv_shared(tokens, k, row_tiles, grid);
            if chip.fits(shared, resident) {
                // A warp for each tile of a block, and enough threads to quantise its rows.
                let tiles = row_tiles.div_ceil(grid) * k_tiles(k);
                let block = if k >= 2048 { 512 } else { 32 * tiles.clamp(4, 16) };
                return Some(Gemv { tokens, grid, block, shared });
            }
        }
    }
    None
}

/// How a prefill product runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gemm {
    /// Whether a block takes 128 tokens, not 64.
    pub wide: bool,
    pub grid: (usize, usize, usize),
    pub shared: usize,
}

/// Threads of a block of `bitnet_gemm*`.
pub(super) const GEMM_THREADS: usize = 256;

pub(super) fn gemm(chip: &Chip, row_tiles: usize, tokens: usize) -> Gemm {
    const NARROW_SHARED: usize = 49_152;
    const WIDE_SHARED: usize = 81_920;
    let rows = row_tiles.div_ceil(8);
    // 128 tokens read the weights half as often, as long as there are blocks for all multiprocessors.
    let wide = chip.is_ampere()
        && chip.fits(WIDE_SHARED, 1)
        && tokens > 64
        && rows * tokens.div_ceil(128) >= chip.multiprocessors;
    let (span, shared) = if wide { (128, WIDE_SHARED) } else { (64, NARROW_SHARED) };
    Gemm { wide, grid: (rows, tokens.div_ceil(span), 1), shared }
}

/// How a dense product runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    /// Tokens that a block holds: 1, 2, 4 or 8, the suffix of the kernel's name.
    pub tokens: usize,
    pub grid: usize,
    pub shared: usize,
}

/// Rows that a warp takes at a time.
const HEAD_ROWS: usize = 4;

/// A dense product of up to `tokens` tokens with elements of `element` bytes; none if shared memory does not hold a token.
pub(super) fn head(chip: &Chip, element: usize, rows: usize, cols: usize, tokens: usize) -> Option<Head> {
    // 32 lanes of 16 bytes.
    let step = 512 / element;
    let shared = |tokens: usize| tokens * cols.div_ceil(step) * step * size_of::<f32>();
    let smallest = tokens.clamp(1, DECODE_TOKENS).next_power_of_two();
    let tokens = [8, 4, 2, 1].into_iter().find(|t| *t <= smallest && chip.fits(shared(*t), 1))?;
    let resident = [4, 3, 2].into_iter().find(|n| chip.fits(shared(tokens), *n)).unwrap_or(1);
    let blocks = rows.div_ceil(HEAD_ROWS * THREADS / 32);
    Some(Head { tokens, grid: blocks.clamp(1, resident * chip.multiprocessors), shared: shared(tokens) })
}

/// The class of lengths that one captured graph serves: `longest` rounded up to a power of two, at least 256.
pub(super) fn bucket(longest: usize) -> usize {
    longest.max(SHORTEST_BUCKET).checked_next_power_of_two().unwrap_or(usize::MAX)
}

/// Runs that a decode attention cuts each sequence into: one for 32 positions of the bucket, up to 64, and fewer where many
/// tokens fill the chip anyway.
pub(super) fn splits(bucket: usize, tokens: usize) -> usize {
    (bucket / 32).min(MAX_RUNS / tokens.max(1)).clamp(1, MAX_SPLITS)
}

/// Shared memory of `bitnet_prefill_attention_*` in f32.
pub(super) fn prefill_attention_shared(head_dim: usize) -> usize {
    (64 * (head_dim + 4) + 1152) * 4
}

/// Shared memory of the matrix-unit form, for the head sizes that have one.
pub(super) fn matrix_attention_shared(head_dim: usize) -> Option<usize> {
    match head_dim {
        64 | 96 | 128 => Some(256 * (2 * head_dim + 16)),
        256 => Some(133_120),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::chip::tests::chip;
    use super::*;

    const CHIPS: [(u32, u32); 5] = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0)];

    #[test]
    fn decode_products_fit_every_chip() {
        for compute in CHIPS {
            let chip = chip(compute);
            for (n, k, gated) in
                [(3840, 2560, false), (2560, 6912, false), (6912, 2560, true), (1, 1, false), (7, 40_000, true)]
            {
                let tiles = row_tiles(n, gated);
                for tokens in 1..=8 {
                    let plan = gemv(&chip, tiles, k, tokens).unwrap();
                    assert!((1..=tokens).contains(&plan.tokens) && (1..=tiles).contains(&plan.grid), "{plan:?}");
                    assert!((32..=512).contains(&plan.block) && plan.block.is_multiple_of(32), "{plan:?}");
                    assert_eq!(
                        plan.shared,
                        plan.tokens * (k.div_ceil(256) * 256 + 16) + tiles.div_ceil(plan.grid) * 512 + 448
                    );
                    assert!(plan.shared <= chip.shared_per_block);
                }
            }
        }
        let h100 = gemv(&chip((9, 0)), row_tiles(2560, false), 6912, 8).unwrap();
        assert_eq!((h100.tokens, h100.grid, h100.block), (8, 132, 512));
        // 7.5 holds 8 tokens of 6912 codes; of 40,000 one; of 132,104 none.
        let turing = chip((7, 5));
        assert_eq!(gemv(&turing, 160, 6912, 8).unwrap().tokens, 8);
        assert_eq!(gemv(&turing, 160, 40_000, 8).unwrap().tokens, 1);
        assert_eq!(gemv(&turing, 160, 132_104, 1), None);
    }

    #[test]
    fn prefill_products_fit_every_chip() {
        assert_eq!(gemm(&chip((7, 5)), 160, 1000), Gemm { wide: false, grid: (20, 16, 1), shared: 49_152 });
        assert_eq!(gemm(&chip((9, 0)), 160, 1000), Gemm { wide: true, grid: (20, 8, 1), shared: 81_920 });
        assert_eq!(gemm(&chip((9, 0)), 160, 128), Gemm { wide: false, grid: (20, 2, 1), shared: 49_152 });
        assert_eq!(gemm(&chip((9, 0)), 1, 1).grid, (1, 1, 1));
    }

    #[test]
    fn dense_products_fit_every_chip() {
        for compute in CHIPS {
            let chip = chip(compute);
            for (element, step) in [(2, 256), (4, 128)] {
                for tokens in 1..20 {
                    let plan = head(&chip, element, 128_256, 2560, tokens).unwrap();
                    assert_eq!(plan.shared, plan.tokens * 2560usize.div_ceil(step) * step * 4);
                    assert!(plan.shared <= chip.shared_per_block && plan.grid <= 4 * chip.multiprocessors);
                }
            }
            assert_eq!(head(&chip, 4, 10, 100_000, 1), None);
        }
        assert_eq!(head(&chip((7, 5)), 2, 1000, 2560, 8).unwrap().tokens, 4);
        assert_eq!(head(&chip((9, 0)), 2, 128_256, 2560, 3).unwrap().tokens, 4);
        assert_eq!(head(&chip((9, 0)), 2, 5, 2560, 1).unwrap().grid, 1);
    }

    #[test]
    fn buckets_and_splits() {
        assert_eq!([0, 1, 256, 257, 4096].map(bucket), [256, 256, 256, 512, 4096]);
        assert_eq!([256, 512, 2048, 1 << 20].map(|b| splits(b, 1)), [8, 16, 64, 64]);
        assert_eq!(splits(4096, 8), 64);
        assert_eq!(splits(4096, 16), 32);
        assert_eq!(splits(4096, 100_000), 1);
        for tokens in 1..2000 {
            assert!(splits(1 << 17, tokens) == 1 || tokens * splits(1 << 17, tokens) <= 512);
        }
    }

    #[test]
    fn attention_shapes() {
        assert!(decode_attention_shared(256) <= super::super::images::PLAIN_SHARED);
        assert_eq!(prefill_attention_shared(256), 71_168);
        assert_eq!([64, 96, 128, 256].map(matrix_attention_shared), [36_864, 53_248, 69_632, 133_120].map(Some));
        assert_eq!(matrix_attention_shared(80), None);
    }

    #[test]
    fn threads_of_a_row() {
        assert_eq!([1, 128, 129, 1000, 2047, 2048, 6912].map(row_threads), [32, 32, 64, 256, 512, 512, 512]);
    }
}
