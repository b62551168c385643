//! The quantised linear on the CPU: splits tiles over threads, runs the kernel, applies scales.

use super::isa::{Isa, per_isa};
use super::kernel::{Line, TernaryKernel, Words};
use super::norm::{Gate, gate_row};
use super::output::OutputColumns;
use super::pool::Pool;
use super::prefetch;
use super::scratch::{grown, with_scratch};
use super::tiles::{CpuTernary, LINE_BYTES, Run, TILE_ROWS};
use crate::backend::activation::QuantizedRows;
use crate::backend::layout::Arrangement;
use crate::ternary::Scale;
use crate::{Error, Result};

/// The operation's name in errors.
const LINEAR: &str = "quantized linear";
/// Bytes of weights that one decode task reads: some 10 µs, so that a slow core costs little at the end.
const TASK_BYTES: usize = 128 << 10;
/// Most tiles of one decode task.
const TASK_TILES: usize = 16;
/// Least prefill tasks of a thread, so that none waits long for the last one.
const TASKS: usize = 20;
/// Most bytes of panels in use at a time, so that they stay in the last level of the caches.
const PANEL_BYTES: usize = 8 << 20;

/// `(acc − Σq) · factor` of a tile's rows, rounded once.
#[inline(always)]
fn scaled(sums: &[i32; TILE_ROWS], q_sum: i32, factor: f64) -> [f32; TILE_ROWS] {
    let mut out = [0.0; TILE_ROWS];
    for i in 0..TILE_ROWS {
        out[i] = (f64::from(sums[i] - q_sum) * factor) as f32;
    }
    out
}

per_isa! {
    /// `out = (sums − Σq) · factor`, rounded once; or that added to `out`. The sums are 16 of each tile, `stride` apart.
    ///
    /// Two roundings in f32 (`/ s_x`, `· scale`) would be errors of two units in the last place in queries and
    /// keys, which the softmax multiplies by the size of the scores; the f64 product also beats the division.
    fn finish(sums: &[i32], stride: usize, q_sum: i32, factor: f64, add: bool, out: &mut [f32]) {
        let (tiles, rest) = out.as_chunks_mut::<TILE_ROWS>();
        let mut tile_sums = sums.chunks(stride);
        // Whole tiles by arrays, which become whole registers.
        for (out, sums) in tiles.iter_mut().zip(&mut tile_sums) {
            let Some(sums) = sums.first_chunk::<TILE_ROWS>() else { return };
            let values = scaled(sums, q_sum, factor);
            for i in 0..TILE_ROWS {
                out[i] = if add { out[i] + values[i] } else { values[i] };
            }
        }
        let Some(sums) = tile_sums.next().and_then(|sums| sums.first_chunk()) else { return };
        for (out, value) in rest.iter_mut().zip(scaled(sums, q_sum, factor)) {
            *out = if add { *out + value } else { value };
        }
    }
}

per_isa! {
    /// `out = act(gate) · up`, of sums as [`finish`]'s: of gate's tiles and up's in turn.
    fn finish_gated(gate: Gate, sums: &[i32], stride: usize, q_sum: i32, factors: [f64; 2], out: &mut [f32]) {
        let mut tiles = sums.chunks(stride);
        for out in out.chunks_mut(TILE_ROWS) {
            let [Some(g), Some(up)] = [tiles.next(), tiles.next()].map(|tile| tile?.first_chunk::<TILE_ROWS>()) else { return };
            let mut product = [0.0; TILE_ROWS];
            gate_row(gate, &scaled(g, q_sum, factors[0]), &scaled(up, q_sum, factors[1]), &mut product);
            out.copy_from_slice(&product[..out.len()]);
        }
    }
}

/// What becomes of the product `y[t][row] = Σ_k q[t][k] · w[row][k] / s_x[t] · scale(row)`.
#[derive(Debug)]
pub(super) enum Epilogue<'a> {
    /// It is written or added to columns of rows.
    Columns(OutputColumns<'a>),
    /// `act(gate) · up` of its two halves is; the weight is packed as gate and up.
    Gated(Gate, &'a mut [f32]),
}

/// Quantised rows times a packed weight, and what becomes of that.
pub(super) fn linear(
    kernel: &dyn TernaryKernel,
    isa: Isa,
    pool: &Pool,
    panel: &mut Vec<Line>,
    w: &CpuTernary,
    x: &QuantizedRows,
    epilogue: Epilogue<'_>,
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
        return Err(Error::Shape { op: LINEAR, reason });
    }
    let (op, arrangement, gate, out) = match epilogue {
        Epilogue::Columns(out) => (LINEAR, Arrangement::Stacked, None, out),
        Epilogue::Gated(gate, out) => {
            ("gated linear", Arrangement::GateUp, Some(gate), OutputColumns::whole(out, rows / 2))
        }
    };
    if w.arrangement() != arrangement {
        let reason = format!("a weight packed as {:?}, not as {arrangement:?}", w.arrangement());
        return Err(Error::Shape { op, reason });
    }
    let step = arrangement.tile_step();
    let (width, add) = (out.width, out.add);
    let out = out.begin(op, tokens, rows / step)?;
    let tile_bytes = w.groups() * LINE_BYTES;
    // Token `t`'s rows of a run of tiles: every (tile, token) is written by exactly one task.
    let write = |t: usize, run: &Run, sums: &[i32], stride: usize| {
        let columns = &run.columns;
        // SAFETY: columns.end <= all columns and t < tokens, so the range lies inside the output (checked by `begin`), which
        // is borrowed mutably for the whole call; ranges of different (tile, token) do not overlap.
        let out = unsafe { std::slice::from_raw_parts_mut(out.get().add(t * width + columns.start), columns.len()) };
        let factor = |scale: Scale| scale.factor(x.scale(t));
        match gate {
            Some(gate) => finish_gated(isa, gate, sums, stride, x.sum(t), run.scales.map(factor), out),
            None => finish(isa, sums, stride, x.sum(t), factor(run.scales[0]), add, out),
        }
    };
    if tokens == 1 {
        let per_task = (TASK_BYTES / tile_bytes).clamp(1, TASK_TILES).next_multiple_of(step);
        pool.run(w.tiles().div_ceil(per_task), &|task| {
            let first = task * per_task;
            let count = per_task.min(w.tiles() - first);
            let mut sums = [0; TASK_TILES * TILE_ROWS];
            let sums = &mut sums[..count * TILE_ROWS];
            kernel.gemv(&w.data()[first * tile_bytes..][..count * tile_bytes], w.groups(), x.readable(0), sums);
            for run in w.runs(first..first + count) {
                write(0, &run, &sums[(run.tiles.start - first) * TILE_ROWS..], TILE_ROWS);
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
    let terms = w.row_terms(gemm, pool);
    let tiles = block.tiles.min(w.tiles().div_ceil(TASKS * pool.threads())).next_multiple_of(block.tile_step.max(step));
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
            let weights = w.weight_tiles(first_tile..first_tile + count, terms);
            with_scratch(tiles * block.panels * gemm.panel_tokens() * TILE_ROWS, |sums| {
                let sums = bytemuck::cast_slice_mut::<f32, i32>(sums);
                for (i, panels) in panel.chunks(block.panels * lines).enumerate() {
                    let at = first + i * block.panels * size;
                    let n = (block.panels * size).min(last - at);
                    let sums = &mut sums[..count * n * TILE_ROWS];
                    // Every token's rows lie in another page, and have left the caches by now.
                    for run in w.runs(first_tile..first_tile + count) {
                        for t in at..at + n {
                            for column in run.columns.clone().step_by(TILE_ROWS) {
                                prefetch::to_write(out.get().wrapping_add(t * width + column));
                            }
                        }
                    }
                    gemm.multiply(weights, panels, size, n, sums);
                    // A token's rows one after the other, so that its output is written in one piece.
                    for run in w.runs(first_tile..first_tile + count) {
                        for t in 0..n {
                            let at_sums = ((run.tiles.start - first_tile) * n + t) * TILE_ROWS;
                            write(at + t, &run, &sums[at_sums..], n * TILE_ROWS);
                        }
                    }
                }
            });
        });
    }
    Ok(())
}
