//! The flags of `bitnet train`, and the recipe that they make.

use super::model_args::parse;
use super::train_flags::{ScheduleArg, TypeArg};
use candle_bitnet::DeviceChoice;
use candle_bitnet::train::{Blocks, Recipe};
use clap::{Args as ClapArgs, ValueEnum};
use std::path::PathBuf;

/// Train a b1.58 model from scratch on a text
///
/// The directory gets recipe.toml, the tokenizer, metrics.jsonl, curve.svg, state.safetensors to resume from, and masters/:
/// a checkpoint of the best parameters by validation, ready for generate, perplexity and convert.
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    /// Text file, or .jsonl with one {"text": "..."} a line
    #[arg(value_name = "TEXT")]
    pub text: PathBuf,

    /// Directory of the run; must not hold one yet, unless --resume is given
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Go on with the run in --out from its last saved state
    #[arg(long, conflicts_with_all = ["config", "RecipeArgs"])]
    pub resume: bool,

    /// Recipe (TOML); flags override what it says
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Device: auto, cpu, cuda[:N] or metal[:N]
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = parse::<DeviceChoice>)]
    pub device: DeviceChoice,

    /// Threads of the CPU, each with a micro-batch of its own; the result does not depend on it [default: physical cores]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub threads: Option<usize>,

    /// Score this text at the end with the best parameters; it plays no part in choosing them
    #[arg(long, value_name = "FILE")]
    pub held_out: Option<PathBuf>,

    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub recipe: RecipeArgs,
}

/// The recipe's settings as flags. The group of their name is what cannot stand beside --resume.
#[derive(Debug, Clone, ClapArgs)]
pub struct RecipeArgs {
    /// Blocks: bitnet (sub-norms, relu²) or llama (SiLU)
    #[arg(long, value_name = "KIND", value_enum, help_heading = "Model")]
    blocks: Option<BlocksArg>,
    /// Width of the residual stream [default: 256]
    #[arg(long, value_name = "N", help_heading = "Model")]
    hidden: Option<usize>,
    /// Width of the MLP [default: 688]
    #[arg(long, value_name = "N", help_heading = "Model")]
    intermediate: Option<usize>,
    /// Decoder layers [default: 6]
    #[arg(long, value_name = "N", help_heading = "Model")]
    layers: Option<usize>,
    /// Query heads [default: 4]
    #[arg(long, value_name = "N", help_heading = "Model")]
    heads: Option<usize>,
    /// Key and value heads [default: as many as query heads]
    #[arg(long, value_name = "N", help_heading = "Model")]
    kv_heads: Option<usize>,
    /// Vocabulary of the tokenizer that is learnt [default: 2048]
    #[arg(long, value_name = "N", help_heading = "Model")]
    vocab: Option<usize>,
    /// Positions of the model, and tokens of a training sequence [default: 256]
    #[arg(long, value_name = "N", help_heading = "Model")]
    length: Option<usize>,
    /// An output head of its own instead of the embedding
    #[arg(long, help_heading = "Model")]
    untied: bool,
    /// Base of the rotary embedding [default: 10000]
    #[arg(long, value_name = "X", help_heading = "Model")]
    rope_theta: Option<f64>,
    /// Type of the master weights: f32 or bf16 (half the memory, updates rounded stochastically) [default: f32]
    #[arg(long, value_name = "TYPE", value_enum, help_heading = "Model")]
    masters: Option<TypeArg>,
    /// Train without any quantisation: the dense twin
    #[arg(long, help_heading = "Model")]
    dense: bool,

    /// Optimiser steps [default: 1000]
    #[arg(long, value_name = "N", help_heading = "Training")]
    steps: Option<u64>,
    /// Sequences of a step [default: 16]
    #[arg(long, value_name = "N", help_heading = "Training")]
    batch: Option<usize>,
    /// Sequences that a thread computes at a time; gradients are accumulated over them [default: 2]
    #[arg(long, value_name = "N", help_heading = "Training")]
    micro_batch: Option<usize>,
    /// Part of the text that is set apart for validation [default: 0.02]
    #[arg(long, value_name = "X", help_heading = "Training")]
    validation: Option<f64>,
    /// Peak of the learning rate [default: 0.002]
    #[arg(long, value_name = "X", help_heading = "Training")]
    lr: Option<f64>,
    /// Steps over which the learning rate rises [default: 100]
    #[arg(long, value_name = "N", help_heading = "Training")]
    warmup: Option<u64>,
    /// Schedule: two-stage (as the b1.58 papers) or cosine [default: two-stage]
    #[arg(long, value_name = "KIND", value_enum, help_heading = "Training")]
    schedule: Option<ScheduleArg>,
    /// Weight decay of the masters [default: 0.1]
    #[arg(long, value_name = "X", help_heading = "Training")]
    weight_decay: Option<f64>,
    /// AdamW's first decay [default: 0.9]
    #[arg(long, value_name = "X", help_heading = "Training")]
    beta1: Option<f64>,
    /// AdamW's second decay [default: 0.95]
    #[arg(long, value_name = "X", help_heading = "Training")]
    beta2: Option<f64>,
    /// Largest norm of the gradient [default: 1]
    #[arg(long, value_name = "X", help_heading = "Training")]
    clip: Option<f64>,
    /// What operands of matrix products are rounded to: f32 or bf16 [default: bf16 where the CPU multiplies it]
    #[arg(long, value_name = "TYPE", value_enum, help_heading = "Training")]
    precision: Option<TypeArg>,
    /// Dropout of the embedding and of every layer's two outputs [default: 0]
    #[arg(long, value_name = "X", help_heading = "Training")]
    dropout: Option<f32>,
    /// Steps over which the quantisers are mixed in [default: 0]
    #[arg(long, value_name = "N", help_heading = "Training")]
    lambda_warmup: Option<u64>,
    /// Steps between validations; 0: only at the end [default: 100]
    #[arg(long, value_name = "N", help_heading = "Training")]
    eval_every: Option<u64>,
    /// Steps between saved states: what a killed run can lose; 0: only at the end [default: 100]
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
enum BlocksArg {
    Bitnet,
    Llama,
}

fn set<T>(target: &mut T, flag: Option<T>) {
    flag.into_iter().for_each(|value| *target = value);
}

impl RecipeArgs {
    /// Overrides a recipe by the flags that are there.
    pub fn apply(&self, recipe: &mut Recipe) {
        let (m, b, o) = (&mut recipe.model, &mut recipe.batches, &mut recipe.optimization);
        set(
            &mut m.blocks,
            self.blocks.map(|b| match b {
                BlocksArg::Bitnet => Blocks::Bitnet,
                BlocksArg::Llama => Blocks::Llama,
            }),
        );
        set(&mut m.hidden, self.hidden);
        set(&mut m.intermediate, self.intermediate);
        set(&mut m.layers, self.layers);
        set(&mut m.heads, self.heads);
        m.kv_heads = self.kv_heads.or(m.kv_heads);
        set(&mut m.vocab, self.vocab);
        set(&mut m.context, self.length);
        m.tied &= !self.untied;
        set(&mut m.rope_theta, self.rope_theta);
        set(&mut m.masters, self.masters.map(Into::into));
        o.quantize &= !self.dense;
        set(&mut o.steps, self.steps);
        set(&mut b.sequences, self.batch);
        let micro = b.micro.min(b.sequences.max(1));
        set(&mut b.micro, self.micro_batch.or(Some(micro)));
        set(&mut b.validation, self.validation);
        set(&mut o.lr, self.lr);
        // A warm-up that nobody asked for must not make a short run impossible.
        let warmup = o.warmup.min(o.steps);
        set(&mut o.warmup, self.warmup.or(Some(warmup)));
        set(&mut o.schedule, self.schedule.map(Into::into));
        set(&mut o.weight_decay, self.weight_decay);
        set(&mut o.beta1, self.beta1);
        set(&mut o.beta2, self.beta2);
        set(&mut o.clip, self.clip);
        set(&mut o.precision, self.precision.map(Into::into));
        set(&mut o.dropout, self.dropout);
        set(&mut o.lambda_warmup, self.lambda_warmup);
        set(&mut o.eval_every, self.eval_every);
        set(&mut o.save_every, self.save_every);
        set(&mut o.patience, self.patience);
        set(&mut o.seed, self.seed);
    }
}
