//! `bitnet compare`: every device and kernel of this machine on the same model and prompt; or this program beside a server.

mod against;

use super::bench_args::{BenchModelArgs, check_counts, lengths};
use super::model_args::{HubArgs, RunArgs};
use super::print;
use anyhow::Result;
use candle_bitnet::bench::{Comparison, Contender, Entry, MAX_REPS, Narrowed, Workload, compare};
use candle_bitnet::model::config::MAX_POSITIONS;
use candle_bitnet::text::Tokenizer;
use candle_bitnet::{DeviceChoice, Error};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;

/// Tokens of the prompt where none is given, and tokens that follow it.
const DEFAULT_LENGTHS: (usize, usize) = (128, 32);
/// Where records are kept in this project's repository.
const RECORDS: &str = "benches/record";

/// Compare all devices and kernels of this machine on one model
///
/// Each GPU, each kernel of the CPU with all cores, and the fastest one with fewer threads: prefill and decode speed, time to
/// the first token, GB/s beside the bandwidth measured in the same run, memory, energy, and whether all chose the same
/// tokens. --device, --kernel and --threads narrow that. --against runs the same prompts here and on a server.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: BenchModelArgs,

    /// Prompt, instead of --pp tokens; with --against, instead of its own, and may be there more than once
    #[arg(short, long, value_name = "TEXT", conflicts_with = "synthetic")]
    prompt: Vec<String>,

    /// Tokens of the prompt where no text is given [default: 128, or what the model's positions leave for it]
    #[arg(long, value_name = "N", allow_negative_numbers = true, conflicts_with_all = ["prompt", "against"])]
    pp: Option<usize>,

    /// Tokens to decode [default: 32; 64 with --against]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    tg: Option<usize>,

    /// Repetitions; the median is reported
    #[arg(long, value_name = "N", default_value_t = 3, allow_negative_numbers = true)]
    reps: usize,

    /// A server that speaks OpenAI's interface (llama-server, ollama, vLLM), such as http://localhost:8080; a key is taken from
    /// BITNET_API_KEY
    #[arg(long, value_name = "URL", conflicts_with_all = ["synthetic", "csv", "chart", "record"])]
    against: Option<String>,

    /// The model that the server is asked for [default: the first that it lists]
    #[arg(long, value_name = "NAME", requires = "against")]
    against_model: Option<String>,

    /// Write JSON
    #[arg(long, conflicts_with_all = ["csv", "markdown"])]
    json: bool,

    /// Write CSV
    #[arg(long, conflicts_with = "markdown")]
    csv: bool,

    /// Write markdown
    #[arg(long)]
    markdown: bool,

    /// Draw the speeds as an SVG file
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,

    /// Append the result to DATE-compare.md in a directory, benches/record unless said otherwise
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = RECORDS)]
    record: Option<PathBuf>,

    #[command(flatten)]
    run: RunArgs,

    #[command(flatten)]
    hub: HubArgs,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    check_counts([
        ("--pp", args.pp, MAX_POSITIONS),
        ("--tg", args.tg, MAX_POSITIONS),
        ("--reps", Some(args.reps), MAX_REPS),
    ])?;
    match &args.against {
        Some(url) => against::run(&args, url),
        None => devices(&args),
    }
}

fn devices(args: &Args) -> Result<()> {
    if let Some(dir) = args.record.as_ref().filter(|dir| !dir.is_dir()) {
        let reason = format!("{} is no directory; make it, or give --record another one", dir.display());
        return Err(Error::request("--record", reason).into());
    }
    let (model, files) = args.model.open(&args.hub)?;
    let positions = model.config().max_positions;
    let (pp, tg) = lengths((args.pp, args.tg), DEFAULT_LENGTHS, positions);
    let prompt = match (args.prompt.as_slice(), &files) {
        ([], _) => (0..pp).map(|i| ((i * 7919) % model.config().vocab_size) as u32).collect(),
        ([text], Some(files)) => Tokenizer::open(files)?.encode(text, true)?,
        _ => return Err(Error::request("--prompt", "devices are compared on one prompt").into()),
    };
    let needed = prompt.len().saturating_add(tg);
    if prompt.is_empty() || needed > positions {
        let reason =
            format!("{} tokens of prompt and {tg} to decode are not within 2 to {positions} positions", prompt.len());
        return Err(Error::request("--pp, --prompt and --tg", reason).into());
    }
    let narrowed = Narrowed { device: args.run.device, kernel: args.run.kernel, threads: args.run.threads() };
    let contenders = Contender::all(narrowed)?;
    // What a contender sets itself is not asked for twice: its device is opened when its turn comes.
    let cpu = RunArgs { device: DeviceChoice::Cpu, ..args.run.clone() };
    let options = cpu.options()?;
    let progress = std::io::stderr().is_terminal();
    let work = Workload { prompt: &prompt, decode_tokens: tg, reps: args.reps };
    let compared = compare(&model, &options, &contenders, work, |entry| {
        if progress {
            // Standard error may be closed; that is no reason to fail.
            let _ = writeln!(std::io::stderr(), "{}", said(entry));
        }
    })?;
    if let Some(file) = &args.chart {
        compared.write_chart(file)?;
    }
    if let Some(dir) = &args.record {
        let date = candle_bitnet::text::today();
        compared.append_to(&dir.join(format!("{date}-compare.md")), &date, &command(args))?;
    }
    print(&formatted(args, &compared)?)
}

/// An entry as it is done.
fn said(entry: &Entry) -> String {
    let result = match (&entry.report, &entry.failed) {
        (Some(report), _) => format!("{:.2} tokens/s", report.decode_tps),
        (None, reason) => format!("failed: {}", reason.as_deref().unwrap_or_default()),
    };
    format!("{}: {result}", entry.flags)
}

fn formatted(args: &Args, compared: &Comparison) -> Result<String> {
    Ok(match (args.json, args.csv, args.markdown) {
        (true, ..) => serde_json::to_string_pretty(compared)?,
        (_, true, _) => compared.csv(),
        (_, _, true) => compared.markdown(),
        _ => compared.describe(),
    })
}

/// The command without its paths and outputs, for a record.
fn command(args: &Args) -> String {
    let model = match (&args.model.synthetic, &args.model.source.model) {
        (Some(preset), _) => format!("--synthetic {preset}"),
        // A path says something of the machine that it was on.
        (None, path) if std::path::Path::new(path).exists() => "--model PATH".into(),
        (None, model) => format!("--model {model}"),
    };
    let lengths = [("--pp", args.pp), ("--tg", args.tg), ("--reps", Some(args.reps))];
    let lengths: String = lengths.iter().filter_map(|(f, n)| Some(format!(" {f} {}", (*n)?))).collect();
    format!("bitnet compare {model}{lengths}")
}
