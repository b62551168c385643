//! The façade: a checkpoint loaded onto a device, its text tools, and one sequence to generate with.

use crate::backend::cpu::{CpuOptions, KernelKind};
use crate::backend::{Backend, DenseType, DeviceMemory};
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::hub::HubOptions;
use crate::checkpoint::{BUILTIN, Checkpoint, ModelFiles};
use crate::generate::{GenerateOptions, GenerationDefaults, LanguageModel, Sampled, Sampler, TokenStream};
use crate::model::config::ModelConfig;
use crate::model::presets::{Preset, SyntheticWeights};
use crate::model::{AdaptedWeights, CheckpointWeights, Decoder, Footprint, Logits, Sequence, WeightSource};
use crate::nn::{HeadChoice, HeadKind, KvCache};
use crate::ternary::I2sLayout;
use crate::text::{ChatTemplate, Message, Tokenizer};
use crate::token_draw::TokenDraw;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Positions that are prepared for where nobody says otherwise; fewer if the model was trained for fewer.
pub const DEFAULT_CONTEXT: usize = 4096;

/// A chat model, for those who ask one of a model that is none.
const CHAT_MODEL: &str = "microsoft/bitnet-b1.58-2B-4T";

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

    fn find(&self, model: &str) -> Result<ModelFiles> {
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

/// A decoder on its device, without text: what `bench` and `logits` need, and what [`BitNet`] is built on.
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

    fn from_checkpoint(checkpoint: &Checkpoint, start: Instant, options: &LoadOptions) -> Result<Self> {
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

/// What was loaded, and how it runs.
#[derive(Debug, Clone)]
pub struct Report {
    /// The architecture's name in config.json.
    pub family: &'static str,
    /// Parameters of the model.
    pub parameters: u64,
    /// The device: `cpu`, or a GPU's number and name.
    pub device: String,
    /// The ternary kernel: the CPU's, or a GPU's compute capability or architecture.
    pub kernel: String,
    /// Threads of the CPU; none on a GPU.
    pub threads: Option<usize>,
    /// The GPU's memory, now; none on the CPU.
    pub device_memory: Option<DeviceMemory>,
    /// Positions of a sequence.
    pub context: usize,
    /// Type of the KV cache.
    pub kv_dtype: DenseType,
    /// Bytes of the weights.
    pub footprint: Footprint,
    /// How the output head is computed.
    pub head: HeadKind,
    /// Type that it is stored in.
    pub head_dtype: DenseType,
    /// The adapter beside them.
    pub adapter: Option<AdapterReport>,
    /// Time that loading took.
    pub load_time: Duration,
}

impl Report {
    /// Bytes of weights that a decoded token reads: ternary, unconverted, adapter and head; of a screened head without the
    /// rows that its screen leaves.
    pub fn bytes_per_token(&self) -> usize {
        self.footprint.ternary + self.footprint.dense + self.footprint.adapter + self.footprint.head
    }

    /// How the output head is computed, with the type that it is stored in.
    pub fn head_name(&self) -> String {
        match self.head {
            HeadKind::Full => self.head_dtype.to_string(),
            HeadKind::Int8 => format!("int8, approximate, of {}", self.head_dtype),
            kind => format!("{kind}, of {}", self.head_dtype),
        }
    }

    /// Bytes that a position keeps in the KV cache.
    pub fn kv_bytes_per_position(&self) -> usize {
        self.footprint.kv_elements_per_position * self.kv_dtype.size()
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mb = |bytes: usize| bytes as f64 / 1e6;
        let (parameters, unit) = match self.parameters as f64 {
            n if n < 1e9 => (n / 1e6, "M"),
            n => (n / 1e9, "G"),
        };
        write!(f, "{}, {parameters:.2} {unit} parameters; {} with kernel {}", self.family, self.device, self.kernel)?;
        if let Some(threads) = self.threads {
            write!(f, " on {threads} thread{}", if threads == 1 { "" } else { "s" })?;
        }
        if let Some(memory) = self.device_memory {
            write!(f, ", device memory {memory}")?;
        }
        write!(
            f,
            "; reads {:.1} MB a token (ternary {:.1}, head {:.1} {}), KV cache {} {:.1} kB a position, context {}; loaded in \
             {:.2} s",
            mb(self.bytes_per_token()),
            mb(self.footprint.ternary),
            mb(self.footprint.head),
            self.head_name(),
            self.kv_dtype,
            self.kv_bytes_per_position() as f64 / 1e3,
            self.context,
            self.load_time.as_secs_f64(),
        )?;
        self.adapter.iter().try_for_each(|adapter| write!(f, "; {adapter}"))
    }
}

/// A LoRA adapter that was loaded.
#[derive(Debug, Clone)]
pub struct AdapterReport {
    /// Its directory.
    pub dir: PathBuf,
    /// Its rank, where no module has another.
    pub rank: usize,
    /// `lora_alpha`, where no module has another.
    pub alpha: f32,
    /// Modules that it adapts.
    pub modules: usize,
    /// Numbers in its matrices.
    pub parameters: u64,
    /// The model that it says it was trained on.
    pub base_model: Option<String>,
}

impl AdapterReport {
    fn new(adapter: &Adapter) -> Self {
        let config = adapter.config();
        Self {
            dir: adapter.dir().to_owned(),
            rank: config.rank,
            alpha: config.alpha,
            modules: adapter.modules().len(),
            parameters: adapter.parameters(),
            base_model: config.base_model.clone(),
        }
    }
}

impl std::fmt::Display for AdapterReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (dir, parameters) = (self.dir.display(), self.parameters as f64 / 1e6);
        let (rank, alpha, modules) = (self.rank, self.alpha, self.modules);
        write!(f, "adapter {dir}: r {rank}, alpha {alpha}, {modules} modules, {parameters:.2} M parameters")
    }
}

/// A b1.58 model with its tokenizer, ready to generate: one sequence with its KV cache.
#[derive(Debug)]
pub struct BitNet {
    loaded: LoadedDecoder,
    cache: KvCache,
    position: usize,
    draw: TokenDraw,
    drawn: Vec<Sampled>,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    defaults: GenerationDefaults,
}

impl BitNet {
    /// Loads a directory, a GGUF file, a hub id (`owner/name`, `owner/name@revision`) or the built-in model (`builtin`).
    ///
    /// # Errors
    /// As [`LoadedDecoder::load`]; for a tokenizer or generation configuration that is missing or malformed.
    pub fn load(model: impl AsRef<str>, options: LoadOptions) -> Result<Self> {
        let files = options.find(model.as_ref())?;
        // Opening reads headers only, and shows that this is a checkpoint at all. Then the small files: a bad
        // tokenizer is reported before gigabytes are packed.
        let start = Instant::now();
        let checkpoint = Checkpoint::open(&files)?;
        let opened = start.elapsed();
        let tokenizer = Tokenizer::open(&files)?;
        let template = ChatTemplate::open(&files)?;
        let defaults = GenerationDefaults::open(&files, &tokenizer, template.as_ref())?;
        let mut loaded = LoadedDecoder::from_checkpoint(&checkpoint, Instant::now(), &options)?;
        loaded.load_time += opened;
        let vocab = loaded.decoder.config().vocab_size;
        if tokenizer.vocab_size() > vocab {
            let reason = format!("has {} tokens, the model's vocabulary {vocab}", tokenizer.vocab_size());
            return Err(Error::file(files.path("tokenizer.json"), reason));
        }
        let cache = loaded.decoder.kv_cache(loaded.kv_dtype, 1)?;
        let draw = TokenDraw::new(loaded.decoder.backend(), 1, vocab)?;
        Ok(Self { loaded, cache, position: 0, draw, drawn: Vec::with_capacity(1), tokenizer, template, defaults })
    }

    /// What was loaded, and how it runs.
    pub fn report(&self) -> Report {
        self.loaded.report()
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.loaded.decoder
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The chat template.
    ///
    /// # Errors
    /// [`Error::Text`] if the checkpoint has none.
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| match &self.loaded.files {
            Some(ModelFiles::Builtin) => Error::Text {
                what: format!("the built-in model ({BUILTIN})"),
                reason: format!(
                    "continues a text and has not learnt to chat: chat with another, such as {CHAT_MODEL}, or generate \
                     from a plain prompt"
                ),
            },
            Some(files) => ChatTemplate::missing(files),
            None => ChatTemplate::missing("the model"),
        })
    }

    /// What the checkpoint says about generation.
    pub fn defaults(&self) -> &GenerationDefaults {
        &self.defaults
    }

    /// Tokens of a conversation, with the prompt for the assistant's answer.
    ///
    /// # Errors
    /// [`Error::Text`] if there is no template or it refuses the messages.
    pub fn chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        Ok(self.chat_template()?.apply(&self.tokenizer, messages, true)?.ids)
    }

    /// Tokens of a text, with what the tokenizer puts in front.
    ///
    /// # Errors
    /// [`Error::Text`] if the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(text, true)
    }

    /// Continues `prompt`; whatever the model held before is forgotten.
    ///
    /// # Errors
    /// [`Error::Request`] for options out of range, [`Error::ContextFull`] for a prompt longer than the context.
    pub fn generate(&mut self, prompt: &[u32], options: &GenerateOptions) -> Result<TokenStream<'_, Self>> {
        let params = options.resolve(&self.defaults, self.vocab_size())?;
        let tokenizer = self.tokenizer.clone();
        TokenStream::new(self, tokenizer, prompt, params)
    }
}

impl BitNet {
    /// Appends tokens and lends their logits to `read`; the position moves on unless something failed.
    fn append(
        &mut self,
        tokens: &[u32],
        wanted: Logits,
        read: impl FnOnce(&mut TokenDraw, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let sequence = Sequence { slot: 0, position: self.position, tokens };
        let Self { loaded, cache, draw, .. } = self;
        loaded.decoder.forward_with(&[sequence], cache, wanted, |logits| read(draw, logits))?;
        self.position += tokens.len();
        Ok(())
    }
}

impl LanguageModel for BitNet {
    fn vocab_size(&self) -> usize {
        self.loaded.decoder.config().vocab_size
    }

    fn context_length(&self) -> usize {
        self.loaded.decoder.context()
    }

    fn position(&self) -> usize {
        self.position
    }

    fn advance(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.append(tokens, Logits::Last, TokenDraw::read)?;
        Ok(self.draw.logits())
    }

    fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        // Nobody looks at them: as few as there can be.
        self.append(tokens, Logits::Top(1), |_, _| Ok(()))
    }

    fn draw(&mut self, tokens: &[u32], sampler: &mut Sampler) -> Result<Sampled> {
        let mut drawn = std::mem::take(&mut self.drawn);
        let samplers = std::slice::from_mut(sampler);
        let wanted = TokenDraw::wanted(samplers);
        let result = self.append(tokens, wanted, |draw, logits| draw.draw(logits, samplers, &mut drawn));
        let first = drawn.first().copied();
        self.drawn = drawn;
        result?;
        first.ok_or_else(|| Error::Shape { op: "sample", reason: "no token was drawn".into() })
    }

    fn truncate(&mut self, position: usize) {
        self.position = self.position.min(position);
    }
}
