//! Ternary weights as the CPU kernels read them: tiles of 16 rows, each a run of 64-byte lines (`packing.rs`).

use crate::backend::host::AlignedBuffer;
use crate::backend::layout::{Arrangement, LayoutId};
use crate::ternary::{PackedTernary, Scale};
use crate::{Error, Result};
use std::ops::Range;
use std::sync::OnceLock;

use super::kernel::{PanelGemm, WeightTiles};
use super::packing::Packing;
use super::pool::Pool;

/// Rows of a tile.
pub const TILE_ROWS: usize = 16;
/// Columns of a line at two bits a code.
pub const LINE_COLS: usize = 16;
/// Bytes of a line.
pub const LINE_BYTES: usize = 64;
/// Most columns for which every accumulator stays below 2^24, exact in f32 too: |acc| ≤ 127·K.
pub const MAX_COLS: usize = 132_104;

/// A run of rows with one scale: one of several weights that share their input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Segment {
    /// Rows of this weight.
    pub rows: usize,
    /// Its scale.
    pub scale: Scale,
    /// Its first row in the output.
    pub first_row: usize,
    /// Its first tile. The next ones follow; of a gate and an up, they take turns.
    pub first_tile: usize,
}

/// Tiles that follow each other and have the same scales.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Run {
    /// The tiles.
    pub tiles: Range<usize>,
    /// What they give in the output: a row each, or one of a row of gate and one of up.
    pub columns: Range<usize>,
    /// The scale of the first tile and every second one, and of those between them.
    pub scales: [Scale; 2],
}

/// One or more ternary matrices over the same input, packed for the CPU kernels.
#[derive(Debug)]
pub struct CpuTernary {
    packing: Packing,
    arrangement: Arrangement,
    cols: usize,
    rows: usize,
    tiles: usize,
    segments: Vec<Segment>,
    data: AlignedBuffer,
    row_terms: OnceLock<Vec<[i32; TILE_ROWS]>>,
}

/// The first of the `step` segments that a tile belongs to.
fn first_owner(segments: &[Segment], step: usize, tile: usize) -> usize {
    (segments.partition_point(|s| s.first_tile <= tile) - 1) / step * step
}

impl CpuTernary {
    /// Packs `weights` in parallel: tiles of one after those of another, or of gate and up in turn.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is none, their columns differ or exceed [`MAX_COLS`], or as [`Arrangement::check`].
    pub fn pack(weights: &[PackedTernary], arrangement: Arrangement, packing: Packing, pool: &Pool) -> Result<Self> {
        arrangement.check(weights)?;
        let shape_error = |reason| Error::Shape { op: "pack", reason };
        let Some(cols) = weights.first().map(PackedTernary::cols) else {
            return Err(shape_error("no weight to pack".into()));
        };
        if let Some(other) = weights.iter().find(|w| w.cols() != cols) {
            return Err(shape_error(format!("weights of {cols} and {} columns cannot share an input", other.cols())));
        }
        if cols > MAX_COLS {
            return Err(shape_error(format!("{cols} columns exceed {MAX_COLS}, where accumulators stop being exact")));
        }
        let (mut rows, mut tiles, mut segments) = (0, 0, Vec::with_capacity(weights.len()));
        for w in weights {
            let first_tile = match arrangement {
                Arrangement::Stacked => tiles,
                Arrangement::GateUp => segments.len(),
            };
            segments.push(Segment { rows: w.rows(), scale: w.scale(), first_row: rows, first_tile });
            rows += w.rows();
            tiles += w.rows().div_ceil(TILE_ROWS);
        }
        let tile_bytes = cols.div_ceil(packing.line_cols()) * LINE_BYTES;
        let mut data = AlignedBuffer::huge(tiles * tile_bytes)?;
        let step = arrangement.tile_step();
        pool.for_each_chunk(&mut data, tile_bytes, |tile, out| {
            let first = first_owner(&segments, step, tile);
            let within = tile - segments[first].first_tile;
            packing.pack_tile(&weights[first + within % step], within / step * TILE_ROWS, out);
        });
        Ok(Self { packing, arrangement, cols, rows, tiles, segments, data, row_terms: OnceLock::new() })
    }

    /// Layout of the packed bytes.
    pub fn layout(&self) -> LayoutId {
        self.packing.layout()
    }

    /// How the codes lie in the lines.
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// What the weights were packed for.
    pub fn arrangement(&self) -> Arrangement {
        self.arrangement
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Output features of all segments.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The weights that were stacked.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Rows `rows` of all segments as the numbers that they stand for, code times scale, row-major.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are no such rows or `out` is not as large as they are.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        if rows.start > rows.end || rows.end > self.rows || out.len() != rows.len() * self.cols {
            let reason = format!("{} elements for rows {rows:?} of [{}, {}]", out.len(), self.rows, self.cols);
            return Err(Error::Shape { op: "dequantize", reason });
        }
        let tile_bytes = self.groups() * LINE_BYTES;
        for (row, out) in rows.zip(out.chunks_exact_mut(self.cols)) {
            let segment = &self.segments[self.segments.partition_point(|s| s.first_row <= row) - 1];
            let within = row - segment.first_row;
            let tile = segment.first_tile + within / TILE_ROWS * self.arrangement.tile_step();
            let tile = &self.data[tile * tile_bytes..][..tile_bytes];
            let (lane, multiplier) = (within % TILE_ROWS, segment.scale.multiplier());
            for (line, out) in tile.chunks_exact(LINE_BYTES).zip(out.chunks_mut(self.packing.line_cols())) {
                for (out, code) in out.iter_mut().zip(self.packing.line_codes(line, lane)) {
                    *out = (f32::from(code) - 1.0) * multiplier;
                }
            }
        }
        Ok(())
    }

    pub(super) fn tiles(&self) -> usize {
        self.tiles
    }

    /// Lines of a tile.
    pub(super) fn groups(&self) -> usize {
        self.cols.div_ceil(self.packing.line_cols())
    }

    /// The packed tiles.
    pub(crate) fn data(&self) -> &[u8] {
        &self.data
    }

    /// What a prefill kernel needs of each tile beside its codes, if it does: computed when first asked for.
    pub(super) fn row_terms(&self, gemm: &dyn PanelGemm, pool: &Pool) -> &[[i32; TILE_ROWS]] {
        if !gemm.has_row_terms() {
            return &[];
        }
        self.row_terms.get_or_init(|| {
            let mut terms = vec![[0; TILE_ROWS]; self.tiles];
            let tile_bytes = self.groups() * LINE_BYTES;
            pool.for_each_chunk(&mut terms, 1, |tile, terms| {
                terms[0] = gemm.row_terms(&self.data[tile * tile_bytes..][..tile_bytes], self.groups());
            });
            terms
        })
    }

    /// Some tiles, with their part of [`Self::row_terms`].
    pub(super) fn weight_tiles<'a>(&'a self, tiles: Range<usize>, terms: &'a [[i32; TILE_ROWS]]) -> WeightTiles<'a> {
        let tile_bytes = self.groups() * LINE_BYTES;
        WeightTiles {
            data: &self.data[tiles.start * tile_bytes..tiles.end * tile_bytes],
            groups: self.groups(),
            terms: terms.get(tiles).unwrap_or_default(),
        }
    }

    /// The runs of tiles `tiles`, one after the other in the output as well. Of gate and up, these are whole pairs.
    pub(super) fn runs(&self, tiles: Range<usize>) -> impl Iterator<Item = Run> {
        let step = self.arrangement.tile_step();
        let first = first_owner(&self.segments, step, tiles.start);
        let owners = self.segments[first..].chunks_exact(step).take_while(move |s| s[0].first_tile < tiles.end);
        owners.map(move |owners| {
            let (s, scales) = (&owners[0], [owners[0].scale, owners[step - 1].scale]);
            let start = s.first_tile.max(tiles.start);
            let end = tiles.end.min(s.first_tile + s.rows.div_ceil(TILE_ROWS) * step);
            let column = |tile: usize| s.first_row + ((tile - s.first_tile) / step * TILE_ROWS).min(s.rows);
            Run { tiles: start..end, columns: column(start)..column(end), scales }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_were_packed() {
        let pool = Pool::new(2);
        let shapes = [([4, 20, 16], 33), ([1, 1, 47], 16), ([16, 32, 5], 70)];
        let packings = [Packing::TwoBits, Packing::Base3];
        for (packing, (rows, cols)) in packings.into_iter().flat_map(|p| shapes.map(|shape| (p, shape))) {
            let weight = |(i, rows): (usize, usize)| {
                let values: Vec<i8> = (0..rows * cols).map(|k| ((k * k + 3 * k + i) % 7 % 3) as i8 - 1).collect();
                let scale = if i == 1 { Scale::Divide(1.7) } else { Scale::Multiply(0.3 + i as f32) };
                PackedTernary::from_weights(rows, cols, &values, scale).unwrap()
            };
            let weights: Vec<PackedTernary> = rows.into_iter().enumerate().map(weight).collect();
            let want: Vec<f32> = weights.iter().flat_map(|w| w.dequantize()).collect();
            let packed = CpuTernary::pack(&weights, Arrangement::Stacked, packing, &pool).unwrap();
            let mut all = vec![0.0; want.len()];
            packed.dequantize_rows(0..packed.rows(), &mut all).unwrap();
            assert_eq!(all, want);
            let mut some = vec![0.0; 3 * cols];
            packed.dequantize_rows(2..5, &mut some).unwrap();
            assert_eq!(some, want[2 * cols..5 * cols]);
            assert!(packed.dequantize_rows(0..packed.rows() + 1, &mut all).is_err());
            assert!(packed.dequantize_rows(0..1, &mut all).is_err());
        }
    }
}
