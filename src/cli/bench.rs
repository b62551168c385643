//! `bitnet bench`: prefill and decode speed, beside the bandwidth of the device's memory measured in the same run.

mod measure;
mod operations;
mod prompts;
mod report;
mod spread;

use super::model_args::{HubArgs, RunArgs, parse, warn_of_no_replay, warn_of_other_base};
use super::print;
use anyhow::Result;
use candle_bitnet::checkpoint::{BUILTIN, Checkpoint, ModelFiles};
use candle_bitnet::model::config::{MAX_POSITIONS, ModelConfig};
use candle_bitnet::model::presets::Preset;
use candle_bitnet::ternary::I2sLayout;
use candle_bitnet::{BitNet, Error, LoadedDecoder};
use measure::{Plan, measure};
use std::path::PathBuf;

/// Tokens to prefill and to decode, where the model has the positions and nobody says otherwise.
const DEFAULT_LENGTHS: (usize, usize) = (512, 128);
/// Most repetitions.
const MAX_REPS: usize = 1000;
/// Most sequences that are decoded together.
const MAX_BATCH: usize = 32;

/// Measure prefill and decode speed
///
/// Decode is limited by memory: the report sets the bytes that a step reads against how fast the same threads read the
/// same weights in the same run or, on a GPU, how fast a copy moves bytes within its memory. --synthetic needs no file;
/// --prompts runs real prompts through a model.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model: a hub id (owner/name or owner/name@revision), a directory, a .gguf file, or builtin
    #[arg(short, long, value_name = "MODEL", default_value = BUILTIN)]
    model: String,

    /// Order of the codes in I2_S tensors of a GGUF file: 128, 64 or rows [default: 128]
    #[arg(long, value_name = "LAYOUT", value_parser = parse::<I2sLayout>, conflicts_with = "synthetic")]
    i2s_layout: Option<I2sLayout>,

    /// A preset's shapes with random weights: 2b4t, 0.7b, 3b, 8b, 30b
    #[arg(long, value_name = "PRESET", conflicts_with_all = ["model", "prompts"])]
    synthetic: Option<String>,

    /// LoRA adapter in PEFT's layout (adapter_config.json, adapter_model.safetensors), run unmerged
    #[arg(long, value_name = "DIR", conflicts_with = "synthetic")]
    adapter: Option<PathBuf>,

    /// Tokens to prefill [default: 512, or what the model's positions leave for it]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pp: Option<usize>,

    /// Tokens to decode; with --prompts, at most [default: 128, or a quarter of the model's positions if they are few]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    tg: Option<usize>,

    /// Repetitions; the median is reported, with the range
    #[arg(long, value_name = "N", default_value_t = 3, allow_negative_numbers = true)]
    reps: usize,

    /// Sequences that are decoded together, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true, conflicts_with = "prompts")]
    batch: usize,

    /// Tell what each operation of a decode step takes, on a GPU each kernel, in a run of its own
    #[arg(long, conflicts_with = "prompts")]
    profile: bool,

    /// A file of prompts, one a line, or one JSON object {"prompt": …} a line
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,

    /// Write JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    run: RunArgs,

    #[command(flatten)]
    hub: HubArgs,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    for (flag, value, most) in [
        ("--pp", args.pp, MAX_POSITIONS),
        ("--tg", args.tg, MAX_POSITIONS),
        ("--reps", Some(args.reps), MAX_REPS),
        ("--batch", Some(args.batch), MAX_BATCH),
    ] {
        if let Some(value) = value.filter(|n| !(1..=most).contains(n)) {
            let reason = format!("{value} is not between 1 and {most}");
            return Err(Error::request(flag, reason).into());
        }
    }
    let mut options = args.run.options()?.hub(args.hub.options()).adapter(args.adapter.clone());
    options = options.i2s_layout(args.i2s_layout);
    if let Some(file) = &args.prompts {
        let list = prompts::read(file)?;
        let mut loaded = BitNet::load(&args.model, options)?;
        warn_of_other_base(&args.model, loaded.report().adapter.as_ref());
        return prompts::run(&mut loaded, &list, args.tg.unwrap_or(DEFAULT_LENGTHS.1), args.json);
    }
    let source = match &args.synthetic {
        Some(preset) => Source::Preset(preset),
        None => {
            let files = ModelFiles::find(&args.model, &args.hub.options())?;
            Source::Files(files.with_i2s_layout(args.i2s_layout)?)
        }
    };
    let positions = source.positions()?;
    let (pp, tg) = lengths(&args, args.run.context.map_or(positions, |n| n.min(positions)));
    if args.run.context.is_none() {
        // Just what the run needs, so that the memory reported is the model's.
        options = options.context(Some(pp.saturating_add(tg)));
    }
    let (name, loaded) = match &source {
        Source::Preset(preset) => (format!("synthetic {preset}"), LoadedDecoder::synthetic(preset, &options)),
        Source::Files(files) => (args.model.clone(), LoadedDecoder::open(files, &options)),
    };
    let loaded = loaded.map_err(|e| match e {
        // The context is what these flags need together, unless it was given.
        Error::Request { what, reason } if what == "--context" && args.run.context.is_none() => {
            Error::request(format!("--pp {pp} and --tg {tg}"), format!("together, {reason}"))
        }
        e => e,
    })?;
    warn_of_other_base(&name, loaded.adapter.as_ref());
    let plan = Plan { pp, tg, batch: args.batch, reps: args.reps, profile: args.profile };
    let report = measure(name, &loaded, plan)?;
    warn_of_no_replay(&loaded.decoder);
    print(&if args.json { serde_json::to_string_pretty(&report)? } else { report.describe() })
}

/// What is measured.
enum Source<'a> {
    Preset(&'a str),
    Files(ModelFiles),
}

impl Source<'_> {
    /// Positions that the model was trained for.
    fn positions(&self) -> Result<usize> {
        let config = match self {
            Self::Preset(preset) => Preset::find(preset)?.config(),
            Self::Files(files) => {
                let checkpoint = Checkpoint::open(files)?;
                let (path, text) = checkpoint.config();
                ModelConfig::parse(path, text)?
            }
        };
        Ok(config.max_positions)
    }
}

/// Tokens to prefill and to decode: what was asked for, and for the rest what so many positions hold.
fn lengths(args: &Args, positions: usize) -> (usize, usize) {
    let (pp, tg) = DEFAULT_LENGTHS;
    let tg = args.tg.unwrap_or(tg.min(positions / 4).max(1));
    (args.pp.unwrap_or(pp.min(positions.saturating_sub(tg)).max(1)), tg)
}
