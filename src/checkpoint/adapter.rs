//! LoRA adapters as PEFT saves them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! A module's matrices are the tensors `base_model.model.{module}.lora_A.weight` `[rank, cols]` and
//! `….lora_B.weight` `[rows, rank]` (`get_peft_model_state_dict` in peft's `utils/save_and_load.py`). An adapter is
//! untrusted input like a checkpoint: every tensor must be one of these, with its partner and the rank that the
//! configuration says, and the configuration must ask for nothing else.

mod config;
mod modules;

pub use config::{AdapterConfig, MAX_RANK};

use super::open::{map, read_text};
use super::write::{Entry, write_file, write_text};
use super::{DenseView, StoredType, TensorInfo, header, limits};
use crate::backend::DenseType;
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Name of an adapter's configuration.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of an adapter's weights.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// What PEFT puts before the base model's own names.
const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

const FORM: &str = "a LoRA adapter is a directory with adapter_config.json and adapter_model.safetensors";

/// An open adapter; the matrices stay in the mapped file until they are read.
#[derive(Debug)]
pub struct Adapter {
    dir: PathBuf,
    weights: PathBuf,
    config: AdapterConfig,
    /// Sorted by name.
    modules: Vec<AdapterModule>,
}

/// One module's pair of matrices.
#[derive(Debug, Clone)]
pub struct AdapterModule {
    /// The module's name in the base model, `model.layers.{i}.self_attn.q_proj` and the like.
    pub name: String,
    /// `[rank, cols]`.
    pub a: DenseView,
    /// `[rows, rank]`.
    pub b: DenseView,
    /// What `B · A · h` is multiplied by.
    pub scaling: f32,
}

impl AdapterModule {
    /// The pair's inner dimension.
    pub fn rank(&self) -> usize {
        self.a.rows
    }

    /// A and B as f32, row-major.
    ///
    /// # Errors
    /// [`Error::Tensor`] if one holds NaN or infinities.
    pub fn matrices(&self) -> Result<(Vec<f32>, Vec<f32>)> {
        let read = |view: &DenseView, suffix: &str| {
            let values = view.to_f32();
            match values.iter().position(|v| !v.is_finite()) {
                None => Ok(values),
                Some(at) => {
                    let name = format!("{PREFIX}{}{suffix}", self.name);
                    Err(Error::tensor(view.file.path(), name, format!("value {at} is {}", values[at])))
                }
            }
        };
        Ok((read(&self.a, A)?, read(&self.b, B)?))
    }
}

/// The tensor names of a module's A and B.
pub fn tensor_names(module: &str) -> [String; 2] {
    [A, B].map(|suffix| format!("{PREFIX}{module}{suffix}"))
}

impl Adapter {
    /// Opens a directory that holds `adapter_config.json` and `adapter_model.safetensors`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::File`], [`Error::Config`] or [`Error::Tensor`], naming the file and the key or tensor,
    /// for anything missing, malformed or not plain LoRA.
    pub fn open(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            let what = if dir.exists() { "not a directory" } else { "no such directory" };
            return Err(Error::file(dir, format!("{what}; {FORM}")));
        }
        let present = |name: &str| {
            let path = dir.join(name);
            match path.symlink_metadata().is_ok() {
                true => Ok(path),
                false if dir.join("adapter_model.bin").exists() && name == WEIGHTS_FILE => Err(Error::file(
                    path,
                    "not found; adapter_model.bin is a pickle, which is not read: save it again as safetensors",
                )),
                false => Err(Error::file(path, format!("not found; {FORM}"))),
            }
        };
        let path = present(CONFIG_FILE)?;
        let config = AdapterConfig::parse(&path, &read_text(&path, limits::MAX_CONFIG_SIZE)?)?;
        let weights = present(WEIGHTS_FILE)?;
        let file = Arc::new(map(&weights)?);
        let tensors = header::parse(&weights, file.bytes())?;
        tensors.iter().try_for_each(|t| split_name(&weights, t).map(drop))?;
        let mut modules = Vec::with_capacity(tensors.len() / 2);
        // Sorted by name, a module's A stands right before its B.
        let mut tensors = tensors.into_iter();
        while let Some(a) = tensors.next() {
            let (name, suffix) = split_name(&weights, &a)?;
            if suffix == B {
                return Err(Error::tensor(&weights, &a.name, format!("without its partner {PREFIX}{name}{A}")));
            }
            let missing = || Error::tensor(&weights, &a.name, format!("without its partner {PREFIX}{name}{B}"));
            let b = tensors.next().filter(|b| b.name == format!("{PREFIX}{name}{B}")).ok_or_else(missing)?;
            let rank = config.rank_of(name);
            let view = |t: &TensorInfo, expected: [Option<usize>; 2], form: &str| {
                let bad = |reason: String| Err(Error::tensor(&weights, &t.name, reason));
                let Some(dtype) = DenseType::from_stored(t.dtype) else {
                    return bad(format!("{} where F32, F16 or BF16 is expected", t.dtype));
                };
                match t.shape[..] {
                    [rows, cols]
                        if expected[0].is_none_or(|r| r == rows)
                            && expected[1].is_none_or(|c| c == cols)
                            && rows > 0
                            && cols > 0 =>
                    {
                        Ok(DenseView::new(dtype, rows, cols, Arc::clone(&file), t.range.clone()))
                    }
                    _ => bad(format!("shape {:?} where {form} is expected with the configuration's rank", t.shape)),
                }
            };
            modules.push(AdapterModule {
                a: view(&a, [Some(rank), None], &format!("[{rank}, inputs]"))?,
                b: view(&b, [None, Some(rank)], &format!("[outputs, {rank}]"))?,
                scaling: config.scaling_of(name),
                name: name.to_owned(),
            });
            if !config.targets(name) {
                return Err(Error::tensor(&weights, &a.name, format!("{CONFIG_FILE} does not target this module")));
            }
        }
        if modules.is_empty() {
            return Err(Error::file(weights, "holds no tensors"));
        }
        Ok(Self { dir: dir.to_owned(), weights, config, modules })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file with the matrices, as errors name it.
    pub fn weights_file(&self) -> &Path {
        &self.weights
    }

    /// The configuration.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// All modules, sorted by name.
    pub fn modules(&self) -> &[AdapterModule] {
        &self.modules
    }

    /// The matrices of a module, if it has any.
    pub fn module(&self, name: &str) -> Option<&AdapterModule> {
        let at = self.modules.binary_search_by(|m| m.name.as_str().cmp(name)).ok()?;
        self.modules.get(at)
    }

    /// Numbers in all matrices.
    pub fn parameters(&self) -> u64 {
        let size = |v: &DenseView| v.rows as u64 * v.cols as u64;
        self.modules.iter().map(|m| size(&m.a) + size(&m.b)).sum()
    }
}

/// The module's name, and which of its two tensors this is.
fn split_name<'t>(file: &Path, tensor: &'t TensorInfo) -> Result<(&'t str, &'static str)> {
    let inner = tensor.name.strip_prefix(PREFIX).unwrap_or_default();
    let found = [A, B].into_iter().find_map(|suffix| Some((inner.strip_suffix(suffix)?, suffix)));
    found.filter(|(module, _)| !module.is_empty()).ok_or_else(|| {
        let what = match () {
            _ if tensor.name.contains("lora_magnitude_vector") => "DoRA's magnitudes are not supported",
            _ if tensor.name.contains("lora_embedding") => "adapters of embeddings are not supported",
            _ if tensor.name.ends_with(".bias") => "biases are not supported",
            _ => "an adapter that changes something else would run without it and be wrong",
        };
        Error::tensor(file, &tensor.name, format!("not {PREFIX}….lora_A.weight or ….lora_B.weight; {what}"))
    })
}

/// A module's pair of matrices, to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterMatrices {
    /// The module's name in the base model, `model.layers.{i}.self_attn.q_proj` and the like.
    pub module: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// `[rank, cols]`, row-major.
    pub a: Vec<f32>,
    /// `[rows, rank]`, row-major.
    pub b: Vec<f32>,
}

/// Writes an adapter in f32, creating the directory if need be and replacing an adapter that is there.
///
/// Both files are complete or not there; the configuration comes last. Where it differs from the one there before,
/// that one goes first, so that no reader ever pairs new matrices with an old scaling.
///
/// # Errors
/// [`Error::Tensor`] for matrices that [`Adapter::open`] would refuse; [`Error::Io`] if the system refuses.
pub fn write_adapter(dir: &Path, config: &AdapterConfig, modules: Vec<AdapterMatrices>) -> Result<()> {
    let (path, weights) = (dir.join(CONFIG_FILE), dir.join(WEIGHTS_FILE));
    let text = config.to_json();
    // What cannot be read back is not written.
    AdapterConfig::parse(&path, &text)?;
    let mut entries = Vec::with_capacity(2 * modules.len());
    for m in modules {
        let rank = config.rank_of(&m.module);
        let [a, b] = tensor_names(&m.module);
        if !config.targets(&m.module) {
            return Err(Error::tensor(&weights, a, "the configuration does not target this module"));
        }
        for (name, values, shape) in [(a, m.a, [rank, m.cols]), (b, m.b, [m.rows, rank])] {
            let bad = |reason: String| Err(Error::tensor(&weights, &name, reason));
            if values.is_empty() || shape[0].checked_mul(shape[1]) != Some(values.len()) {
                return bad(format!("{} values for shape {shape:?}", values.len()));
            }
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return bad(format!("value {at} is {}", values[at]));
            }
            let produce =
                move |out: &mut dyn std::io::Write| values.iter().try_for_each(|v| out.write_all(&v.to_le_bytes()));
            entries.push(Entry::new(name, StoredType::F32, shape, produce));
        }
    }
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    if path.exists() && std::fs::read(&path).map_err(|e| Error::io(&path, e))? != text.as_bytes() {
        std::fs::remove_file(&path).map_err(|e| Error::io(&path, e))?;
    }
    write_file(&weights, entries, &mut |_| ())?;
    write_text(&path, &text)
}
