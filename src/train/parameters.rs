//! A model's trainable tensors, by the names that a checkpoint gives them.

use crate::checkpoint::Checkpoint;
use crate::model::config::{ModelConfig, Projection};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What a parameter is, which decides how it is quantised and decayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Embedding or output head.
    Dense,
    /// A norm's weight.
    Norm,
    /// A BitLinear's master weight.
    Ternary,
    /// A matrix of a LoRA update; decays like a master.
    LowRank,
}

/// Type of the master weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Masters {
    /// 32-bit.
    #[default]
    F32,
    /// 16-bit, with updates rounded stochastically so that small ones are not lost.
    BF16,
}

impl Masters {
    /// The type of the tensors.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::BF16 => DType::BF16,
        }
    }
}

/// One trainable tensor.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Its name in a checkpoint.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Its value, f32 or bf16.
    pub value: Tensor,
}

/// All trainable tensors of a decoder, in the order of a checkpoint.
///
/// A clone shares the tensors, and training updates them in place: [`Parameters::copied`] has its own.
#[derive(Debug, Clone)]
pub struct Parameters {
    list: Vec<Parameter>,
}

/// The embedding and the output head.
const EMBEDDINGS: [&str; 2] = ["model.embed_tokens.weight", "lm_head.weight"];

/// Where a tensor of the model stands and what it looks like.
fn layout(config: &ModelConfig) -> Vec<(String, Kind, Vec<usize>)> {
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    let mut list = vec![("model.embed_tokens.weight".to_owned(), Kind::Dense, vec![vocab, hidden])];
    for layer in 0..config.num_layers {
        list.extend(config.norms(layer).into_iter().map(|(name, len)| (name, Kind::Norm, vec![len])));
        list.extend(config.linears(layer).into_iter().map(|(name, rows, cols)| {
            let kind = if config.is_converted(&name) { Kind::Ternary } else { Kind::Dense };
            (format!("{name}.weight"), kind, vec![rows, cols])
        }));
    }
    list.push(("model.norm.weight".into(), Kind::Norm, vec![hidden]));
    if !config.tied_embeddings {
        list.push(("lm_head.weight".into(), Kind::Dense, vec![vocab, hidden]));
    }
    list
}

impl Parameters {
    /// Random values: normal with deviation `1 / sqrt(inputs)`, those that write to the residual stream less by
    /// `sqrt(2 · layers)`, as GPT-2 does; embeddings 0.02; norms 1. The same seed gives the same values on every device.
    ///
    /// # Errors
    /// Of candle.
    pub fn random(config: &ModelConfig, masters: Masters, device: &Device, seed: u64) -> Result<Self> {
        let residual = (2.0 * config.num_layers as f32).sqrt();
        let list = layout(config).into_iter().enumerate().map(|(i, (name, kind, dims))| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(i as u64);
            let count = dims.iter().product();
            let writes = [Projection::Output, Projection::Down].iter().any(|p| name.contains(p.path()));
            let deviation = match (kind, writes) {
                (Kind::Norm, _) => 0.0,
                (Kind::Dense, _) if EMBEDDINGS.contains(&name.as_str()) => 0.02,
                (_, writes) => {
                    let inputs = dims.last().copied().unwrap_or(1) as f32;
                    inputs.sqrt().recip() / if writes { residual } else { 1.0 }
                }
            };
            let values: Vec<f32> = match kind {
                Kind::Norm => vec![1.0; count],
                _ => (0..count).map(|_| deviation * normal(&mut rng)).collect(),
            };
            let value = Tensor::from_vec(values, dims, device)?.to_dtype(masters.dtype())?;
            Ok(Parameter { name, kind, value })
        });
        Ok(Self { list: list.collect::<Result<_>>()? })
    }

    /// Values that `read` supplies by name and shape, such as a checkpoint's masters.
    ///
    /// # Errors
    /// Those of `read`; [`Error::Shape`] if it returns another shape.
    pub fn from_values(
        config: &ModelConfig,
        masters: Masters,
        device: &Device,
        mut read: impl FnMut(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        let list = layout(config).into_iter().map(|(name, kind, dims)| {
            let value = read(&name, &dims)?;
            if value.dims() != dims {
                let reason = format!("{name} has shape {:?} where {dims:?} is expected", value.dims());
                return Err(Error::Shape { op: "parameters", reason });
            }
            let value = value.to_device(device)?.to_dtype(masters.dtype())?;
            Ok(Parameter { name, kind, value })
        });
        Ok(Self { list: list.collect::<Result<_>>()? })
    }

    /// Any parameters, in this order.
    ///
    /// # Errors
    /// [`Error::Shape`] for a name that is given twice or a value that is neither f32 nor bf16.
    pub fn new(list: Vec<Parameter>) -> Result<Self> {
        let mut names: Vec<&str> = list.iter().map(|p| p.name.as_str()).collect();
        names.sort_unstable();
        let twice = names.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| format!("{} is given twice", pair[0]));
        let typed = |p: &&Parameter| !matches!(p.value.dtype(), DType::F32 | DType::BF16);
        let other = || list.iter().find(typed).map(|p| format!("{} is {:?}, not f32 or bf16", p.name, p.value.dtype()));
        match twice.or_else(other) {
            Some(reason) => Err(Error::Shape { op: "parameters", reason }),
            None => Ok(Self { list }),
        }
    }

    /// The masters of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Tensor`] for one that is missing, packed, of another shape, or not finite.
    pub fn from_checkpoint(
        config: &ModelConfig,
        masters: Masters,
        device: &Device,
        checkpoint: &Checkpoint,
    ) -> Result<Self> {
        Self::from_values(config, masters, device, |name, dims| {
            let values = match *dims {
                [rows, cols] => {
                    let view = checkpoint.dense(name, rows, cols)?;
                    let values = view.to_f32();
                    view.release();
                    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                        return Err(Error::tensor(view.file.path(), name, format!("value {at} is {}", values[at])));
                    }
                    values
                }
                _ => checkpoint.vector(name, dims.iter().product())?,
            };
            Ok(Tensor::from_vec(values, dims, &Device::Cpu)?)
        })
    }

    /// The same values in tensors of their own.
    ///
    /// # Errors
    /// Of candle.
    pub fn copied(&self) -> Result<Self> {
        let copy = |p: &Parameter| Ok(Parameter { value: p.value.contiguous()?.copy()?, ..p.clone() });
        Ok(Self { list: self.list.iter().map(copy).collect::<Result<_>>()? })
    }

    /// The parameters, in the order of a checkpoint.
    pub fn list(&self) -> &[Parameter] {
        &self.list
    }

    pub(super) fn list_mut(&mut self) -> &mut [Parameter] {
        &mut self.list
    }

    /// The index of a parameter.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is none of this name.
    pub fn index(&self, name: &str) -> Result<usize> {
        let missing = || Error::Shape { op: "parameters", reason: format!("there is no {name}") };
        self.list.iter().position(|p| p.name == name).ok_or_else(missing)
    }

    /// Number of values.
    pub fn count(&self) -> usize {
        self.list.iter().map(|p| p.value.elem_count()).sum()
    }
}

/// A normal number by Box and Muller's method.
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
}
