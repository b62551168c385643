//! The flags that every command with a model shares.

use super::first_line;
use super::preset::Preset;
use anyhow::Result;
use candle_bitnet::backend::DenseType;
use candle_bitnet::backend::cpu::KernelKind;
use candle_bitnet::checkpoint::hub::HubOptions;
use candle_bitnet::checkpoint::{BUILTIN, ModelFiles};
use candle_bitnet::model::Decoder;
use candle_bitnet::nn::{HeadChoice, HeadKind};
use candle_bitnet::ternary::I2sLayout;
use candle_bitnet::{AdapterReport, BitNet, DeviceChoice, Error, LoadOptions, LoadedDecoder, select_device};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::LazyLock;

/// Parses a flag's value; clap names the flag, so the error is the reason alone.
pub fn parse<T: FromStr<Err = Error>>(value: &str) -> Result<T, String> {
    value.parse().map_err(|e| match e {
        Error::Request { reason, .. } => reason,
        other => other.to_string(),
    })
}

/// How to run a model.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Device: auto, cpu, cuda[:N] or metal[:N]
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = parse::<DeviceChoice>)]
    pub device: DeviceChoice,

    /// Ternary kernel of the CPU instead of the fastest [generic, avx2, avx-vnni, avx512-vnni, avx512-vbmi, amx-int8, neon, neon-dotprod, neon-i8mm]
    #[arg(long, value_name = "KERNEL", value_parser = parse::<KernelKind>)]
    pub kernel: Option<KernelKind>,

    /// Settings for a kind of use, which other flags override: mobile, edge, server or cloud; doctor explains them
    #[arg(long, value_name = "NAME", value_parser = parse::<Preset>)]
    pub preset: Option<Preset>,

    /// Threads of the CPU [default: physical cores]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub threads: Option<usize>,

    /// Positions of a sequence [default: the model's, at most 4096]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub context: Option<usize>,

    /// Type of the KV cache: f32, bf16 or f16 [default: f32]
    #[arg(long, value_name = "TYPE", value_parser = parse::<DenseType>)]
    pub kv_type: Option<DenseType>,

    /// Output head: auto, full (as stored; also bf16), int8 (approximate), screened (the tokens of full) or screened-probable (those of full but for one in 10⁹) [default: auto]
    #[arg(long, value_name = "HEAD", value_parser = parse::<HeadChoice>)]
    pub head: Option<HeadChoice>,

    /// Compute every decode step anew instead of replaying a recorded one, on a GPU
    #[arg(long)]
    pub no_graph: bool,
}

impl RunArgs {
    /// Threads of the CPU, where a flag or the preset says how many.
    pub fn threads(&self) -> Option<usize> {
        self.threads.or(self.preset.map(|p| p.threads_here()))
    }

    /// Sequences that the preset decodes together.
    pub fn preset_batch(&self) -> Option<usize> {
        self.preset.map(|p| p.batch)
    }

    /// Options for loading, without a hub.
    pub fn options(&self) -> Result<LoadOptions> {
        let device = select_device(self.device)?;
        let mut options = LoadOptions::new(&device)
            .kernel(self.kernel)
            .threads(self.threads())
            .context(self.context)
            .graphs(!self.no_graph);
        if let Some(preset) = self.preset {
            options = options.default_context(preset.context).kv_dtype(preset.kv_type).head(preset.head);
        }
        if let Some(dtype) = self.kv_type {
            options = options.kv_dtype(dtype);
        }
        if let Some(head) = self.head {
            options = options.head(head);
        }
        Ok(if std::io::stderr().is_terminal() { options.on_progress(show_progress) } else { options })
    }
}

/// A bar of the layers that are loaded; gone when all are.
fn show_progress(done: usize, layers: usize) {
    static BAR: LazyLock<ProgressBar> = LazyLock::new(|| {
        let style = ProgressStyle::with_template("loading {bar:30} layer {pos} of {len}");
        ProgressBar::no_length().with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
    });
    BAR.set_length(layers as u64);
    BAR.set_position(done as u64);
    if done == layers {
        BAR.finish_and_clear();
    }
}

/// Where hub ids are looked up.
#[derive(Debug, Clone, Args)]
pub struct HubArgs {
    /// Branch, tag or commit on the hub
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,

    /// Use only what the hub's cache holds (as HF_HUB_OFFLINE=1)
    #[arg(long)]
    pub offline: bool,
}

impl HubArgs {
    /// Options for the hub, with the environment's where no flag is given.
    pub fn options(&self) -> HubOptions {
        let env = HubOptions::from_env();
        HubOptions {
            revision: self.revision.clone(),
            offline: self.offline || env.offline,
            progress: std::io::stderr().is_terminal(),
            ..env
        }
    }
}

/// Which model.
#[derive(Debug, Clone, Args)]
pub struct SourceArgs {
    /// Model: a hub id (owner/name or owner/name@revision), a directory, a .gguf file, or builtin
    #[arg(short, long, value_name = "MODEL", default_value = BUILTIN)]
    pub model: String,

    /// Order of the codes in I2_S tensors of a GGUF file, which the file does not tell: 128, 64 or rows [default: 128]
    #[arg(long, value_name = "LAYOUT", value_parser = parse::<I2sLayout>)]
    pub i2s_layout: Option<I2sLayout>,
}

impl SourceArgs {
    /// Its files.
    pub fn find(&self, hub: &HubArgs) -> Result<ModelFiles> {
        Ok(ModelFiles::find(&self.model, &hub.options())?.with_i2s_layout(self.i2s_layout)?)
    }
}

/// Which model to read, where it is not run: the first argument, or the flag of the other commands.
#[derive(Debug, Clone, Args)]
pub struct FilesArgs {
    /// Model: a hub id (owner/name, owner/name@revision, owner/name:file.gguf), a directory, a .gguf file, or builtin
    /// [default: builtin]
    #[arg(value_name = "MODEL")]
    pub model: Option<String>,

    /// The same, as the other commands take it
    #[arg(short, long = "model", id = "model_flag", value_name = "MODEL", conflicts_with = "model")]
    pub model_flag: Option<String>,

    /// Order of the codes in I2_S tensors of the GGUF file that is read: 128, 64 or rows [default: 128]
    #[arg(long, value_name = "LAYOUT", value_parser = parse::<I2sLayout>)]
    pub i2s_layout: Option<I2sLayout>,
}

impl FilesArgs {
    /// What the user calls it.
    pub fn name(&self) -> &str {
        self.model.as_deref().or(self.model_flag.as_deref()).unwrap_or(BUILTIN)
    }

    /// Its files.
    pub fn find(&self, hub: &HubArgs) -> Result<ModelFiles> {
        Ok(ModelFiles::find(self.name(), &hub.options())?.with_i2s_layout(self.i2s_layout)?)
    }
}

/// Which model, and how to run it.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    #[command(flatten)]
    pub source: SourceArgs,

    /// LoRA adapter in PEFT's layout (adapter_config.json, adapter_model.safetensors), run unmerged
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,

    #[command(flatten)]
    pub run: RunArgs,

    #[command(flatten)]
    pub hub: HubArgs,
}

impl ModelArgs {
    /// What the user calls the model.
    pub fn name(&self) -> &str {
        &self.source.model
    }

    fn options(&self) -> Result<LoadOptions> {
        let options = self.run.options()?.hub(self.hub.options());
        Ok(options.adapter(self.adapter.clone()).i2s_layout(self.source.i2s_layout))
    }

    /// The same where every logit is wanted: a screen would be made for nothing.
    pub fn for_all_logits(mut self) -> Self {
        if matches!(self.run.head, None | Some(HeadChoice::Auto)) {
            self.run.head = Some(HeadKind::Full.into());
        }
        self
    }

    /// Loads the model with its text tools, and says on a terminal what was decided.
    pub fn load(&self) -> Result<BitNet> {
        let model = BitNet::load(self.name(), self.options()?)?;
        if std::io::stderr().is_terminal() {
            eprintln!("{}: {}", self.name(), model.report());
        }
        warn_of_other_base(self.name(), model.report().adapter.as_ref());
        Ok(model)
    }

    /// Loads the decoder alone.
    pub fn load_decoder(&self) -> Result<LoadedDecoder> {
        let loaded = LoadedDecoder::load(self.name(), &self.options()?)?;
        warn_of_other_base(self.name(), loaded.adapter.as_ref());
        Ok(loaded)
    }
}

/// Says on standard error that an adapter names another model than it runs on; its shapes fit, so it may be right.
pub fn warn_of_other_base(model: &str, adapter: Option<&AdapterReport>) {
    if let Some(base) = adapter.and_then(|a| a.base_model.as_deref()).filter(|base| !same_model(base, model)) {
        let base: String = base.chars().take(200).collect();
        // Standard error may be closed; that is no reason to fail.
        let _ = writeln!(std::io::stderr(), "warning: the adapter was trained on {base:?}, and runs on {model:?}");
    }
}

/// Says on standard error why decode steps were not replayed, if they should have been.
pub fn warn_of_no_replay(decoder: &Decoder) {
    if let Some(reason) = decoder.take_replay_failure() {
        let reason = first_line(&reason);
        let _ = writeln!(
            std::io::stderr(),
            "warning: decode steps were computed anew each time, as the device could not record one: {reason}"
        );
    }
}

/// Whether two paths or hub ids may be one model: their last parts are equal, or one goes on after the other, as a
/// packed repository and its `-bf16` masters do.
fn same_model(a: &str, b: &str) -> bool {
    let last = |name: &str| {
        let name = name.split_once('@').map_or(name, |(id, _)| id);
        name.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or_default().to_ascii_lowercase()
    };
    let (a, b) = (last(a), last(b));
    // "." and ".." name nothing.
    a.is_empty() || b.is_empty() || a.ends_with('.') || b.ends_with('.') || a.starts_with(&b) || b.starts_with(&a)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapters_base_is_compared_by_its_last_part() {
        for (a, b) in [
            ("microsoft/bitnet-b1.58-2B-4T-bf16", "microsoft/bitnet-b1.58-2B-4T@main"),
            ("/data/models/Falcon/", "tiiuae/falcon"),
            ("x/y", "."),
            ("", "a"),
        ] {
            assert!(same_model(a, b), "{a} {b}");
        }
        assert!(!same_model("tiiuae/Falcon3-1B", "tiiuae/Falcon3-3B"));
    }
}
