//! Supervised fine-tuning through the public interface: examples, gradients of adapters, runs of both kinds.

mod common;

use candle_bitnet::backend::attention::{AttentionShape, RopeTable};
use candle_bitnet::backend::cpu::{CpuOptions, Gate};
use candle_bitnet::backend::{Backend, DenseType, TernaryWeight};
use candle_bitnet::checkpoint::adapter::{Adapter, AdapterMatrices, WEIGHTS_FILE, tensor_names, write_adapter};
use candle_bitnet::checkpoint::write::{Entry, write_file};
use candle_bitnet::checkpoint::{Checkpoint, StoredType};
use candle_bitnet::generate::GenerateOptions;
use candle_bitnet::model::config::{Activation, ModelConfig, Projection};
use candle_bitnet::model::convert::{Form, convert};
use candle_bitnet::model::{CheckpointWeights, Logits, Sequence};
use candle_bitnet::ops::grad::{self, FrozenWeight, composed};
use candle_bitnet::ternary::{PackedTernary, Scale};
use candle_bitnet::text::{ChatTemplate, Message, Tokenizer};
use candle_bitnet::train::examples::{
    Example, ExampleBatches, ExampleOptions, Examples, PromptFormat, Sample, TrainOn, read_samples,
};
use candle_bitnet::train::finetune::{Batching, Finetune, FinetuneRecipe, RECIPE};
use candle_bitnet::train::{
    Batch, Data, Event, LoraModel, LoraOptions, Masters, Optimization, Outcome, Parameter, Parameters, Regularization,
    Schedule,
};
use candle_bitnet::{BitNet, Error, LoadOptions, LoadedDecoder};
use candle_core::{DType, Device, Tensor, Var};
use common::{FIXTURES, fixture};
use std::collections::{BTreeMap, HashMap};
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
        let stored = backend.dense_filled(DenseType::F32, 2 * rows, cols, |out| out.copy_from_slice(&stored)).unwrap();
        let got = grad::frozen_linear(&backend, &FrozenWeight::Dense(Arc::new(stored)), &x).unwrap();
        let want = composed::linear(&x, &dense).unwrap();
        close(&got, &want, 2e-6);
        close(&gradient(&got), &gradient(&want), 2e-6);
        // Nothing that is trained comes before it: nothing is kept for a gradient.
        let frozen =
            grad::frozen_linear(&backend, &FrozenWeight::Dense(Arc::new(backend_dense(&dense))), &weight_input(&x));
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

#[test]
fn the_frozen_attention_is_inferences_with_the_gradient_of_attention() {
    let backend = backend();
    for (heads, kv_heads, dim, sequences, length) in [(4, 2, 8, 2, 19), (3, 3, 16, 1, 70), (2, 1, 4, 3, 1)] {
        let shape = AttentionShape::new(heads, kv_heads, dim).unwrap();
        let rope = Arc::new(RopeTable::new(80, dim, 10_000.0).unwrap());
        let qkv = Var::from_tensor(&tensor(&[sequences, length, shape.qkv_dim()], 5)).unwrap();
        let weight = tensor(&[sequences, length, heads * dim], 6);
        let got = grad::frozen_attention(&backend, &qkv, shape, &rope).unwrap();
        let want = composed::attention(&qkv, shape, &rope).unwrap();
        close(&got, &want, 1e-5);
        let gradient =
            |y: &Tensor| y.mul(&weight).unwrap().sum_all().unwrap().backward().unwrap().remove(&qkv).unwrap();
        close(&gradient(&got), &gradient(&want), 1e-5);
        assert!(
            grad::frozen_attention(&backend, &qkv, AttentionShape::new(heads, kv_heads, dim / 2).unwrap(), &rope)
                .is_err()
        );
    }
}

// ---- the model ----

fn config_of(checkpoint: &Checkpoint) -> ModelConfig {
    let (path, text) = checkpoint.config();
    ModelConfig::parse(path, text).unwrap()
}

fn lora(rank: usize, modules: &[&str]) -> LoraOptions {
    LoraOptions { rank, alpha: 2.0 * rank as f32, target_modules: modules.iter().map(|m| (*m).to_owned()).collect() }
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

/// `a1_bf16` with two kinds of projections left dense, and a norm inside every BitLinear.
fn unusual() -> TempDir {
    let (dir, source) = (tempfile::tempdir().unwrap(), fixture("a1_bf16"));
    let checkpoint = Checkpoint::open(&source).unwrap();
    let config = config_of(&checkpoint);
    let mut entries: Vec<Entry> = Vec::new();
    for name in checkpoint.names() {
        let view = checkpoint.tensor(name).unwrap();
        entries.push(Entry::from_bytes(name, view.info.dtype, view.info.shape.clone(), view.bytes().to_vec()));
    }
    for (i, (name, _, cols)) in (0..config.num_layers).flat_map(|l| config.linears(l)).enumerate() {
        if !name.ends_with("o_proj") && !name.ends_with("up_proj") {
            let norm: Vec<u8> = values(cols, i as u32).iter().flat_map(|v| (v * 0.3 + 1.0).to_le_bytes()).collect();
            entries.push(Entry::from_bytes(format!("{name}.rms_norm.weight"), StoredType::F32, [cols], norm));
        }
    }
    write_file(&dir.path().join("model.safetensors"), entries, &mut |_| ()).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(checkpoint.config().1).unwrap();
    json["quantization_config"]["modules_to_not_convert"] = serde_json::json!(["o_proj", "up_proj"]);
    json["quantization_config"]["use_rms_norm"] = true.into();
    std::fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    dir
}

#[test]
fn the_trainers_forward_pass_is_inferences_bit_for_bit() {
    let unusual = unusual();
    for path in FIXTURES.map(fixture).iter().map(|p| p.as_path()).chain([unusual.path()]) {
        let name = path.display();
        for modules in [&["all-linear"][..], &["q_proj", "v_proj"], &["down_proj"], &["k_proj", "o_proj", "up_proj"]] {
            let model = lora_model(path, &lora(3, modules));
            let batch = batch(model.config().vocab_size, 3, 19);
            let logits = |parameters: &Parameters| -> Vec<Vec<f32>> {
                let prepared = model.prepare(parameters).unwrap();
                prepared.logits(&batch.tokens, batch.length).unwrap().to_vec2().unwrap()
            };
            // B is zero at first: the base's own logits, and their cross-entropy.
            let new = model.parameters(0).unwrap();
            let base = inference_logits(path, None, &batch.tokens, batch.length);
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
            let adapted = inference_logits(path, Some(dir.path()), &batch.tokens, batch.length);
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
    let shape =
        candle_bitnet::backend::attention::AttentionShape::new(config.num_heads, config.num_kv_heads, config.head_dim);
    let shape = shape.unwrap();
    let rope = RopeTable::new(64, config.head_dim, config.rope_theta).unwrap();
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
    let project = |h: &Tensor, layer: usize, which: Projection| {
        let packed = weights.ternary(layer, which).unwrap().unwrap();
        let weight = Tensor::from_vec(packed.dequantize(), (packed.rows(), packed.cols()), &CPU).unwrap();
        let y = composed::linear(&composed::fake_quantize(h, 1.0).unwrap(), &weight).unwrap();
        let module = config.projection_name(layer, which);
        let [a, b] = tensor_names(&module);
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
            Activation::Relu2 => Gate::Relu2,
            Activation::Silu => Gate::Silu,
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

#[test]
fn dropout_is_of_the_adapters_inputs_and_a_function_of_the_seed() {
    let model = lora_model(&fixture("a1_packed"), &lora(2, &["q_proj", "up_proj"]));
    let (new, stirred, batch) = (model.parameters(0).unwrap(), stirred(&model), batch(384, 2, 9));
    let loss = |parameters: &Parameters, dropout: f32, seed: u64| {
        let prepared = model.prepare(parameters).unwrap();
        prepared.loss(&batch, Regularization { dropout, seed }).unwrap().to_scalar::<f32>().unwrap()
    };
    // While B is zero there is nothing that dropping inputs could change.
    assert_eq!(loss(&new, 0.5, 1), loss(&new, 0.0, 0));
    assert_eq!(loss(&stirred, 0.5, 1), loss(&stirred, 0.5, 1));
    assert_ne!(loss(&stirred, 0.5, 1), loss(&stirred, 0.5, 2));
    assert_ne!(loss(&stirred, 0.5, 1), loss(&stirred, 0.0, 1));
}

#[test]
fn bad_adapters_are_refused() {
    let refused = |options: &LoraOptions| options.config(0.0).unwrap_err().to_string();
    assert!(refused(&lora(0, &["q_proj"])).starts_with("rank: 0 is out of range: 1 to"));
    assert!(refused(&LoraOptions { alpha: f32::NAN, ..lora(4, &["q_proj"]) }).starts_with("alpha: NaN"));
    assert!(refused(&lora(4, &["query"])).contains("'query' is no projection; all-linear, or some of q_proj, k_proj"));
    assert!(refused(&lora(4, &["all-linear", "q_proj"])).contains("'all-linear' is no projection"));
    assert!(refused(&lora(4, &[])).contains("none given"));
    let model = lora_model(&fixture("a1_packed"), &lora(2, &["q_proj"]));
    let other = lora_model(&fixture("a1_packed"), &lora(2, &["k_proj"])).parameters(0).unwrap();
    assert!(model.prepare(&other).unwrap_err().to_string().contains("there is no base_model.model.model.layers.0"));
    let prepared = model.parameters(0).unwrap();
    let prepared = model.prepare(&prepared).unwrap();
    assert!(matches!(prepared.logits(&[1; 65], 65), Err(Error::ContextFull { needed: 65, available: 64 })));
    assert!(prepared.logits(&[1, 2, 3], 2).is_err());
    let e = prepared.logits(&[1, 4000], 2).unwrap_err().to_string();
    assert!(e.contains("4000 is outside the vocabulary of 384"), "{e}");
    let p = model.parameters(0).unwrap().list()[0].clone();
    let e = Parameters::new(vec![p.clone(), p]).unwrap_err().to_string();
    assert!(e.contains("lora_A.weight is given twice"), "{e}");
}

// ---- examples ----

fn file(dir: &Path, lines: &[&str]) -> PathBuf {
    let path = dir.join("data.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

#[test]
fn lines_of_every_form_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(
        dir.path(),
        &[
            "\u{feff}{\"messages\":[{\"role\":\"system\",\"content\":\"S\"},{\"role\":\"user\",\"content\":\"Q\"},{\"role\":\"assistant\",\"content\":\"A\"}],\"id\":7}",
            "",
            r#"{"instruction":"Do","input":"this","output":"done"}"#,
            r#"{"instruction":"Do","context":" ","input":null,"output":"done","text":"not this"}"#,
            "{\"input\":\"I\",\"output\":\"O\"}\r",
            r#"{"text":"Once\nupon"}"#,
        ],
    );
    let pair = |q: &str, a: &str| Sample::Conversation(vec![Message::user(q), Message::assistant(a)]);
    let want = vec![
        (1, Sample::Conversation(vec![Message::system("S"), Message::user("Q"), Message::assistant("A")])),
        (3, pair("Do\n\nthis", "done")),
        (4, pair("Do", "done")),
        (5, pair("I", "O")),
        (6, Sample::Text("Once\nupon".into())),
    ];
    assert_eq!(read_samples(&path).unwrap(), want);
}

#[test]
fn bad_lines_are_errors_that_name_them() {
    let dir = tempfile::tempdir().unwrap();
    for (line, reason) in [
        (r#"{"text":"cut off"#, "line 2: no JSON: EOF while parsing a string"),
        (r#"{"text":"a"} {"text":"b"}"#, "line 2: no JSON: trailing characters"),
        (r#"["text"]"#, "line 2: a list where an object is expected: {\"messages\"}, {\"instruction\""),
        ("null", "line 2: null where an object is expected"),
        ("{}", "found no keys"),
        (r#"{"prompt":"a","completion":"b"}"#, "line 2: expected {\"messages\"}"),
        (r#"{"prompt":"a","completion":"b"}"#, "found the keys \"prompt\", \"completion\""),
        (r#"{"text":3}"#, "\"text\" is a number where a string is expected"),
        (r#"{"instruction":"a","output":null}"#, "\"output\" is null where a string is expected"),
        (r#"{"instruction":"a","output":"b","input":["c"]}"#, "\"input\" is a list where a string is expected"),
        (r#"{"messages":"hello"}"#, "\"messages\" is a string where a list is expected"),
        (r#"{"messages":[]}"#, "line 2: \"messages\" is empty"),
        (r#"{"messages":["hi"]}"#, "message 1: a string where {\"role\", \"content\"} is expected"),
        (r#"{"messages":[{"role":"user"}]}"#, "message 1: \"content\" is missing where a string is expected"),
        (r#"{"messages":[{"role":"user","content":"q"}]}"#, "the last message is of the user: there is no answer"),
        (r#"{"messages":[{"role":"assistant","content":"a"}]}"#, "message 1: assistant first: expected at most one"),
        (
            r#"{"messages":[{"role":"user","content":"q"},{"role":"user","content":"q"}]}"#,
            "line 2: message 2: user after user: expected at most one system message first, then user and assistant",
        ),
        (
            r#"{"messages":[{"role":"user","content":"q"},{"role":"system","content":"s"}]}"#,
            "message 2: system after user",
        ),
        (r#"{"messages":[{"role":"tool","content":"t"}]}"#, "role \"tool\" is not system, user or assistant"),
        (
            r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a","weight":0}]}"#,
            "message 2: key \"weight\" has no meaning here",
        ),
    ] {
        let path = file(dir.path(), &[r#"{"text":"good"}"#, line]);
        let e = read_samples(&path).unwrap_err();
        assert!(matches!(e, Error::File { .. }) && e.to_string().contains(reason), "{line}: {e}");
    }
    let path = dir.path().join("other.jsonl");
    let fails = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        read_samples(&path).unwrap_err().to_string()
    };
    assert!(fails(b"").ends_with("other.jsonl: empty: there is no example in it"));
    assert!(fails(b"\n \n").contains("empty: there is no example"));
    assert!(fails(b"{\"text\":\"a\"}\n{\"text\":\"\xff\"}\n").contains("line 2: not UTF-8"));
    let many = vec![r#"{"role":"user","content":"q"}"#; 1025].join(",");
    assert!(fails(format!("{{\"messages\":[{many}]}}").as_bytes()).contains("1025 messages; at most 1024"));
    assert!(matches!(read_samples(&dir.path().join("none.jsonl")), Err(Error::Io { .. })));
}

fn chat(turns: &[(&str, &str)]) -> Sample {
    let both = |(q, a): &(&str, &str)| [Message::user(*q), Message::assistant(*a)];
    Sample::Conversation(turns.iter().flat_map(both).collect())
}

/// The text of each run of tokens that is learnt.
fn learnt(tokenizer: &Tokenizer, e: &Example) -> Vec<String> {
    let mut runs: Vec<Vec<u32>> = Vec::new();
    for (i, id) in e.ids.iter().enumerate().filter(|(i, _)| e.learnt[*i]) {
        match runs.last_mut().filter(|_| e.learnt[i - 1]) {
            Some(run) => run.push(*id),
            None => runs.push(vec![*id]),
        }
    }
    runs.iter().map(|ids| tokenizer.decode(ids, false).unwrap()).collect()
}

#[test]
fn what_is_learnt_is_the_assistants_part_up_to_the_end_of_its_turn() {
    let format = PromptFormat::from_dir(&fixture("a3_llama")).unwrap();
    let text = |e: &Example| format.tokenizer().decode(&e.ids, false).unwrap();
    let example = |sample: &Sample, on| format.example(sample, on).unwrap().unwrap();
    let one = example(&chat(&[("Why?", " Because. ")]), TrainOn::Assistant);
    let head = |role: &str| format!("<|start_header_id|>{role}<|end_header_id|>\n\n");
    let asked = format!("<|begin_of_text|>{}Why?<|eot_id|>{}", head("user"), head("assistant"));
    assert_eq!(text(&one), format!("{asked}Because.<|eot_id|>"));
    assert_eq!(learnt(format.tokenizer(), &one), ["Because.<|eot_id|>"]);
    assert_eq!(one.ids[..one.prompt], format.prompt("Why?").unwrap());
    assert_eq!(one.targets(), one.ids.len() - one.prompt);

    let two = example(&chat(&[("a", "b"), ("c", "d e")]), TrainOn::Assistant);
    assert_eq!(learnt(format.tokenizer(), &two), ["b<|eot_id|>", "d e<|eot_id|>"]);
    assert_eq!(two.ids[..two.prompt], format.prompt("a").unwrap());
    let system = Sample::Conversation(vec![Message::system("s"), Message::user("a"), Message::assistant("b")]);
    let system = example(&system, TrainOn::Assistant);
    assert_eq!(learnt(format.tokenizer(), &system), ["b<|eot_id|>"]);
    assert!(text(&system).starts_with(&format!("<|begin_of_text|>{}s<|eot_id|>", head("system"))));
    // An empty answer among others teaches nothing.
    let silent = example(&chat(&[("a", " "), ("c", "d")]), TrainOn::Assistant);
    assert_eq!(learnt(format.tokenizer(), &silent), ["d<|eot_id|>"]);
    assert_eq!(format.example(&chat(&[("a", " ")]), TrainOn::Assistant).unwrap(), None);

    let all = example(&chat(&[("a", "b")]), TrainOn::All);
    assert_eq!(all.learnt, [vec![false], vec![true; all.ids.len() - 1]].concat());
    let plain = example(&Sample::Text("to be".into()), TrainOn::Assistant);
    assert_eq!(text(&plain), "<|begin_of_text|>to be<|eot_id|>");
    assert_eq!(learnt(format.tokenizer(), &plain), ["to be<|eot_id|>"]);
    assert_eq!(format.example(&Sample::Text(" \n".into()), TrainOn::All).unwrap(), None);
}

#[test]
fn a_seam_that_the_tokenizer_would_join_is_cut_as_generation_will_meet_it() {
    // "Assistant: " ends with a space that would be one token with the answer's first letters.
    for name in ["a1_bf16", "a2_packed_gqa_untied_sharded"] {
        let format = PromptFormat::from_dir(&fixture(name)).unwrap();
        let e =
            format.example(&chat(&[("Why?", "the cat"), ("And?", "the dog")]), TrainOn::Assistant).unwrap().unwrap();
        assert_eq!(e.ids[..e.prompt], format.prompt("Why?").unwrap());
        assert_eq!(learnt(format.tokenizer(), &e), ["the cat<|eot_id|>", "the dog<|eot_id|>"]);
    }
}

#[test]
fn what_follows_the_end_of_a_turn_is_not_learnt_and_other_templates_are_refused() {
    let dir = fixture("a1_bf16");
    let with = |source: &str| {
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        PromptFormat::new(tokenizer, Some(ChatTemplate::new(source, "test")), vec![383])
    };
    let format = with(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|eot_id|>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    );
    let e = format.example(&chat(&[("q", "a"), ("r", "b")]), TrainOn::Assistant).unwrap().unwrap();
    assert_eq!(learnt(format.tokenizer(), &e), ["a<|eot_id|>", "b<|eot_id|>"]);
    assert_eq!(format.tokenizer().decode(e.ids.last_chunk::<1>().unwrap(), false).unwrap(), "<|eot_id|>");
    let format = with("{% for m in messages %}{{ m.content }}{% if loop.last %}<|eot_id|>{% endif %}{% endfor %}");
    let e = format.example(&chat(&[("q", "a")]), TrainOn::Assistant).unwrap_err().to_string();
    assert!(e.contains("renders the beginning of this conversation otherwise when more follows"), "{e}");
}

#[test]
fn without_a_template_a_pair_is_two_lines_and_more_is_refused() {
    let tokenizer = Tokenizer::from_dir(fixture("a1_bf16")).unwrap();
    let format = PromptFormat::new(tokenizer.clone(), None, vec![375]);
    let e = format.example(&chat(&[("What?", "This.")]), TrainOn::Assistant).unwrap().unwrap();
    assert_eq!(tokenizer.decode(&e.ids, false).unwrap(), "<|begin_of_text|>What?\nThis.<|end_of_text|>");
    assert_eq!(learnt(&tokenizer, &e), ["This.<|end_of_text|>"]);
    assert_eq!(e.ids[..e.prompt], format.prompt("What?").unwrap());
    let refused = format.example(&chat(&[("a", "b"), ("c", "d")]), TrainOn::Assistant).unwrap_err().to_string();
    assert!(refused.contains("only a single question with its answer can do without"), "{refused}");
    let system = Sample::Conversation(vec![Message::system("s"), Message::user("a"), Message::assistant("b")]);
    assert!(format.example(&system, TrainOn::Assistant).is_err());
}

#[test]
fn what_is_left_out_or_cut_is_counted() {
    let (dir, format) = (tempfile::tempdir().unwrap(), PromptFormat::from_dir(&fixture("a1_bf16")).unwrap());
    let long = format!(r#"{{"input":"q","output":"{}"}}"#, "word ".repeat(40));
    let prompt = format!(r#"{{"input":"{}","output":"a"}}"#, "word ".repeat(40));
    let short = r#"{"input":"q","output":"a"}"#;
    let path =
        file(dir.path(), &[short, &long, r#"{"input":"q","output":" "}"#, &prompt, short, r#"{"text":""}"#, short]);
    let options = ExampleOptions { context: 40, validation: 0.34, ..ExampleOptions::default() };
    let read = |options: &ExampleOptions| Examples::read(&path, None, &format, options).unwrap();
    let kept = read(&options);
    let counts = |e: &Examples| {
        let c = e.counts;
        (c.lines, c.used, c.too_long, c.empty, c.truncated)
    };
    assert_eq!(counts(&kept), (7, 3, 2, 2, 0));
    assert_eq!(kept.train.iter().map(|e| e.line).collect::<Vec<_>>(), [1, 5]);
    assert_eq!(kept.validation.iter().map(|e| e.line).collect::<Vec<_>>(), [7]);
    // Cut where something to learn is left: one position a token, and the last one is only predicted.
    let cut = read(&ExampleOptions { truncate: true, ..options });
    assert_eq!(counts(&cut), (7, 4, 1, 2, 1));
    let lengths = cut.train.iter().chain(&cut.validation).map(|e| e.ids.len());
    assert_eq!(lengths.max(), Some(41));
    assert_eq!(read(&ExampleOptions { max_samples: 5, validation: 0.0, ..options }).counts.lines, 5);
    let both = Examples::read(&path, Some(&path), &format, &options).unwrap();
    assert_eq!((both.train.len(), both.validation.len(), both.counts.lines), (3, 3, 14));
    assert_ne!(kept.fingerprint(), cut.fingerprint());
    assert_eq!(kept.fingerprint(), read(&options).fingerprint());

    let path = file(dir.path(), &[&long, r#"{"text":""}"#]);
    let e = Examples::read(&path, None, &format, &options).unwrap_err().to_string();
    assert!(e.contains("no example is left of 2 lines: 1 longer than 40 positions, 1 without anything"), "{e}");
    let bad = Examples::read(&path, None, &format, &ExampleOptions { validation: 0.9, ..options });
    assert!(bad.unwrap_err().to_string().starts_with("validation: 0.9 is out of range"));
    let path = file(dir.path(), &[short, r#"{"messages":[{"role":"user","content":"q"}]}"#]);
    let e = Examples::read(&path, None, &format, &options).unwrap_err().to_string();
    assert!(e.contains("data.jsonl: line 2: "), "{e}");
}

fn example(tag: u32, length: usize, prompt: usize) -> Example {
    let ids = (0..length as u32).map(|i| 10 * tag + i).collect();
    Example { line: 1, ids, learnt: (0..length).map(|i| i >= prompt).collect(), prompt }
}

#[test]
fn batches_pad_at_the_end_and_see_every_example_once_an_epoch() {
    let train: Vec<Example> = (1..=10).map(|i| example(i, 3 + (i as usize) % 4, 2)).collect();
    let validation = vec![example(11, 5, 2), example(12, 3, 1)];
    let examples = Examples { train: train.clone(), validation, ..Examples::default() };
    let data = |seed| ExampleBatches::new(examples.clone(), 4, 2, seed).unwrap();
    let (one, none) = (data(1), None::<u32>);
    assert_eq!(one.validation().len(), 1);
    let v = &one.validation()[0];
    assert_eq!((v.length, &v.tokens[..]), (4, &[120, 121, 0, 0, 110, 111, 112, 113][..]));
    assert_eq!(v.targets, [Some(121), Some(122), none, none, none, Some(112), Some(113), Some(114)]);
    assert_eq!((one.validation_bytes(), one.epochs(5)), (0, 2.0));

    // Which examples a step is made of, by their first tokens.
    let tags = |data: &ExampleBatches, step: u64| -> Vec<u32> {
        let batches = data.micro_batches(step).unwrap();
        assert!(batches.iter().all(|b| b.tokens.len() == 2 * b.length && b.targets.len() == b.tokens.len()));
        batches.iter().flat_map(|b| b.tokens.chunks(b.length).map(|t| t[0] / 10).collect::<Vec<_>>()).collect()
    };
    let epochs: Vec<u32> = (0..5).flat_map(|step| tags(&one, step)).collect();
    let mut seen: BTreeMap<u32, usize> = BTreeMap::new();
    epochs.iter().for_each(|tag| *seen.entry(*tag).or_default() += 1);
    assert!(seen.len() == 10 && seen.values().all(|n| *n == 2), "{seen:?}");
    let again = data(1);
    assert_eq!(
        (0..5).rev().map(|s| tags(&again, s)).collect::<Vec<_>>(),
        (0..5).rev().map(|s| tags(&one, s)).collect::<Vec<_>>()
    );
    assert_ne!(tags(&data(2), 0), tags(&one, 0));
    for (sequences, micro) in [(0, 1), (2, 0), (2, 3)] {
        assert!(ExampleBatches::new(examples.clone(), sequences, micro, 0).is_err());
    }
    assert!(ExampleBatches::new(Examples::default(), 2, 1, 0).is_err());
}

// ---- runs ----

const COLOURS: [&str; 8] = ["red", "green", "blue", "black", "white", "yellow", "orange", "violet"];

/// Questions whose answers no model with random weights knows.
fn pairs(dir: &Path, count: usize) -> PathBuf {
    let line = |i: usize| {
        let answer = COLOURS[i % 8].to_uppercase();
        format!("{{\"instruction\":\"{} {}?\",\"output\":\"{answer}\"}}", i, COLOURS[i % 8])
    };
    let path = dir.join("pairs.jsonl");
    std::fs::write(&path, (0..count).map(line).collect::<Vec<_>>().join("\n")).unwrap();
    path
}

fn recipe(lora: Option<LoraOptions>, steps: u64) -> FinetuneRecipe {
    let mut recipe = FinetuneRecipe::new("base", lora);
    recipe.examples = ExampleOptions { context: 64, validation: 0.0, ..ExampleOptions::default() };
    recipe.batches = Batching { sequences: 4, micro: 2 };
    let schedule = Schedule::Cosine;
    recipe.optimization = Optimization {
        steps,
        lr: 1e-2,
        warmup: 2,
        schedule,
        weight_decay: 0.0,
        eval_every: 0,
        save_every: 0,
        ..Optimization::default()
    };
    recipe
}

fn examples(base: &Path, data: &Path, recipe: &FinetuneRecipe) -> Examples {
    let format = PromptFormat::from_dir(base).unwrap();
    Examples::read(data, recipe.validation_file.as_deref(), &format, &recipe.examples).unwrap()
}

fn start(base: &Path, data: &Path, out: &Path, recipe: &FinetuneRecipe) -> Result<Finetune, Error> {
    Finetune::start(base, out, recipe, examples(base, data, recipe))
}

/// Runs to the end; the losses of the steps.
fn losses(run: &Finetune, threads: usize) -> Vec<f64> {
    let mut losses = Vec::new();
    let summary = run.run(&CPU, threads, &mut |event| {
        if let Event::Step(m) = event {
            losses.push(m.loss);
        }
        Ok(ControlFlow::Continue(()))
    });
    assert_eq!(summary.unwrap().outcome, Outcome::Finished);
    losses
}

fn snapshot(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    files.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

fn answer(model: &Path, adapter: Option<&Path>, question: &str) -> String {
    let options = LoadOptions::new(&CPU).threads(Some(1)).adapter(adapter.map(Path::to_owned));
    let mut model = BitNet::load(model.to_str().unwrap(), options).unwrap();
    let prompt = model.chat_prompt(&[Message::user(question)]).unwrap();
    model.generate(&prompt, &GenerateOptions::default().greedy().max_tokens(16)).unwrap().collect_all().unwrap().text
}

#[test]
fn lora_teaches_the_answers_and_leaves_every_byte_of_the_base() {
    let (dir, base) = (tempfile::tempdir().unwrap(), fixture("a1_packed"));
    let (data, out, before) = (pairs(dir.path(), 16), dir.path().join("out"), snapshot(&base));
    let run = start(&base, &data, &out, &recipe(Some(lora(8, &["all-linear"])), 60)).unwrap();
    assert_eq!(
        run.trainable(),
        run.recipe().lora.as_ref().map_or(0, |_| 2 * 8 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 344)))
    );
    assert!(run.trainable_share() > 0.0 && run.trainable_share() < 0.3);
    let losses = losses(&run, 2);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&losses[..4]), mean(&losses[losses.len() - 4..]));
    assert!(last < 0.2 * first, "{first} to {last}");
    let known =
        |i: usize| answer(&base, Some(&out), &format!("{i} {}?", COLOURS[i % 8])) == COLOURS[i % 8].to_uppercase();
    let right = (0..8).filter(|i| known(*i)).count();
    assert!(right >= 6, "{right} of 8 answers, loss {last}");
    assert_ne!(answer(&base, None, "0 red?"), "RED");
    assert!(snapshot(&base) == before);
    let adapter = Adapter::open(&out).unwrap();
    assert_eq!((adapter.config().rank, adapter.config().alpha), (8, 16.0));
    assert_eq!((adapter.config().base_model.as_deref(), adapter.modules().len()), (Some("base"), 14));
    assert_eq!(run.output(), out);
    assert_eq!(adapter.parameters() as usize, run.trainable());
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_bit_for_bit() {
    for (base, method) in [("a3_llama", Some(lora(2, &["q_proj", "down_proj"]))), ("a1_bf16", None)] {
        let (dir, base) = (tempfile::tempdir().unwrap(), fixture(base));
        let data = pairs(dir.path(), 12);
        let mut recipe = recipe(method, 6);
        recipe.examples.validation = 0.2;
        recipe.optimization = Optimization { eval_every: 2, save_every: 3, dropout: 0.1, ..recipe.optimization };
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        losses(&start(&base, &data, &one, &recipe).unwrap(), 1);
        // Stopped by the observer once, and killed once: what it wrote after the saved state does not count.
        let stop_at = |run: &Finetune, last: u64, kill: bool| {
            run.run(&CPU, 2, &mut |event| match event {
                Event::Step(m) if m.step == last && kill => Err(Error::Training("killed".into())),
                Event::Step(m) if m.step == last => Ok(ControlFlow::Break(())),
                _ => Ok(ControlFlow::Continue(())),
            })
        };
        let stopped = stop_at(&start(&base, &data, &two, &recipe).unwrap(), 1, false).unwrap();
        assert_eq!((stopped.outcome, stopped.steps), (Outcome::Interrupted, 1));
        let resume = |two: &Path| {
            let recipe = FinetuneRecipe::read(two).unwrap();
            let examples = examples(&base, &data, &recipe);
            Finetune::resume(&base, two, recipe, examples).unwrap()
        };
        assert!(stop_at(&resume(&two), 5, true).is_err());
        losses(&resume(&two), 2);
        let state = |dir: &Path| {
            let tensors = candle_core::safetensors::load(dir.join("state.safetensors"), &CPU).unwrap();
            let values = |(name, t): (String, Tensor)| {
                (name, t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap())
            };
            let mut all: HashMap<String, Vec<f64>> = tensors.into_iter().map(values).collect();
            // It holds the seconds.
            all.remove("progress").unwrap();
            all
        };
        assert!(state(&one) == state(&two));
        let metrics = |dir: &Path| -> Vec<String> {
            let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
            text.lines().map(|l| l.split(",\"tokens_per_second\"").next().unwrap().to_owned()).collect()
        };
        assert_eq!(metrics(&one), metrics(&two));
        let result = |dir: &Path| match dir.join("masters").is_dir() {
            true => std::fs::read(dir.join("masters/model.safetensors")).unwrap(),
            false => std::fs::read(dir.join(WEIGHTS_FILE)).unwrap(),
        };
        assert!(result(&one) == result(&two));
        // Other data is not what the run began with.
        let recipe = FinetuneRecipe::read(&two).unwrap();
        let other = examples(&base, &pairs(dir.path(), 13), &recipe);
        let e = Finetune::resume(&base, &two, recipe, other).unwrap_err().to_string();
        assert!(e.contains("not those that the run began with"), "{e}");
    }
}

#[test]
fn the_best_by_validation_is_kept_and_a_run_that_gets_worse_stops() {
    let (dir, base) = (tempfile::tempdir().unwrap(), fixture("a1_packed"));
    let (data, out) = (pairs(dir.path(), 10), dir.path().join("out"));
    let mut recipe = recipe(Some(lora(4, &["o_proj", "down_proj"])), 80);
    // The same questions with other answers: what is learnt becomes wrong there.
    let wrong = dir.path().join("wrong.jsonl");
    let text = std::fs::read_to_string(&data).unwrap();
    std::fs::write(&wrong, text.replace("RED", "it").replace("GREEN", "so").replace("BLUE", "if")).unwrap();
    recipe.validation_file = Some(wrong);
    recipe.examples.max_samples = 3;
    recipe.optimization = Optimization { eval_every: 2, patience: 3, ..recipe.optimization };
    let run = start(&base, &data, &out, &recipe).unwrap();
    let mut seen: Vec<(u64, f64, bool)> = Vec::new();
    let mut best: HashMap<String, Vec<f32>> = HashMap::new();
    let summary = run
        .run(&CPU, 2, &mut |event| {
            match event {
                Event::Validated(v) => seen.push((v.step, v.loss, v.best)),
                // The optimiser goes on in place: values, not tensors, are kept.
                Event::Best(p) => best = p.list().iter().map(|p| (p.name.clone(), flat(&p.value))).collect(),
                _ => {}
            }
            Ok(ControlFlow::Continue(()))
        })
        .unwrap();
    assert_eq!(summary.outcome, Outcome::Stopped, "{seen:?}");
    let kept = summary.best.unwrap();
    assert_eq!(summary.steps, kept.step + 6);
    assert!(seen.iter().all(|(_, loss, _)| *loss >= kept.loss) && kept.best);
    assert!(seen[seen.len() - 3..].iter().all(|(.., best)| !best));
    let stored = Adapter::open(&out).unwrap();
    let (a, b) = stored.modules()[0].matrices().unwrap();
    let [a_name, b_name] = tensor_names(&stored.modules()[0].name);
    assert!(a == best[&a_name] && b == best[&b_name]);
}

#[test]
fn full_training_moves_the_masters_and_writes_a_checkpoint_with_its_text() {
    let (dir, base) = (tempfile::tempdir().unwrap(), fixture("a1_bf16"));
    let (data, before) = (pairs(dir.path(), 8), snapshot(&base));
    let mut recipe = recipe(None, 30);
    recipe.optimization.lr = 3e-3;
    let run = start(&base, &data, &dir.path().join("out"), &recipe).unwrap();
    assert!((run.trainable_share() - 1.0).abs() < 1e-12 && run.trainable() as u64 == run.config().parameters());
    let losses = losses(&run, 2);
    assert!(losses[losses.len() - 1] < 0.6 * losses[0], "{losses:?}");
    let masters = run.output();
    assert!(snapshot(&base) == before && masters.ends_with("masters"));
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert!(std::fs::read(masters.join(name)).unwrap() == std::fs::read(base.join(name)).unwrap(), "{name}");
    }
    assert_ne!(answer(&masters, None, "0 red?"), answer(&base, None, "0 red?"));

    // A Llama-style model too, from masters that a conversion made.
    let llama = dir.path().join("llama");
    convert(&fixture("a3_llama"), &llama, Form::Masters, &mut |_| ControlFlow::Continue(())).unwrap();
    recipe.optimization.steps = 2;
    recipe.masters = Masters::BF16;
    let run = start(&llama, &data, &dir.path().join("second"), &recipe).unwrap();
    assert_eq!(self::losses(&run, 1).len(), 2);
    answer(&run.output(), None, "0 red?");
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let (dir, base) = (tempfile::tempdir().unwrap(), fixture("a1_packed"));
    let (data, out) = (pairs(dir.path(), 8), dir.path().join("out"));
    let refused = |recipe: &FinetuneRecipe, out: &Path| match start(&base, &data, out, recipe).unwrap_err() {
        Error::Request { what, reason } => format!("{what}: {reason}"),
        other => panic!("{other}"),
    };
    let mut full = recipe(None, 4);
    let e = refused(&full, &out);
    assert!(e.starts_with("model: base is packed; full training needs masters: use the bf16 repository"), "{e}");
    assert!(e.contains("microsoft/bitnet-b1.58-2B-4T-bf16") && e.contains("leave --full out"), "{e}");
    full.model = "microsoft/bitnet-b1.58-2B-4T@main".into();
    assert!(refused(&full, &out).contains("use microsoft/bitnet-b1.58-2B-4T-bf16, or leave"));
    assert!(!out.exists());
    let adapter = recipe(Some(lora(2, &["q_proj"])), 4);
    let e = refused(&adapter, &base);
    assert!(e.starts_with("output directory: ") && e.ends_with("holds a model; name another directory"), "{e}");
    let mut long = adapter.clone();
    long.examples.context = 1000;
    assert!(refused(&long, &out).contains("context: 1000 is more than the model's 512 positions"));
    let mut bad = adapter.clone();
    bad.optimization.lr = -1.0;
    assert!(refused(&bad, &out).starts_with("lr: -1"));
    bad = adapter.clone();
    bad.batches.micro = 9;
    assert!(refused(&bad, &out).starts_with("batch: 9 at a time of 4 a step"));
    start(&base, &data, &out, &adapter).unwrap();
    let e = refused(&adapter, &out);
    assert!(e.ends_with("holds a run; resume it, or name another directory"), "{e}");
    let e = FinetuneRecipe::read(dir.path()).unwrap_err().to_string();
    assert!(e.contains("holds no run of finetune"), "{e}");
    let text = std::fs::read_to_string(out.join(RECIPE)).unwrap();
    std::fs::write(out.join(RECIPE), text.replace("steps", "stepz")).unwrap();
    assert!(FinetuneRecipe::read(&out).unwrap_err().to_string().contains("stepz"));
    std::fs::remove_file(out.join(RECIPE)).unwrap();
    write_adapter(&out, &lora(1, &["q_proj"]).config(0.0).unwrap(), one_matrix()).unwrap();
    assert!(refused(&adapter, &out).ends_with("holds an adapter; name another directory"));
}

fn one_matrix() -> Vec<AdapterMatrices> {
    let module = "model.layers.0.self_attn.q_proj".to_owned();
    vec![AdapterMatrices { module, rows: 1, cols: 1, a: vec![1.0], b: vec![1.0] }]
}
