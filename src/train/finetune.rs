//! Supervised fine-tuning in a directory: a model and examples in, an adapter or a checkpoint of masters out.
//!
//! The directory holds `finetune.toml`, `metrics.jsonl` (one object a step or validation), `curve.svg`, `state.safetensors`
//! (to resume from), and the best parameters so far by validation, or the last without validation examples: `adapter_config.json` and
//! `adapter_model.safetensors` of a LoRA run, `masters/` of a full one. The base's own files are only read.

use super::decoder::Decoder;
use super::directory::{MASTERS, RunDirectory, Summary};
use super::examples::{ExampleBatches, ExampleCounts, ExampleOptions, Examples};
use super::export::write_masters;
use super::lora::{LoraModel, LoraOptions};
use super::optimization::Optimization;
use super::parameters::{Masters, Parameters};
use super::trainer::{Event, Trainable, Trainer};
use crate::backend::Backend;
use crate::backend::cpu::CpuOptions;
use crate::checkpoint::adapter::{CONFIG_FILE, write_adapter};
use crate::checkpoint::write::write_text;
use crate::checkpoint::{Checkpoint, ModelFiles, StoredType};
use crate::model::CheckpointWeights;
use crate::model::config::{Mode, ModelConfig};
use crate::model::convert::Companions;
use crate::{Error, Result};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// The settings' file.
pub const RECIPE: &str = "finetune.toml";

/// How many examples are computed at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Batching {
    /// Examples of a step.
    pub sequences: usize,
    /// Examples of a micro-batch: what one thread computes at a time. Decides memory and the order of sums, so a run keeps
    /// it.
    pub micro: usize,
}

impl Default for Batching {
    fn default() -> Self {
        Self { sequences: 8, micro: 1 }
    }
}

/// All settings of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FinetuneRecipe {
    /// The base, as it was named: a hub id or a directory. An adapter's configuration repeats it.
    pub model: String,
    /// Branch, tag or commit on the hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// File of the validation examples, where they are not set apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_file: Option<PathBuf>,
    /// What the examples are recognised by when the run goes on; [`Finetune::start`] fills it in.
    #[serde(default)]
    pub fingerprint: String,
    /// Type of the masters of full training.
    #[serde(default)]
    pub masters: Masters,
    /// The adapter; none for full training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraOptions>,
    /// The examples.
    #[serde(default)]
    pub examples: ExampleOptions,
    /// The batches.
    #[serde(default)]
    pub batches: Batching,
    /// The steps; `dropout` is that of the adapter's inputs in a LoRA run.
    #[serde(default)]
    pub optimization: Optimization,
}

impl FinetuneRecipe {
    /// Settings for a model with everything else at its default.
    pub fn new(model: impl Into<String>, lora: Option<LoraOptions>) -> Self {
        Self {
            model: model.into(),
            revision: None,
            validation_file: None,
            fingerprint: String::new(),
            masters: Masters::F32,
            lora,
            examples: ExampleOptions::default(),
            batches: Batching::default(),
            optimization: Optimization::default(),
        }
    }

    /// Reads the settings of a run.
    ///
    /// # Errors
    /// [`Error::Request`] if the directory holds no run; [`Error::Io`], or [`Error::File`] naming the line or the key.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(RECIPE);
        if !path.exists() {
            let reason = format!("{} holds no run of finetune to go on with", dir.display());
            return Err(Error::request("output directory", reason));
        }
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        toml::from_str(&text).map_err(|e| Error::file(path, e.to_string().trim().replace('\n', " ")))
    }

    fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::request("settings", e.to_string()))
    }
}

#[derive(Debug)]
enum Model {
    Lora(Box<LoraModel>),
    Full(Box<Decoder>),
}

/// A prepared run.
#[derive(Debug)]
pub struct Finetune {
    recipe: FinetuneRecipe,
    dir: RunDirectory,
    checkpoint: Checkpoint,
    config: ModelConfig,
    model: Model,
    trainable: usize,
    batches: ExampleBatches,
    counts: ExampleCounts,
}

impl Finetune {
    /// Prepares a run in `dir`, which must hold neither a run nor a model: loads the checkpoint `base`, writes the
    /// settings. The examples are those that `recipe.examples` describes.
    ///
    /// # Errors
    /// [`Error::Request`] for a directory that holds something, settings out of range, or full training of a packed base;
    /// those of loading the base.
    pub fn start(base: impl Into<ModelFiles>, dir: &Path, recipe: &FinetuneRecipe, examples: Examples) -> Result<Self> {
        let held = [
            (RECIPE, "a run; resume it, or name"),
            (CONFIG_FILE, "an adapter; name"),
            ("config.json", "a model; name"),
        ];
        if let Some((_, what)) = held.iter().find(|(name, _)| dir.join(name).exists()) {
            let reason = format!("{} holds {what} another directory", dir.display());
            return Err(Error::request("output directory", reason));
        }
        let recipe = FinetuneRecipe { fingerprint: format!("{:016x}", examples.fingerprint()), ..recipe.clone() };
        let run = Self::prepare(base.into(), || RunDirectory::create(dir), recipe, examples)?;
        write_text(&dir.join(RECIPE), &run.recipe.to_toml()?)?;
        Ok(run)
    }

    /// Prepares to go on with the run in `dir`, whose settings [`FinetuneRecipe::read`] gave, from its last saved state or,
    /// if there is none yet, from the start.
    ///
    /// # Errors
    /// As [`Self::start`]; [`Error::Request`] for other examples than the run began with.
    pub fn resume(base: impl Into<ModelFiles>, dir: &Path, recipe: FinetuneRecipe, examples: Examples) -> Result<Self> {
        if format!("{:016x}", examples.fingerprint()) != recipe.fingerprint {
            let reason = "they are not those that the run began with: another file, model or template";
            return Err(Error::request("examples", reason));
        }
        Self::prepare(base.into(), || RunDirectory::reopen(dir), recipe, examples)
    }

    /// `dir` is asked for last, when all else is known to be right.
    fn prepare(
        base: ModelFiles,
        dir: impl FnOnce() -> Result<RunDirectory>,
        recipe: FinetuneRecipe,
        examples: Examples,
    ) -> Result<Self> {
        recipe.optimization.check()?;
        let counts = examples.counts;
        let Batching { sequences, micro } = recipe.batches;
        let batches = ExampleBatches::new(examples, sequences, micro, recipe.optimization.seed)?;
        let checkpoint = Checkpoint::open(base)?;
        let (path, text) = checkpoint.config();
        let config = ModelConfig::parse(path, text)?;
        let context = recipe.examples.context;
        if context > config.max_positions {
            let reason = format!("{context} is more than the model's {} positions", config.max_positions);
            return Err(Error::request("context", reason));
        }
        let weights = CheckpointWeights::new(&checkpoint, &config)?;
        let (model, trainable) = match &recipe.lora {
            Some(options) => {
                let mut adapter = options.config(recipe.optimization.dropout)?;
                adapter.base_model = Some(recipe.model.clone());
                // All threads pack; they are gone before training begins.
                let backend = Backend::new(&Device::Cpu, CpuOptions::default())?;
                let model = LoraModel::load(&backend, &config, &weights, adapter, context)?;
                let count = model.parameters(recipe.optimization.seed)?.count();
                (Model::Lora(Box::new(model)), count)
            }
            None => {
                refuse_packed(&checkpoint, &config, &recipe.model)?;
                let decoder = Decoder::new(&config)?.with_precision(recipe.optimization.precision);
                (Model::Full(Box::new(decoder)), config.parameters() as usize)
            }
        };
        Ok(Self { recipe, dir: dir()?, checkpoint, config, model, trainable, batches, counts })
    }

    /// The settings.
    pub fn recipe(&self) -> &FinetuneRecipe {
        &self.recipe
    }

    /// The base's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Numbers that are trained.
    pub fn trainable(&self) -> usize {
        self.trainable
    }

    /// Their share in all numbers of the model, the adapter's included.
    pub fn trainable_share(&self) -> f64 {
        let base = self.config.parameters();
        let all = base + if self.recipe.lora.is_some() { self.trainable as u64 } else { 0 };
        self.trainable as f64 / all as f64
    }

    /// The batches.
    pub fn batches(&self) -> &ExampleBatches {
        &self.batches
    }

    /// What became of the lines.
    pub fn counts(&self) -> &ExampleCounts {
        &self.counts
    }

    /// The first example's prompt.
    pub fn first_prompt(&self) -> &[u32] {
        self.batches.examples().first().and_then(|e| e.ids.get(..e.prompt)).unwrap_or_default()
    }

    /// Where the result is: the adapter's directory, or that of the masters.
    pub fn output(&self) -> PathBuf {
        match self.model {
            Model::Lora(_) => self.dir.path().to_owned(),
            Model::Full(_) => self.dir.path().join(MASTERS),
        }
    }

    /// Trains to the end of the recipe or until `observe` breaks; everything that is written is written whole. LoRA runs
    /// on the CPU.
    ///
    /// # Errors
    /// Those of [`Trainer::run`]; [`Error::Unavailable`] for LoRA on another device.
    pub fn run(
        &self,
        device: &Device,
        threads: usize,
        observe: &mut dyn FnMut(Event<'_>) -> Result<ControlFlow<()>>,
    ) -> Result<Summary> {
        match &self.model {
            Model::Lora(_) if !device.is_cpu() => Err(Error::Unavailable {
                what: "LoRA training on this device".into(),
                reason: "adapters are trained on the CPU for now; use --device cpu".into(),
            }),
            Model::Lora(model) => {
                let parameters = model.parameters(self.recipe.optimization.seed)?;
                let export = |p: &Parameters| write_adapter(self.dir.path(), model.adapter(), model.matrices(p)?);
                self.train(&**model, parameters, threads, &export, observe)
            }
            Model::Full(decoder) => {
                let (config, masters) = (&self.config, self.recipe.masters);
                let parameters = Parameters::from_checkpoint(config, masters, device, &self.checkpoint)?;
                self.train(&**decoder, parameters, threads, &|p| self.export_masters(p), observe)
            }
        }
    }

    fn train<M: Trainable>(
        &self,
        model: &M,
        parameters: Parameters,
        threads: usize,
        export: &dyn Fn(&Parameters) -> Result<()>,
        observe: &mut dyn FnMut(Event<'_>) -> Result<ControlFlow<()>>,
    ) -> Result<Summary> {
        let trainer = Trainer::new(model, &self.batches, parameters, self.recipe.optimization, threads)?;
        self.dir.run(trainer, export, observe)
    }

    /// Writes a checkpoint of masters with the base's tokenizer and text files, so that it is the old one or the new one at
    /// any time.
    fn export_masters(&self, parameters: &Parameters) -> Result<()> {
        let dir = self.dir.path().join(MASTERS);
        std::fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        let base = self.checkpoint.source();
        for name in Companions::of(base)?.copied {
            let (from, to) = (base.path(&name), dir.join(&name));
            let mut bytes = Vec::new();
            Companions::reader(base, &name)?.read_to_end(&mut bytes).map_err(|e| Error::io(&from, e))?;
            if std::fs::read(&to).ok().as_ref() != Some(&bytes) {
                std::fs::write(&to, bytes).map_err(|e| Error::io(&to, e))?;
            }
        }
        let mut config = self.config.clone();
        config.quantization.mode = Mode::Online;
        write_masters(&dir, &config, parameters, true)
    }
}

/// Refuses a base whose ternary weights are codes: their masters are gone.
fn refuse_packed(checkpoint: &Checkpoint, config: &ModelConfig, model: &str) -> Result<()> {
    let names = (0..config.num_layers).flat_map(|layer| config.linears(layer));
    let packed = |(name, ..): &(String, usize, usize)| {
        let weight = checkpoint.tensor(&format!("{name}.weight"));
        config.is_converted(name)
            && (checkpoint.is_gguf()
                || checkpoint.contains(&format!("{name}.weight_scale"))
                || weight.is_some_and(|w| w.info.dtype == StoredType::U8))
    };
    if !names.collect::<Vec<_>>().iter().any(packed) {
        return Ok(());
    }
    let example = "microsoft/bitnet-b1.58-2B-4T-bf16";
    let use_instead = match model.split('/').collect::<Vec<_>>()[..] {
        ["microsoft", name] if !Path::new(model).exists() => {
            format!("use microsoft/{}-bf16", name.split('@').next().unwrap_or(name))
        }
        _ => format!("use the bf16 repository that it was packed from (such as {example})"),
    };
    Err(Error::request(
        "model",
        format!(
            "{model} is packed; full training needs masters: {use_instead}, or leave --full out to train an adapter"
        ),
    ))
}
