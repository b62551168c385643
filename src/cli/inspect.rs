//! `bitnet inspect`: what a checkpoint holds, what it will occupy, and what looks wrong about it.

mod report;

use super::model_args::{HubArgs, parse};
use super::print;
use anyhow::Result;
use candle_bitnet::checkpoint::{BUILTIN, Checkpoint, ModelFiles};
use candle_bitnet::ternary::I2sLayout;
use clap::Args as ClapArgs;
use report::Report;

/// Show what a checkpoint holds and what it will occupy
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    /// Model: a hub id (owner/name or owner/name@revision), a directory, a .gguf file, or builtin [default: builtin]
    #[arg(value_name = "MODEL")]
    pub model: Option<String>,

    /// The same, as the other commands take it
    #[arg(short, long = "model", id = "model_flag", value_name = "MODEL", conflicts_with = "model")]
    pub model_flag: Option<String>,

    /// Write JSON
    #[arg(long)]
    pub json: bool,

    /// List every tensor
    #[arg(long)]
    pub tensors: bool,

    /// Order of the codes in I2_S tensors of a GGUF file: 128, 64 or rows [default: 128]
    #[arg(long, value_name = "LAYOUT", value_parser = parse::<I2sLayout>)]
    pub i2s_layout: Option<I2sLayout>,

    #[command(flatten)]
    pub hub: HubArgs,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let model = args.model.or(args.model_flag).unwrap_or_else(|| BUILTIN.into());
    let files = ModelFiles::find(&model, &args.hub.options())?.with_i2s_layout(args.i2s_layout)?;
    let checkpoint = Checkpoint::open(&files)?;
    let report = Report::of(&checkpoint, args.tensors)?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&report)?,
        false => report.to_string(),
    };
    print(&text)
}
