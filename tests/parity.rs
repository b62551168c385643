//! The decoder against transformers: the fixtures' verdict on every kernel, however the prompt is cut.

mod common;

use candle_bitnet::backend::cpu::{CpuOptions, KernelKind};
use candle_bitnet::backend::{Backend, DenseType};
use candle_bitnet::checkpoint::Checkpoint;
use candle_bitnet::model::config::{ModelConfig, Projection};
use candle_bitnet::model::{CheckpointWeights, Decoder, Logits, Sequence, WeightSource};
use candle_bitnet::nn::{BitLinear, LinearWeight};
use candle_core::{Device, Module, Tensor};
use common::{Expected, FIXTURES, argmax, fixture};

fn open(name: &str) -> (Checkpoint, ModelConfig) {
    let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
    let (path, text) = checkpoint.config();
    let config = ModelConfig::parse(path, text).unwrap();
    (checkpoint, config)
}

fn load(name: &str, kernel: KernelKind, threads: usize) -> Decoder {
    let options = CpuOptions { kernel: Some(kernel), threads: Some(threads) };
    let backend = Backend::new(&Device::Cpu, options).unwrap();
    let (checkpoint, config) = open(name);
    let weights = CheckpointWeights::new(&checkpoint, &config).unwrap();
    Decoder::load(&backend, config.clone(), &weights, 256, |_| ()).unwrap()
}

/// On a GPU, with decode steps replayed as graphs or not.
fn load_on(device: &Device, name: &str, graphs: bool) -> Decoder {
    let backend = Backend::new(device, CpuOptions { kernel: None, threads: Some(2) }).unwrap().with_graphs(graphs);
    let (checkpoint, config) = open(name);
    let weights = CheckpointWeights::new(&checkpoint, &config).unwrap();
    Decoder::load(&backend, config.clone(), &weights, 256, |_| ()).unwrap()
}

/// The fastest kernel of this CPU, and all GPUs.
fn load_everywhere(name: &str) -> Vec<Decoder> {
    let mut models = vec![load(name, KernelKind::available()[0], 2)];
    models.extend(common::gpus().iter().map(|gpu| load_on(gpu, name, true)));
    models
}

/// Whether rows of logits are the same: to the bit on the CPU. A GPU sums attention in another order in a prefill than in a
/// step, so there an activation's code may differ now and then.
fn same(model: &Decoder, a: &[f32], b: &[f32]) -> bool {
    let near = || a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f32>() < 0.02 * a.len() as f32;
    a.len() == b.len() && if model.backend().is_cpu() { a == b } else { near() }
}

/// Logits of one prompt, given to the model in pieces of `chunk` tokens.
fn logits(model: &Decoder, ids: &[u32], chunk: usize) -> Vec<Vec<f32>> {
    let cache = model.kv_cache(DenseType::F32, 1).unwrap();
    let mut rows = Vec::new();
    for (i, tokens) in ids.chunks(chunk).enumerate() {
        let piece = Sequence { slot: 0, position: i * chunk, tokens };
        rows.extend(model.forward(&[piece], &cache, Logits::All).unwrap().to_vec2::<f32>().unwrap());
    }
    rows
}

#[test]
fn logits_pass_on_every_kernel_and_are_the_same_bits_however_computed() {
    for name in FIXTURES {
        let expected = Expected::load(name);
        let mut first: Option<Vec<Vec<Vec<f32>>>> = None;
        for kernel in KernelKind::available() {
            for threads in [1, 2] {
                let model = load(name, kernel, threads);
                for chunk in [usize::MAX, 16, 5, 1] {
                    let prompts = 0..expected.prompts();
                    let got: Vec<_> = prompts.map(|i| logits(&model, &expected.ids(i), chunk)).collect();
                    let context = format!("{name}, {kernel}, {threads} threads, pieces of {chunk}");
                    expected.judge(&got).unwrap_or_else(|e| panic!("{context}: {e}"));
                    // Stronger than the verdict: nothing about the machine or the batch changes a bit.
                    assert!(first.get_or_insert_with(|| got.clone()) == &got, "{context}: logits differ");
                }
            }
        }
    }
}

#[test]
fn logits_pass_on_gpus_and_replayed_steps_give_the_same_bits() {
    // All at once: emulated ones take minutes.
    std::thread::scope(|scope| {
        for gpu in common::gpus() {
            scope.spawn(move || FIXTURES.iter().for_each(|name| logits_pass_on(&gpu, name)));
        }
    });
}

fn logits_pass_on(gpu: &Device, name: &str) {
    let expected = Expected::load(name);
    let (replayed, plain) = (load_on(gpu, name, true), load_on(gpu, name, false));
    for chunk in [usize::MAX, 5, 1] {
        let compute =
            |model| -> Vec<_> { (0..expected.prompts()).map(|i| logits(model, &expected.ids(i), chunk)).collect() };
        let got = compute(&replayed);
        expected.judge(&got).unwrap_or_else(|e| panic!("{name} on {gpu:?}, pieces of {chunk}: {e}"));
        if chunk == 1 && gpu.is_cuda() {
            assert!(got == compute(&plain), "{name} on {gpu:?}: graphs change logits");
        }
    }
    assert_eq!((replayed.take_replay_failure(), plain.take_replay_failure()), (None, None));
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    for (name, model) in FIXTURES.iter().flat_map(|name| load_everywhere(name).into_iter().map(move |m| (name, m))) {
        let expected = Expected::load(name);
        for prompt in 0..expected.prompts() {
            if !expected.greedy_firm(prompt) {
                continue;
            }
            let cache = model.kv_cache(DenseType::F32, 1).unwrap();
            let (mut tokens, mut position, mut got) = (expected.ids(prompt), 0, Vec::new());
            let want = expected.greedy(prompt);
            while got.len() < want.len() {
                let sequence = Sequence { slot: 0, position, tokens: &tokens };
                let row = model.forward(&[sequence], &cache, Logits::Last).unwrap().to_vec2::<f32>().unwrap();
                assert_eq!(row.len(), 1);
                position += tokens.len();
                tokens = vec![argmax(&row[0])];
                got.push(tokens[0]);
            }
            assert_eq!(got, want, "{name}, prompt {prompt}");
        }
    }
}

#[test]
fn sequences_of_a_batch_do_not_see_each_other() {
    for model in load_everywhere("a2_packed_gqa_untied_sharded") {
        batches(&model);
    }
}

fn batches(model: &Decoder) {
    let expected = Expected::load("a2_packed_gqa_untied_sharded");
    let ids: Vec<Vec<u32>> = (1..4).map(|i| expected.ids(i)).collect();
    let alone: Vec<Vec<Vec<f32>>> = ids.iter().map(|ids| logits(model, ids, usize::MAX)).collect();
    // Prefill of one beside decode of others, each at its own position, slots in another order.
    let cache = model.kv_cache(DenseType::F32, 4).unwrap();
    let sequence =
        |i: usize, from: usize, to: usize| Sequence { slot: [3, 0, 2][i], position: from, tokens: &ids[i][from..to] };
    let steps: [&[Sequence]; 6] = [
        &[sequence(0, 0, 3), sequence(1, 0, 20)],
        &[sequence(2, 0, 40), sequence(1, 20, 21), sequence(0, 3, 4)],
        &[sequence(1, 21, 30), sequence(0, 4, 7), sequence(2, 40, 41)],
        // Steps of several sequences: as they are, recorded, replayed.
        &[sequence(2, 41, 42), sequence(1, 30, 31)],
        &[sequence(1, 31, 32), sequence(2, 42, 43)],
        &[sequence(2, 43, 44), sequence(1, 32, 33)],
    ];
    for batch in steps {
        let all = model.forward(batch, &cache, Logits::All).unwrap().to_vec2::<f32>().unwrap();
        let mut rows = all.iter();
        for s in batch {
            let which = [3, 0, 2].iter().position(|slot| *slot == s.slot).unwrap();
            for i in 0..s.tokens.len() {
                let (got, want) = (rows.next().unwrap(), &alone[which][s.position + i]);
                assert!(same(model, got, want), "slot {} position {i}", s.slot);
            }
        }
    }
}

#[test]
fn last_logits_are_the_last_rows_of_all() {
    let expected = Expected::load("a3_llama");
    let ids: Vec<Vec<u32>> = (1..3).map(|i| expected.ids(i)).collect();
    for model in load_everywhere("a3_llama") {
        let cache = model.kv_cache(DenseType::F32, 2).unwrap();
        let batch: Vec<_> = ids.iter().enumerate().map(|(slot, t)| Sequence { slot, position: 0, tokens: t }).collect();
        let all = model.forward(&batch, &cache, Logits::All).unwrap().to_vec2::<f32>().unwrap();
        let last = model.forward(&batch, &cache, Logits::Last).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(last, [all[ids[0].len() - 1].clone(), all[all.len() - 1].clone()]);
    }
}

#[test]
fn half_precision_caches_stay_close() {
    let names = ["a1_packed", "a3_llama"];
    for (name, model) in names.iter().flat_map(|name| load_everywhere(name).into_iter().map(move |m| (name, m))) {
        let expected = Expected::load(name);
        let ids = expected.ids(3);
        let exact = logits(&model, &ids, usize::MAX);
        for (dtype, limit) in [(DenseType::BF16, 0.25), (DenseType::F16, 0.12)] {
            let cache = model.kv_cache(dtype, 1).unwrap();
            let piece = Sequence { slot: 0, position: 0, tokens: &ids };
            let got = model.forward(&[piece], &cache, Logits::All).unwrap().to_vec2::<f32>().unwrap();
            let pairs = got.iter().flatten().zip(exact.iter().flatten());
            let mean = pairs.map(|(a, b)| (a - b).abs()).sum::<f32>() / (got.len() * got[0].len()) as f32;
            assert!(mean > 0.0 && mean < limit, "{name} {dtype}: mean difference {mean}");
        }
    }
}

#[test]
fn every_projection_follows_transformers_given_the_same_input() {
    for name in FIXTURES {
        let expected = Expected::load(name);
        let (checkpoint, config) = open(name);
        let weights = CheckpointWeights::new(&checkpoint, &config).unwrap();
        let backend = Backend::for_device(&Device::Cpu).unwrap();
        let debug = |of: &str| expected.tensors[&format!("debug.{of}")].clone();
        let inputs = [
            (Projection::Query, "input_layernorm"),
            (Projection::Key, "input_layernorm"),
            (Projection::Value, "input_layernorm"),
            (Projection::Gate, "post_attention_layernorm"),
            (Projection::Up, "post_attention_layernorm"),
            (Projection::Output, "self_attn.attn_sub_norm"),
            (Projection::Down, "mlp.ffn_sub_norm"),
        ];
        for (which, input) in inputs {
            if !expected.tensors.contains_key(&format!("debug.{input}")) {
                continue; // Llama-style models have no sub-norm to take the input from.
            }
            let LinearWeight::Ternary(weight) = weights.linear(&backend, 0, which).unwrap() else { panic!() };
            let layer = BitLinear::new(weight, &Device::Cpu).unwrap();
            let (got, want) = (layer.forward(&debug(input)).unwrap(), debug(which.path()));
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let scale = flat(&want).iter().fold(0f32, |m, v| m.max(v.abs()));
            for (g, w) in flat(&got).iter().zip(flat(&want)) {
                assert!((g - w).abs() <= 1e-5 * scale, "{name} {which:?}: {g} instead of {w}");
            }
        }
    }
}

#[test]
fn bad_batches_are_refused_and_leave_the_cache_alone() {
    let model = load("a1_packed", KernelKind::available()[0], 1);
    let cache = model.kv_cache(DenseType::F32, 2).unwrap();
    let fails = |batch: &[Sequence]| model.forward(batch, &cache, Logits::Last).unwrap_err().to_string();
    let at = |slot, position, tokens| Sequence { slot, position, tokens };
    assert!(fails(&[]).contains("at least one token"));
    assert!(fails(&[at(0, 0, &[])]).contains("at least one token"));
    assert!(fails(&[at(2, 0, &[1])]).contains("KV slot"));
    assert!(fails(&[at(0, 0, &[1]), at(0, 1, &[1])]).contains("KV slot"));
    assert!(fails(&[at(0, 0, &[384])]).contains("384 is outside the vocabulary of 384"));
    let full = fails(&[at(0, 250, &[1; 7])]);
    assert!(full.contains("257 positions needed, 256 available"), "{full}");
    assert!(fails(&[at(0, usize::MAX, &[1])]).contains("context full"));
}
