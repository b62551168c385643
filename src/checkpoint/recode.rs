//! Dense values from one stored type to another; ggml's block types by candle's own code.

use super::{StoredType, TensorView};
use crate::Result;
use crate::backend::DenseType;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// Values that are converted at a time, at least: enough to keep a thread busy, few enough to stay in its cache.
pub(super) const PIECE: usize = 1 << 16;

/// A type that dense values are read from and written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dense {
    Plain(DenseType),
    Blocks(GgmlDType),
}

fn dense(dtype: StoredType) -> Result<Dense, String> {
    let known = match dtype {
        StoredType::Ggml(blocks) => blocks.candle().map(Dense::Blocks),
        plain => DenseType::from_stored(plain).map(Dense::Plain),
    };
    known.ok_or_else(|| format!("{dtype} where a dense type (F32, F16, BF16, Q8_0, Q6_K, …) is expected"))
}

impl TensorView<'_> {
    /// Rows of a tensor of dense values (all of a vector is one row), as the bytes of another type. Values that F16 or
    /// BF16 do not hold are rounded to the nearest.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] if one of the types is none for dense values, if rows do not fit its blocks, and for values
    /// that the other type cannot hold: those that are too large for F16, and NaN or infinities in blocks.
    pub(crate) fn recode(&self, rows: Range<usize>, to: StoredType) -> Result<Vec<u8>> {
        self.try_recode(rows, to).map_err(|reason| self.error(reason))
    }

    fn try_recode(&self, rows: Range<usize>, to: StoredType) -> Result<Vec<u8>, String> {
        let cols = self.info.shape.last().copied().unwrap_or(1);
        let (from, target) = (dense(self.info.dtype)?, dense(to)?);
        let (from_row, to_row) = (self.info.dtype.bytes_of(&[1, cols])?, to.bytes_of(&[1, cols])?);
        let stored = rows.start.checked_mul(from_row).zip(rows.end.checked_mul(from_row));
        let Some(stored) = stored.and_then(|(start, end)| self.bytes().get(start..end)) else {
            return Err(format!("has no rows {} to {}", rows.start, rows.end));
        };
        let mut out = vec![0; rows.len() * to_row];
        if out.is_empty() {
            return Ok(out);
        }
        let piece = PIECE.div_ceil(cols);
        let pieces = stored.par_chunks(piece * from_row).zip(out.par_chunks_mut(piece * to_row));
        pieces.try_for_each(|(bytes, out)| {
            let values = widen_as(from, bytes, bytes.len() / from_row * cols)?;
            narrow(target, values, out)
        })?;
        Ok(out)
    }

    /// Rows of a tensor of dense values, as f32.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] for another type.
    pub(crate) fn widened(&self, rows: Range<usize>) -> Result<Vec<f32>> {
        let bytes = self.recode(rows, StoredType::F32)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }
}

/// `count` values.
pub(super) fn widen(dtype: StoredType, bytes: &[u8], count: usize) -> Result<Vec<f32>, String> {
    widen_as(dense(dtype)?, bytes, count)
}

fn widen_as(dtype: Dense, bytes: &[u8], count: usize) -> Result<Vec<f32>, String> {
    match dtype {
        Dense::Plain(dtype) => {
            let mut values = vec![0.0; count];
            dtype.widen(bytes, &mut values);
            Ok(values)
        }
        Dense::Blocks(dtype) => {
            let wide = || -> candle_core::Result<Vec<f32>> {
                let storage = QStorage::from_data(Cow::Borrowed(bytes), &Device::Cpu, dtype)?;
                QTensor::new(storage, count)?.dequantize(&Device::Cpu)?.to_vec1()
            };
            wide().map_err(|e| e.to_string())
        }
    }
}

fn narrow(dtype: Dense, values: Vec<f32>, out: &mut [u8]) -> Result<(), String> {
    match dtype {
        Dense::Plain(DenseType::F32) => put(out, &values, f32::to_le_bytes),
        Dense::Plain(DenseType::BF16) => put(out, &values, |v| bf16::from_f32(v).to_le_bytes()),
        Dense::Plain(DenseType::F16) => {
            if let Some(v) = values.iter().find(|v| v.is_finite() && f16::from_f32(**v).is_infinite()) {
                return Err(format!("holds {v}, too large for F16; BF16 and F32 have the range"));
            }
            put(out, &values, |v| f16::from_f32(v).to_le_bytes());
        }
        Dense::Blocks(dtype) => {
            if let Some(v) = values.iter().find(|v| !v.is_finite()) {
                return Err(format!("holds {v}, which blocks of quantised values cannot"));
            }
            let count = values.len();
            let blocks = || -> candle_core::Result<()> {
                let tensor = QTensor::quantize(&Tensor::from_vec(values, count, &Device::Cpu)?, dtype)?;
                let data = tensor.data()?;
                if data.len() != out.len() {
                    candle_core::bail!("{} bytes of blocks where {} are expected", data.len(), out.len());
                }
                out.copy_from_slice(&data);
                Ok(())
            };
            blocks().map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}

fn put<const N: usize>(out: &mut [u8], values: &[f32], bytes: impl Fn(f32) -> [u8; N]) {
    out.as_chunks_mut::<N>().0.iter_mut().zip(values).for_each(|(out, v)| *out = bytes(*v));
}
