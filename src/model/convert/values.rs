//! Tensors of dense values, streamed from one type to another, and ternary weights as dense values.

use super::progress::Tracker;
use crate::backend::DenseType;
use crate::checkpoint::{StoredType, TensorView};
use crate::ternary::{CODES_PER_BYTE, PackedTernary};
use half::{bf16, f16};
use rayon::prelude::*;
use std::io::{self, Write};
use std::ops::Range;

/// Bytes of the source that are read at a time.
const CHUNK: usize = 4 << 20;

/// Rows of a tensor (a vector is one row) in pieces that fit in memory.
pub(super) fn pieces(view: &TensorView) -> impl Iterator<Item = Range<usize>> + use<> {
    let rows = rows(view);
    let row_bytes = view.info.range.len().checked_div(rows).unwrap_or(0);
    let step = (CHUNK / row_bytes.max(1)).max(1);
    (0..rows).step_by(step).map(move |first| first..(first + step).min(rows))
}

/// Where the bytes of some rows are in the tensor's file.
pub(super) fn place(view: &TensorView, piece: &Range<usize>) -> Range<usize> {
    let row_bytes = view.info.range.len().checked_div(rows(view)).unwrap_or(0);
    let at = |row: usize| view.info.range.start + row * row_bytes;
    at(piece.start)..at(piece.end)
}

fn rows(view: &TensorView) -> usize {
    let cols = view.info.shape.last().copied().unwrap_or(1);
    view.info.elements().checked_div(cols).unwrap_or(0)
}

/// Writes a tensor in a type, its own or another one.
pub(super) fn write(view: &TensorView, dtype: StoredType, out: &mut dyn Write, tracker: &Tracker) -> io::Result<()> {
    for rows in pieces(view) {
        let bytes = place(view, &rows);
        match view.info.dtype == dtype {
            true => put(out, view.file.bytes().get(bytes.clone()).unwrap_or_default(), tracker)?,
            false => put(out, &tracker.keep(view.recode(rows, dtype))?, tracker)?,
        }
        // Read once: it need not stay in memory.
        view.file.release(bytes);
    }
    Ok(())
}

/// Writes bytes in pieces, so that progress shows and a conversion can be stopped.
pub(super) fn put(out: &mut dyn Write, bytes: &[u8], tracker: &Tracker) -> io::Result<()> {
    for chunk in bytes.chunks(CHUNK) {
        out.write_all(chunk)?;
        tracker.keep(tracker.advance(chunk.len() as u64))?;
    }
    Ok(())
}

/// A scale as the nearest value of a type, if that is a normal number of it.
pub(super) fn rounded(scale: f32, dtype: DenseType) -> Option<f32> {
    match dtype {
        DenseType::F32 => scale.is_normal().then_some(scale),
        DenseType::BF16 => Some(bf16::from_f32(scale)).filter(|s| s.is_normal()).map(bf16::to_f32),
        DenseType::F16 => Some(f16::from_f32(scale)).filter(|s| s.is_normal()).map(f16::to_f32),
    }
}

/// Writes the weights −s, 0 and s of a matrix, row-major.
pub(super) fn write_ternary(
    packed: &PackedTernary,
    dtype: DenseType,
    out: &mut dyn Write,
    tracker: &Tracker,
) -> io::Result<()> {
    let scale = rounded(packed.scale().multiplier(), dtype).unwrap_or_default();
    let values = [-scale, 0.0, scale, f32::NAN];
    let row_bytes = packed.cols() * dtype.size();
    let step = (CHUNK / row_bytes).clamp(1, packed.rows());
    let mut bytes = vec![0; step * row_bytes];
    for first in (0..packed.rows()).step_by(step) {
        let bytes = &mut bytes[..step.min(packed.rows() - first) * row_bytes];
        bytes.par_chunks_mut(row_bytes).enumerate().for_each(|(i, out)| {
            let codes = packed.row(first + i);
            match dtype {
                DenseType::F32 => fill(out, codes, values.map(f32::to_le_bytes)),
                DenseType::BF16 => fill(out, codes, values.map(|v| bf16::from_f32(v).to_le_bytes())),
                DenseType::F16 => fill(out, codes, values.map(|v| f16::from_f32(v).to_le_bytes())),
            }
        });
        put(out, bytes, tracker)?;
    }
    Ok(())
}

/// The value of each code.
fn fill<const N: usize>(out: &mut [u8], codes: &[u8], values: [[u8; N]; 4]) {
    for (out, byte) in out.as_chunks_mut::<N>().0.chunks_mut(CODES_PER_BYTE).zip(codes) {
        out.iter_mut().enumerate().for_each(|(i, out)| *out = values[usize::from(byte >> (2 * i) & 3)]);
    }
}
