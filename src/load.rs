//! A model's weights on a device: how to load them, and the decoder that they become.

use crate::backend::cpu::{CpuOptions, KernelKind};
use crate::backend::{Backend, DenseType};
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::hub::HubOptions;
use crate::checkpoint::{Checkpoint, ModelFiles};
use crate::model::config::ModelConfig;
use crate::model::presets::{Preset, SyntheticWeights};
use crate::model::{AdaptedWeights, CheckpointWeights, Decoder, WeightSource};
use crate::nn::HeadChoice;
use crate::report::{AdapterReport, Report};
use crate::ternary::I2sLayout;
use crate::{Error, Result};
use candle_core::Device;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Positions that are prepared for where nobody says otherwise; fewer if the model was trained for fewer.
pub const DEFAULT_CONTEXT: usize = 4096;

/// How to load a model; everything has a default that is decided from the model and the device.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    device: Device,
    cpu: CpuOptions,
    context: Option<usize>,
    default_context: usize,
    kv_dtype: DenseType,
    hub: HubOptions,
    adapter: Option<PathBuf>,
    i2s_layout: Option<I2sLayout>,
    graphs: bool,
    head: HeadChoice,
    progress: Option<fn(usize, usize)>,
}

impl LoadOptions {
    /// Loads onto `device`; the hub is used as its environment variables say.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            cpu: CpuOptions::default(),
            context: None,
            default_context: DEFAULT_CONTEXT,
            kv_dtype: DenseType::F32,
            hub: HubOptions::from_env(),
            adapter: None,
            i2s_layout: None,
            graphs: true,
            head: HeadChoice::Auto,
            progress: None,
        }
    }

    /// Another device than the one that these options were made for.
    pub fn device(mut self, device: &Device) -> Self {
        self.device = device.clone();
        self
    }

    /// Threads on the CPU; by default the physical cores.
    pub fn threads(mut self, threads: Option<usize>) -> Self {
        self.cpu.threads = threads;
        self
    }

    /// The CPU's ternary kernel; by default the fastest that it can run.
    pub fn kernel(mut self, kernel: Option<KernelKind>) -> Self {
        self.cpu.kernel = kernel;
        self
    }

    /// Positions of a sequence; by default the model's, at most [`Self::default_context`].
    pub fn context(mut self, positions: Option<usize>) -> Self {
        self.context = positions;
        self
    }

    /// Most positions of a sequence where [`Self::context`] does not say how many; [`DEFAULT_CONTEXT`] unless set.
    pub fn default_context(mut self, positions: usize) -> Self {
        self.default_context = positions;
        self
    }

    /// Type of the KV cache; f32 by default.
    pub fn kv_dtype(mut self, dtype: DenseType) -> Self {
        self.kv_dtype = dtype;
        self
    }

    /// How hub ids are resolved.
    pub fn hub(mut self, options: HubOptions) -> Self {
        self.hub = options;
        self
    }

    /// Directory of a LoRA adapter in PEFT's layout, run beside the weights and never merged into them.
    pub fn adapter(mut self, dir: Option<PathBuf>) -> Self {
        self.adapter = dir;
        self
    }

    /// Layout of the I2_S tensors of a GGUF file, which the file does not tell; by default the one of published files.
    pub fn i2s_layout(mut self, layout: Option<I2sLayout>) -> Self {
        self.i2s_layout = layout;
        self
    }

    /// Whether decode steps are recorded as graphs and replayed, where the device can; true by default, and without effect
    /// on results.
    pub fn graphs(mut self, graphs: bool) -> Self {
        self.graphs = graphs;
        self
    }

    /// Whether these options load onto the CPU.
    pub fn is_for_cpu(&self) -> bool {
        self.device.is_cpu()
    }

    /// Type of the KV cache.
    pub(crate) fn kv_type(&self) -> DenseType {
        self.kv_dtype
    }

    /// How the output head is computed; decided from the model and the device by default, without effect on tokens.
    pub fn head(mut self, head: impl Into<HeadChoice>) -> Self {
        self.head = head.into();
        self
    }

    /// Called with (layers loaded, layers) while loading.
    pub fn on_progress(mut self, progress: fn(usize, usize)) -> Self {
        self.progress = Some(progress);
        self
    }

    pub(crate) fn find(&self, model: &str) -> Result<ModelFiles> {
        ModelFiles::find(model, &self.hub)?.with_i2s_layout(self.i2s_layout)
    }

    fn context_for(&self, config: &ModelConfig) -> Result<usize> {
        let most = config.max_positions;
        match self.context {
            None => Ok(most.min(self.default_context.max(1))),
            Some(n) if (1..=most).contains(&n) => Ok(n),
            Some(n) => {
                Err(Error::request("--context", format!("{n} is not between 1 and {most}, the model's positions")))
            }
        }
    }
}

/// A decoder on its device, without text: what `bench` and `logits` need, and what [`BitNet`](crate::BitNet) is built on.
#[derive(Debug)]
pub struct LoadedDecoder {
    /// The decoder.
    pub decoder: Decoder,
    /// Type of its KV caches.
    pub kv_dtype: DenseType,
    /// The checkpoint's files; none for a preset.
    pub files: Option<ModelFiles>,
    /// The adapter beside its weights.
    pub adapter: Option<AdapterReport>,
    /// Time from opening the checkpoint to the last packed weight, without the tokenizer's.
    pub load_time: Duration,
}

impl LoadedDecoder {
    /// Loads a directory, a GGUF file, a hub id (`owner/name`, `owner/name@revision`) or the built-in model (`builtin`).
    ///
    /// # Errors
    /// For a model that cannot be found, is malformed, is not b1.58, or does not fit this machine; each names the
    /// file and the tensor or key. The same for its adapter, if there is one.
    pub fn load(model: &str, options: &LoadOptions) -> Result<Self> {
        Self::open(&options.find(model)?, options)
    }

    /// Loads from the files of a model.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn open(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let start = Instant::now();
        Self::from_checkpoint(&Checkpoint::open(files)?, start, options)
    }

    pub(crate) fn from_checkpoint(checkpoint: &Checkpoint, start: Instant, options: &LoadOptions) -> Result<Self> {
        let (path, text) = checkpoint.config();
        let config = ModelConfig::parse(path, text)?;
        let backend = Backend::new(&options.device, options.cpu)?.with_graphs(options.graphs);
        let weights = CheckpointWeights::new(checkpoint, &config)?;
        let adapter = options.adapter.as_deref().map(Adapter::open).transpose()?;
        let adapted = adapter.as_ref().map(|a| AdaptedWeights::new(&weights, a, &config)).transpose()?;
        let source: &dyn WeightSource = adapted.as_ref().map_or(&weights, |a| a);
        let (context, layers) = (options.context_for(&config)?, config.num_layers);
        let progress = |done| options.progress.into_iter().for_each(|f| f(done, layers));
        let decoder = Decoder::load(&backend, config.clone(), source, context, progress)?.with_head(options.head)?;
        let files = Some(checkpoint.source().clone());
        let adapter = adapter.as_ref().map(AdapterReport::new);
        Ok(Self { decoder, kv_dtype: options.kv_dtype, files, adapter, load_time: start.elapsed() })
    }

    /// A preset's shapes with random weights; needs no file.
    ///
    /// # Errors
    /// [`Error::Request`] for an unknown preset, or with an adapter; if the model does not fit this machine.
    pub fn synthetic(preset: &str, options: &LoadOptions) -> Result<Self> {
        let config = Preset::find(preset)?.config();
        if options.adapter.is_some() {
            return Err(Error::request("--adapter", "a preset's weights are random, so no adapter belongs to them"));
        }
        let start = Instant::now();
        let backend = Backend::new(&options.device, options.cpu)?.with_graphs(options.graphs);
        let weights = SyntheticWeights::new(&config, 0);
        let (context, layers) = (options.context_for(&config)?, config.num_layers);
        let progress = |done| options.progress.into_iter().for_each(|f| f(done, layers));
        let decoder = Decoder::load(&backend, config, &weights, context, progress)?.with_head(options.head)?;
        Ok(Self { decoder, kv_dtype: options.kv_dtype, files: None, adapter: None, load_time: start.elapsed() })
    }

    /// What was loaded, and how it runs.
    pub fn report(&self) -> Report {
        let backend = self.decoder.backend();
        let config = self.decoder.config();
        Report {
            family: config.family.architecture(),
            parameters: config.parameters(),
            device: backend.device_name(),
            kernel: backend.kernel_name(),
            threads: backend.is_cpu().then(|| backend.cpu().pool().threads()),
            // A driver that does not answer fails the next step, which says so.
            device_memory: backend.device_memory().ok().flatten(),
            context: self.decoder.context(),
            kv_dtype: self.kv_dtype,
            footprint: self.decoder.footprint(),
            head: self.decoder.head().kind(),
            head_dtype: self.decoder.head().weight().dtype(),
            adapter: self.adapter.clone(),
            load_time: self.load_time,
        }
    }
}
