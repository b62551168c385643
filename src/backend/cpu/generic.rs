//! The portable kernel: the reference that every other kernel must equal bit for bit.

use super::kernel::{TernaryKernel, check_gemm, check_gemv};
use super::tiles::{LINE_BYTES, TILE_ROWS};

/// Portable Rust, for any CPU.
#[derive(Debug, Clone, Copy)]
pub struct Generic;

/// Adds one line times the four activations of each bit position.
#[inline(always)]
fn add_line(line: &[u8], words: [[i8; 4]; 4], sums: &mut [i32; TILE_ROWS]) {
    for (sum, bytes) in sums.iter_mut().zip(line.chunks_exact(4)) {
        for (p, q) in words.iter().enumerate() {
            for b in 0..4 {
                *sum += i32::from(bytes[b] >> (2 * p) & 3) * i32::from(q[b]);
            }
        }
    }
}

impl TernaryKernel for Generic {
    fn name(&self) -> &'static str {
        "generic"
    }

    fn gemv(&self, tiles: &[u8], groups: usize, q: &[i8], sums: &mut [i32]) {
        check_gemv(tiles, groups, q, sums);
        for (tile, sums) in tiles.chunks_exact(groups * LINE_BYTES).zip(sums.as_chunks_mut().0) {
            *sums = [0; TILE_ROWS];
            for (line, q) in tile.chunks_exact(LINE_BYTES).zip(q.as_chunks::<4>().0.as_chunks::<4>().0) {
                add_line(line, *q, sums);
            }
        }
    }

    fn gemm(&self, tiles: &[u8], groups: usize, panel: &[i32], tokens: usize, sums: &mut [i32]) {
        check_gemm(tiles, groups, panel, tokens, sums);
        let per_tile = sums.chunks_exact_mut(TILE_ROWS * tokens);
        for (tile, sums) in tiles.chunks_exact(groups * LINE_BYTES).zip(per_tile) {
            for (t, sums) in sums.as_chunks_mut().0.iter_mut().enumerate() {
                *sums = [0; TILE_ROWS];
                for (line, words) in tile.chunks_exact(LINE_BYTES).zip(panel.chunks_exact(4 * tokens)) {
                    let word = |p: usize| words[p * tokens + t].to_le_bytes().map(|b| b as i8);
                    add_line(line, std::array::from_fn(word), sums);
                }
            }
        }
    }
}
