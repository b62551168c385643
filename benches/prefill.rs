//! Prefill of a fifth of 2B-4T, in tokens a second: prompts of several lengths, and a piece of one that is long already.
//!
//! `cargo bench --bench prefill`: 0.5 GB of memory. Logits are computed for the last token, as before generation.

mod common;

use candle_bitnet::backend::DenseType;
use candle_bitnet::model::presets::SyntheticWeights;
use candle_bitnet::model::{Decoder, Logits, Sequence};
use common::{backend, fifth, is_trial, thread_counts};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use std::time::Duration;

/// Tokens, and the positions before them.
const PIECES: [(usize, usize); 4] = [(16, 0), (64, 0), (512, 0), (512, 1536)];

fn prefill(c: &mut Criterion) {
    let (config, context) = (fifth(), if is_trial() { 64 } else { 2048 });
    let weights = SyntheticWeights::new(&config, 0);
    for options in thread_counts() {
        let (backend, name) = backend(options);
        let decoder = Decoder::load(&backend, config.clone(), &weights, context, |_| ()).expect("memory");
        let cache = decoder.kv_cache(DenseType::F32, 1).expect("memory");
        let mut group = c.benchmark_group(format!("prefill, {name}"));
        group.sample_size(10).sampling_mode(SamplingMode::Flat);
        group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(3));
        for (count, position) in PIECES.into_iter().filter(|(count, position)| count + position <= context) {
            let tokens: Vec<u32> = (0..count).map(|i| (i * 7919 % config.vocab_size) as u32).collect();
            let piece = Sequence { slot: 0, position, tokens: &tokens };
            let after = if position == 0 { String::new() } else { format!(" after {position}") };
            group.throughput(Throughput::Elements(count as u64));
            group.bench_function(BenchmarkId::from_parameter(format!("{count} tokens{after}")), |b| {
                b.iter(|| decoder.forward_with(&[piece], &cache, Logits::Top(1), |_| Ok(())).expect("a prefill"));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, prefill);
criterion_main!(benches);
