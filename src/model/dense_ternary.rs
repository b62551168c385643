//! Ternary weights of dense values: masters that are quantised, or codes times a scale that are taken apart.

use super::config::{Mode, SUPPORTED};
use crate::checkpoint::DenseView;
use crate::ternary::{PackedTernary, Scale};
use crate::{Error, Result};

/// The codes and the scale of a projection that is stored densely, without a `weight_scale`, and releases what was
/// read. `name` is the tensor's, for errors.
///
/// # Errors
/// [`Error::Tensor`] for masters that are not finite, and with [`Mode::Dequantized`] for values of more than one
/// magnitude: such a model is not ternary.
pub fn ternary_of(view: &DenseView, name: &str, mode: Mode) -> Result<PackedTernary> {
    let packed = match mode {
        Mode::Offline | Mode::Online => PackedTernary::quantize_slice(view.rows, view.cols, &view.to_f32())
            .map_err(|e| Error::tensor(view.file.path(), name, e.to_string()))?,
        Mode::Dequantized => taken_apart(view, name)?,
    };
    view.release();
    Ok(packed)
}

/// Values −s, 0 and s as codes and the scale s, exactly.
fn taken_apart(view: &DenseView, name: &str) -> Result<PackedTernary> {
    let fail = |reason: String| Err(Error::tensor(view.file.path(), name, reason));
    let mut codes = Vec::with_capacity(view.rows.saturating_mul(view.cols));
    let mut row = vec![0f32; view.cols];
    let mut scale = None;
    for r in 0..view.rows {
        view.dtype.widen(view.row(r), &mut row);
        for (c, value) in row.iter().enumerate() {
            if *value == 0.0 {
                codes.push(0);
                continue;
            }
            let magnitude = *scale.get_or_insert(value.abs());
            if !magnitude.is_normal() {
                return fail(format!("row {r}, column {c} is {value}, which is no scale"));
            }
            if value.abs() != magnitude {
                return fail(format!(
                    "holds {magnitude} and, in row {r}, column {c}, {value}: values that are not ternary, and config.json \
                     has no quantization_config, so this is not a b1.58 checkpoint; {SUPPORTED}. If these are masters of \
                     one, as in Falcon-E's revision prequantized, add \"quantization_config\": {{\"quant_method\": \
                     \"bitnet\", \"quantization_mode\": \"online\"}} to config.json"
                ));
            }
            codes.push(if *value > 0.0 { 1 } else { -1 });
        }
    }
    // A matrix of zeros has any scale.
    let scale = Scale::Multiply(scale.unwrap_or(1.0));
    PackedTernary::from_weights(view.rows, view.cols, &codes, scale)
        .map_err(|e| Error::tensor(view.file.path(), name, e.to_string()))
}
