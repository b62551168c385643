//! The program as its user runs it: what it prints, what it writes, and how it fails.

#[path = "cli/adapter.rs"]
mod adapter;
#[path = "cli/bench.rs"]
mod bench;
#[path = "cli/builtin.rs"]
mod builtin;
#[path = "cli/chat.rs"]
mod chat;
mod common;
#[path = "cli/compare.rs"]
mod compare;
#[path = "cli/convert.rs"]
mod convert;
#[cfg(feature = "cuda")]
#[path = "cli/cuda.rs"]
mod cuda;
#[path = "cli/finetune.rs"]
mod finetune;
#[path = "cli/generate.rs"]
mod generate;
#[path = "cli/gguf.rs"]
mod gguf;
#[cfg(any(feature = "cuda", feature = "metal"))]
#[path = "cli/gpu.rs"]
mod gpu;
#[path = "cli/head.rs"]
mod head;
#[path = "cli/hostile.rs"]
mod hostile;
#[path = "cli/logits.rs"]
mod logits;
#[cfg(feature = "metal")]
#[path = "cli/metal.rs"]
mod metal;
#[path = "cli/perplexity.rs"]
mod perplexity;
#[path = "cli/tools.rs"]
mod tools;
#[path = "cli/train.rs"]
mod train;

use assert_cmd::Command;
use std::process::Output;
use std::time::Duration;

/// Path of a fixture's checkpoint.
fn model(name: &str) -> String {
    common::fixture(name).to_str().unwrap().to_owned()
}

/// Settings that hide this machine's GPUs, the emulator's too.
const NO_GPUS: [(&str, &str); 3] =
    [("CUDA_VISIBLE_DEVICES", ""), ("BITNET_METAL_DEVICES", "0"), ("BITNET_EMULATED_DEVICES", "0")];

/// What an error says where a GPU is asked for, and this build has no kernels for it or all are hidden.
const NO_GPU: &str = if cfg!(feature = "cuda") { "CUDA" } else { "--features cuda" };

/// The program on the CPU.
fn bitnet(args: &[&str]) -> Command {
    let mut command = program(args);
    command.envs(NO_GPUS);
    command
}

/// The program; stack traces are asked for, so that a test sees where one would reach the user.
fn program(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("bitnet").unwrap();
    command.args(args).env("HF_HUB_OFFLINE", "1").env("RUST_BACKTRACE", "1").timeout(Duration::from_secs(120));
    command
}

/// What a run left.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ran {
    fn of(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let ran = Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) };
        assert!(!ran.err.contains("panicked") && !ran.err.contains("backtrace"), "{ran:?}");
        ran
    }

    /// Standard output of a run that succeeded.
    fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.out
    }

    fn json(self) -> serde_json::Value {
        serde_json::from_str(&self.ok()).unwrap()
    }

    /// A run that failed with this code, said why in these words, and printed nothing else.
    fn fails(self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(self.out.is_empty() && self.err.starts_with("error: "), "{self:?}");
        for word in words {
            assert!(self.err.contains(word), "no {word:?} in {:?}", self.err);
        }
    }
}

fn run(args: &[&str]) -> Ran {
    Ran::of(bitnet(args).output().unwrap())
}

fn run_with(args: &[&str], stdin: &str) -> Ran {
    Ran::of(bitnet(args).write_stdin(stdin).output().unwrap())
}

#[test]
fn help_and_version_are_there() {
    assert_eq!(run(&["--version"]).ok(), format!("bitnet {}\n", env!("CARGO_PKG_VERSION")));
    let help = run(&["--help"]).ok();
    for command in [
        "generate",
        "chat",
        "train",
        "finetune",
        "bench",
        "compare",
        "perplexity",
        "inspect",
        "convert",
        "doctor",
        "logits",
        "synth",
        "completions",
    ] {
        assert!(help.contains(&format!("  {command} ")), "{help}");
        let own = run(&[command, "--help"]).ok();
        assert!(own.contains(&format!("Usage: bitnet {command}")), "{own}");
    }
    let none = run(&[]);
    assert!(none.code == Some(2) && none.err.contains("Usage: bitnet"), "{none:?}");
    run(&["frobnicate"]).fails(2, &["frobnicate"]);
}
