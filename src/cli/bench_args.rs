//! The flags that `bench` and `compare` share, and what they mean.

use super::model_args::{HubArgs, SourceArgs};
use anyhow::Result;
use candle_bitnet::Error;
use candle_bitnet::bench::BenchModel;
use candle_bitnet::checkpoint::ModelFiles;
use clap::Args;

/// Which model to measure: a checkpoint, or a preset's shapes.
#[derive(Debug, Clone, Args)]
pub struct BenchModelArgs {
    #[command(flatten)]
    pub source: SourceArgs,

    /// A preset's shapes with random weights: 2b4t, 0.7b, 3b, 8b, 30b
    #[arg(long, value_name = "PRESET", conflicts_with_all = ["model", "i2s_layout"])]
    pub synthetic: Option<String>,
}

impl BenchModelArgs {
    /// The model, and its files if it has some.
    pub fn open(&self, hub: &HubArgs) -> Result<(BenchModel, Option<ModelFiles>)> {
        if let Some(preset) = &self.synthetic {
            return Ok((BenchModel::synthetic(preset)?, None));
        }
        let files = self.source.find(hub)?;
        Ok((BenchModel::files(&self.source.model, files.clone())?, Some(files)))
    }
}

/// Refuses a flag's number that is not between 1 and the most that it may be.
pub fn check_counts<const N: usize>(counts: [(&str, Option<usize>, usize); N]) -> Result<()> {
    for (flag, value, most) in counts {
        if let Some(value) = value.filter(|n| !(1..=most).contains(n)) {
            return Err(Error::request(flag, format!("{value} is not between 1 and {most}")).into());
        }
    }
    Ok(())
}

/// Tokens to prefill and to decode: what was asked for, and for the rest the defaults, as far as so many positions hold them.
pub fn lengths(asked: (Option<usize>, Option<usize>), defaults: (usize, usize), positions: usize) -> (usize, usize) {
    let tg = asked.1.unwrap_or(defaults.1.min(positions / 4).max(1));
    (asked.0.unwrap_or(defaults.0.min(positions.saturating_sub(tg)).max(1)), tg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_fit_the_positions_unless_they_were_asked_for() {
        assert_eq!(lengths((None, None), (512, 128), 4096), (512, 128));
        assert_eq!(lengths((None, None), (512, 128), 64), (48, 16));
        assert_eq!(lengths((None, None), (512, 128), 1), (1, 1));
        assert_eq!(lengths((Some(700), None), (512, 128), 64), (700, 16));
        assert_eq!(lengths((None, Some(60)), (512, 128), 64), (4, 60));
    }

    #[test]
    fn counts_outside_their_range_name_their_flag() {
        check_counts([("--pp", None, 3), ("--tg", Some(1), 3), ("--reps", Some(3), 3)]).unwrap();
        for bad in [0, 4] {
            let error = check_counts([("--pp", Some(1), 3), ("--tg", Some(bad), 3)]).unwrap_err();
            assert!(error.to_string().contains("--tg") && error.to_string().contains("1 and 3"), "{error}");
        }
    }
}
