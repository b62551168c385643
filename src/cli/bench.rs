//! `bitnet bench`: prefill and decode speed, beside the read bandwidth measured in the same run.

mod prompts;
mod spread;

use super::greedy_sampler;
use super::model_args::{HubArgs, RunArgs, parse, warn_of_other_base};
use super::print;
use anyhow::Result;
use candle_bitnet::backend::cpu::read_bandwidth;
use candle_bitnet::backend::host;
use candle_bitnet::checkpoint::{BUILTIN, Checkpoint, ModelFiles};
use candle_bitnet::generate::Sampler;
use candle_bitnet::model::config::{MAX_POSITIONS, ModelConfig};
use candle_bitnet::model::presets::Preset;
use candle_bitnet::model::{Decoder, Logits, Sequence, read_logits};
use candle_bitnet::nn::KvCache;
use candle_bitnet::ternary::I2sLayout;
use candle_bitnet::{BitNet, Error, LoadedDecoder};
use serde::Serialize;
use spread::Spread;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// For how long the read bandwidth is measured in each repetition.
const BANDWIDTH_TIME: Duration = Duration::from_millis(800);
/// Tokens that are given to the model at once.
const CHUNK: usize = 512;
/// Tokens to prefill and to decode, where the model has the positions and nobody says otherwise.
const DEFAULT_LENGTHS: (usize, usize) = (512, 128);
/// Most repetitions.
const MAX_REPS: usize = 1000;

/// Measure prefill and decode speed
///
/// Decode is limited by memory: the report sets the bytes that a token reads against how fast the same threads read
/// the same weights in the same run. --synthetic needs no file; --prompts runs real prompts through a model.
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

/// What is reported of the weights and this machine.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    device: String,
    kernel: String,
    threads: usize,
    cpu: Option<String>,
    prefill_tokens: usize,
    decode_tokens: usize,
    /// Tokens a second, median.
    prefill_tps: f64,
    prefill_tps_range: [f64; 2],
    decode_tps: f64,
    decode_tps_range: [f64; 2],
    /// Stored bytes that a decoded token reads.
    bytes_per_token: usize,
    bytes_per_token_ternary: usize,
    bytes_per_token_head: usize,
    bytes_per_token_dense: usize,
    bytes_per_token_adapter: usize,
    /// Mean over the decoded positions.
    bytes_per_token_kv: usize,
    decode_gbps: f64,
    /// How fast the same threads read the same weights, computing nothing; after each repetition, median.
    read_gbps: f64,
    decode_share: f64,
    resident_bytes: Option<u64>,
    load_seconds: f64,
    kv_type: &'static str,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    for (flag, value, most) in
        [("--pp", args.pp, MAX_POSITIONS), ("--tg", args.tg, MAX_POSITIONS), ("--reps", Some(args.reps), MAX_REPS)]
    {
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
    let report = measure(name, &loaded, pp, tg, args.reps)?;
    let text = if args.json { serde_json::to_string_pretty(&report)? } else { describe(&report) };
    print(&text)
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

fn measure(model: String, loaded: &LoadedDecoder, pp: usize, tg: usize, reps: usize) -> Result<Report> {
    let decoder = &loaded.decoder;
    let cpu = decoder.backend().cpu();
    let about = loaded.report();
    let weights = decoder.host_weights();
    let cache = decoder.kv_cache(loaded.kv_dtype, 1)?;
    let vocab = decoder.config().vocab_size;
    let mut sampler = greedy_sampler(vocab)?;
    let mut repetition = |pp: usize, tg: usize| one_repetition(decoder, &cache, &mut sampler, pp, tg);
    repetition(pp.min(16), tg.min(4))?;
    let (mut prefill, mut decode, mut read, mut resident) = (Vec::new(), Vec::new(), Vec::new(), None);
    for _ in 0..reps {
        let (p, d) = repetition(pp, tg)?;
        prefill.push(pp as f64 / p);
        decode.push(tg as f64 / d);
        resident = host::resident_bytes();
        read.push(read_bandwidth(cpu, &weights, BANDWIDTH_TIME) / 1e9);
    }
    let (prefill, decode, read_gbps) = (Spread::of(prefill), Spread::of(decode), Spread::of(read).median);
    let kv = about.kv_bytes_per_position() * (pp + tg.div_ceil(2));
    let bytes_per_token = about.bytes_per_token() + kv;
    let decode_gbps = decode.median * bytes_per_token as f64 / 1e9;
    Ok(Report {
        model,
        device: about.device,
        kernel: about.kernel,
        threads: about.threads,
        cpu: host::cpu_name(),
        prefill_tokens: pp,
        decode_tokens: tg,
        prefill_tps: prefill.median,
        prefill_tps_range: [prefill.min, prefill.max],
        decode_tps: decode.median,
        decode_tps_range: [decode.min, decode.max],
        bytes_per_token,
        bytes_per_token_ternary: about.footprint.ternary,
        bytes_per_token_head: about.footprint.head,
        bytes_per_token_dense: about.footprint.dense,
        bytes_per_token_adapter: about.footprint.adapter,
        bytes_per_token_kv: kv,
        decode_gbps,
        read_gbps,
        decode_share: decode_gbps / read_gbps,
        resident_bytes: resident,
        load_seconds: about.load_time.as_secs_f64(),
        kv_type: about.kv_dtype.name(),
    })
}

/// Seconds of a prefill of `pp` tokens, and of `tg` greedy tokens after it.
fn one_repetition(
    decoder: &Decoder,
    cache: &KvCache,
    sampler: &mut Sampler,
    pp: usize,
    tg: usize,
) -> Result<(f64, f64)> {
    let vocab = decoder.config().vocab_size;
    let prompt: Vec<u32> = (0..pp).map(|i| (i * 7919 % vocab) as u32).collect();
    let start = Instant::now();
    for (i, tokens) in prompt.chunks(CHUNK).enumerate() {
        let piece = Sequence { slot: 0, position: i * CHUNK, tokens };
        decoder.forward_with(&[piece], cache, Logits::Last, |_| Ok(()))?;
    }
    let prefill = start.elapsed().as_secs_f64();
    let (mut token, mut values) = (1, Vec::with_capacity(vocab));
    let start = Instant::now();
    for i in 0..tg {
        let sequence = Sequence { slot: 0, position: pp + i, tokens: &[token] };
        decoder.forward_with(&[sequence], cache, Logits::Last, |logits| read_logits(logits, &mut values))?;
        token = sampler.sample(&values)?.token;
    }
    Ok((prefill, start.elapsed().as_secs_f64()))
}

fn describe(r: &Report) -> String {
    let mb = |bytes: usize| bytes as f64 / 1e6;
    format!(
        "{}: {} kernel {}, {} threads, KV {}{}\n\
         load      {:.2} s\n\
         prefill   {:.1} tokens/s ({:.1} to {:.1}), {} tokens\n\
         decode    {:.2} tokens/s ({:.2} to {:.2}), {} tokens\n\
         a token   {:.1} MB: ternary {:.1}, head {:.1}, other {:.1}, KV {:.1}\n\
         bandwidth {:.1} GB/s of the {:.1} GB/s that {} threads read here: {:.0} %\n\
         resident  {}\n",
        r.model,
        r.device,
        r.kernel,
        r.threads,
        r.kv_type,
        r.cpu.as_ref().map(|c| format!("; {c}")).unwrap_or_default(),
        r.load_seconds,
        r.prefill_tps,
        r.prefill_tps_range[0],
        r.prefill_tps_range[1],
        r.prefill_tokens,
        r.decode_tps,
        r.decode_tps_range[0],
        r.decode_tps_range[1],
        r.decode_tokens,
        mb(r.bytes_per_token),
        mb(r.bytes_per_token_ternary),
        mb(r.bytes_per_token_head),
        mb(r.bytes_per_token_dense + r.bytes_per_token_adapter),
        mb(r.bytes_per_token_kv),
        r.decode_gbps,
        r.read_gbps,
        r.threads,
        100.0 * r.decode_share,
        r.resident_bytes.map_or("unknown".into(), |b| format!("{:.0} MB", b as f64 / 1e6)),
    )
}
