//! Grids, threads and threadgroup memory, by the formulas of `kernels/README.md`.

use super::kernels::MAX_THREADGROUP_MEMORY;
pub(super) use crate::backend::gpu::plan::{
    DECODE_TOKENS, THREADS, decode_attention_blocks, decode_attention_shared, padded, row_tiles,
};
use crate::backend::gpu::plan::{form, k_tiles};

/// Threadgroup memory of the norms.
pub(super) const NORM_MEMORY: usize = 128;
/// Threadgroups of a decode product for each core: of the forms that quantise the input themselves, and of the others.
const PER_CORE: [usize; 2] = [4, 8];
/// Positions of a run of split attention, at least.
const RUN: usize = 32;
/// Most runs that a sequence is cut into.
const MAX_SPLITS: usize = 64;
/// Threadgroups for each core that attention is cut into.
const ATTENTION_PER_CORE: usize = 8;

/// Scale and sums of one token's codes.
pub(super) fn stats(cols: usize) -> usize {
    4 + 8 * k_tiles(cols)
}

/// How a decode product runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gemv {
    /// Whether it normalises and quantises its input itself.
    pub quantises: bool,
    pub grid: usize,
    pub threadgroup: usize,
}

/// The decode product of up to 8 tokens: one launch that does all, where threadgroup memory holds the input's codes, else one
/// over quantised rows.
pub(super) fn gemv(cores: usize, row_tiles: usize, k: usize, tokens: usize) -> Gemv {
    let quantised = tokens * (2 * padded(k) + size_of::<f32>() * stats(k)) + 128;
    let plan = |quantises: bool, grid: usize| {
        let grid = grid.clamp(1, row_tiles.max(1));
        let sums = row_tiles.div_ceil(grid) * 64 * form(tokens) + 32 * form(tokens);
        Gemv { quantises, grid, threadgroup: sums + if quantises { quantised } else { 0 } }
    };
    // More threadgroups have fewer sums each; one row tile each always fits without the input.
    let grids = |quantises: bool| [cores * PER_CORE[usize::from(!quantises)], row_tiles].map(|g| plan(quantises, g));
    let fits = |p: &Gemv| p.threadgroup <= MAX_THREADGROUP_MEMORY;
    let [first, _] = grids(true);
    if fits(&first) {
        return first;
    }
    let [some, most] = grids(false);
    if fits(&some) { some } else { most }
}

/// Threads of `bitnet_gemm*`.
pub(super) const GEMM_THREADS: usize = 128;

/// How a prefill product runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gemm {
    /// Whether a threadgroup takes 64 tokens, not 32, which reads the weights half as often.
    pub wide: bool,
    pub grid: (usize, usize, usize),
    pub threadgroup: usize,
}

/// The prefill product of any number of tokens.
pub(super) fn gemm(row_tiles: usize, tokens: usize) -> Gemm {
    let wide = tokens > 32;
    let (span, threadgroup) = if wide { (64, 19_456) } else { (32, 13_824) };
    Gemm { wide, grid: (row_tiles.div_ceil(4), tokens.div_ceil(span), 1), threadgroup }
}

/// Threadgroups of a dense product.
pub(super) fn head_grid(rows: usize) -> usize {
    rows.div_ceil(64).max(1)
}

/// Threads of decode attention and of its second part, and threadgroup memory of that.
pub(super) const ATTENTION_THREADS: usize = 128;
/// Threadgroup memory of `bitnet_decode_combine`.
pub(super) const COMBINE_MEMORY: usize = 512;

/// Runs that a decode attention cuts each sequence into: enough to fill the GPU, none shorter than is worth it.
pub(super) fn splits(cores: usize, longest: usize, groups: usize) -> usize {
    let wanted = (cores * ATTENTION_PER_CORE).div_ceil(groups.max(1));
    longest.div_ceil(RUN).min(wanted).clamp(1, MAX_SPLITS)
}

/// How a prefill attends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Prefill {
    /// Which of the kernel's forms: for heads of up to 64, 128, 256.
    pub form: usize,
    /// Queries of a threadgroup.
    pub queries: usize,
    pub threads: usize,
    pub threadgroup: usize,
}

/// The form of a prefill attention for a head size.
pub(super) fn prefill_attention(head_dim: usize) -> Prefill {
    let (form, queries, threadgroup) = match head_dim {
        0..=64 => (0, 32, 23_040),
        65..=128 => (1, 32, 28_928),
        _ => (2, 16, 26_240),
    };
    Prefill { form, queries, threads: 4 * queries, threadgroup }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_products_fit() {
        for cores in [1, 8, 12, 64] {
            for (n, k, gated) in [
                (3840, 2560, false),
                (2560, 6912, false),
                (6912, 2560, true),
                (1, 1, false),
                (7, 40_000, true),
                (1_000_000, 64, false),
            ] {
                let tiles = row_tiles(n, gated);
                for tokens in 1..=DECODE_TOKENS {
                    let plan = gemv(cores, tiles, k, tokens);
                    assert!((1..=tiles).contains(&plan.grid), "{plan:?}");
                    assert!(
                        plan.threadgroup <= MAX_THREADGROUP_MEMORY && plan.threadgroup.is_multiple_of(16),
                        "{plan:?}"
                    );
                    let sums = tiles.div_ceil(plan.grid) * 64 * form(tokens) + 16 * form(tokens) * 2;
                    let input = tokens * (2 * padded(k) + 4 * (4 + 8 * k_tiles(k))) + 128;
                    assert_eq!(plan.threadgroup, sums + if plan.quantises { input } else { 0 });
                }
            }
        }
        // The down projection of 2B-4T: two tokens in one launch, more in two.
        let down = |tokens| gemv(12, row_tiles(2560, false), 6912, tokens).quantises;
        assert_eq!([1, 2, 3, 8].map(down), [true, true, false, false]);
        assert_eq!(gemv(12, row_tiles(3840, false), 2560, 1).grid, 48);
    }

    #[test]
    fn attention_shapes() {
        assert_eq!(stats(257), 20);
        assert!(decode_attention_shared(256) <= MAX_THREADGROUP_MEMORY);
        assert_eq!([1, 32, 33, 100_000].map(|n| splits(12, n, 5)), [1, 1, 2, 20]);
        assert_eq!((splits(64, 100_000, 1), splits(12, 100_000, 1000), splits(12, 0, 0)), (64, 1, 1));
        let forms = [4, 64, 68, 128, 132, 256].map(|d| prefill_attention(d).form);
        assert_eq!(forms, [0, 0, 1, 1, 2, 2]);
        assert_eq!([64, 256].map(|d| prefill_attention(d).threads), [128, 64]);
        assert_eq!((head_grid(128_256), head_grid(0)), (2004, 1));
    }

    #[test]
    fn prefill_products() {
        assert_eq!(gemm(160, 32), Gemm { wide: false, grid: (40, 1, 1), threadgroup: 13_824 });
        assert_eq!(gemm(161, 65), Gemm { wide: true, grid: (41, 2, 1), threadgroup: 19_456 });
    }
}
