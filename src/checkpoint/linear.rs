//! The weight of a linear layer: packed ternary codes with a scale, or dense values.

use super::{Checkpoint, DenseView, StoredType, TensorView};
use crate::ternary::{PackedTernary, Scale};
use crate::{Error, Result};

/// What `weight_scale` does in a checkpoint; decided by its configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleStyle {
    /// `linear_class: autobitlinear`.
    Multiply,
    /// Any other `linear_class`, or none.
    Divide,
}

impl ScaleStyle {
    /// The scale that a stored number means.
    pub fn scale(self, stored: f32) -> Scale {
        match self {
            Self::Multiply => Scale::Multiply(stored),
            Self::Divide => Scale::Divide(stored),
        }
    }
}

/// A linear layer's weight as the checkpoint holds it.
#[derive(Debug, Clone)]
pub enum LinearWeight {
    /// Ternary codes with the checkpoint's scale.
    Ternary(PackedTernary),
    /// Dense values without a scale: masters to be quantised, or a layer that was never converted.
    Dense(DenseView),
}

impl Checkpoint {
    /// The weight `[rows, cols]` of the linear layer `base`, from one of
    /// - `{base}.weight` U8 `[rows / 4, cols]` with `{base}.weight_scale`: packed codes (formats: transformers
    ///   `integrations/bitnet.py`);
    /// - `{base}.weight` F32, F16 or BF16 `[rows, cols]` with `{base}.weight_scale`: the same, unpacked, every
    ///   value −1, 0 or 1;
    /// - `{base}.weight` F32, F16 or BF16 `[rows, cols]` alone: dense;
    /// - in a GGUF file `{base}.weight` I2_S, TQ1_0, TQ2_0, or floating-point values −m, 0 and m, with or without a
    ///   `{base}.weight_scale`, which multiplies whatever `style` says.
    ///
    /// A scale is one finite, positive, normal number: it stands for `mean|W|` or its inverse. Pages that were
    /// decoded are released, so that no weight is resident twice.
    ///
    /// # Errors
    /// [`Error::Tensor`] if something is missing, of another shape or type, or not ternary, and if the layer has
    /// a bias, which no b1.58 family has.
    pub fn linear(&self, base: &str, rows: usize, cols: usize, style: ScaleStyle) -> Result<LinearWeight> {
        if let Some(bias) = self.tensor(&format!("{base}.bias")) {
            return Err(bias.error("linear layers with a bias are not supported"));
        }
        if let Some(rules) = self.gguf_rules() {
            return self.gguf_linear(rules, base, rows, cols);
        }
        let name = format!("{base}.weight");
        let scale_name = format!("{base}.weight_scale");
        let weight = self.require(&name)?;
        if weight.info.dtype == StoredType::U8 {
            let scale = self.scale(&self.require(&scale_name)?, style)?;
            return packed(&weight, rows, cols, scale).map(LinearWeight::Ternary);
        }
        let dense = self.dense(&name, rows, cols)?;
        match self.tensor(&scale_name) {
            None => Ok(LinearWeight::Dense(dense)),
            Some(scale) => unpacked(&weight, &dense, self.scale(&scale, style)?).map(LinearWeight::Ternary),
        }
    }

    pub(super) fn scale(&self, view: &TensorView, style: ScaleStyle) -> Result<Scale> {
        if view.info.elements() != 1 {
            return Err(view.error(format!("shape {:?} where one number is expected", view.info.shape)));
        }
        match view.floats()?.first() {
            Some(s) if s.is_normal() && *s > 0.0 => Ok(style.scale(*s)),
            Some(s) => Err(view.error(format!("{s} is no scale: it must be positive, finite and not denormal"))),
            None => Err(view.error("empty")),
        }
    }
}

fn packed(weight: &TensorView, rows: usize, cols: usize, scale: Scale) -> Result<PackedTernary> {
    if !rows.is_multiple_of(4) {
        return Err(weight.error(format!("packed, but {rows} output features are not a multiple of 4")));
    }
    if weight.info.shape != [rows / 4, cols] {
        let expected = format!("[{}, {cols}], the packing of [{rows}, {cols}],", rows / 4);
        return Err(weight.error(format!("shape {:?} where {expected} is expected", weight.info.shape)));
    }
    let ternary = PackedTernary::from_hf(rows / 4, cols, weight.bytes(), scale).map_err(|e| name(weight, e))?;
    weight.file.release(weight.info.range.clone());
    Ok(ternary)
}

fn unpacked(weight: &TensorView, dense: &DenseView, scale: Scale) -> Result<PackedTernary> {
    let mut codes = Vec::with_capacity(dense.rows.saturating_mul(dense.cols));
    let mut row = vec![0f32; dense.cols];
    for r in 0..dense.rows {
        dense.dtype.widen(dense.row(r), &mut row);
        for (c, value) in row.iter().enumerate() {
            if ![-1.0, 0.0, 1.0].contains(value) {
                return Err(weight.error(format!(
                    "has a weight_scale, so every value must be -1, 0 or 1, but row {r}, column {c} is {value}"
                )));
            }
            codes.push(*value as i8);
        }
    }
    let ternary = PackedTernary::from_weights(dense.rows, dense.cols, &codes, scale).map_err(|e| name(weight, e))?;
    dense.release();
    Ok(ternary)
}

/// Wraps an error of the number format into one that names the tensor.
fn name(weight: &TensorView, e: Error) -> Error {
    match e {
        e @ (Error::InvalidCode { .. } | Error::Shape { .. }) => weight.error(e.to_string()),
        e => e,
    }
}
