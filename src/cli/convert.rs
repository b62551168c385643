//! `bitnet convert`: a checkpoint in another form, the same model.

use super::model_args::{FilesArgs, HubArgs};
use super::{first_line, print};
use anyhow::Result;
use candle_bitnet::Error;
use candle_bitnet::backend::DenseType;
use candle_bitnet::checkpoint::gguf::GgmlType;
use candle_bitnet::checkpoint::{Checkpoint, ModelFiles, ScaleStyle, StoredType};
use candle_bitnet::model::config::ModelConfig;
use candle_bitnet::model::convert::{Form, GgufType, Options, Phase, Progress, Summary, convert};
use candle_bitnet::ternary::I2sLayout;
use clap::{Args as ClapArgs, ValueEnum};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::fmt::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Write a model in another form: safetensors or GGUF
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    #[command(flatten)]
    pub files: FilesArgs,

    /// Form to write
    #[arg(long, value_name = "FORM")]
    pub to: Target,

    /// Type of the embedding and the output head; block types only in GGUF [default: the model's]
    #[arg(long, value_name = "TYPE")]
    pub head: Option<Head>,

    /// What weight_scale does in a packed form [default: what the model's config.json says]
    #[arg(long, value_name = "CONVENTION")]
    pub scale: Option<Convention>,

    /// Directory or .gguf file to write; a directory must not hold a checkpoint yet
    #[arg(short, long, value_name = "PATH")]
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
    /// Safetensors with the values -s, 0 and s, for software without ternary weights
    DenseBf16,
    /// The same in f16
    DenseF16,
    /// The same in f32, which holds every scale
    DenseF32,
    /// GGUF for microsoft/BitNet (bitnet.cpp) on x86
    #[value(name = "i2_s")]
    I2s,
    /// The same in the order of its Arm builds
    #[value(name = "i2_s-64")]
    I2s64,
    /// The same with four rows interleaved
    #[value(name = "i2_s-rows")]
    I2sRows,
    /// GGUF for llama.cpp, 2.06 bits a weight
    #[value(name = "tq2_0")]
    Tq2,
    /// GGUF for llama.cpp, 1.69 bits a weight
    #[value(name = "tq1_0")]
    Tq1,
}

/// A type of dense values, as a flag names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Head {
    F32,
    F16,
    Bf16,
    #[value(name = "q8_0")]
    Q8,
    #[value(name = "q6_k")]
    Q6K,
    #[value(name = "q4_0")]
    Q4,
}

impl Head {
    fn stored(self) -> StoredType {
        match self {
            Self::F32 => StoredType::F32,
            Self::F16 => StoredType::F16,
            Self::Bf16 => StoredType::BF16,
            Self::Q8 => StoredType::Ggml(GgmlType::Q8_0),
            Self::Q6K => StoredType::Ggml(GgmlType::Q6_K),
            Self::Q4 => StoredType::Ggml(GgmlType::Q4_0),
        }
    }
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
    if args.to != Target::Packed && args.scale.is_some() {
        let reason = "only packed codes have a weight_scale; leave it out, or write --to packed";
        return Err(Error::request("--scale", reason).into());
    }
    let multiply = Form::Packed(ScaleStyle::Multiply);
    let known = match (args.to, args.scale) {
        (Target::Packed, Some(Convention::Divide)) => Some(Form::Packed(ScaleStyle::Divide)),
        (Target::Packed, Some(Convention::Multiply)) => Some(multiply),
        (Target::Packed, None) => None,
        (Target::Masters, _) => Some(Form::Masters),
        (Target::DenseBf16, _) => Some(Form::Dense(DenseType::BF16)),
        (Target::DenseF16, _) => Some(Form::Dense(DenseType::F16)),
        (Target::DenseF32, _) => Some(Form::Dense(DenseType::F32)),
        (Target::I2s, _) => Some(Form::Gguf(GgufType::I2_S(I2sLayout::Blocks128))),
        (Target::I2s64, _) => Some(Form::Gguf(GgufType::I2_S(I2sLayout::Blocks64))),
        (Target::I2sRows, _) => Some(Form::Gguf(GgufType::I2_S(I2sLayout::Rows4))),
        (Target::Tq2, _) => Some(Form::Gguf(GgufType::TQ2_0)),
        (Target::Tq1, _) => Some(Form::Gguf(GgufType::TQ1_0)),
    };
    let head = args.head.map(Head::stored);
    // Before a download, which may take an hour.
    Options { form: known.unwrap_or(multiply), head }.check(&args.out)?;
    let source = args.files.find(&args.hub)?;
    let form = match known {
        Some(form) => form,
        None => Form::Packed(convention(&source)?),
    };
    let stopped = stop_on_interrupt();
    // Drawn on terminals only.
    let bar = ProgressBar::no_length().with_style(
        ProgressStyle::with_template("{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let mut phase = None;
    let summary = convert(&source, &args.out, Options { form, head }, &mut |p: Progress| {
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
fn names(form: Form) -> (String, Option<&'static str>) {
    let (name, scale) = match form {
        Form::Packed(ScaleStyle::Multiply) => ("packed", Some("multiply")),
        Form::Packed(ScaleStyle::Divide) => ("packed", Some("divide")),
        Form::Dense(dtype) => return (format!("dense-{dtype}"), None),
        Form::Gguf(GgufType::I2_S(I2sLayout::Blocks128)) => ("i2_s", None),
        Form::Gguf(GgufType::I2_S(layout)) => return (format!("i2_s-{layout}"), None),
        Form::Gguf(GgufType::TQ2_0) => ("tq2_0", None),
        Form::Gguf(GgufType::TQ1_0) => ("tq1_0", None),
        _ => ("masters", None),
    };
    (name.to_owned(), scale)
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
        "rounded_tensors": s.verified.rounded_tensors,
        "largest_relative_error": s.verified.largest_error,
        "f32_masters": s.f32_masters,
        "copied": s.copied,
        "not_copied": s.left,
    })
}

fn text(out: &Path, s: &Summary) -> String {
    let v = &s.verified;
    let form = match names(s.form) {
        (form, Some(scale)) => format!("{form}, {scale}"),
        (form, None) => form,
    };
    let weights = s.files.iter().filter(|f| f.ends_with(".safetensors") || f.ends_with(".gguf")).count();
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
            Form::Masters => "cannot be the scale of masters".to_owned(),
            Form::Dense(dtype) => format!("are no {dtype}"),
            _ => "have no exact inverse".to_owned(),
        };
        let (n, difference) = (v.inexact_scales, v.largest_difference);
        line(format!(
            "inexact: {n} of {matrices} scales {why}; the largest relative difference is {difference:.1e}, so logits \
             will differ in their last bits"
        ));
    }
    if v.rounded_tensors > 0 {
        let (n, error) = (v.rounded_tensors, 100.0 * v.largest_error);
        let tensors = if n == 1 { "tensor is" } else { "tensors are" };
        line(format!(
            "rounded: {n} dense {tensors} in a type with fewer bits, {error:.2} % off (root mean square), so logits \
             will differ"
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
