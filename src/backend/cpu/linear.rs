//! The quantised linear on the CPU: splits tiles over threads, runs the kernel, applies scales.

use super::isa::{Isa, per_isa};
use super::kernel::{Line, TernaryKernel, Words};
use super::output::OutputColumns;
use super::pool::Pool;
use super::scratch::{grown, with_scratch};
use super::tiles::{CpuTernary, LINE_BYTES, TILE_ROWS};
use crate::backend::activation::QuantizedRows;
use crate::{Error, Result};

/// Bytes of weights that one decode task reads: some 10 µs, so that a slow core costs little at the end.
const TASK_BYTES: usize = 128 << 10;
/// Most tiles of one decode task.
const TASK_TILES: usize = 16;
/// Most bytes of panels in use at a time, so that they stay in the last level of the caches.
const PANEL_BYTES: usize = 8 << 20;

per_isa! {
    /// `out = (sums − Σq) · factor`, rounded once; or that added to `out`.
    ///
    /// Two roundings in f32 (`/ s_x`, `· scale`) would be errors of two units in the last place in queries and
    /// keys, which the softmax multiplies by the size of the scores; the f64 product also beats the division.
    fn finish(sums: &[i32], q_sum: i32, factor: f64, add: bool, out: &mut [f32]) {
        let value = |acc: &i32| (f64::from(acc - q_sum) * factor) as f32;
        if add {
            for (o, acc) in out.iter_mut().zip(sums) {
                *o += value(acc);
            }
        } else {
            for (o, acc) in out.iter_mut().zip(sums) {
                *o = value(acc);
            }
        }
    }
}

/// `out[t][row] = Σ_k q[t][k] · w[row][k] / s_x[t] · scale(row)`, or that added to it.
pub(super) fn linear(
    kernel: &dyn TernaryKernel,
    isa: Isa,
    pool: &Pool,
    panel: &mut Vec<Line>,
    w: &CpuTernary,
    x: &QuantizedRows,
    out: OutputColumns<'_>,
) -> Result<()> {
    if w.layout() != kernel.layout() {
        return Err(Error::Layout {
            kernel: kernel.name(),
            expected: kernel.layout().name(),
            found: w.layout().name(),
        });
    }
    let (tokens, rows) = (x.rows(), w.rows());
    if x.cols() != w.cols() {
        let reason = format!("weight [{rows}, {}], input [{tokens}, {}]", w.cols(), x.cols());
        return Err(Error::Shape { op: "quantized linear", reason });
    }
    let (width, add) = (out.width, out.add);
    let out = out.begin("quantized linear", tokens, rows)?;
    let tile_bytes = w.groups() * LINE_BYTES;
    // A tile's rows of token `t`: every (tile, token) is written by exactly one task.
    let write = |t: usize, rows: &std::ops::Range<usize>, factor: f64, sums: &[i32]| {
        // SAFETY: rows.end <= all rows and t < tokens, so the range lies inside the output (checked by `begin`), which
        // is borrowed mutably for the whole call; ranges of different (tile, token) do not overlap.
        let out = unsafe { std::slice::from_raw_parts_mut(out.get().add(t * width + rows.start), rows.len()) };
        finish(isa, &sums[..rows.len()], x.sum(t), factor, add, out);
    };
    if tokens == 1 {
        let per_task = (TASK_BYTES / tile_bytes).clamp(1, TASK_TILES);
        pool.run(w.tiles().div_ceil(per_task), &|task| {
            let first = task * per_task;
            let count = per_task.min(w.tiles() - first);
            let mut sums = [0; TASK_TILES * TILE_ROWS];
            let sums = &mut sums[..count * TILE_ROWS];
            kernel.gemv(&w.data()[first * tile_bytes..][..count * tile_bytes], w.groups(), x.readable(0), sums);
            for (i, sums) in sums.chunks_exact(TILE_ROWS).enumerate() {
                let (scale, rows) = w.tile_rows(first + i);
                write(0, &rows, scale.factor(x.scale(0)), sums);
            }
        });
        return Ok(());
    }
    let words = Words(kernel);
    let gemm = kernel.panel_gemm(tokens).unwrap_or(&words);
    // Panels of equal size, the last one may be smaller.
    let size = tokens.div_ceil(tokens.div_ceil(gemm.panel_tokens()));
    let (lines, block) = (gemm.panel_lines(w.groups(), size), gemm.block());
    let at_once = (PANEL_BYTES / (lines * size_of::<Line>()) / block.panels).max(1) * block.panels;
    let tiles = block.tiles.min(w.tiles().div_ceil(4 * pool.threads())).next_multiple_of(block.tile_step);
    for first in (0..tokens).step_by(at_once * size) {
        let last = tokens.min(first + at_once * size);
        let panel = grown(panel, (last - first).div_ceil(size) * lines);
        pool.for_each_chunk(panel, lines, |i, panel| {
            let at = first + i * size;
            gemm.fill(x, at..last.min(at + size), w.groups(), panel);
        });
        let panel = &*panel;
        pool.run(w.tiles().div_ceil(tiles), &|task| {
            let first_tile = tiles * task;
            let count = tiles.min(w.tiles() - first_tile);
            let data = &w.data()[first_tile * tile_bytes..][..count * tile_bytes];
            with_scratch(tiles * block.panels * gemm.panel_tokens() * TILE_ROWS, |sums| {
                let sums = bytemuck::cast_slice_mut::<f32, i32>(sums);
                for (i, panels) in panel.chunks(block.panels * lines).enumerate() {
                    let at = first + i * block.panels * size;
                    let n = (block.panels * size).min(last - at);
                    let sums = &mut sums[..count * n * TILE_ROWS];
                    gemm.multiply(data, w.groups(), panels, size, n, sums);
                    // A token's rows one after the other, so that its output is written in one piece.
                    for t in 0..n {
                        for tile in 0..count {
                            let (scale, rows) = w.tile_rows(first_tile + tile);
                            let sums = &sums[(tile * n + t) * TILE_ROWS..][..TILE_ROWS];
                            write(at + t, &rows, scale.factor(x.scale(at + t)), sums);
                        }
                    }
                }
            });
        });
    }
    Ok(())
}
