//! `bitnet`: run BitNet b1.58 models from the command line.
//!
//! Exit status: 0 done, 1 failed, 2 used wrongly.

mod cli;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    match cli.command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // Causes on one line, each once: many errors already say what their cause says.
            let mut message = String::new();
            for cause in e.chain().map(|c| cli::first_line(&c)) {
                if !message.ends_with(&cause) {
                    message += if message.is_empty() { "" } else { ": " };
                    message += &cause;
                }
            }
            eprintln!("error: {message}");
            let usage = matches!(e.downcast_ref(), Some(candle_bitnet::Error::Request { .. }));
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}
