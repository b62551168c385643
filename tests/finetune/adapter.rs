//! A frozen decoder with an adapter: its forward pass against inference, its gradients against differences and a dense
//! composition.

use crate::common::{FIXTURES, fixture};
use crate::{CPU, backend, lora, tensor, values};
use candle_bitnet::backend::DenseType;
use candle_bitnet::backend::attention::{AttentionShape, RopeTable};
use candle_bitnet::backend::cpu::Gate;
use candle_bitnet::checkpoint::adapter::{tensor_names, write_adapter};
use candle_bitnet::checkpoint::write::{Entry, write_file};
use candle_bitnet::checkpoint::{Checkpoint, StoredType};
use candle_bitnet::model::config::{Activation, ModelConfig, Projection};
use candle_bitnet::model::{CheckpointWeights, Logits, Sequence};
use candle_bitnet::ops::grad::composed;
use candle_bitnet::train::{Batch, LoraModel, LoraOptions, Parameter, Parameters, Regularization};
use candle_bitnet::{Error, LoadOptions, LoadedDecoder};
use candle_core::{Tensor, Var};
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;

fn config_of(checkpoint: &Checkpoint) -> ModelConfig {
    let (path, text) = checkpoint.config();
    ModelConfig::parse(path, text).unwrap()
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
    let shape = AttentionShape::new(config.num_heads, config.num_kv_heads, config.head_dim);
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
