//! LoRA on a b1.58 model (Hu et al., "LoRA", 2021): the base stays as it is stored, packed ternary, and every forward pass
//! computes what inference with the adapter computes, bit for bit, on inference's own kernels.

mod forward;

pub use forward::LoraPrepared;

use super::parameters::{Kind, Parameter, Parameters};
use crate::backend::attention::{AttentionShape, RopeTable};
use crate::backend::cpu::{Gate, KernelKind};
use crate::backend::{Arrangement, Backend, DenseWeight};
use crate::checkpoint::adapter::{AdapterConfig, AdapterMatrices, MAX_RANK, tensor_names};
use crate::model::WeightSource;
use crate::model::config::{Activation, ModelConfig, Projection};
use crate::nn::LinearWeight;
use crate::ops::grad::FrozenWeight;
use crate::{Error, Result};
use candle_core::{Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What stands for all seven projections among the target modules.
pub const ALL_LINEAR: &str = "all-linear";

/// The adapter's shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraOptions {
    /// Inner dimension.
    pub rank: usize,
    /// The update is multiplied by `alpha / rank`.
    pub alpha: f32,
    /// Projections that are adapted, by their last name (`q_proj` and the like), or [`ALL_LINEAR`] alone.
    pub target_modules: Vec<String>,
}

impl Default for LoraOptions {
    fn default() -> Self {
        Self { rank: 16, alpha: 32.0, target_modules: vec![ALL_LINEAR.into()] }
    }
}

impl LoraOptions {
    /// The same as PEFT writes it, with `all-linear` spelt out and `dropout` noted.
    ///
    /// # Errors
    /// [`Error::Request`] naming what is out of range or no projection.
    pub fn config(&self, dropout: f32) -> Result<AdapterConfig> {
        if !(1..=MAX_RANK).contains(&self.rank) {
            return Err(Error::request("rank", format!("{} is out of range: 1 to {MAX_RANK}", self.rank)));
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 || self.alpha > 1e6 {
            return Err(Error::request("alpha", format!("{} is out of range: above 0, at most 1000000", self.alpha)));
        }
        let last = |p: Projection| p.path().rsplit('.').next().unwrap_or_default().to_owned();
        let known = Projection::ALL.map(last);
        let modules = match &self.target_modules[..] {
            [one] if one == ALL_LINEAR => known.to_vec(),
            [] => return Err(Error::request("target modules", "none given")),
            list => list.to_vec(),
        };
        if let Some(name) = modules.iter().find(|name| !known.contains(name)) {
            let reason = format!("'{name}' is no projection; {ALL_LINEAR}, or some of {}", known.join(", "));
            return Err(Error::request("target modules", reason));
        }
        let mut config = AdapterConfig::new(self.rank, self.alpha, modules);
        config.dropout = dropout;
        Ok(config)
    }
}

/// Linear layers over one input: one packed weight for all where that is possible, as inference stacks them.
#[derive(Debug)]
struct Site {
    linears: Vec<Frozen>,
    parts: Vec<Part>,
}

/// One projection of a site.
#[derive(Debug)]
struct Part {
    rows: usize,
    /// Where it is adapted: the index of A, which B follows, and the scaling.
    adapter: Option<(usize, f32)>,
}

#[derive(Debug)]
struct Frozen {
    weight: FrozenWeight,
    /// BitLinear's own norm and its eps (`use_rms_norm`), which the adapter does not see.
    norm: Option<(Tensor, f32)>,
}

#[derive(Debug)]
struct Layer {
    input_norm: Tensor,
    qkv: Site,
    attention_sub_norm: Option<Tensor>,
    output: Site,
    post_attention_norm: Tensor,
    gate_up: Site,
    mlp_sub_norm: Option<Tensor>,
    down: Site,
}

/// A module with an adapter.
#[derive(Debug, Clone)]
struct Module {
    name: String,
    rows: usize,
    cols: usize,
}

/// A frozen decoder whose projections have trainable low-rank updates beside them. On the CPU.
#[derive(Debug)]
pub struct LoraModel {
    config: ModelConfig,
    adapter: AdapterConfig,
    kernel: KernelKind,
    shape: AttentionShape,
    rope: Arc<RopeTable>,
    gate: Gate,
    embedding: Arc<DenseWeight>,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Arc<DenseWeight>,
    /// Those with an adapter, in the parameters' order.
    modules: Vec<Module>,
}

impl LoraModel {
    /// Loads and packs the weights of `source` for sequences of up to `context` tokens.
    ///
    /// # Errors
    /// Those of the source; [`Error::Unavailable`] for a backend of another device than the CPU; [`Error::Shape`] for
    /// shapes that no kernel runs.
    pub fn load(
        backend: &Backend,
        config: &ModelConfig,
        source: &dyn WeightSource,
        adapter: AdapterConfig,
        context: usize,
    ) -> Result<Self> {
        if !backend.device().is_cpu() {
            let reason = "adapters are trained on the CPU for now; use --device cpu".into();
            return Err(Error::Unavailable { what: "LoRA training on this device".into(), reason });
        }
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let embedding = Arc::new(source.dense(backend, "model.embed_tokens.weight", vocab, hidden)?);
        let head = match config.tied_embeddings {
            true => Arc::clone(&embedding),
            false => Arc::new(source.dense(backend, "lm_head.weight", vocab, hidden)?),
        };
        let norm = |name: &str, len: usize| -> Result<Tensor> {
            Ok(Tensor::from_vec(source.vector(name, len)?, len, &Device::Cpu)?)
        };
        let mut modules = Vec::new();
        let mut layers = Vec::with_capacity(config.num_layers);
        for index in 0..config.num_layers {
            let mut weights: Vec<LinearWeight> = Projection::ALL
                .par_iter()
                .map(|which| source.linear(backend, index, *which))
                .collect::<Result<Vec<_>>>()?;
            let mut site = |which: &[Projection]| {
                let weights = weights.drain(..which.len()).collect();
                let mut load = Loading { backend, config, adapter: &adapter, norm: &norm, modules: &mut modules };
                load.site(index, which, weights)
            };
            let (qkv, output, gate_up, down) = (
                site(&[Projection::Query, Projection::Key, Projection::Value])?,
                site(&[Projection::Output])?,
                site(&[Projection::Gate, Projection::Up])?,
                site(&[Projection::Down])?,
            );
            let name = |path: &str| format!("model.layers.{index}.{path}.weight");
            let [attention_sub_norm, mlp_sub_norm] = config.family.sub_norms();
            let sub = |path: &str, len: usize| config.sub_norms.then(|| norm(&name(path), len)).transpose();
            layers.push(Layer {
                input_norm: norm(&name("input_layernorm"), hidden)?,
                qkv,
                attention_sub_norm: sub(attention_sub_norm, config.q_size())?,
                output,
                post_attention_norm: norm(&name("post_attention_layernorm"), hidden)?,
                gate_up,
                mlp_sub_norm: sub(mlp_sub_norm, config.intermediate_size)?,
                down,
            });
        }
        if modules.is_empty() {
            return Err(Error::request("target modules", "they name no projection of this model"));
        }
        Ok(Self {
            kernel: backend.cpu().kernel(),
            shape: AttentionShape::new(config.num_heads, config.num_kv_heads, config.head_dim)?,
            rope: Arc::new(RopeTable::new(context, config.head_dim, config.rope_theta)?),
            gate: match config.activation {
                Activation::Relu2 => Gate::Relu2,
                Activation::Silu => Gate::Silu,
            },
            norm: norm("model.norm.weight", hidden)?,
            config: config.clone(),
            adapter,
            embedding,
            layers,
            head,
            modules,
        })
    }

    /// The base's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The adapter's configuration.
    pub fn adapter(&self) -> &AdapterConfig {
        &self.adapter
    }

    /// A new adapter: A uniform within `1 / sqrt(inputs)` as PEFT draws it (`kaiming_uniform_` with `a = sqrt(5)`), B
    /// zero, so that it changes nothing yet.
    ///
    /// # Errors
    /// Of candle.
    pub fn parameters(&self, seed: u64) -> Result<Parameters> {
        let mut list = Vec::with_capacity(2 * self.modules.len());
        for (i, m) in self.modules.iter().enumerate() {
            let rank = self.adapter.rank_of(&m.name);
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(i as u64);
            let bound = (m.cols as f32).sqrt().recip();
            let a: Vec<f32> = (0..rank * m.cols).map(|_| (2.0 * rng.random::<f32>() - 1.0) * bound).collect();
            let [a_name, b_name] = tensor_names(&m.name);
            for (name, values, dims) in
                [(a_name, a, [rank, m.cols]), (b_name, vec![0.0; m.rows * rank], [m.rows, rank])]
            {
                let value = Tensor::from_vec(values, &dims[..], &Device::Cpu)?;
                list.push(Parameter { name, kind: Kind::LowRank, value });
            }
        }
        Parameters::new(list)
    }

    /// The matrices as [`crate::checkpoint::adapter::write_adapter`] takes them.
    ///
    /// # Errors
    /// [`Error::Shape`] if they are not those of this model.
    pub fn matrices(&self, parameters: &Parameters) -> Result<Vec<AdapterMatrices>> {
        let values = |name: &str| -> Result<Vec<f32>> {
            let p = &parameters.list()[parameters.index(name)?];
            Ok(p.value.flatten_all()?.to_vec1()?)
        };
        let module = |m: &Module| {
            let [a, b] = tensor_names(&m.name);
            Ok(AdapterMatrices { module: m.name.clone(), rows: m.rows, cols: m.cols, a: values(&a)?, b: values(&b)? })
        };
        self.modules.iter().map(module).collect()
    }

    /// The adapter as the forward pass sees it.
    ///
    /// # Errors
    /// [`Error::Shape`] if the parameters are not those of this model.
    pub fn prepare(&self, parameters: &Parameters) -> Result<LoraPrepared<'_>> {
        let mut leaves = Vec::with_capacity(2 * self.modules.len());
        for m in &self.modules {
            let rank = self.adapter.rank_of(&m.name);
            for (name, dims) in tensor_names(&m.name).into_iter().zip([[rank, m.cols], [m.rows, rank]]) {
                let value = &parameters.list()[parameters.index(&name)?].value;
                if value.dims() != dims {
                    let reason = format!("{name} has shape {:?} where {dims:?} is expected", value.dims());
                    return Err(Error::Shape { op: "parameters", reason });
                }
                leaves.push(Var::from_tensor(value)?);
            }
        }
        if leaves.len() != parameters.list().len() {
            let reason = format!("{} parameters for {} adapted modules", parameters.list().len(), self.modules.len());
            return Err(Error::Shape { op: "parameters", reason });
        }
        Ok(LoraPrepared::new(self, leaves))
    }
}

/// What loading one site needs.
struct Loading<'a> {
    backend: &'a Backend,
    config: &'a ModelConfig,
    adapter: &'a AdapterConfig,
    norm: &'a dyn Fn(&str, usize) -> Result<Tensor>,
    modules: &'a mut Vec<Module>,
}

impl Loading<'_> {
    fn site(&mut self, layer: usize, which: &[Projection], weights: Vec<LinearWeight>) -> Result<Site> {
        let (config, backend) = (self.config, self.backend);
        let mut parts = Vec::with_capacity(which.len());
        let mut norms = Vec::with_capacity(which.len());
        for projection in which {
            let (rows, cols) = config.projection_shape(*projection);
            let name = config.projection_name(layer, *projection);
            norms.push(match config.quantization.use_rms_norm && config.is_converted(&name) {
                true => {
                    let weight = (self.norm)(&format!("{name}.rms_norm.weight"), cols)?;
                    Some((weight, config.quantization.rms_norm_eps))
                }
                false => None,
            });
            let adapter = self.adapter.targets(&name).then(|| {
                let scaling = self.adapter.scaling_of(&name);
                self.modules.push(Module { name, rows, cols });
                (2 * (self.modules.len() - 1), scaling)
            });
            parts.push(Part { rows, adapter });
        }
        let ternary = |weights: Vec<LinearWeight>| {
            let codes = |w| match w {
                LinearWeight::Ternary(w) => Some(w),
                LinearWeight::Dense(_) => None,
            };
            let codes: Vec<_> = weights.into_iter().filter_map(codes).collect();
            Ok::<_, Error>(FrozenWeight::Ternary(Arc::new(backend.pack(&codes, Arrangement::Stacked)?)))
        };
        let shared = norms.iter().all(Option::is_none) && weights.iter().all(|w| matches!(w, LinearWeight::Ternary(_)));
        let linears = match shared {
            true => vec![Frozen { weight: ternary(weights)?, norm: None }],
            false => {
                let one = |(weight, norm)| {
                    let weight = match weight {
                        LinearWeight::Dense(w) => FrozenWeight::Dense(Arc::new(w)),
                        codes => ternary(vec![codes])?,
                    };
                    Ok(Frozen { weight, norm })
                };
                weights.into_iter().zip(norms).map(one).collect::<Result<_>>()?
            }
        };
        Ok(Site { linears, parts })
    }
}
