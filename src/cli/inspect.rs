//! `bitnet inspect`: what a checkpoint holds, what it will occupy, and what looks wrong about it.

mod report;

use super::model_args::{FilesArgs, HubArgs};
use super::print;
use anyhow::Result;
use candle_bitnet::checkpoint::Checkpoint;
use clap::Args as ClapArgs;
use report::Report;

/// Show what a checkpoint holds and what it will occupy
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    #[command(flatten)]
    pub files: FilesArgs,

    /// Write JSON
    #[arg(long)]
    pub json: bool,

    /// List every tensor
    #[arg(long)]
    pub tensors: bool,

    #[command(flatten)]
    pub hub: HubArgs,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.files.find(&args.hub)?)?;
    let report = Report::of(&checkpoint, args.tensors)?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&report)?,
        false => report.to_string(),
    };
    print(&text)
}
