//! What every device and kernel of this machine gives: a table, a chart and a recommendation.
//!
//!     cargo run --release --example compare_devices [MODEL [CHART.svg]]
//!
//! MODEL is a hub id, a directory, a GGUF file or `builtin`, the default; shapes without a file are `synthetic:2b4t`. The
//! chart is `compare_devices.svg` unless another file is named. `bitnet compare` is the same with flags.

use candle_bitnet::bench::{BenchModel, Contender, Narrowed, Workload, compare};
use candle_bitnet::checkpoint::ModelFiles;
use candle_bitnet::checkpoint::hub::HubOptions;
use candle_bitnet::{LoadOptions, Result};
use candle_core::Device;
use std::path::Path;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let name = args.next().unwrap_or_else(|| "builtin".into());
    let chart = args.next().unwrap_or_else(|| "compare_devices.svg".into());

    let model = match name.strip_prefix("synthetic:") {
        Some(shape) => BenchModel::synthetic(shape)?,
        None => BenchModel::files(&name, ModelFiles::find(&name, &HubOptions::from_env())?)?,
    };
    // Any prompt does for speed; these are token ids that every vocabulary has.
    let prompt: Vec<u32> = (1..=64).collect();
    let work = Workload { prompt: &prompt, decode_tokens: 32, reps: 2 };
    let contenders = Contender::all(Narrowed::default())?;
    let compared = compare(&model, &LoadOptions::new(&Device::Cpu), &contenders, work, |entry| {
        eprintln!("{}: {}", entry.flags, if entry.report.is_some() { "done" } else { "failed" });
    })?;
    println!("{}", compared.describe());
    compared.write_chart(Path::new(&chart))?;
    println!("chart: {chart}");
    Ok(())
}
