//! `bitnet convert`: a checkpoint in another form, the same model.

use super::model_args::HubArgs;
use super::{first_line, print};
use anyhow::Result;
use candle_bitnet::Error;
use candle_bitnet::checkpoint::write::check_target;
use candle_bitnet::checkpoint::{BUILTIN, Checkpoint, ModelFiles, ScaleStyle};
use candle_bitnet::model::config::ModelConfig;
use candle_bitnet::model::convert::{Form, Phase, Progress, Summary, convert};
use clap::{Args as ClapArgs, ValueEnum};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::fmt::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Write a model in another form: packed codes or masters
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    /// Model: a hub id (owner/name or owner/name@revision), a directory, or builtin [default: builtin]
    #[arg(value_name = "MODEL")]
    pub model: Option<String>,

    /// The same, as the other commands take it
    #[arg(short, long = "model", id = "model_flag", value_name = "MODEL", conflicts_with = "model")]
    pub model_flag: Option<String>,

    /// Form to write
    #[arg(long, value_name = "FORM")]
    pub to: Target,

    /// What weight_scale does in a packed form [default: what the model's config.json says]
    #[arg(long, value_name = "CONVENTION")]
    pub scale: Option<Convention>,

    /// Directory to write; must not hold a checkpoint yet
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,

    /// Write JSON
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub hub: HubArgs,
}

/// A form, as a flag names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Target {
    /// Safetensors with four codes to a byte
    Packed,
    /// Safetensors with bf16 weights, quantised at load
    Masters,
}

/// What `weight_scale` does, as a flag names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Convention {
    /// Outputs are multiplied by it (linear_class: autobitlinear)
    Multiply,
    /// Outputs are divided by it (linear_class: bitlinear, or none)
    Divide,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    if args.to == Target::Masters && args.scale.is_some() {
        let reason = "masters have no weight_scale; leave it out, or write --to packed";
        return Err(Error::request("--scale", reason).into());
    }
    // Before a download, which may take an hour.
    check_target(&args.out)?;
    let model = args.model.or(args.model_flag).unwrap_or_else(|| BUILTIN.into());
    let source = ModelFiles::find(&model, &args.hub.options())?;
    let form = match (args.to, args.scale) {
        (Target::Masters, _) => Form::Masters,
        (Target::Packed, Some(Convention::Multiply)) => Form::Packed(ScaleStyle::Multiply),
        (Target::Packed, Some(Convention::Divide)) => Form::Packed(ScaleStyle::Divide),
        (Target::Packed, None) => Form::Packed(convention(&source)?),
    };
    let stopped = stop_on_interrupt();
    // Drawn on terminals only.
    let bar = ProgressBar::no_length().with_style(
        ProgressStyle::with_template("{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let mut phase = None;
    let summary = convert(&source, &args.out, form, &mut |p: Progress| {
        if phase.replace(p.phase) != Some(p.phase) {
            bar.reset();
            bar.set_length(p.total);
            bar.set_message(match p.phase {
                Phase::Reading => "reading",
                Phase::Writing => "writing",
                Phase::Verifying => "reading back",
            });
        }
        bar.set_position(p.done);
        if stopped.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    if let (Err(e), true) = (&summary, stopped.load(Ordering::Relaxed)) {
        eprintln!("error: {}", first_line(e));
        // As a shell expects of a program that an interrupt ended.
        std::process::exit(130);
    }
    let summary = summary?;
    match args.json {
        true => print(&serde_json::to_string_pretty(&json(&args.out, &summary))?),
        false => print(&text(&args.out, &summary)),
    }
}

/// What the model's own configuration says of `weight_scale`.
fn convention(source: &ModelFiles) -> Result<ScaleStyle> {
    let checkpoint = Checkpoint::open(source)?;
    let (path, text) = checkpoint.config();
    Ok(ModelConfig::parse(path, text)?.quantization.scale_style)
}

/// Ctrl-C ends the conversion between two pieces, so that it can clean up behind itself.
fn stop_on_interrupt() -> Arc<AtomicBool> {
    let stopped = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stopped);
    // Without a handler Ctrl-C still ends the program, and leaves the hidden directory.
    let _ = ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed));
    stopped
}

/// The form and the convention, as the flags name them.
fn names(form: Form) -> (&'static str, Option<&'static str>) {
    match form {
        Form::Packed(ScaleStyle::Multiply) => ("packed", Some("multiply")),
        Form::Packed(ScaleStyle::Divide) => ("packed", Some("divide")),
        _ => ("masters", None),
    }
}

fn json(out: &Path, s: &Summary) -> Value {
    let (form, scale) = names(s.form);
    json!({
        "path": out.display().to_string(),
        "form": form,
        "scale": scale,
        "files": s.files,
        "tensor_bytes": s.bytes,
        "matrices": s.verified.matrices,
        "other_tensors": s.verified.tensors,
        // A conversion that cannot be verified is an error, so there is no other value.
        "verified": true,
        "inexact_scales": s.verified.inexact_scales,
        "largest_scale_difference": s.verified.largest_difference,
        "f32_masters": s.f32_masters,
        "copied": s.copied,
        "not_copied": s.left,
    })
}

fn text(out: &Path, s: &Summary) -> String {
    let v = &s.verified;
    let form = match names(s.form) {
        (form, Some(scale)) => format!("{form}, {scale}"),
        (form, None) => form.to_owned(),
    };
    let weights = s.files.iter().filter(|f| f.ends_with(".safetensors")).count();
    let files = if weights == 1 { "1 file".to_owned() } else { format!("{weights} files") };
    let mut text = format!("{}: {form}, {} in {files}", out.display(), HumanBytes(s.bytes));
    let (matrices, others) = (v.matrices, v.tensors);
    let exact = if v.inexact_scales == 0 { " and scales" } else { "" };
    let mut line = |part: String| {
        // Writing to a string does not fail.
        let _ = write!(text, "\n{part}");
    };
    line(format!("read back: {matrices} ternary matrices with the same codes{exact}, {others} other tensors the same"));
    if v.inexact_scales > 0 {
        let why = match s.form {
            Form::Masters => "cannot be the scale of masters",
            _ => "have no exact inverse",
        };
        let (n, difference) = (v.inexact_scales, v.largest_difference);
        line(format!(
            "inexact: {n} of {matrices} scales {why}; the largest relative difference is {difference:.1e}, so logits \
             may differ in their last bits"
        ));
    }
    if s.f32_masters > 0 {
        line(format!("{} small matrices are F32: BF16 cannot express their scales", s.f32_masters));
    }
    if !s.copied.is_empty() {
        line(format!("copied: {}", s.copied.join(", ")));
    }
    if !s.left.is_empty() {
        line(format!("not copied: {}", s.left.join(", ")));
    }
    text
}
