//! `bitnet bench`: prefill and decode speed, beside the bandwidth of the device's memory measured in the same run.

mod prompts;

use super::bench_args::{BenchModelArgs, check_counts, lengths};
use super::model_args::{HubArgs, RunArgs, parse, warn_of_no_replay, warn_of_other_base};
use super::print;
use anyhow::Result;
use candle_bitnet::bench::{Baseline, BaselineType, BenchModel, MAX_BATCH, MAX_REPS, Plan, SweepAxes, measure, sweep};
use candle_bitnet::model::config::MAX_POSITIONS;
use candle_bitnet::{BitNet, Error, LoadOptions};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;

/// Tokens to prefill and to decode, where the model has the positions and nobody says otherwise.
const DEFAULT_LENGTHS: (usize, usize) = (512, 128);
/// The same for each point of a sweep.
const SWEEP_LENGTHS: (usize, usize) = (128, 32);

/// Measure prefill and decode speed
///
/// Decode is limited by memory: the report sets the bytes that a step reads against how fast the same threads read the
/// same weights in the same run or, on a GPU, how fast a copy moves bytes within its memory. --synthetic needs no file;
/// --prompts runs real prompts through a model.
/// --baseline measures candle-transformers' dense Llama of the same shape as well, --sweep the same model over threads,
/// context and batch.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: BenchModelArgs,

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

    /// Sequences that are decoded together, 1 to 32 [default: 1, or the preset's]
    #[arg(long, value_name = "N", allow_negative_numbers = true, conflicts_with = "prompts")]
    batch: Option<usize>,

    /// Vary these one at a time: threads, context, batch; each chooses its values unless they follow, as in
    /// threads=1,2,context=128,4096,batch. A context's decode ends there; elsewhere 128 tokens are prefilled and 32
    /// decoded, unless --pp and --tg say otherwise
    #[arg(long, value_name = "AXES", value_parser = parse::<SweepAxes>, conflicts_with_all = ["prompts", "profile"])]
    sweep: Option<SweepAxes>,

    /// Draw the sweep as an SVG file
    #[arg(long, value_name = "FILE", requires = "sweep")]
    chart: Option<PathBuf>,

    /// Measure a dense Llama of the same shape with random weights afterwards, in f32, bf16 or both (f32,bf16)
    #[arg(long, value_name = "TYPES", value_delimiter = ',', value_parser = parse::<BaselineType>,
          conflicts_with_all = ["prompts", "sweep"])]
    baseline: Vec<BaselineType>,

    /// Tell what each operation of a decode step takes, on a GPU each kernel, in a run of its own
    #[arg(long, conflicts_with = "prompts")]
    profile: bool,

    /// A file of prompts, one a line, or one JSON object {"prompt": …} a line
    #[arg(long, value_name = "FILE", conflicts_with = "synthetic")]
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
    let batch = args.batch.or(args.run.preset_batch()).unwrap_or(1);
    check_counts([
        ("--pp", args.pp, MAX_POSITIONS),
        ("--tg", args.tg, MAX_POSITIONS),
        ("--reps", Some(args.reps), MAX_REPS),
        ("--batch", Some(batch), MAX_BATCH),
    ])?;
    let source = &args.model.source;
    let options =
        args.run.options()?.hub(args.hub.options()).adapter(args.adapter.clone()).i2s_layout(source.i2s_layout);
    if let Some(file) = &args.prompts {
        let list = prompts::read(file)?;
        let mut loaded = BitNet::load(&source.model, options)?;
        warn_of_other_base(&source.model, loaded.report().adapter.as_ref());
        return prompts::run(&mut loaded, &list, args.tg.unwrap_or(DEFAULT_LENGTHS.1), args.json);
    }
    let (model, _) = args.model.open(&args.hub)?;
    let positions = model.config().max_positions;
    let positions = args.run.context.map_or(positions, |n| n.min(positions));
    let defaults = if args.sweep.is_some() { SWEEP_LENGTHS } else { DEFAULT_LENGTHS };
    let (pp, tg) = lengths((args.pp, args.tg), defaults, positions);
    let plan = Plan { pp, tg, batch, reps: args.reps, profile: args.profile };
    match &args.sweep {
        Some(axes) => run_sweep(&args, &model, &options, plan, axes),
        None => run_once(&args, &model, options, plan),
    }
}

/// One measurement, and the baselines.
fn run_once(args: &Args, model: &BenchModel, mut options: LoadOptions, plan: Plan) -> Result<()> {
    if args.run.context.is_none() {
        // Just what the run needs, so that the memory reported is the model's.
        options = options.context(Some(plan.pp.saturating_add(plan.tg)));
    }
    for dtype in &args.baseline {
        Baseline::check(model.config(), *dtype, plan, options.is_for_cpu())?;
    }
    let loaded = model.load(&options).map_err(|e| too_long(e, args, plan))?;
    warn_of_other_base(&model.name(), loaded.adapter.as_ref());
    let mut report = measure(model.name(), &loaded, plan)?;
    warn_of_no_replay(&loaded.decoder);
    // One model in memory at a time.
    drop(loaded);
    for dtype in &args.baseline {
        if std::io::stderr().is_terminal() {
            // It takes minutes. Standard error may be closed; that is no reason to fail.
            let _ = writeln!(std::io::stderr(), "measuring the dense model in {}", dtype.name());
        }
        let baseline = Baseline::measure(model.config(), *dtype, plan, &report)?;
        report.baselines.push(baseline);
    }
    print(&if args.json { serde_json::to_string_pretty(&report)? } else { report.describe() })
}

/// The sweep's table and chart; on a terminal, each point as it is done.
fn run_sweep(args: &Args, model: &BenchModel, options: &LoadOptions, plan: Plan, axes: &SweepAxes) -> Result<()> {
    let progress = std::io::stderr().is_terminal();
    let swept = sweep(model, options, plan, axes, |point| {
        if progress {
            let speed = point.report.as_ref().map_or("skipped".into(), |r| format!("{:.2} tokens/s", r.decode_tps));
            // Standard error may be closed; that is no reason to fail.
            let _ = writeln!(std::io::stderr(), "{} {}: {speed}", point.axis.name(), point.value);
        }
    })
    .map_err(|e| too_long(e, args, plan))?;
    if let Some(file) = &args.chart {
        swept.write_chart(file)?;
    }
    print(&if args.json { serde_json::to_string_pretty(&swept)? } else { swept.describe() })
}

/// An error about the context, which is what these flags need together unless it was given.
fn too_long(error: Error, args: &Args, plan: Plan) -> Error {
    match error {
        Error::Request { what, reason } if what == "--context" && args.run.context.is_none() => {
            Error::request(format!("--pp {} and --tg {}", plan.pp, plan.tg), format!("together, {reason}"))
        }
        e => e,
    }
}
