//! Ternary weights in a GGUF file.

use super::{Architecture, GgmlType, Gguf};
use crate::checkpoint::{Checkpoint, LinearWeight, NotTernary, StoredType, TensorView};
use crate::ternary::{I2sLayout, PackedTernary, Scale};
use crate::{Error, Result};

/// How the weights of one file are to be read.
#[derive(Debug, Clone, Copy)]
pub(in crate::checkpoint) struct Rules {
    /// Layout of its I2_S tensors.
    i2s: I2sLayout,
    /// Query and key-value heads whose rows are interleaved: rows `2j` and `2j + 1` of a head are `j` and `j + d/2`.
    interleaved: Option<(usize, usize)>,
    /// Whether floating-point weights that are not ternary are masters, to be quantised.
    masters: bool,
}

impl Rules {
    pub(in crate::checkpoint) fn of(gguf: &Gguf, i2s: Option<I2sLayout>) -> Result<Self> {
        let arch = gguf.architecture()?;
        let interleaved = match arch {
            Architecture::Llama => Some(gguf.heads(arch)?),
            _ => None,
        };
        // Any model can be a Llama; one of these can only be b1.58.
        Ok(Self { i2s: i2s.unwrap_or_default(), interleaved, masters: arch != Architecture::Llama })
    }

    /// The interleaved heads of a linear layer.
    fn heads(&self, base: &str) -> Option<usize> {
        let (heads, kv_heads) = self.interleaved?;
        match base.rsplit('.').next() {
            Some("q_proj") => Some(heads),
            Some("k_proj") => Some(kv_heads),
            _ => None,
        }
    }
}

impl Checkpoint {
    /// [`Checkpoint::linear`] for a GGUF file: I2_S, TQ1_0, TQ2_0, or floating-point values −m, 0 and m; times
    /// `{base}.weight_scale`, where there is one.
    pub(in crate::checkpoint) fn gguf_linear(
        &self,
        rules: &Rules,
        base: &str,
        rows: usize,
        cols: usize,
    ) -> Result<LinearWeight> {
        let weight = self.require(&format!("{base}.weight"))?;
        if weight.info.shape != [rows, cols] {
            return Err(weight.error(format!("shape {:?} where [{rows}, {cols}] is expected", weight.info.shape)));
        }
        let scale = self.tensor(&format!("{base}.weight_scale"));
        let bytes = weight.bytes();
        let decoded = match weight.info.dtype {
            StoredType::Ggml(GgmlType::I2_S) => PackedTernary::from_i2s(rows, cols, bytes, rules.i2s),
            StoredType::Ggml(GgmlType::TQ1_0) => PackedTernary::from_tq1_0(rows, cols, bytes),
            StoredType::Ggml(GgmlType::TQ2_0) => PackedTernary::from_tq2_0(rows, cols, bytes),
            StoredType::F32 | StoredType::F16 | StoredType::BF16 => {
                let view = self.dense(&weight.info.name, rows, cols)?;
                match view.three_valued(not_ternary) {
                    Ok(packed) => Ok(packed),
                    Err(_) if rules.masters && scale.is_none() => return Ok(LinearWeight::Dense(view)),
                    Err(reason) => return Err(weight.error(reason)),
                }
            }
            other => {
                return Err(weight.error(format!(
                    "{other} values are not ternary, so this is no b1.58 model; its weights would be I2_S, TQ1_0 or TQ2_0"
                )));
            }
        };
        let mut packed = decoded.map_err(|e| describe(&weight, e))?;
        if let Some(scale) = scale {
            let m =
                self.scale(&scale, crate::checkpoint::ScaleStyle::Multiply)?.multiplier() * packed.scale().multiplier();
            if !m.is_normal() {
                return Err(
                    scale.error(format!("together with the weight's own scale it gives {m}, which is no scale"))
                );
            }
            packed = packed.with_scale(Scale::Multiply(m));
        }
        if let Some(heads) = rules.heads(base) {
            let dim = rows.checked_div(heads).filter(|d| d * heads == rows && d.is_multiple_of(2));
            let Some(dim) = dim else {
                return Err(weight.error(format!("{rows} rows are not {heads} heads of an even size")));
            };
            packed = packed.with_rows(|row| {
                let (head, at) = (row / dim, row % dim);
                head * dim + 2 * (at % (dim / 2)) + at / (dim / 2)
            });
        }
        weight.file.release(weight.info.range.clone());
        Ok(LinearWeight::Ternary(packed))
    }
}

fn not_ternary(NotTernary { row, col, value, magnitude }: NotTernary) -> String {
    let before = magnitude.map_or(String::new(), |m| format!(" after ±{m}"));
    format!("row {row}, column {col} is {value}{before}: these values are not ternary, so this is no b1.58 model")
}

fn describe(weight: &TensorView, e: Error) -> Error {
    match e {
        e @ (Error::InvalidCode { .. } | Error::Shape { .. }) => weight.error(e.to_string()),
        e => e,
    }
}
