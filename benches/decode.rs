//! Decode steps of a fifth of 2B-4T: bytes a second beside the read bandwidth of the same weights, and tokens a second of
//! batches.
//!
//! `cargo bench --bench decode`: 0.5 GB of memory. A step appends at the same position again and again, as the last of so
//! many; the token is not drawn.

mod common;

use candle_bitnet::backend::DenseType;
use candle_bitnet::model::presets::SyntheticWeights;
use candle_bitnet::model::{Decoder, Logits, Sequence};
use candle_bitnet::nn::{HeadChoice, HeadKind};
use common::{backend, beside_reads, fifth, is_trial, thread_counts};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, criterion_group, criterion_main};
use std::time::Duration;

/// Positions of a sequence, the token's included.
const POSITIONS: [usize; 2] = [64, 2048];
/// Sequences of a step.
const BATCHES: [usize; 3] = [2, 8, 32];

/// Measures steps of `sequences` tokens, each the last of `positions`.
fn steps(group: &mut BenchmarkGroup<'_, WallTime>, what: &str, decoder: &Decoder, sequences: usize, positions: usize) {
    let cache = decoder.kv_cache_of(DenseType::F32, sequences, positions).expect("memory");
    let tokens: Vec<u32> = (1..=sequences as u32).collect();
    let sequence = |(slot, token)| Sequence { slot, position: positions - 1, tokens: std::slice::from_ref(token) };
    let batch: Vec<Sequence<'_>> = tokens.iter().enumerate().map(sequence).collect();
    let step = || decoder.forward_with(&batch, &cache, Logits::Top(1), |_| Ok(())).expect("a step");
    let before = decoder.head().reads();
    step();
    let head = decoder.head().reads().since(before).bytes;
    let bytes = decoder.footprint().ternary + head + sequences * positions * cache.bytes_per_position();
    let id = match sequences {
        1 => BenchmarkId::new(what, format!("{positions} positions")),
        n => BenchmarkId::new(what, format!("{n} sequences of {positions} positions")),
    };
    beside_reads(group, id, decoder.backend().cpu(), &decoder.host_weights(), (bytes, sequences), step);
}

fn decode(c: &mut Criterion) {
    let (config, context) = (fifth(), if is_trial() { 64 } else { POSITIONS[1] });
    let weights = SyntheticWeights::new(&config, 0);
    let load = |options, head: HeadChoice| {
        let (backend, name) = backend(options);
        let decoder = Decoder::load(&backend, config.clone(), &weights, context, |_| ()).expect("memory");
        (decoder.with_head(head).expect("finite weights"), name)
    };
    for options in thread_counts() {
        let (decoder, name) = load(options, HeadKind::Full.into());
        let mut group = c.benchmark_group(format!("decode, {name}"));
        group.sample_size(15).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_millis(1500));
        steps(&mut group, "full head", &decoder, 1, POSITIONS[0]);
        for sequences in BATCHES {
            steps(&mut group, "full head", &decoder, sequences, POSITIONS[0]);
        }
        drop(decoder);
        let (decoder, _) = load(options, HeadChoice::Auto);
        let head = format!("{} head", decoder.head().kind());
        for positions in POSITIONS.into_iter().filter(|n| *n <= context) {
            steps(&mut group, &format!("auto: {head}"), &decoder, 1, positions);
        }
        group.finish();
    }
}

criterion_group!(benches, decode);
criterion_main!(benches);
