//! Ternary weights of dense values: masters that are quantised, or codes times a scale that are taken apart.

use super::config::{Mode, SUPPORTED};
use crate::checkpoint::{DenseView, NotTernary};
use crate::ternary::PackedTernary;
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
        Mode::Dequantized => {
            view.three_valued(not_ternary).map_err(|reason| Error::tensor(view.file.path(), name, reason))?
        }
    };
    view.release();
    Ok(packed)
}

fn not_ternary(NotTernary { row, col, value, magnitude }: NotTernary) -> String {
    let Some(magnitude) = magnitude else { return format!("row {row}, column {col} is {value}, which is no scale") };
    format!(
        "holds {magnitude} and, in row {row}, column {col}, {value}: values that are not ternary, and config.json has no \
         quantization_config, so this is not a b1.58 checkpoint; {SUPPORTED}. If these are masters of one, as in \
         Falcon-E's revision prequantized, add \"quantization_config\": {{\"quant_method\": \"bitnet\", \
         \"quantization_mode\": \"online\"}} to config.json"
    )
}
