//! The command line: one file per subcommand, each with an `Args` and a `run`.

pub mod bench;
pub mod chat;
mod chat_input;
pub mod completions;
pub mod doctor;
#[cfg(test)]
mod fake;
pub mod generate;
pub mod inspect;
pub mod logits;
mod model_args;
mod sampling_args;
pub mod synth;

use clap::{Parser, Subcommand};

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
    Inspect(inspect::Args),
    Doctor(doctor::Args),
    Logits(logits::Args),
    Synth(synth::Args),
    Completions(completions::Args),
}

impl Command {
    /// Runs the command.
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Generate(args) => generate::run(args),
            Self::Chat(args) => chat::run(args),
            Self::Bench(args) => bench::run(args),
            Self::Inspect(args) => inspect::run(args),
            Self::Doctor(args) => doctor::run(args),
            Self::Logits(args) => logits::run(args),
            Self::Synth(args) => synth::run(args),
            Self::Completions(args) => completions::run(args),
        }
    }
}
