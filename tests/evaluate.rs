//! Sliding-window scores against a naive recomputation, and what they do not depend on.

mod common;

use candle_bitnet::Error;
use candle_bitnet::backend::cpu::{CpuOptions, KernelKind};
use candle_bitnet::backend::{Backend, DenseType, DenseWeight};
use candle_bitnet::checkpoint::Checkpoint;
use candle_bitnet::evaluate::{MAX_BATCH, Score, Windows, score};
use candle_bitnet::model::config::{ModelConfig, Projection};
use candle_bitnet::model::{CheckpointWeights, Decoder, Logits, Sequence, WeightSource};
use candle_bitnet::nn::LinearWeight;
use candle_core::Device;
use common::{FIXTURES, fixture};

/// Positions that the decoders are loaded for.
const POSITIONS: usize = 160;

/// A checkpoint's weights, but for the last norm's, which are all `norm` where it is given.
struct Weights<'a> {
    checkpoint: CheckpointWeights<'a>,
    norm: Option<f32>,
}

impl WeightSource for Weights<'_> {
    fn linear(&self, backend: &Backend, layer: usize, which: Projection) -> candle_bitnet::Result<LinearWeight> {
        self.checkpoint.linear(backend, layer, which)
    }

    fn vector(&self, name: &str, len: usize) -> candle_bitnet::Result<Vec<f32>> {
        match self.norm {
            Some(value) if name == "model.norm.weight" => Ok(vec![value; len]),
            _ => self.checkpoint.vector(name, len),
        }
    }

    fn dense(&self, backend: &Backend, name: &str, rows: usize, cols: usize) -> candle_bitnet::Result<DenseWeight> {
        self.checkpoint.dense(backend, name, rows, cols)
    }
}

fn load_with(name: &str, options: CpuOptions, norm: Option<f32>) -> Decoder {
    let backend = Backend::new(&Device::Cpu, options).unwrap();
    let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
    let (path, text) = checkpoint.config();
    let config = ModelConfig::parse(path, text).unwrap();
    let weights = Weights { checkpoint: CheckpointWeights::new(&checkpoint, &config).unwrap(), norm };
    Decoder::load(&backend, config.clone(), &weights, POSITIONS, |_| ()).unwrap()
}

fn load(name: &str) -> Decoder {
    load_with(name, CpuOptions { kernel: None, threads: Some(2) }, None)
}

fn ids(decoder: &Decoder, count: usize) -> Vec<u32> {
    let vocab = decoder.config().vocab_size;
    (0..count).map(|i| (i * i * 31 + i * 7919) as u32 % vocab as u32).collect()
}

fn run(decoder: &Decoder, prefix: &[u32], tokens: &[u32], windows: Windows) -> Score {
    score(decoder, DenseType::F32, prefix, tokens, &windows, &mut |_| ()).unwrap()
}

/// The loop of transformers' guide, one whole forward pass a window: negative log-likelihoods in nats.
fn naive(decoder: &Decoder, sequence: &[u32], context: usize, stride: usize) -> Vec<f64> {
    let (mut nll, mut previous_end) = (Vec::new(), 1);
    for begin in (0..sequence.len()).step_by(stride) {
        let end = (begin + context).min(sequence.len());
        // One token more where the window alone could not predict its first new token.
        let from = begin.min(previous_end - 1);
        let cache = decoder.kv_cache(DenseType::F32, 1).unwrap();
        let tokens = &sequence[from..end];
        let rows = match tokens {
            [_] | [] => vec![],
            // The last token's row predicts nothing here; without it a window never outgrows the context.
            [read @ .., _] => {
                let window = Sequence { slot: 0, position: 0, tokens: read };
                decoder.forward(&[window], &cache, Logits::All).unwrap().to_vec2::<f32>().unwrap()
            }
        };
        for target in previous_end..end {
            let row: Vec<f64> = rows[target - 1 - from].iter().map(|v| f64::from(*v)).collect();
            let sum: f64 = row.iter().map(|v| v.exp()).sum();
            nll.push(-(row[sequence[target] as usize].exp() / sum).ln());
        }
        previous_end = end;
        if end == sequence.len() {
            break;
        }
    }
    nll
}

#[test]
fn scores_are_those_of_a_naive_loop() {
    for name in FIXTURES {
        let decoder = load(name);
        let sequence = ids(&decoder, 150);
        for (context, stride) in [(64, 32), (64, 64), (40, 7), (33, 32), (160, 80), (149, 149), (2, 1), (1, 1)] {
            let nll = naive(&decoder, &sequence, context, stride);
            let want: f64 = nll.iter().sum();
            for (prefix, tokens) in [sequence.split_at(0), sequence.split_at(1)] {
                let got = run(&decoder, prefix, tokens, Windows { context, stride, batch: 3 });
                assert_eq!((got.tokens, nll.len()), (149, 149));
                let error = (got.nll_nats / want - 1.0).abs();
                assert!(error < 1e-12, "{name}, context {context}, stride {stride}: {got:?}, not {want}");
                assert!((got.perplexity().ln() * 149.0 / want - 1.0).abs() < 1e-12);
                assert!((got.bits_per_byte(600) * 600.0 * 2f64.ln() / want - 1.0).abs() < 1e-12);
            }
            // A longer prefix leaves out just its own part.
            let got = run(&decoder, &sequence[..90], &sequence[90..], Windows { context, stride, batch: 3 });
            let want: f64 = nll[89..].iter().sum();
            assert!(got.tokens == 60 && (got.nll_nats / want - 1.0).abs() < 1e-12, "{name}: {got:?}, not {want}");
        }
    }
}

#[test]
fn scores_are_the_same_bits_for_every_batch_kernel_and_thread_count() {
    let mut first = None;
    for kernel in KernelKind::available() {
        for threads in [1, 3] {
            let options = CpuOptions { kernel: Some(kernel), threads: Some(threads) };
            let decoder = load_with("a1_packed", options, None);
            // With the largest batch more tokens than one forward pass takes, to be read and to be scored.
            let sequence = ids(&decoder, 600);
            for batch in [1, 4, MAX_BATCH] {
                let got = run(&decoder, &sequence[..1], &sequence[1..], Windows { context: 100, stride: 25, batch });
                let bits = (got.nll_nats.to_bits(), got.tokens, got.windows);
                let context = format!("{kernel}, {threads} threads, batch {batch}");
                assert_eq!(*first.get_or_insert(bits), bits, "{context}");
                assert_eq!((got.tokens, got.windows), (599, 21), "{context}");
            }
        }
    }
}

#[test]
fn a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() {
    let decoder = load_with("a3_llama", CpuOptions::default(), Some(0.0));
    let vocab = decoder.config().vocab_size as f64;
    let got = run(&decoder, &[1], &ids(&decoder, 99), Windows::new(POSITIONS));
    assert!((got.perplexity() / vocab - 1.0).abs() < 1e-12, "{got:?}");
    assert!((got.bits_per_byte(198) * 2.0 / vocab.log2() - 1.0).abs() < 1e-12, "{got:?}");
}

#[test]
fn progress_counts_up_to_all_tokens() {
    let decoder = load("a1_packed");
    for batch in [1, 3] {
        let mut seen = vec![0];
        let windows = Windows { context: 50, stride: 25, batch };
        let tokens = ids(&decoder, 301);
        score(&decoder, DenseType::BF16, &[], &tokens, &windows, &mut |n| seen.push(n)).unwrap();
        assert!(seen.is_sorted_by(|a, b| a < b) && seen.len() > 2, "{seen:?}");
        assert_eq!(seen.last(), Some(&300));
    }
}

#[test]
fn what_cannot_be_scored_is_named() {
    let decoder = load("a1_packed");
    let fails = |prefix: &[u32], tokens: &[u32], context: usize, stride: usize, batch: usize, words: &[&str]| {
        let windows = Windows { context, stride, batch };
        let error = score(&decoder, DenseType::F32, prefix, tokens, &windows, &mut |_| ()).unwrap_err();
        assert!(matches!(error, Error::Request { .. }), "{error:?}");
        for word in words {
            assert!(error.to_string().contains(word), "no {word:?} in {error}");
        }
    };
    fails(&[1], &[2, 3], 0, 1, 1, &["context", "0 is not between 1 and 160"]);
    fails(&[1], &[2, 3], 161, 1, 1, &["context", "161", "positions"]);
    fails(&[1], &[2, 3], 8, 0, 1, &["stride", "0 is not between 1 and 8"]);
    fails(&[1], &[2, 3], 8, 9, 1, &["stride", "9", "context"]);
    fails(&[1], &[2, 3], 8, 4, 0, &["batch", "0"]);
    fails(&[1], &[2, 3], 8, 4, MAX_BATCH + 1, &["batch", "1024"]);
    fails(&[], &[], 8, 4, 1, &["nothing"]);
    fails(&[], &[2], 8, 4, 1, &["nothing", "something before"]);
    fails(&[1, 2], &[], 8, 4, 1, &["nothing"]);
    // The last token is never given to the model, and must still be one.
    fails(&[1], &[2, 384], 8, 4, 1, &["384 is outside the vocabulary of 384"]);
    assert_eq!(run(&decoder, &[1], &[2], Windows { context: 8, stride: 4, batch: 1 }).tokens, 1);

    let broken = load_with("a1_packed", CpuOptions::default(), Some(f32::NAN));
    let error = score(&broken, DenseType::F32, &[1], &[2, 3], &Windows::new(8), &mut |_| ()).unwrap_err();
    assert!(matches!(error, Error::Logits(_)) && error.to_string().contains("token 0"), "{error}");
}
