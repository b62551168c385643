//! What was loaded, and how it runs.

use crate::backend::{DenseType, DeviceMemory};
use crate::checkpoint::adapter::Adapter;
use crate::model::Footprint;
use crate::nn::HeadKind;
use std::path::PathBuf;
use std::time::Duration;

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
    pub(crate) fn new(adapter: &Adapter) -> Self {
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
