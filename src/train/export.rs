//! Trained parameters as a checkpoint: bf16 masters under the names of inference, to be quantised at load.

use super::parameters::{Kind, Parameters};
use super::state::bytes_of;
use crate::checkpoint::StoredType;
use crate::checkpoint::write::{Entry, write_checkpoint, write_text};
use crate::model::config::ModelConfig;
use crate::{Error, Result};
use candle_core::DType;
use std::path::Path;

/// Writes `model.safetensors` and `config.json` (written last) into a directory that exists: matrices as bf16, norms as
/// f32. Loading it quantises to exactly the codes that were trained, because training quantises the bf16 values too.
///
/// A model that was not trained `quantized` gets no `quantization_config`, so that no loader of b1.58 models takes it for
/// one.
///
/// # Errors
/// [`Error::Io`]; [`Error::Training`] for values that are not finite.
pub fn write_masters(dir: &Path, config: &ModelConfig, parameters: &Parameters, quantized: bool) -> Result<()> {
    let mut entries = Vec::new();
    for p in parameters.list() {
        let (dtype, stored) = match p.kind {
            Kind::Norm => (DType::F32, StoredType::F32),
            Kind::Dense | Kind::Ternary | Kind::LowRank => (DType::BF16, StoredType::BF16),
        };
        let value = p.value.to_dtype(dtype)?;
        if !value.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?.is_finite() {
            return Err(Error::Training(format!("{} holds NaN or infinite values and was not written", p.name)));
        }
        entries.push(Entry::new(&p.name, stored, p.value.dims().to_vec(), move |out| {
            out.write_all(&bytes_of(&value).map_err(std::io::Error::other)?.1)
        }));
    }
    // One file of any size: replacing it is one rename, where shards of two checkpoints could be mixed by a crash.
    write_checkpoint(dir, entries, u64::MAX, &mut |_| {})?;
    let mut json = config.to_json();
    if !quantized {
        let bad = |e: serde_json::Error| Error::file(dir.join("config.json"), e.to_string());
        let mut value: serde_json::Map<_, _> = serde_json::from_str(&json).map_err(bad)?;
        value.shift_remove("quantization_config");
        json = serde_json::to_string_pretty(&value).map_err(bad)? + "\n";
    }
    write_text(&dir.join("config.json"), &json)
}
