//! The flags of `bitnet finetune`, and the settings that they make.

use super::model_args::{HubArgs, parse};
use super::train_flags::{ScheduleArg, TypeArg};
use anyhow::Result;
use candle_bitnet::train::examples::{ExampleOptions, TrainOn};
use candle_bitnet::train::finetune::{Batching, FinetuneRecipe};
use candle_bitnet::train::{ALL_LINEAR, LoraOptions, Masters, Optimization, Precision, Schedule};
use candle_bitnet::{DEFAULT_CONTEXT, DeviceChoice, Error};
use clap::{Args as ClapArgs, ValueEnum};
use std::path::PathBuf;

/// Fine-tune a b1.58 model on examples: a LoRA adapter on packed weights, or all masters with --full
///
/// Each line of DATA is {"messages": [{"role", "content"}, ...]}, {"instruction", "output"}, {"input", "output"} or
/// {"text"}. They are written as the model's chat template has it; without one, a pair becomes the input, a line break, the
/// output and the end of text. The directory gets finetune.toml, metrics.jsonl, state.safetensors to resume from, and the
/// best result by validation: adapter_config.json and adapter_model.safetensors in PEFT's layout (run it with --adapter), or
/// masters/, a checkpoint. The base's files are only read.
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    /// Examples, one JSON object a line
    #[arg(value_name = "DATA")]
    pub data: PathBuf,

    /// Base model: a hub id (owner/name or owner/name@revision), a directory, or builtin [default: builtin]
    #[arg(short, long, value_name = "MODEL")]
    pub model: Option<String>,

    /// Directory of the run; must hold neither a run nor a model, unless --resume is given
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Go on with the run in --out from its last saved state
    #[arg(long, conflicts_with_all = RECIPE_FLAGS)]
    pub resume: bool,

    /// A question to answer before and after training [default: the first example's]
    #[arg(long, value_name = "TEXT")]
    pub test_prompt: Option<String>,

    /// Device: auto, cpu, cuda[:N] or metal[:N]; adapters are trained on the CPU
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = parse::<DeviceChoice>)]
    pub device: DeviceChoice,

    /// Threads of the CPU, each with a micro-batch of its own; the result does not depend on it [default: physical cores]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub threads: Option<usize>,

    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub hub: HubArgs,

    #[command(flatten)]
    pub recipe: RecipeArgs,
}

/// Flags that change a run's settings, and so cannot stand beside --resume.
const RECIPE_FLAGS: [&str; 28] = [
    "model",
    "revision",
    "full",
    "rank",
    "alpha",
    "target_modules",
    "masters",
    "train_on",
    "context",
    "truncate",
    "max_samples",
    "validation",
    "validation_file",
    "epochs",
    "steps",
    "batch",
    "micro_batch",
    "lr",
    "warmup",
    "schedule",
    "weight_decay",
    "clip",
    "dropout",
    "eval_every",
    "save_every",
    "patience",
    "seed",
    "beta2",
];

/// A run's settings as flags.
#[derive(Debug, Clone, ClapArgs)]
pub struct RecipeArgs {
    /// Train all weights, from bf16 masters, instead of an adapter
    #[arg(long, conflicts_with_all = ["rank", "alpha", "target_modules"], help_heading = "Method")]
    pub full: bool,
    /// The adapter's inner dimension [default: 16]
    #[arg(long, value_name = "N", help_heading = "Method")]
    rank: Option<usize>,
    /// The adapter's update is multiplied by alpha / rank [default: twice the rank]
    #[arg(long, value_name = "X", help_heading = "Method")]
    alpha: Option<f32>,
    /// Projections that get an adapter: all-linear, or some of q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj
    /// [default: all-linear]
    #[arg(long, value_name = "NAMES", value_delimiter = ',', help_heading = "Method")]
    target_modules: Option<Vec<String>>,
    /// Dropout of the adapter's inputs; with --full, of the embedding and every layer's two outputs [default: 0]
    #[arg(long, value_name = "X", help_heading = "Method")]
    dropout: Option<f32>,
    /// Type of the masters with --full: f32 or bf16 (half the memory) [default: f32]
    #[arg(long, value_name = "TYPE", value_enum, requires = "full", help_heading = "Method")]
    masters: Option<TypeArg>,

    /// What is learnt: the assistant's parts, or all [default: assistant]
    #[arg(long, value_name = "PART", value_enum, help_heading = "Examples")]
    train_on: Option<TrainOnArg>,
    /// Longest example, in tokens [default: the model's positions, at most 4096]
    #[arg(long, value_name = "N", help_heading = "Examples")]
    context: Option<usize>,
    /// Cut longer examples instead of leaving them out
    #[arg(long, help_heading = "Examples")]
    truncate: bool,
    /// Use the first N lines only
    #[arg(long, value_name = "N", help_heading = "Examples")]
    max_samples: Option<usize>,
    /// Part of the examples that is set apart for validation [default: 0.05]
    #[arg(long, value_name = "X", conflicts_with = "validation_file", help_heading = "Examples")]
    validation: Option<f64>,
    /// Examples to validate with, instead of setting some apart
    #[arg(long, value_name = "FILE", help_heading = "Examples")]
    pub validation_file: Option<PathBuf>,

    /// How often each example is seen [default: 3]
    #[arg(long, value_name = "X", conflicts_with = "steps", help_heading = "Training")]
    epochs: Option<f64>,
    /// Optimiser steps, instead of --epochs
    #[arg(long, value_name = "N", help_heading = "Training")]
    steps: Option<u64>,
    /// Examples of a step [default: 8]
    #[arg(long, value_name = "N", help_heading = "Training")]
    batch: Option<usize>,
    /// Examples that a thread computes at a time; gradients are accumulated over them [default: 1]
    #[arg(long, value_name = "N", help_heading = "Training")]
    micro_batch: Option<usize>,
    /// Peak of the learning rate [default: 0.0002; with --full 0.0001]
    #[arg(long, value_name = "X", help_heading = "Training")]
    lr: Option<f64>,
    /// Steps over which the learning rate rises [default: 3 % of all]
    #[arg(long, value_name = "N", help_heading = "Training")]
    warmup: Option<u64>,
    /// Schedule: cosine or two-stage [default: cosine]
    #[arg(long, value_name = "KIND", value_enum, help_heading = "Training")]
    schedule: Option<ScheduleArg>,
    /// Weight decay [default: 0]
    #[arg(long, value_name = "X", help_heading = "Training")]
    weight_decay: Option<f64>,
    /// AdamW's second decay [default: 0.95]
    #[arg(long, value_name = "X", help_heading = "Training")]
    beta2: Option<f64>,
    /// Largest norm of the gradient [default: 1]
    #[arg(long, value_name = "X", help_heading = "Training")]
    clip: Option<f64>,
    /// Steps between validations; 0: only at the end [default: one epoch]
    #[arg(long, value_name = "N", help_heading = "Training")]
    eval_every: Option<u64>,
    /// Steps between saved states: what a killed run can lose; 0: only at the end [default: one epoch, at most 100]
    #[arg(long, value_name = "N", help_heading = "Training")]
    save_every: Option<u64>,
    /// Stop after this many validations without improvement; 0: never [default: 0]
    #[arg(long, value_name = "N", help_heading = "Training")]
    patience: Option<u64>,
    /// Seed of everything random [default: 0]
    #[arg(long, value_name = "N", help_heading = "Training")]
    seed: Option<u64>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum TrainOnArg {
    Assistant,
    All,
}

impl RecipeArgs {
    /// What is to become of the data, for a model with so many positions.
    pub fn examples(&self, positions: usize) -> ExampleOptions {
        let default = ExampleOptions::default();
        ExampleOptions {
            train_on: match self.train_on {
                Some(TrainOnArg::All) => TrainOn::All,
                _ => TrainOn::Assistant,
            },
            context: self.context.unwrap_or(positions.min(DEFAULT_CONTEXT)),
            truncate: self.truncate,
            max_samples: self.max_samples.unwrap_or(default.max_samples),
            validation: self.validation.unwrap_or(default.validation),
        }
    }

    /// The settings of a run on so many training examples.
    ///
    /// # Errors
    /// [`Error::Request`] for numbers that make no sense.
    pub fn recipe(&self, model: &str, examples: ExampleOptions, count: usize) -> Result<FinetuneRecipe> {
        let rank = self.rank.unwrap_or(LoraOptions::default().rank);
        let lora = (!self.full).then(|| LoraOptions {
            rank,
            alpha: self.alpha.unwrap_or(2.0 * rank as f32),
            target_modules: self.target_modules.clone().unwrap_or_else(|| vec![ALL_LINEAR.into()]),
        });
        let sequences = self.batch.unwrap_or(Batching::default().sequences);
        let batches = Batching { sequences, micro: self.micro_batch.unwrap_or(Batching::default().micro) };
        let epochs = self.epochs.unwrap_or(3.0);
        if !(epochs > 0.0 && epochs <= 1e6) {
            return Err(
                Error::request("--epochs", format!("{epochs} is out of range: above 0, at most 1000000")).into()
            );
        }
        let per_epoch = count as f64 / sequences.max(1) as f64;
        let steps = self.steps.unwrap_or((epochs * per_epoch).ceil() as u64);
        let epoch = (per_epoch.ceil() as u64).max(1);
        let o = Optimization::default();
        let optimization = Optimization {
            precision: Precision::fastest(),
            steps,
            lr: self.lr.unwrap_or(if self.full { 1e-4 } else { 2e-4 }),
            warmup: self.warmup.unwrap_or(steps * 3 / 100),
            schedule: self.schedule.map_or(Schedule::Cosine, Into::into),
            weight_decay: self.weight_decay.unwrap_or(0.0),
            beta2: self.beta2.unwrap_or(o.beta2),
            clip: self.clip.unwrap_or(o.clip),
            dropout: self.dropout.unwrap_or(0.0),
            eval_every: self.eval_every.unwrap_or(epoch),
            save_every: self.save_every.unwrap_or(epoch.min(100)),
            patience: self.patience.unwrap_or(0),
            seed: self.seed.unwrap_or(0),
            ..o
        };
        let masters = self.masters.map_or(Masters::F32, Into::into);
        let validation_file = self.validation_file.clone();
        let recipe = FinetuneRecipe::new(model, lora);
        Ok(FinetuneRecipe { validation_file, masters, examples, batches, optimization, ..recipe })
    }
}
