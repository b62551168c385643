//! Every b1.58 family in safetensors: tiny checkpoints with the names, keys and storage of the published ones, against
//! a naive forward pass and against each other.

mod common;

use candle_bitnet::backend::cpu::CpuOptions;
use candle_bitnet::backend::{Backend, DenseType};
use candle_bitnet::checkpoint::write::{Entry, write_checkpoint};
use candle_bitnet::checkpoint::{Checkpoint, ModelFiles, StoredType};
use candle_bitnet::generate::GenerateOptions;
use candle_bitnet::model::config::{Activation, Family, Mode, ModelConfig};
use candle_bitnet::model::convert::{Form, GgufType, Summary, convert};
use candle_bitnet::model::{CheckpointWeights, Decoder, Logits, Sequence};
use candle_bitnet::ternary::{I2sLayout, PackedTernary, Scale};
use candle_bitnet::text::Tokenizer;
use candle_bitnet::{BitNet, DeviceChoice, Error, LoadOptions, select_device};
use candle_core::Device;
use half::{bf16, f16};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

/// How ternary matrices are stored.
#[derive(Clone, Copy, PartialEq)]
enum Storage {
    /// Codes with a scale that divides, as published with transformers' first format.
    Packed,
    /// What is quantised at load.
    Masters(StoredType),
    /// −s, 0 and s in BF16.
    Dequantized,
}

#[derive(Clone)]
struct Matrix {
    rows: usize,
    cols: usize,
    /// Rounded to the type of the masters.
    masters: Vec<f32>,
}

/// A model of random weights: its masters are what all forms of it are made of.
struct Model {
    config: Value,
    norms: [&'static str; 2],
    dtype: StoredType,
    matrices: BTreeMap<String, Matrix>,
    vectors: BTreeMap<String, Vec<f32>>,
}

fn rounded(dtype: StoredType, x: f32) -> f32 {
    match dtype {
        StoredType::F16 => f16::from_f32(x).to_f32(),
        _ => bf16::from_f32(x).to_f32(),
    }
}

fn bytes(dtype: StoredType, values: &[f32]) -> Vec<u8> {
    match dtype {
        StoredType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        StoredType::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// The configuration as this crate understands it.
fn parsed(config: &Value) -> ModelConfig {
    ModelConfig::parse(Path::new("config.json"), &config.to_string()).unwrap()
}

impl Model {
    fn new(config: Value, dtype: StoredType) -> Self {
        let c = parsed(&config);
        let norms = match c.family {
            Family::FirstReproduction => ["self_attn.inner_attn_ln", "mlp.ffn_layernorm"],
            _ => ["self_attn.attn_sub_norm", "mlp.ffn_sub_norm"],
        };
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let mut matrices = BTreeMap::new();
        let mut vectors = BTreeMap::new();
        let mut matrix = |name: String, rows: usize, cols: usize, size: f32| {
            let masters = (0..rows * cols).map(|_| rounded(dtype, next() * size)).collect();
            matrices.insert(name, Matrix { rows, cols, masters });
        };
        let (h, q, kv, i) = (c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size);
        matrix("model.embed_tokens".into(), c.vocab_size, h, 1.0);
        if !c.tied_embeddings {
            matrix("lm_head".into(), c.vocab_size, h, 0.3);
        }
        for layer in 0..c.num_layers {
            let mut part =
                |path: &str, rows, cols| matrix(format!("model.layers.{layer}.{path}_proj"), rows, cols, 0.1);
            part("self_attn.q", q, h);
            part("self_attn.k", kv, h);
            part("self_attn.v", kv, h);
            part("self_attn.o", h, q);
            part("mlp.gate", i, h);
            part("mlp.up", i, h);
            part("mlp.down", h, i);
        }
        let mut vector = |name: String, len: usize| {
            vectors.insert(name, (0..len).map(|_| rounded(dtype, 1.0 + 0.3 * next())).collect());
        };
        vector("model.norm.weight".into(), h);
        for layer in 0..c.num_layers {
            let mut norm = |path: &str, len| vector(format!("model.layers.{layer}.{path}.weight"), len);
            norm("input_layernorm", h);
            norm("post_attention_layernorm", h);
            if c.sub_norms {
                norm(norms[0], q);
                norm(norms[1], i);
            }
        }
        Self { config, norms, dtype, matrices, vectors }
    }

    fn is_ternary(name: &str) -> bool {
        name.contains(".layers.")
    }

    /// Codes and multiplier, as absmean quantisation gives them.
    fn ternary(m: &Matrix) -> (Vec<i8>, f32) {
        let mean = m.masters.iter().map(|w| f64::from(w.abs())).sum::<f64>() / m.masters.len() as f64;
        let multiplier = mean as f32;
        let codes = m.masters.iter().map(|w| (w / multiplier).round_ties_even().clamp(-1.0, 1.0) as i8).collect();
        (codes, multiplier)
    }

    /// Writes it with `config`, which says how it is stored.
    fn write(&self, dir: &Path, config: &Value, storage: Storage) {
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        let mut entries = Vec::new();
        for (name, m) in &self.matrices {
            let weight = format!("{name}.weight");
            let shape = [m.rows, m.cols];
            let (codes, multiplier) = Self::ternary(m);
            let dense = |values: &[f32]| Entry::from_bytes(&weight, self.dtype, shape, bytes(self.dtype, values));
            if !Self::is_ternary(name) {
                entries.push(dense(&m.masters));
                continue;
            }
            match storage {
                Storage::Packed => {
                    let packed = PackedTernary::from_weights(m.rows, m.cols, &codes, Scale::Multiply(1.0)).unwrap();
                    let shape = [m.rows / 4, m.cols];
                    entries.push(Entry::from_bytes(&weight, StoredType::U8, shape, packed.to_hf().unwrap()));
                    let scale = format!("{name}.weight_scale");
                    entries.push(Entry::from_bytes(
                        scale,
                        StoredType::F32,
                        [1],
                        bytes(StoredType::F32, &[1.0 / multiplier]),
                    ));
                }
                Storage::Masters(dtype) => {
                    assert!(dtype == self.dtype);
                    entries.push(dense(&m.masters));
                }
                Storage::Dequantized => {
                    let values: Vec<f32> = codes.iter().map(|c| f32::from(*c) * multiplier).collect();
                    entries.push(dense(&values));
                }
            }
        }
        for (name, v) in &self.vectors {
            entries.push(Entry::from_bytes(name, self.dtype, [v.len()], bytes(self.dtype, v)));
        }
        write_checkpoint(dir, entries, 1 << 20, &mut |_| {}).unwrap();
    }

    /// `y = x Wᵀ` with activations quantised to 8 bits per token, weights to ternary.
    fn linear(&self, x: &[Vec<f64>], name: &str, storage: Storage) -> Vec<Vec<f64>> {
        let m = &self.matrices[name];
        let (codes, mut multiplier) = Self::ternary(m);
        if storage == Storage::Dequantized {
            multiplier = rounded(self.dtype, multiplier);
        }
        let row = |x: &Vec<f64>| -> Vec<f64> {
            let absmax = x.iter().fold(0f32, |m, v| m.max(v.abs() as f32));
            let s = 127.0 / absmax.max(1e-5);
            let q: Vec<i32> = x.iter().map(|v| (*v as f32 * s).round_ties_even() as i32).collect();
            let dot = |w: &[i8]| w.iter().zip(&q).map(|(w, q)| i32::from(*w) * q).sum::<i32>();
            codes.chunks(m.cols).map(|w| f64::from(dot(w)) / f64::from(s) * f64::from(multiplier)).collect()
        };
        x.iter().map(row).collect()
    }

    fn norm(&self, x: &[Vec<f64>], name: &str, eps: f32) -> Vec<Vec<f64>> {
        let w = &self.vectors[&format!("{name}.weight")];
        let row = |x: &Vec<f64>| {
            let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
            let r = 1.0 / (mean + f64::from(eps)).sqrt();
            x.iter().zip(w).map(|(v, w)| v * r * f64::from(*w)).collect()
        };
        x.iter().map(row).collect()
    }

    /// Logits after every token, as plainly as they can be computed.
    fn logits(&self, tokens: &[u32], storage: Storage) -> Vec<Vec<f32>> {
        let c = parsed(&self.config);
        let dim = c.head_dim;
        let add = |x: &mut [Vec<f64>], y: Vec<Vec<f64>>| {
            x.iter_mut().flatten().zip(y.iter().flatten()).for_each(|(x, y)| *x += y);
        };
        let embedding = &self.matrices["model.embed_tokens"];
        let row = |m: &Matrix, r: usize| m.masters[r * m.cols..][..m.cols].iter().map(|v| f64::from(*v)).collect();
        let mut x: Vec<Vec<f64>> = tokens.iter().map(|t| row(embedding, *t as usize)).collect();
        let rotated = |x: &[f64], position: usize| -> Vec<f64> {
            let half = dim / 2;
            let angle = |i: usize| position as f64 * c.rope_theta.powf(-2.0 * i as f64 / dim as f64);
            let low = (0..half).map(|i| x[i] * angle(i).cos() - x[i + half] * angle(i).sin());
            low.chain((0..half).map(|i| x[i + half] * angle(i).cos() + x[i] * angle(i).sin())).collect()
        };
        for layer in 0..c.num_layers {
            let name = |path: &str| format!("model.layers.{layer}.{path}");
            let h = self.norm(&x, &name("input_layernorm"), c.rms_norm_eps);
            let [q, k, v] = ["q", "k", "v"].map(|p| self.linear(&h, &name(&format!("self_attn.{p}_proj")), storage));
            let mut context = Vec::new();
            for t in 0..tokens.len() {
                let mut out = Vec::new();
                for head in 0..c.num_heads {
                    let at = head / (c.num_heads / c.num_kv_heads) * dim;
                    let query = rotated(&q[t][head * dim..][..dim], t);
                    let score = |s: usize| {
                        let key = rotated(&k[s][at..][..dim], s);
                        query.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>() / (dim as f64).sqrt()
                    };
                    let scores: Vec<f64> = (0..=t).map(score).collect();
                    let max = scores.iter().copied().fold(f64::MIN, f64::max);
                    let p: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                    let sum: f64 = p.iter().sum();
                    out.extend((0..dim).map(|i| p.iter().zip(&v).map(|(p, v)| p / sum * v[at + i]).sum::<f64>()));
                }
                context.push(out);
            }
            if c.sub_norms {
                context = self.norm(&context, &name(self.norms[0]), c.rms_norm_eps);
            }
            add(&mut x, self.linear(&context, &name("self_attn.o_proj"), storage));
            let h = self.norm(&x, &name("post_attention_layernorm"), c.rms_norm_eps);
            let [gate, up] = ["gate", "up"].map(|p| self.linear(&h, &name(&format!("mlp.{p}_proj")), storage));
            let act = |g: f64| match c.activation {
                Activation::Relu2 => g.max(0.0).powi(2),
                Activation::Silu => g / (1.0 + (-g).exp()),
            };
            let product = |(g, u): (&Vec<f64>, &Vec<f64>)| g.iter().zip(u).map(|(g, u)| act(*g) * u).collect();
            let mut h: Vec<Vec<f64>> = gate.iter().zip(&up).map(product).collect();
            if c.sub_norms {
                h = self.norm(&h, &name(self.norms[1]), c.rms_norm_eps);
            }
            add(&mut x, self.linear(&h, &name("mlp.down_proj"), storage));
        }
        let x = self.norm(&x, "model.norm", c.rms_norm_eps);
        let head = self.matrices.get("lm_head").unwrap_or(embedding);
        let dot = |x: &[f64], w: &[f32]| x.iter().zip(w).map(|(x, w)| x * f64::from(*w)).sum::<f64>() as f32;
        x.iter().map(|x| head.masters.chunks(head.cols).map(|w| dot(x, w)).collect()).collect()
    }
}

const PROMPTS: [&[u32]; 5] = [&[1, 17, 99, 3], &[5, 5, 60], &[8, 101, 2, 44], &[90], &[7, 30, 9, 9, 71]];

fn open(dir: impl Into<ModelFiles>) -> candle_bitnet::Result<(Decoder, ModelConfig)> {
    let checkpoint = Checkpoint::open(dir)?;
    let (path, text) = checkpoint.config();
    let config = ModelConfig::parse(path, text)?;
    let backend = Backend::new(&Device::Cpu, CpuOptions { kernel: None, threads: Some(2) })?;
    let weights = CheckpointWeights::new(&checkpoint, &config)?;
    Ok((Decoder::load(&backend, config.clone(), &weights, 64, |_| ())?, config))
}

fn logits(dir: impl Into<ModelFiles>) -> Vec<Vec<f32>> {
    logits_of(dir, PROMPTS[4])
}

fn logits_of(dir: impl Into<ModelFiles>, tokens: &[u32]) -> Vec<Vec<f32>> {
    let (decoder, _) = open(dir).unwrap();
    let cache = decoder.kv_cache(DenseType::F32, 1).unwrap();
    let tokens = Sequence { slot: 0, position: 0, tokens };
    decoder.forward(&[tokens], &cache, Logits::All).unwrap().to_vec2().unwrap()
}

/// All rows near, and those of most prompts equal but for rounding: one activation that rounds to the neighbouring
/// integer moves all rows after it.
fn assert_near(what: &str, dir: &Path, model: &Model, storage: Storage) {
    let mut whole = 0;
    let off: Vec<Vec<f32>> = PROMPTS
        .iter()
        .map(|tokens| {
            let (got, want) = (logits_of(dir, tokens), model.logits(tokens, storage));
            assert_eq!((got.len(), got[0].len()), (want.len(), want[0].len()));
            let spread = want.iter().flatten().fold(0f32, |m, v| m.max(v.abs()));
            let off = |(a, b): (&Vec<f32>, &Vec<f32>)| a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            let off: Vec<f32> = got.iter().zip(&want).map(|pair| off(pair) / spread).collect();
            whole += usize::from(off.iter().all(|d| *d < 1e-4));
            off
        })
        .collect();
    assert!(whole >= 3 && off.iter().flatten().all(|d| *d < 0.02), "{what}: {off:?}");
}

fn written(model: &Model, config: &Value, storage: Storage) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    model.write(dir.path(), config, storage);
    dir
}

fn with(config: &Value, key: &str, value: Value) -> Value {
    let mut config = config.clone();
    match value {
        Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
        value => config[key] = value,
    }
    config
}

/// HF1BitLLM/Llama3-8B-1.58-100B-tokens: grouped heads, an untied head, packed with a scale that divides.
fn llama3() -> Value {
    json!({
        "_name_or_path": "", "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 100, "eos_token_id": 101, "hidden_act": "silu", "hidden_size": 128, "initializer_range": 0.02,
        "intermediate_size": 448, "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 1, "pretraining_tp": 1,
        "quantization_config": {"modules_to_not_convert": null, "quant_method": "bitnet"},
        "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 500000.0, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.44.0.dev0", "use_cache": true, "vocab_size": 112
    })
}

/// tiiuae/Falcon3-3B-Instruct-1.58bit: heads wider than the hidden size over their number.
fn falcon3() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "eos_token_id": 11,
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 96, "initializer_range": 0.02, "intermediate_size": 288,
        "max_position_embeddings": 32768, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 3,
        "num_hidden_layers": 2, "num_key_value_heads": 1, "pretraining_tp": 1,
        "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "bitnet"},
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000042, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 104
    })
}

/// tiiuae/Falcon-E-3B-Base.
fn falcon_e() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 11, "head_dim": 32, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
        "intermediate_size": 416, "max_position_embeddings": 32768, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "quantization_config": {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline",
            "modules_to_not_convert": null},
        "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 1000042, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 128
    })
}

/// 1bitLLM/bitnet_b1_58-3B: a `model_type` of another family, heads of 100, masters in F16, nothing said of quantisation.
fn first_reproduction() -> Value {
    json!({
        "_name_or_path": "1bitLLM/bitnet_b1_58-3B", "architectures": ["BitnetForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 200,
        "initializer_range": 0.02, "input_bits": 8, "intermediate_size": 540, "max_position_embeddings": 2048,
        "model_type": "llama", "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "pad_token_id": 900, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "torch_dtype": "float16", "use_cache": true, "vocab_size": 902, "weight_bits": 1
    })
}

#[test]
fn llama3_and_falcon3_are_packed_with_a_scale_that_divides() {
    for (name, config) in [("Llama3", llama3()), ("Falcon3", falcon3())] {
        let model = Model::new(config.clone(), StoredType::BF16);
        let dir = written(&model, &config, Storage::Packed);
        let (_, read) = open(dir.path()).unwrap();
        assert_eq!((read.family, read.quantization.mode, read.sub_norms), (Family::Llama, Mode::Offline, false));
        assert_near(name, dir.path(), &model, Storage::Packed);
    }
    assert_eq!(parsed(&falcon3()).q_size(), 192, "head_dim is read");
    // The same without it would be another model, which the shapes show.
    let (config, model) = (with(&falcon3(), "head_dim", Value::Null), Model::new(falcon3(), StoredType::BF16));
    let err = open(written(&model, &config, Storage::Packed).path()).unwrap_err();
    assert!(matches!(&err, Error::Tensor { tensor, .. } if tensor.contains("self_attn")), "{err}");
}

#[test]
fn falcon_e_runs_from_each_of_its_revisions() {
    let config = falcon_e();
    let plain = with(&config, "quantization_config", Value::Null);
    let model = Model::new(config.clone(), StoredType::BF16);
    let packed = written(&model, &config, Storage::Packed);
    assert_near("packed", packed.path(), &model, Storage::Packed);

    // `bfloat16`: a plain Llama configuration; the values show that it is ternary.
    let dense = written(&model, &plain, Storage::Dequantized);
    let (_, read) = open(dense.path()).unwrap();
    assert_eq!((read.quantization.mode, read.family), (Mode::Dequantized, Family::Llama));
    assert_eq!(ModelConfig::parse(Path::new("c"), &read.to_json()).unwrap(), read);
    let dense_logits = logits(dense.path());
    assert_near("bfloat16", dense.path(), &model, Storage::Dequantized);

    // `prequantized`: masters under the same configuration, which only the revision's name tells apart.
    let masters = written(&model, &plain, Storage::Masters(StoredType::BF16));
    let err = open(masters.path()).unwrap_err();
    assert!(matches!(err, Error::Tensor { .. }), "{err:?}");
    for part in ["self_attn.", "not ternary", "not a b1.58 checkpoint", "supported are", "prequantized", "online"] {
        assert!(err.to_string().contains(part), "{part}: {err}");
    }
    let cache = tempfile::tempdir().unwrap();
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let snapshot = cache.path().join("snapshots").join(commit);
    std::fs::create_dir_all(&snapshot).unwrap();
    model.write(&snapshot, &plain, Storage::Masters(StoredType::BF16));
    assert!(open(&snapshot).is_err());
    std::fs::create_dir(cache.path().join("refs")).unwrap();
    std::fs::write(cache.path().join("refs/prequantized"), commit).unwrap();
    let from_revision = logits(&snapshot);
    assert_near("prequantized", &snapshot, &model, Storage::Masters(StoredType::BF16));
    let said = with(&plain, "quantization_config", json!({"quant_method": "bitnet", "quantization_mode": "online"}));
    assert_eq!(logits(written(&model, &said, Storage::Masters(StoredType::BF16)).path()), from_revision);

    // What is dense can be packed, and is the same model.
    for form in [Form::Packed(candle_bitnet::checkpoint::ScaleStyle::Multiply), Form::Masters] {
        let target = tempfile::tempdir().unwrap();
        convert(dense.path(), target.path(), form, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(logits(target.path()), dense_logits, "{form:?}");
    }
}

fn converted(source: impl Into<ModelFiles>, target: &Path, form: Form) -> candle_bitnet::Result<Summary> {
    convert(source, target, form, &mut |_| ControlFlow::Continue(()))
}

#[test]
fn the_first_reproduction_has_norms_and_a_tokenizer_of_its_own() {
    let config = first_reproduction();
    let model = Model::new(config.clone(), StoredType::F16);
    let dir = written(&model, &config, Storage::Masters(StoredType::F16));
    let (decoder, read) = open(dir.path()).unwrap();
    assert_eq!((read.family, read.head_dim, read.activation), (Family::FirstReproduction, 100, Activation::Silu));
    assert_eq!((read.quantization.mode, read.sub_norms, read.vocab_size), (Mode::Online, true, 902));
    assert_eq!(ModelConfig::parse(Path::new("c"), &read.to_json()).unwrap(), read);
    drop(decoder);
    let whole = logits(dir.path());
    assert_near("1bitLLM", dir.path(), &model, Storage::Masters(StoredType::F16));
    let target = tempfile::tempdir().unwrap();
    convert(dir.path(), target.path(), Form::Packed(candle_bitnet::checkpoint::ScaleStyle::Multiply), &mut |_| {
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(logits(target.path()), whole);
    // Dense values of this family are always quantised again.
    let err = converted(dir.path(), &target.path().join("dense"), Form::Dense(DenseType::F16)).unwrap_err();
    assert!(err.to_string().contains("--to masters"), "{err}");

    // No tokenizer.json, but a SentencePiece model, with two tokens more.
    std::fs::copy(common::fixture("sentencepiece").join("bpe.model"), dir.path().join("tokenizer.model")).unwrap();
    let save = |name: &str, text: Value| std::fs::write(dir.path().join(name), text.to_string()).unwrap();
    save("added_tokens.json", json!({"<line>": 901, "<pad>": 900}));
    save("special_tokens_map.json", json!({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}));
    save(
        "tokenizer_config.json",
        json!({"add_bos_token": true, "add_eos_token": false, "bos_token": "<s>",
        "added_tokens_decoder": {"0": {"content": "<unk>", "special": true}, "901": {"content": "<line>", "special": false}},
        "tokenizer_class": "BitnetTokenizer"}),
    );
    let options = LoadOptions::new(&select_device(DeviceChoice::Cpu).unwrap()).threads(Some(2));
    let mut bitnet = BitNet::load(dir.path().to_str().unwrap(), options.clone()).unwrap();
    assert_eq!(bitnet.report().family, "BitnetForCausalLM");
    let tokenizer = bitnet.tokenizer().clone();
    assert_eq!((tokenizer.vocab_size(), tokenizer.adds_bos(), tokenizer.eos_id()), (902, true, Some(2)));
    assert_eq!((tokenizer.token_to_id("<line>"), tokenizer.is_special(900)), (Some(901), true));
    let prompt = bitnet.encode("Hello<line>").unwrap();
    assert!(prompt.first() == Some(&1) && prompt.last() == Some(&901), "{prompt:?}");
    let text: Vec<_> = bitnet.generate(&prompt, &GenerateOptions::default().greedy().max_tokens(5)).unwrap().collect();
    assert!(text.iter().all(Result::is_ok) && !text.is_empty());

    // As a GGUF file, its norms have other names, and its pieces and added tokens are in the metadata.
    let file = target.path().join("model.gguf");
    let layout = I2sLayout::Rows4;
    let summary = converted(dir.path(), &file, Form::Gguf(GgufType::I2_S(layout))).unwrap();
    assert_eq!((summary.verified.matrices, summary.verified.rounded_tensors), (14, 0), "{summary:?}");
    let gguf = ModelFiles::from(&file).with_i2s_layout(Some(layout)).unwrap();
    assert_eq!(logits(gguf.clone()), whole);
    let again = Tokenizer::open(&gguf).unwrap();
    assert_eq!((again.adds_bos(), again.eos_id(), again.token_to_id("<line>")), (true, Some(2), Some(901)));
    assert_eq!(again.encode("Hello<line> there", true).unwrap(), tokenizer.encode("Hello<line> there", true).unwrap());
    // And back to a directory, as a model of the family that the file says it is.
    let back = target.path().join("back");
    converted(&gguf, &back, Form::Packed(candle_bitnet::checkpoint::ScaleStyle::Divide)).unwrap();
    assert_eq!(logits(&back), whole);
    // A tokenizer.json with the same pieces has merges instead of scores.
    let json = target.path().join("json");
    converted(dir.path(), &json, Form::Masters).unwrap();
    std::fs::write(json.join("tokenizer.json"), tokenizer.to_json().unwrap()).unwrap();
    std::fs::remove_file(json.join("tokenizer.model")).unwrap();
    let file = target.path().join("json.gguf");
    converted(&json, &file, Form::Gguf(GgufType::I2_S(layout))).unwrap();
    let again = Tokenizer::open(&ModelFiles::from(&file)).unwrap();
    assert_eq!(again.encode("Hello<line> there", true).unwrap(), tokenizer.encode("Hello<line> there", true).unwrap());

    for (name, text, reason) in [
        ("added_tokens.json", json!({"<line>": 905}), "leaves a gap"),
        ("added_tokens.json", json!({"<line>": 5}), "token 5 is \"<line>\""),
        ("added_tokens.json", json!({"<line>": "x"}), "no id"),
    ] {
        save("tokenizer_config.json", json!({}));
        save(name, text);
        let err = BitNet::load(dir.path().to_str().unwrap(), options.clone()).unwrap_err().to_string();
        assert!(err.contains(name) && err.contains(reason), "{err}");
    }
}

#[test]
fn what_is_not_b158_is_refused_with_what_was_found() {
    let refused = |config: Value, found: &str| {
        let err = ModelConfig::parse(Path::new("config.json"), &config.to_string()).unwrap_err();
        assert!(matches!(err, Error::Config { .. }) && err.to_string().contains(found), "{err}");
        err.to_string()
    };
    for (architecture, found) in [("MistralForCausalLM", "Mistral"), ("Qwen2ForCausalLM", "Qwen2")] {
        let text = refused(with(&llama3(), "architectures", json!([architecture])), found);
        assert!(text.contains("supported are") && text.contains("1bitLLM") && text.contains("Falcon-E"), "{text}");
    }
    let text = refused(with(&llama3(), "quantization_config", json!({"quant_method": "gptq", "bits": 4})), "gptq");
    assert!(text.contains("supported are"), "{text}");
    refused(with(&first_reproduction(), "weight_bits", json!(2)), "2 where 1, which is b1.58,");
    refused(with(&first_reproduction(), "input_bits", json!(4)), "4 where 8");
    refused(with(&llama3(), "rope_scaling", json!({"rope_type": "llama3", "factor": 8.0})), "llama3");
    // Norms of another family are not ignored.
    let model = Model::new(first_reproduction(), StoredType::F16);
    let config = with(&first_reproduction(), "architectures", json!(["LlamaForCausalLM"]));
    let err = open(written(&model, &config, Storage::Masters(StoredType::F16)).path()).unwrap_err();
    assert!(matches!(&err, Error::Tensor { tensor, .. } if tensor.contains("layer")), "{err}");
}
