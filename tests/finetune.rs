//! Supervised fine-tuning through the public interface: examples, gradients of adapters, runs of both kinds.

mod common;

use candle_bitnet::backend::cpu::CpuOptions;
use candle_bitnet::backend::{Backend, DenseType, TernaryWeight};
use candle_bitnet::checkpoint::Checkpoint;
use candle_bitnet::checkpoint::adapter::{Adapter, CONFIG_FILE, WEIGHTS_FILE, write_adapter};
use candle_bitnet::generate::GenerateOptions;
use candle_bitnet::model::config::ModelConfig;
use candle_bitnet::model::{CheckpointWeights, Logits, Sequence};
use candle_bitnet::ops::grad::{self, FrozenWeight, composed};
use candle_bitnet::ternary::{PackedTernary, Scale};
use candle_bitnet::text::{ChatTemplate, Message, Tokenizer};
use candle_bitnet::train::examples::{
    Example, ExampleBatches, ExampleOptions, Examples, PromptFormat, Sample, TrainOn, read_samples,
};
use candle_bitnet::train::finetune::{Batching, Finetune, FinetuneRecipe, RECIPE};
use candle_bitnet::train::{
    Batch, Data, Event, LoraModel, LoraOptions, Optimization, Outcome, Parameter, Parameters, Regularization, Schedule,
};
use candle_bitnet::{BitNet, Error, LoadOptions, LoadedDecoder};
use candle_core::{DType, Device, Tensor, Var};
use common::{FIXTURES, fixture};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

const CPU: Device = Device::Cpu;

fn values(n: usize, seed: u32) -> Vec<f32> {
    let value = |i: usize| {
        let x = (i as u32).wrapping_add(seed.wrapping_mul(7919)).wrapping_mul(2_654_435_761);
        ((x ^ x >> 15).wrapping_mul(2_246_822_519) >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..n).map(value).collect()
}

fn tensor(dims: &[usize], seed: u32) -> Tensor {
    Tensor::from_vec(values(dims.iter().product(), seed), dims, &CPU).unwrap()
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn close(got: &Tensor, want: &Tensor, relative: f32) {
    assert_eq!(got.dims(), want.dims());
    let (got, want) = (flat(got), flat(want));
    let size = want.iter().fold(1e-9f32, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        assert!((g - w).abs() <= relative * size, "element {i}: {g} instead of {w}");
    }
}

fn backend() -> Backend {
    Backend::new(&CPU, CpuOptions { kernel: None, threads: Some(1) }).unwrap()
}

// ---- operations ----

#[test]
fn the_frozen_linears_compute_what_inference_does_and_their_gradient_is_that_of_the_weight() {
    let backend = backend();
    for (rows, cols, tokens) in [(20, 96, 5), (70, 130, 1), (5, 48, 13)] {
        let codes: Vec<i8> = (0..rows * cols).map(|i| ((i * i + 3 * i) % 7 % 3) as i8 - 1).collect();
        let first = PackedTernary::from_weights(rows, cols, &codes, Scale::Multiply(0.21)).unwrap();
        let second = PackedTernary::from_weights(rows, cols, &codes, Scale::Divide(3.0)).unwrap();
        let dense: Vec<f32> = first.dequantize().into_iter().chain(second.dequantize()).collect();
        let dense = Tensor::from_vec(dense, (2 * rows, cols), &CPU).unwrap();
        let packed: TernaryWeight = backend.pack(&[first, second]).unwrap();
        let x = Var::from_tensor(&tensor(&[tokens, cols], 1)).unwrap();
        let weight = tensor(&[tokens, 2 * rows], 2);
        let got = grad::frozen_linear(&backend, &FrozenWeight::Ternary(Arc::new(packed)), &x).unwrap();
        let want = composed::linear(&composed::fake_quantize(&x, 1.0).unwrap(), &dense).unwrap();
        close(&got, &want, 2e-6);
        let gradient = |y: &Tensor| y.mul(&weight).unwrap().sum_all().unwrap().backward().unwrap().remove(&x).unwrap();
        close(&gradient(&got), &gradient(&want), 2e-6);

        let stored = flat(&dense).iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        let stored =
            backend.dense_filled(DenseType::F32, 2 * rows, cols, |out| out.copy_from_slice(&stored)).unwrap();
        let got = grad::frozen_linear(&backend, &FrozenWeight::Dense(Arc::new(stored)), &x).unwrap();
        let want = composed::linear(&x, &dense).unwrap();
        close(&got, &want, 2e-6);
        close(&gradient(&got), &gradient(&want), 2e-6);
        // Nothing that is trained comes before it: nothing is kept for a gradient.
        let frozen = grad::frozen_linear(&backend, &FrozenWeight::Dense(Arc::new(backend_dense(&dense))), &weight_input(&x));
        assert!(!frozen.unwrap().track_op());
    }
    let weight = FrozenWeight::Dense(Arc::new(backend_dense(&tensor(&[4, 8], 1))));
    assert!(grad::frozen_linear(&backend, &weight, &tensor(&[2, 9], 1)).is_err());
    assert!(grad::frozen_linear(&backend, &weight, &tensor(&[2, 8], 1).to_dtype(DType::F16).unwrap()).is_err());
}

fn weight_input(x: &Var) -> Tensor {
    x.as_tensor().detach()
}

fn backend_dense(t: &Tensor) -> candle_bitnet::backend::DenseWeight {
    let (rows, cols) = t.dims2().unwrap();
    let bytes: Vec<u8> = flat(t).iter().flat_map(|v| v.to_le_bytes()).collect();
    backend().dense_filled(DenseType::F32, rows, cols, |out| out.copy_from_slice(&bytes)).unwrap()
}

#[test]
fn the_frozen_head_is_the_cross_entropy_of_the_rows_with_a_target() {
    let (backend, head) = (backend(), tensor(&[37, 24], 3));
    let frozen = Arc::new(backend_dense(&head));
    for targets in [vec![Some(3), None, Some(36), Some(0), None], vec![None; 5], vec![Some(1); 5]] {
        let hidden = Var::from_tensor(&tensor(&[5, 24], 4)).unwrap();
        let got = grad::frozen_cross_entropy(&backend, &frozen, &hidden, &targets).unwrap();
        let want = composed::cross_entropy(&hidden, &head, &targets).unwrap();
        close(&got, &want, 2e-6);
        let gradient = |loss: &Tensor| (loss * 3.0).unwrap().backward().unwrap().remove(&hidden).unwrap();
        close(&gradient(&got), &gradient(&want), 5e-6);
    }
    let hidden = tensor(&[2, 24], 4);
    let e = grad::frozen_cross_entropy(&backend, &frozen, &hidden, &[Some(37), None]).unwrap_err();
    assert!(e.to_string().contains("target 37 is outside the vocabulary of 37"), "{e}");
    assert!(grad::frozen_cross_entropy(&backend, &frozen, &hidden, &[None]).is_err());
}

#[test]
fn the_low_rank_update_has_the_gradients_of_its_formula() {
    let backend = backend();
    for (tokens, cols, rank, rows, scaling) in [(6, 33, 4, 20, 2.0f32), (1, 16, 7, 65, -0.3)] {
        let [h, a, b] = [[tokens, cols], [rank, cols], [rows, rank]].map(|d| Var::from_tensor(&tensor(&d, 7)).unwrap());
        let weight = tensor(&[tokens, rows], 8);
        let got = grad::low_rank(&backend, &h, &a, &b, scaling).unwrap();
        let inner = composed::linear(&h, &a).unwrap();
        let want = (composed::linear(&inner, &b).unwrap() * f64::from(scaling)).unwrap();
        close(&got, &want, 2e-6);
        let gradients = |y: &Tensor| y.mul(&weight).unwrap().sum_all().unwrap().backward().unwrap();
        let (got, want) = (gradients(&got), gradients(&want));
        for x in [&h, &a, &b] {
            close(got.get(x).unwrap(), want.get(x).unwrap(), 3e-6);
        }
    }
    assert!(grad::low_rank(&backend, &tensor(&[2, 8], 1), &tensor(&[3, 8], 1), &tensor(&[8, 4], 1), 1.0).is_err());
}

// ---- the model ----

fn config_of(checkpoint: &Checkpoint) -> ModelConfig {
    let (path, text) = checkpoint.config();
    ModelConfig::parse(path, text).unwrap()
}

fn lora(rank: usize, modules: &[&str]) -> LoraOptions {
    LoraOptions {
        rank,
        alpha: 2.0 * rank as f32,
        target_modules: modules.iter().map(|m| (*m).to_owned()).collect(),
    }
}

fn lora_model(dir: &Path, options: &LoraOptions) -> LoraModel {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let config = config_of(&checkpoint);
    let weights = CheckpointWeights::new(&checkpoint, &config).unwrap();
    LoraModel::load(&backend(), &config, &weights, options.config(0.0).unwrap(), 64).unwrap()
}

/// Parameters whose B is not zero, so that all gradients flow.
fn stirred(model: &LoraModel) -> Parameters {
    let stir = |(i, p): (usize, &Parameter)| {
        let noise = (tensor(p.value.dims(), 20 + i as u32) * 0.05).unwrap();
        Parameter { value: (&p.value + noise).unwrap(), ..p.clone() }
    };
    Parameters::new(model.parameters(1).unwrap().list().iter().enumerate().map(stir).collect()).unwrap()
}

fn batch(vocab: usize, sequences: usize, length: usize) -> Batch {
    let tokens: Vec<u32> = (0..sequences * length).map(|i| ((i * 37 + 11) % (vocab - 8)) as u32).collect();
    let target = |i: usize| (i % 3 != 1).then_some(((i * 53 + 5) % vocab) as u32);
    Batch { length, targets: (0..tokens.len()).map(target).collect(), tokens }
}

/// A copy of a fixture whose projection of one kind is left dense, and every BitLinear has a norm of its own.
fn inference_logits(dir: &Path, adapter: Option<&Path>, tokens: &[u32], length: usize) -> Vec<Vec<f32>> {
    let options = LoadOptions::new(&CPU).threads(Some(2)).adapter(adapter.map(Path::to_owned));
    let decoder = LoadedDecoder::load(dir.to_str().unwrap(), &options).unwrap().decoder;
    let mut rows = Vec::new();
    for tokens in tokens.chunks(length) {
        let cache = decoder.kv_cache(DenseType::F32, 1).unwrap();
        let logits = decoder.forward(&[Sequence { slot: 0, position: 0, tokens }], &cache, Logits::All).unwrap();
        rows.extend(logits.to_vec2::<f32>().unwrap());
    }
    rows
}

#[test]
fn the_trainers_forward_pass_is_inferences_bit_for_bit() {
    for name in FIXTURES {
        for modules in [&["all-linear"][..], &["q_proj", "v_proj"], &["down_proj"], &["k_proj", "o_proj", "up_proj"]] {
            let model = lora_model(&fixture(name), &lora(3, modules));
            let batch = batch(model.config().vocab_size, 3, 19);
            let logits = |parameters: &Parameters| -> Vec<Vec<f32>> {
                let prepared = model.prepare(parameters).unwrap();
                prepared.logits(&batch.tokens, batch.length).unwrap().to_vec2().unwrap()
            };
            // B is zero at first: the base's own logits, and their cross-entropy.
            let new = model.parameters(0).unwrap();
            let base = inference_logits(&fixture(name), None, &batch.tokens, batch.length);
            assert!(logits(&new) == base, "{name} {modules:?}");
            let nats = |(row, target): (&Vec<f32>, &Option<u32>)| -> f64 {
                let Some(target) = target else { return 0.0 };
                let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
                let sum: f64 = row.iter().map(|v| (f64::from(*v) - max).exp()).sum();
                max + sum.ln() - f64::from(row[*target as usize])
            };
            let want: f64 = base.iter().zip(&batch.targets).map(nats).sum();
            let loss = model.prepare(&new).unwrap().loss(&batch, Regularization::default()).unwrap();
            let loss = f64::from(loss.to_scalar::<f32>().unwrap());
            assert!((loss / want - 1.0).abs() < 1e-6, "{name}: {loss} instead of {want}");

            let parameters = stirred(&model);
            let dir = tempfile::tempdir().unwrap();
            write_adapter(dir.path(), model.adapter(), model.matrices(&parameters).unwrap()).unwrap();
            let adapted = inference_logits(&fixture(name), Some(dir.path()), &batch.tokens, batch.length);
            assert!(adapted != base && logits(&parameters) == adapted, "{name} {modules:?}");
        }
    }
}

fn loss_at(model: &LoraModel, parameters: &Parameters, batch: &Batch) -> f64 {
    let loss = model.prepare(parameters).unwrap().loss(batch, Regularization::default()).unwrap();
    f64::from(loss.to_scalar::<f32>().unwrap())
}

fn gradients(model: &LoraModel, parameters: &Parameters, batch: &Batch) -> Vec<Tensor> {
    let prepared = model.prepare(parameters).unwrap();
    let loss = prepared.loss(batch, Regularization::default()).unwrap();
    prepared.gradients(loss.backward().unwrap()).unwrap()
}

/// After the last layer's down projection nothing is quantised any more, so finite differences see what they should.
#[test]
fn gradients_of_the_last_update_are_those_of_finite_differences() {
    for name in ["a1_packed", "a3_llama"] {
        let model = lora_model(&fixture(name), &lora(2, &["down_proj"]));
        let (parameters, batch) = (stirred(&model), batch(model.config().vocab_size, 2, 7));
        let got = gradients(&model, &parameters, &batch);
        let count = parameters.list().len();
        for index in [count - 2, count - 1] {
            let value = &parameters.list()[index].value;
            for seed in [31, 32, 33] {
                let direction = tensor(value.dims(), seed);
                let at = |step: f64| {
                    let mut list = parameters.list().to_vec();
                    list[index].value = (value + (&direction * step).unwrap()).unwrap();
                    loss_at(&model, &Parameters::new(list).unwrap(), &batch)
                };
                let step = 2e-3;
                let want = (at(step) - at(-step)) / (2.0 * step);
                let got = got[index].mul(&direction).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
                assert!((f64::from(got) - want).abs() <= 5e-3 * want.abs().max(1.0), "{name}: {got} instead of {want}");
            }
        }
    }
}

/// The decoder with an adapter, composed of candle's own operations on dequantised weights.
fn composed_loss(dir: &Path, model: &LoraModel, leaves: &[Var], batch: &Batch) -> Tensor {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let config = config_of(&checkpoint);
    let weights = CheckpointWeights::new(&checkpoint, &config).unwrap();
    let shape = candle_bitnet::backend::attention::AttentionShape::new(config.num_heads, config.num_kv_heads, config.head_dim);
    let shape = shape.unwrap();
    let rope = candle_bitnet::backend::attention::RopeTable::new(64, config.head_dim, config.rope_theta).unwrap();
    let rope = Arc::new(rope);
    let names: Vec<String> = model.parameters(0).unwrap().list().iter().map(|p| p.name.clone()).collect();
    let dense = |name: &str| {
        let view = checkpoint.dense(name, config.vocab_size, config.hidden_size).unwrap();
        Tensor::from_vec(view.to_f32(), (view.rows, view.cols), &CPU).unwrap()
    };
    let norm = |x: &Tensor, name: &str, len: usize| {
        let weight = Tensor::from_vec(checkpoint.vector(name, len).unwrap(), len, &CPU).unwrap();
        composed::rms_norm(x, &weight, config.rms_norm_eps).unwrap()
    };
    use candle_bitnet::model::config::{Activation, Projection};
    let project = |h: &Tensor, layer: usize, which: Projection| {
        let packed = weights.ternary(layer, which).unwrap().unwrap();
        let weight = Tensor::from_vec(packed.dequantize(), (packed.rows(), packed.cols()), &CPU).unwrap();
        let y = composed::linear(&composed::fake_quantize(h, 1.0).unwrap(), &weight).unwrap();
        let module = config.projection_name(layer, which);
        let [a, b] = candle_bitnet::checkpoint::adapter::tensor_names(&module);
        let Some(at) = names.iter().position(|n| *n == a) else { return y };
        assert_eq!(names[at + 1], b);
        let update = composed::linear(&composed::linear(h, &leaves[at]).unwrap(), &leaves[at + 1]).unwrap();
        (y + (update * f64::from(model.adapter().scaling_of(&module))).unwrap()).unwrap()
    };
    let ids = Tensor::from_slice(&batch.tokens, batch.tokens.len(), &CPU).unwrap();
    let embedding = dense("model.embed_tokens.weight");
    let mut x = embedding.index_select(&ids, 0).unwrap();
    for i in 0..config.num_layers {
        let name = |path: &str| format!("model.layers.{i}.{path}.weight");
        let h = norm(&x, &name("input_layernorm"), config.hidden_size);
        let qkv = [Projection::Query, Projection::Key, Projection::Value].map(|p| project(&h, i, p));
        let qkv = Tensor::cat(&qkv, 1).unwrap();
        let qkv = qkv.reshape((batch.tokens.len() / batch.length, batch.length, shape.qkv_dim())).unwrap();
        let mut context = composed::attention(&qkv, shape, &rope).unwrap().flatten(0, 1).unwrap();
        if config.sub_norms {
            context = norm(&context, &name("self_attn.attn_sub_norm"), config.q_size());
        }
        x = (x + project(&context, i, Projection::Output)).unwrap();
        let h = norm(&x, &name("post_attention_layernorm"), config.hidden_size);
        let gate_up = Tensor::cat(&[project(&h, i, Projection::Gate), project(&h, i, Projection::Up)], 1).unwrap();
        let gate = match config.activation {
            Activation::Relu2 => candle_bitnet::backend::cpu::Gate::Relu2,
            Activation::Silu => candle_bitnet::backend::cpu::Gate::Silu,
        };
        let mut product = composed::gated(gate, &gate_up).unwrap();
        if config.sub_norms {
            product = norm(&product, &name("mlp.ffn_sub_norm"), config.intermediate_size);
        }
        x = (x + project(&product, i, Projection::Down)).unwrap();
    }
    let x = norm(&x, "model.norm.weight", config.hidden_size);
    let head = if config.tied_embeddings { embedding } else { dense("lm_head.weight") };
    composed::cross_entropy(&x, &head, &batch.targets).unwrap()
}

#[test]
fn gradients_are_those_of_a_dense_composition() {
    for name in FIXTURES {
        let dir = fixture(name);
        let model = lora_model(&dir, &lora(3, &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]));
        let (parameters, batch) = (stirred(&model), batch(model.config().vocab_size, 2, 9));
        let leaves: Vec<Var> = parameters.list().iter().map(|p| Var::from_tensor(&p.value).unwrap()).collect();
        let loss = composed_loss(&dir, &model, &leaves, &batch);
        let want = loss.backward().unwrap();
        let loss = f64::from(loss.to_scalar::<f32>().unwrap());
        assert!((loss_at(&model, &parameters, &batch) / loss - 1.0).abs() < 1e-3, "{name}");
        for ((p, leaf), got) in parameters.list().iter().zip(&leaves).zip(gradients(&model, &parameters, &batch)) {
            // An activation that is rounded to the neighbouring code moves everything after it a little.
            let want = want.get(leaf).unwrap();
            let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            let error = norm(&(got - want).unwrap()) / norm(want);
            assert!(error < 2e-2, "{name} {}: {error}", p.name);
        }
    }
}
