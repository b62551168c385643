//! A run's state in one safetensors file, written whole or not at all: masters, moments and progress.

use super::parameters::Parameters;
use super::trainer::Validation;
use crate::backend::host::MappedFile;
use crate::checkpoint::write::{Entry, write_file};
use crate::checkpoint::{StoredType, header};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use half::bf16;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;

/// The tensor that holds the progress, as JSON.
const PROGRESS: &str = "progress";

/// How far a run is.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Steps done, skipped ones included.
    pub step: u64,
    /// Updates of the optimiser.
    pub updates: u64,
    /// Targets trained on.
    pub tokens: u64,
    /// Seconds spent in steps.
    pub seconds: f64,
    /// Steps skipped for a loss or gradient that was not finite.
    pub skipped: u64,
    /// Such steps since the last good one.
    pub bad_in_a_row: u64,
    /// Loss of the last step.
    #[serde(skip)]
    pub last_loss: f64,
    /// The best validation.
    pub best: Option<Validation>,
    /// Validations since then.
    pub since_best: u64,
    /// Fingerprint of the data, where it has one.
    #[serde(default)]
    pub data: Option<u64>,
}

/// The values of a tensor as little-endian bytes, with their type.
pub(super) fn bytes_of(tensor: &Tensor) -> Result<(StoredType, Vec<u8>)> {
    let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
    Ok(match flat.dtype() {
        DType::BF16 => (StoredType::BF16, flat.to_vec1::<bf16>()?.iter().flat_map(|v| v.to_le_bytes()).collect()),
        _ => {
            let values = flat.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            (StoredType::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
    })
}

/// Writes a state.
pub(super) fn save(
    path: &Path,
    parameters: &Parameters,
    moments: &[(Tensor, Tensor)],
    progress: &Progress,
) -> Result<()> {
    let mut entries = Vec::new();
    for (p, (m, v)) in parameters.list().iter().zip(moments) {
        for (prefix, tensor) in [("master", &p.value), ("first_moment", m), ("second_moment", v)] {
            let dtype = if tensor.dtype() == DType::BF16 { StoredType::BF16 } else { StoredType::F32 };
            let tensor = tensor.clone();
            entries.push(Entry::new(format!("{prefix}.{}", p.name), dtype, p.value.dims().to_vec(), move |out| {
                let (_, bytes) = bytes_of(&tensor).map_err(std::io::Error::other)?;
                out.write_all(&bytes)
            }));
        }
    }
    let json = serde_json::to_vec(progress).map_err(|e| Error::file(path, e.to_string()))?;
    entries.push(Entry::from_bytes(PROGRESS, StoredType::U8, [json.len()], json));
    write_file(path, entries, &mut |_| {})
}

/// A state for parameters like these.
#[allow(clippy::type_complexity)]
pub(super) fn load(path: &Path, like: &Parameters) -> Result<(Parameters, Vec<(Tensor, Tensor)>, Progress)> {
    let tensors = read_tensors(path)?;
    let missing = |name: &str| Error::tensor(path, name, "missing: this is the state of another model");
    let progress = match tensors.get(PROGRESS) {
        Some(Stored { bytes, .. }) => serde_json::from_slice(bytes)
            .map_err(|e| Error::tensor(path, PROGRESS, format!("not the progress of a run: {e}")))?,
        None => return Err(missing(PROGRESS)),
    };
    let mut parameters = like.clone();
    let mut moments = Vec::with_capacity(like.list().len());
    for p in parameters.list_mut() {
        let take = |prefix: &str, dtype: DType| {
            let name = format!("{prefix}.{}", p.name);
            let stored = tensors.get(&name).ok_or_else(|| missing(&name))?;
            if stored.shape != p.value.dims() || stored.dtype() != Some(dtype) {
                let reason = format!(
                    "{} {:?} where {dtype:?} {:?} is expected: this is the state of another model",
                    stored.kind,
                    stored.shape,
                    p.value.dims()
                );
                return Err(Error::tensor(path, name, reason));
            }
            Ok(Tensor::from_raw_buffer(&stored.bytes, dtype, &stored.shape, p.value.device())?)
        };
        moments.push((take("first_moment", DType::F32)?, take("second_moment", DType::F32)?));
        p.value = take("master", p.value.dtype())?;
    }
    Ok((parameters, moments, progress))
}

struct Stored {
    kind: StoredType,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Stored {
    fn dtype(&self) -> Option<DType> {
        match self.kind {
            StoredType::F32 => Some(DType::F32),
            StoredType::BF16 => Some(DType::BF16),
            _ => None,
        }
    }
}

fn read_tensors(path: &Path) -> Result<HashMap<String, Stored>> {
    let file = MappedFile::open(path)?;
    let bytes = file.bytes();
    let infos = header::parse(path, bytes)?;
    let stored = |info: crate::checkpoint::TensorInfo| {
        let bytes = bytes.get(info.range.clone()).unwrap_or_default().to_vec();
        (info.name, Stored { kind: info.dtype, shape: info.shape, bytes })
    };
    Ok(infos.into_iter().map(stored).collect())
}
