//! The command line: one file per subcommand, each with an `Args` and a `run`.

pub mod bench;
mod bench_args;
pub mod cache;
pub mod chat;
mod chat_input;
pub mod compare;
pub mod completions;
pub mod convert;
pub mod doctor;
#[cfg(test)]
mod fake;
pub mod finetune;
mod finetune_args;
pub mod generate;
pub mod inspect;
pub mod logits;
pub mod man;
mod model_args;
pub mod perplexity;
mod preset;
mod sampling_args;
pub mod synth;
pub mod train;
mod train_args;
mod train_flags;
mod train_progress;

use anyhow::Context;
use clap::{Parser, Subcommand};
use std::fmt::Display;
use std::io::{self, Write};

/// Run BitNet b1.58 language models
#[derive(Debug, Parser)]
#[command(name = "bitnet", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    Generate(generate::Args),
    Chat(chat::Args),
    Bench(bench::Args),
    Compare(compare::Args),
    Perplexity(perplexity::Args),
    Inspect(inspect::Args),
    Convert(convert::Args),
    Doctor(doctor::Args),
    Cache(cache::Args),
    Logits(logits::Args),
    Synth(synth::Args),
    Train(train::Args),
    Finetune(finetune::Args),
    Completions(completions::Args),
    Man(man::Args),
}

impl Command {
    /// Runs the command.
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Generate(args) => generate::run(args),
            Self::Chat(args) => chat::run(args),
            Self::Bench(args) => bench::run(args),
            Self::Compare(args) => compare::run(args),
            Self::Perplexity(args) => perplexity::run(args),
            Self::Inspect(args) => inspect::run(args),
            Self::Convert(args) => convert::run(args),
            Self::Doctor(args) => doctor::run(args),
            Self::Cache(args) => cache::run(args),
            Self::Logits(args) => logits::run(args),
            Self::Synth(args) => synth::run(args),
            Self::Train(args) => train::run(args),
            Self::Finetune(args) => finetune::run(args),
            Self::Completions(args) => completions::run(args),
            Self::Man(args) => man::run(args),
        }
    }
}

/// Prints a command's result, ended by one line break. A closed pipe is a quiet end: `bitnet doctor | head` is no
/// failure.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    still_open(writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush())).map(drop)
}

/// Whether a write found a reader: a closed pipe is a quiet end, any other failure an error.
fn still_open(result: io::Result<()>) -> anyhow::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(e).context("standard output"),
    }
}

/// How many threads compute, where a line names it; nothing on a GPU.
fn on_threads(threads: Option<usize>) -> String {
    threads.map(|n| format!(", {n} thread{}", if n == 1 { "" } else { "s" })).unwrap_or_default()
}

/// An error's own text: candle appends a stack trace where RUST_BACKTRACE is set.
pub fn first_line(error: &dyn Display) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
