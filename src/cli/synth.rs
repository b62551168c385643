//! `bitnet synth`: a checkpoint with real shapes and random ternary weights, in the hub's packed layout.

mod tokenizer;

use super::print;
use anyhow::{Context, Result};
use candle_bitnet::Error;
use candle_bitnet::checkpoint::write::{DEFAULT_SHARD_BYTES, check_target, write_checkpoint, write_text};
use candle_bitnet::model::config::{MAX_LAYERS, ModelConfig};
use candle_bitnet::model::presets::{PRESETS, Preset, SyntheticWeights};
use clap::Args as ClapArgs;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};

/// Write a checkpoint with real shapes and random weights
#[derive(Debug, Clone, ClapArgs)]
#[command(after_help = presets_help())]
pub struct Args {
    /// Which shapes; see below
    #[arg(long, value_name = "NAME")]
    pub preset: String,

    /// Directory to write; must not hold a checkpoint yet
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Seed of the weights
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    pub seed: u64,

    /// Decoder layers, instead of the preset's
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub layers: Option<usize>,
}

fn presets_help() -> String {
    let width = PRESETS.iter().map(|p| p.name.len()).max().unwrap_or_default();
    PRESETS.iter().fold("Presets:".into(), |text, p| format!("{text}\n  {:width$}  {}", p.name, p.about))
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let mut config = Preset::find(&args.preset)?.config();
    if let Some(layers) = args.layers {
        if !(1..=MAX_LAYERS).contains(&layers) {
            let reason = format!("{layers} is out of range; a model has 1 to {MAX_LAYERS} layers");
            return Err(Error::request("--layers", reason).into());
        }
        config.num_layers = layers;
    }
    check_target(&args.out)?;
    let existed = args.out.exists();
    std::fs::create_dir_all(&args.out).with_context(|| format!("creating {}", args.out.display()))?;
    let written = write(&config, args.seed, &args.out);
    if written.is_err() && !existed {
        // Only succeeds while it is empty, as it is after an error.
        let _ = std::fs::remove_dir(&args.out);
    }
    let (files, bytes) = written?;
    print(&format!(
        "{}: {} in {files} file{}, {} parameters, seed {}",
        args.out.display(),
        HumanBytes(bytes),
        if files == 1 { "" } else { "s" },
        config.parameters(),
        args.seed
    ))
}

/// Writes everything; `config.json` comes last, so that a directory with one is complete.
fn write(config: &ModelConfig, seed: u64, out: &Path) -> Result<(usize, u64)> {
    let weights = SyntheticWeights::new(config, seed);
    let entries = weights.entries();
    let total = entries.iter().map(|e| e.shape.iter().product::<usize>() as u64 * e.dtype.size() as u64).sum();
    check_space(out, total)?;
    let bar = ProgressBar::new(total).with_style(
        ProgressStyle::with_template("{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    bar.set_message(format!("writing {}", out.display()));
    let mut bytes = 0;
    let files = write_checkpoint(out, entries, DEFAULT_SHARD_BYTES, &mut |n| {
        bytes += n;
        bar.set_position(bytes.min(total));
    });
    bar.finish_and_clear();
    let files = files?;
    for (name, text) in tokenizer::files(config) {
        write_text(&out.join(name), &text)?;
    }
    write_text(&out.join("config.json"), &config.to_json())?;
    Ok((files.iter().filter(|f| f.extension().is_some_and(|e| e == "safetensors")).count(), bytes))
}

/// Refuses to start what cannot fit. Where the system does not say, writing will find out.
fn check_space(out: &Path, needed: u64) -> Result<()> {
    #[cfg(unix)]
    if let Ok(fs) = rustix::fs::statvfs(out) {
        let free = fs.f_bavail.saturating_mul(fs.f_frsize);
        anyhow::ensure!(
            free > needed,
            "{}: {} needed, but only {} are free on this disk; choose another directory or fewer --layers",
            out.display(),
            HumanBytes(needed),
            HumanBytes(free)
        );
    }
    #[cfg(not(unix))]
    let _ = (out, needed);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_bitnet::checkpoint::{Checkpoint, LinearWeight};
    use candle_bitnet::model::config::Projection;

    fn args(preset: &str, out: &Path) -> Args {
        Args { preset: preset.into(), out: out.to_owned(), seed: 3, layers: Some(1) }
    }

    #[test]
    fn a_written_checkpoint_is_the_synthetic_model() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("new/model");
        run(args("0.7b", &out)).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        let (path, text) = checkpoint.config();
        let config = ModelConfig::parse(path, text).unwrap();
        assert_eq!((config.num_layers, config.hidden_size), (1, 1536));
        assert!(config.unexplained(checkpoint.names()).is_empty());
        let weights = SyntheticWeights::new(&config, 3);
        for which in Projection::ALL {
            let (rows, cols) = config.projection_shape(which);
            let base = config.projection_name(0, which);
            let stored = checkpoint.linear(&base, rows, cols, config.quantization.scale_style).unwrap();
            let LinearWeight::Ternary(stored) = stored else { panic!("{base} is dense") };
            assert_eq!(stored, weights.linear(0, which).unwrap());
        }
        let mut row = vec![0; 2 * 1536];
        weights.dense_bf16("model.embed_tokens.weight", 1536, 31_000, &mut row);
        assert_eq!(checkpoint.dense("model.embed_tokens.weight", 32_002, 1536).unwrap().row(31_000), row);
        assert!(!checkpoint.contains("lm_head.weight"));
        for (name, len) in config.norms(0) {
            assert_eq!(checkpoint.vector(&name, len).unwrap(), weights.vector(&name, len));
        }
        let again = run(args("0.7b", &out)).unwrap_err();
        assert!(again.to_string().contains("already holds"), "{again}");
        assert!(matches!(again.downcast_ref(), Some(Error::Request { .. })));
    }

    #[test]
    fn bad_requests_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("m");
        assert!(run(args("nope", &out)).unwrap_err().to_string().contains("2b4t"));
        for layers in [0, MAX_LAYERS + 1] {
            let err = run(Args { layers: Some(layers), ..args("0.7b", &out) }).unwrap_err();
            assert!(err.to_string().contains("--layers"), "{err}");
        }
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(run(args("0.7b", &dir.path().join("file"))).unwrap_err().to_string().contains("not a directory"));
        assert!(!out.exists());
        assert!(presets_help().contains("2b4t"));
    }
}
