//! Loading a fifth of 2B-4T from files in the page cache, in bytes of tensors a second: packed safetensors and GGUF, with the
//! screen of the output head and without it; and opening them, which reads headers alone.
//!
//! `cargo bench --bench load`: writes 0.9 GB into a temporary folder (TMPDIR) and removes it again; 0.6 GB of memory.

mod common;

use candle_bitnet::checkpoint::write::{DEFAULT_SHARD_BYTES, write_checkpoint, write_text};
use candle_bitnet::checkpoint::{Checkpoint, ModelFiles};
use candle_bitnet::model::convert::{Form, GgufType, convert};
use candle_bitnet::model::presets::SyntheticWeights;
use candle_bitnet::nn::{HeadChoice, HeadKind};
use candle_bitnet::ternary::I2sLayout;
use candle_bitnet::{LoadOptions, LoadedDecoder};
use candle_core::Device;
use common::{fifth, is_trial};
use criterion::{BatchSize, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

/// The model's files by the name of their form, with the bytes of their tensors.
fn files(dir: &Path) -> Vec<(&'static str, ModelFiles, u64)> {
    let (config, packed) = (fifth(), dir.join("packed"));
    std::fs::create_dir(&packed).expect("a temporary folder");
    let mut bytes = 0;
    let entries = SyntheticWeights::new(&config, 0);
    write_checkpoint(&packed, entries.entries(), DEFAULT_SHARD_BYTES, &mut |n| bytes += n).expect("disk space");
    write_text(&packed.join("config.json"), &config.to_json()).expect("disk space");
    let mut all = vec![("safetensors", ModelFiles::from(packed.as_path()), bytes)];
    for (name, kind) in [("gguf i2_s", GgufType::I2_S(I2sLayout::default())), ("gguf tq2_0", GgufType::TQ2_0)] {
        let target = dir.join(format!("{}.gguf", name.replace(' ', "-")));
        let written = convert(packed.as_path(), &target, Form::Gguf(kind), &mut |_| ControlFlow::Continue(()));
        all.push((name, ModelFiles::from(target.as_path()), written.expect("disk space").bytes));
    }
    all
}

fn load(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let context = if is_trial() { 64 } else { 512 };
    let mut group = c.benchmark_group("load");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    for (form, files, bytes) in files(dir.path()) {
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("open", form), |b| {
            b.iter(|| Checkpoint::open(&files).expect("a checkpoint"));
        });
        group.throughput(Throughput::BytesDecimal(bytes));
        for (head, choice) in [("full head", HeadKind::Full.into()), ("auto head", HeadChoice::Auto)] {
            let options = LoadOptions::new(&Device::Cpu).context(Some(context)).head(choice);
            group.bench_function(BenchmarkId::new(head, form), |b| {
                // One at a time in memory, dropped when its time is taken.
                let open = |()| LoadedDecoder::open(&files, &options).expect("a model");
                b.iter_batched(|| (), open, BatchSize::PerIteration);
            });
        }
    }
    group.finish();
}

criterion_group!(benches, load);
criterion_main!(benches);
