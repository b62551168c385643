//! `config.json` of a converted checkpoint: the source's, but for how its weights are stored.

use super::{Form, Model};
use crate::backend::DenseType;
use crate::checkpoint::ScaleStyle;
use crate::model::config::{Family, Mode};
use crate::{Error, Result};
use serde_json::Value;

/// The text of the new `config.json`. Keys keep their order; only those of `quantization_config` that say something else
/// than the form are changed, and a text that needs no change stays as it is. Dense weights have none.
pub(super) fn rewrite(model: &Model, form: Form) -> Result<String> {
    let (path, text) = model.checkpoint.config();
    let q = &model.config.quantization;
    let mut json: Value = serde_json::from_str(text).map_err(|e| Error::file(path, e.to_string()))?;
    let Some(fields) = json.as_object_mut() else { return Err(Error::file(path, "not an object")) };
    let (style, mode) = match form {
        Form::Packed(style) => (style, Mode::Offline),
        // transformers knows masters for this class alone; a scale to multiply with is what they are quantised to.
        Form::Masters => (ScaleStyle::Multiply, Mode::Online),
        // A GGUF file has metadata instead.
        Form::Gguf(_) => return Ok(text.to_owned()),
        Form::Dense(dtype) => {
            if model.config.family == Family::FirstReproduction {
                let reason = "dense weights of this family are always quantised again; use --to masters";
                return Err(Error::config(path, "architectures", reason));
            }
            fields.shift_remove("quantization_config");
            let name = match dtype {
                DenseType::F32 => "float32",
                DenseType::BF16 => "bfloat16",
                DenseType::F16 => "float16",
            };
            let key = if fields.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            fields.insert(key.into(), name.into());
            return Ok(format!("{json:#}\n"));
        }
    };
    if (style, mode) == (q.scale_style, q.mode) {
        return Ok(text.to_owned());
    }
    // Neither 1bitLLM's masters nor dequantised weights have one: it has to say everything then.
    let is_new = fields.get("quantization_config").is_none_or(Value::is_null);
    if is_new {
        fields.insert("quantization_config".into(), serde_json::json!({ "quant_method": "bitnet" }));
    }
    let Some(quantization) = fields.get_mut("quantization_config").and_then(Value::as_object_mut) else {
        return Err(Error::config(path, "quantization_config", "not an object"));
    };
    if style != q.scale_style || is_new {
        let class = match style {
            ScaleStyle::Multiply => "autobitlinear",
            ScaleStyle::Divide => "bitlinear",
        };
        quantization.insert("linear_class".into(), class.into());
    }
    if mode != q.mode || is_new {
        let mode = match mode {
            Mode::Offline => "offline",
            Mode::Online | Mode::Dequantized => "online",
        };
        quantization.insert("quantization_mode".into(), mode.into());
    }
    Ok(format!("{json:#}\n"))
}
