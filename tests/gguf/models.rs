//! The same model in a GGUF file and in safetensors gives the same logits, bit for bit.

use super::builder::Builder;
use super::{FILES, decoder, logits};
use crate::common::{Expected, fixture};
use candle_bitnet::backend::DenseType;
use candle_bitnet::backend::cpu::KernelKind;
use candle_bitnet::checkpoint::gguf::Gguf;
use candle_bitnet::checkpoint::hub::HubOptions;
use candle_bitnet::checkpoint::{Checkpoint, ModelFiles, ScaleStyle, StoredType};
use candle_bitnet::model::config::{Family, ModelConfig, Projection};
use candle_bitnet::model::convert::{Form, convert};
use candle_bitnet::model::{CheckpointWeights, Decoder};
use candle_bitnet::ternary::{I2sLayout, PackedTernary};
use candle_bitnet::text::Tokenizer;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

const F32: u32 = 0;
const F16: u32 = 1;
const BF16: u32 = 30;
const I2_S: u32 = 36;
const TQ2_0: u32 = 35;

/// How linear layers are written.
type Encode<'a> = &'a dyn Fn(Builder, &str, PackedTernary) -> Builder;

fn i2s(layout: I2sLayout) -> impl Fn(Builder, &str, PackedTernary) -> Builder {
    move |b, name, w| {
        let shape = [w.rows() as u64, w.cols() as u64];
        b.tensor(&format!("{name}.weight"), &shape, I2_S, w.to_i2s(layout).unwrap())
    }
}

fn f16_values(w: &PackedTernary, m: f32) -> Vec<u8> {
    let values = (0..w.rows()).flat_map(|r| (0..w.cols()).map(move |c| f32::from(w.weight(r, c)) * m));
    values.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect()
}

fn gguf_type(dtype: StoredType) -> u32 {
    match dtype {
        StoredType::F32 => F32,
        StoredType::F16 => F16,
        StoredType::BF16 => BF16,
        other => panic!("{other}"),
    }
}

const LINEARS: [&str; 7] = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

/// The metadata of a model, and its tensors but for linear layers.
fn skeleton(dir: &std::path::Path, arch: &str) -> (Builder, Checkpoint, ModelConfig) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let config = ModelConfig::parse(checkpoint.config().0, checkpoint.config().1).unwrap();
    let key = |k: &str| format!("{arch}.{k}");
    let mut b = Builder::new()
        .text("general.architecture", arch)
        .u32(&key("context_length"), config.max_positions as u32)
        .u32(&key("embedding_length"), config.hidden_size as u32)
        .u32(&key("block_count"), config.num_layers as u32)
        .u32(&key("feed_forward_length"), config.intermediate_size as u32)
        .u32(&key("attention.head_count"), config.num_heads as u32)
        .u32(&key("attention.head_count_kv"), config.num_kv_heads as u32)
        .u32(&key("attention.key_length"), config.head_dim as u32)
        .f32(&key("attention.layer_norm_rms_epsilon"), config.rms_norm_eps)
        .f32(&key("rope.freq_base"), config.rope_theta as f32);
    for t in checkpoint.tensors() {
        let name = t.name.clone();
        let gguf = match name.as_str() {
            "model.embed_tokens.weight" => "token_embd.weight".to_owned(),
            "model.norm.weight" => "output_norm.weight".to_owned(),
            "lm_head.weight" => "output.weight".to_owned(),
            name => {
                let (layer, rest) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
                let module = match rest {
                    "input_layernorm.weight" => "attn_norm",
                    "post_attention_layernorm.weight" => "ffn_norm",
                    "self_attn.attn_sub_norm.weight" => "attn_sub_norm",
                    "mlp.ffn_sub_norm.weight" => "ffn_sub_norm",
                    _ => continue,
                };
                format!("blk.{layer}.{module}.weight")
            }
        };
        let shape: Vec<u64> = t.shape.iter().map(|d| *d as u64).collect();
        let bytes = checkpoint.tensor(&name).unwrap().bytes().to_vec();
        b = b.tensor(&gguf, &shape, gguf_type(t.dtype), bytes);
    }
    (b, checkpoint, config)
}

fn model(dir: &std::path::Path, arch: &str, encode: Encode) -> Builder {
    let (mut b, checkpoint, config) = skeleton(dir, arch);
    let weights = CheckpointWeights::new(&checkpoint, &config).unwrap();
    for layer in 0..config.num_layers {
        for (which, name) in Projection::ALL.into_iter().zip(LINEARS) {
            let mut w = weights.ternary(layer, which).unwrap().unwrap();
            let heads = match which {
                Projection::Query => config.num_heads,
                _ => config.num_kv_heads,
            };
            if arch == "llama" && matches!(which, Projection::Query | Projection::Key) {
                // reshape(heads, 2, d/2, cols).swapaxes(1, 2): row h·d + 2j + i is row h·d + i·d/2 + j.
                let dim = w.rows() / heads;
                w = w.with_rows(|r| r / dim * dim + r % dim % 2 * (dim / 2) + r % dim / 2);
            }
            b = encode(b, &format!("blk.{layer}.{name}"), w);
        }
    }
    b
}

fn first_logits(model: &Decoder) -> Vec<Vec<f32>> {
    logits(model, &[1, 5, 200, 3, 77, 12, 300, 9])
}

fn fastest() -> KernelKind {
    KernelKind::available()[0]
}

fn run(b: &Builder, layout: Option<I2sLayout>) -> candle_bitnet::Result<Vec<Vec<f32>>> {
    let dir = tempfile::tempdir().unwrap();
    let files = ModelFiles::from(&b.write(dir.path())).with_i2s_layout(layout)?;
    decoder(&files, fastest()).map(|m| first_logits(&m))
}

#[test]
fn all_layouts_of_i2_s_give_the_model_of_the_directory() {
    let dir = fixture("a1_packed");
    let want = first_logits(&decoder(&dir, fastest()).unwrap());
    for layout in I2sLayout::ALL {
        let b = model(&dir, "bitnet-b1.58", &i2s(layout));
        assert!(run(&b, Some(layout)).unwrap() == want, "{layout}");
        if layout == I2sLayout::Blocks128 {
            assert!(run(&b, None).unwrap() == want, "the default");
            let old = model(&dir, "bitnet-25", &i2s(layout));
            assert!(run(&old, None).unwrap() == want, "bitnet-25 is bitnet-b1.58");
        }
    }
    let error = ModelFiles::from(&dir).with_i2s_layout(Some(I2sLayout::Rows4)).unwrap_err().to_string();
    assert!(error.contains("--i2s-layout") && error.contains("no GGUF file"), "{error}");
}

#[test]
fn rows_of_llama_are_put_in_order() {
    let dir = fixture("a3_llama");
    let want = first_logits(&decoder(&dir, fastest()).unwrap());
    let b = model(&dir, "llama", &i2s(I2sLayout::Blocks128));
    assert!(run(&b, None).unwrap() == want);
    let file = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&b.write(file.path())).unwrap();
    let config = ModelConfig::parse(checkpoint.config().0, checkpoint.config().1).unwrap();
    assert_eq!((config.family, config.sub_norms), (Family::Llama, false));
}

#[test]
fn scales_of_their_own_multiply_and_three_values_are_ternary() {
    let dir = fixture("a1_packed");
    let want = first_logits(&decoder(&dir, fastest()).unwrap());
    let shape = |w: &PackedTernary| [w.rows() as u64, w.cols() as u64];
    // -1, 0, 1 with a scale, as llama.cpp's converter writes architecture bitnet.
    let split: Encode = &|b, name, w| {
        let m = w.scale().multiplier();
        b.tensor(&format!("{name}.weight"), &shape(&w), F16, f16_values(&w, 1.0)).tensor(
            &format!("{name}.scale"),
            &[1],
            F32,
            m.to_le_bytes().to_vec(),
        )
    };
    assert!(run(&model(&dir, "bitnet-b1.58", split), None).unwrap() == want);
    // -m, 0, m in f32; said to be what they are.
    let whole: Encode = &|b, name, w| {
        let bytes = w.dequantize().iter().flat_map(|v| v.to_le_bytes()).collect();
        b.tensor(&format!("{name}.weight"), &shape(&w), F32, bytes)
    };
    let whole = model(&dir, "bitnet-b1.58", whole);
    assert!(run(&whole, None).unwrap() == want);
    let file = tempfile::tempdir().unwrap();
    let config = |b: &Builder| Checkpoint::open(&b.write(file.path())).unwrap().config().1.to_owned();
    assert!(config(&whole).contains("offline"));
    // Architecture bitnet is the same but for its activation.
    let silu = run(&model(&dir, "bitnet", split), None).unwrap();
    assert!(silu != want && silu.iter().flatten().all(|v| v.is_finite()));
    // A scale on top of I2_S.
    let double: Encode = &|b, name, w| {
        let (m, w) = (w.scale().multiplier(), w.with_scale(candle_bitnet::ternary::Scale::Multiply(1.0)));
        let b = i2s(I2sLayout::Blocks128)(b, name, w);
        b.tensor(&format!("{name}.scale"), &[1], F32, m.to_le_bytes().to_vec())
    };
    assert!(run(&model(&dir, "bitnet-b1.58", double), None).unwrap() == want);
}

#[test]
fn masters_are_quantised_in_bitnet_and_refused_in_llama() {
    let dir = fixture("a1_bf16");
    let (mut b, checkpoint, config) = skeleton(&dir, "bitnet-b1.58");
    for layer in 0..config.num_layers {
        for (which, name) in Projection::ALL.into_iter().zip(LINEARS) {
            let view = checkpoint.require(&format!("{}.weight", config.projection_name(layer, which))).unwrap();
            let shape = view.info.shape.iter().map(|d| *d as u64).collect::<Vec<_>>();
            b = b.tensor(&format!("blk.{layer}.{name}.weight"), &shape, BF16, view.bytes().to_vec());
        }
    }
    let want = first_logits(&decoder(&dir, fastest()).unwrap());
    assert!(run(&b, None).unwrap() == want);
    let file = tempfile::tempdir().unwrap();
    assert!(Checkpoint::open(&b.write(file.path())).unwrap().config().1.contains("online"));
    let mut llama = b.clone();
    for (key, value) in &mut llama.entries {
        let text = String::from_utf8(key.clone()).unwrap().replace("bitnet-b1.58.", "llama.");
        *key = text.clone().into_bytes();
        if text == "general.architecture" {
            *value = [&8u32.to_le_bytes()[..], &5u64.to_le_bytes(), b"llama"].concat();
        }
    }
    llama.tensors.retain(|t| !t.name.contains("sub_norm"));
    let error = run(&llama, None).unwrap_err().to_string();
    assert!(error.contains("tensor blk.0.") && error.contains("not ternary"), "{error}");
}

#[test]
fn heads_may_be_there_twice_or_be_another() {
    let dir = fixture("a1_packed");
    let want = first_logits(&decoder(&dir, fastest()).unwrap());
    let b = model(&dir, "bitnet-b1.58", &i2s(I2sLayout::Blocks128));
    let embedding = b.tensors.iter().find(|t| t.name == "token_embd.weight").unwrap().clone();
    let file = tempfile::tempdir().unwrap();
    let config = |b: &Builder| {
        let checkpoint = Checkpoint::open(&b.write(file.path())).unwrap();
        ModelConfig::parse(checkpoint.config().0, checkpoint.config().1).unwrap()
    };
    let twice = b.clone().tensor("output.weight", &embedding.shape, embedding.kind, embedding.bytes.clone());
    assert!(config(&b).tied_embeddings && config(&twice).tied_embeddings);
    assert!(run(&twice, None).unwrap() == want);
    let mut other = embedding.bytes.clone();
    *other.last_mut().unwrap() ^= 0x40;
    let other = b.tensor("output.weight", &embedding.shape, embedding.kind, other);
    assert!(!config(&other).tied_embeddings);
    assert!(run(&other, None).unwrap() != want);
}

#[test]
fn block_types_of_embedding_and_head_are_widened_by_candle() {
    let source = fixture("gguf_a1").join(FILES[2]);
    let gguf = Gguf::open(&source).unwrap();
    let info = gguf.header().tensors.iter().find(|t| t.name == "token_embd.weight").unwrap();
    let (rows, cols) = (info.shape[0], info.shape[1]);
    let mut values = vec![0f32; rows * cols];
    DenseType::F16.widen(&gguf.file().bytes()[info.range.clone()], &mut values);
    // The same file again, as a builder.
    let arch = "bitnet-b1.58";
    let mut b = Builder::new().text("general.architecture", arch);
    for (key, value) in [
        ("context_length", 512),
        ("embedding_length", 256),
        ("block_count", 2),
        ("feed_forward_length", 512),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ] {
        b = b.u32(&format!("{arch}.{key}"), value);
    }
    b = b.f32(&format!("{arch}.attention.layer_norm_rms_epsilon"), 1e-5).f32(&format!("{arch}.rope.freq_base"), 5e5);
    for t in &gguf.header().tensors {
        let shape: Vec<u64> = t.shape.iter().map(|d| *d as u64).collect();
        let kind = match t.dtype {
            StoredType::Ggml(t) => t.id(),
            other => gguf_type(other),
        };
        b = b.tensor(&t.name, &shape, kind, gguf.file().bytes()[t.range.clone()].to_vec());
    }
    assert!(b.tensors.iter().any(|t| t.kind == TQ2_0));
    let shape = [rows as u64, cols as u64];
    let exact = run(&b, None).unwrap();
    let tensor = Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap();
    for (dtype, id, near) in [
        (GgmlDType::Q8_0, 8, 0.15),
        (GgmlDType::Q6K, 14, 0.5),
        (GgmlDType::Q5_1, 7, 0.8),
        (GgmlDType::Q4_0, 2, 1.5),
        (GgmlDType::Q4K, 12, 1.5),
    ] {
        let blocks = QTensor::quantize(&tensor, dtype).unwrap();
        let wide = blocks.dequantize(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        let wide: Vec<f32> = wide.flatten_all().unwrap().to_vec1().unwrap();
        let wide: Vec<u8> = wide.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        let want = run(&b.clone().tensor("token_embd.weight", &shape, BF16, wide.clone()), None).unwrap();
        let bytes = blocks.data().unwrap().to_vec();
        let tied = b.clone().tensor("token_embd.weight", &shape, id, bytes.clone());
        let got = run(&tied, None).unwrap();
        assert!(got == want, "{dtype:?}");
        let differences: Vec<f32> =
            got.iter().flatten().zip(exact.iter().flatten()).map(|(a, b)| (a - b).abs()).collect();
        let mean = differences.iter().sum::<f32>() / differences.len() as f32;
        assert!(mean < near, "{dtype:?} moves logits by {mean}");
        // A head of its own beside an embedding in bf16.
        let untied =
            b.clone().tensor("token_embd.weight", &shape, BF16, wide).tensor("output.weight", &shape, id, bytes);
        assert!(run(&untied, None).unwrap() == want, "{dtype:?} as a head");
    }
    let bad = b.tensor("token_embd.weight", &shape, 23, vec![0; rows * 136]);
    let error = run(&bad, None).unwrap_err().to_string();
    assert!(error.contains("token_embd.weight: IQ4_XS where a dense type"), "{error}");
}

#[test]
fn what_is_not_b158_is_refused_by_name() {
    let dir = fixture("a1_packed");
    let b = model(&dir, "bitnet-b1.58", &i2s(I2sLayout::Blocks128));
    let fails = |b: &Builder, parts: &[&str]| {
        let error = run(b, None).map(|_| ()).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{parts:?} in {error}");
    };
    let weight = b.tensors.iter().find(|t| t.name == "blk.1.ffn_up.weight").unwrap().clone();
    let quantised = b.clone().tensor(&weight.name, &weight.shape, 8, vec![0; 344 * 128 / 32 * 34]);
    fails(&quantised, &["blk.1.ffn_up.weight", "Q8_0 values are not ternary"]);
    fails(&b.clone().tensor("rope_freqs.weight", &[16], 0, vec![0; 64]), &["rope_freqs.weight", "gives it no meaning"]);
    fails(&b.clone().tensor("blk.0.attn_q.bias", &[128], 0, vec![0; 512]), &["blk.0.attn_q.bias", "bias"]);
    let noise: Vec<u8> = (0..weight.bytes.len()).map(|i| ((i * i * 31) >> 3) as u8).collect();
    let mut damaged = noise;
    damaged[344 * 128 / 4..][..4].copy_from_slice(&0.1f32.to_le_bytes());
    fails(&b.clone().tensor(&weight.name, &weight.shape, I2_S, damaged), &["blk.1.ffn_up.weight", "are 3"]);
    // A GGUF name and Hugging Face's, for one and the same.
    fails(&b.clone().tensor("model.norm.weight", &[128], 0, vec![0; 512]), &["model.norm.weight", "two names"]);
    let mut missing = b.clone();
    missing.tensors.retain(|t| t.name != "blk.1.attn_v.weight");
    fails(&missing, &["tensor blk.1.attn_v.weight: missing"]);
    fails(&b.clone().text("general.architecture", "qwen2"), &["general.architecture", "qwen2", "bitnet-b1.58"]);
    fails(&b.clone().without("general.architecture"), &["general.architecture: missing"]);
    fails(&b.clone().without("bitnet-b1.58.block_count"), &["bitnet-b1.58.block_count: missing"]);
    fails(&b.clone().text("bitnet-b1.58.block_count", "two"), &["block_count", "\"two\"", "whole number"]);
    fails(&b.clone().u32("bitnet-b1.58.vocab_size", 7), &["vocab_size: 7, but token_embd.weight has"]);
    fails(&b.clone().text("bitnet-b1.58.rope.scaling.type", "yarn"), &["rope.scaling.type", "yarn"]);
    fails(&b.clone().u32("bitnet-b1.58.rope.dimension_count", 6), &["rope.dimension_count", "partial"]);
    fails(&b.clone().u32("bitnet-b1.58.attention.value_length", 6), &["value_length: 6"]);
    fails(&b.clone().u32("split.count", 4), &["split.count", "one of 4 parts", "--merge"]);
    fails(&b.clone().u32("bitnet-b1.58.attention.head_count", 0), &["num_attention_heads"]);
}

#[test]
fn files_are_found_by_name_and_in_directories() {
    let options = HubOptions { offline: true, ..HubOptions::default() };
    let path = fixture("gguf_a1").join(FILES[1]);
    let files = ModelFiles::find(path.to_str().unwrap(), &options).unwrap();
    assert_eq!(files, ModelFiles::Gguf { path: path.clone(), i2s_layout: None });
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("ggml-model.GGUF");
    std::fs::copy(&path, &copy).unwrap();
    let found = ModelFiles::find(dir.path().to_str().unwrap(), &options).unwrap();
    assert_eq!(found, ModelFiles::Gguf { path: copy, i2s_layout: None });
    std::fs::copy(&path, dir.path().join("another.gguf")).unwrap();
    let found = ModelFiles::find(dir.path().to_str().unwrap(), &options).unwrap();
    assert_eq!(found, ModelFiles::Directory(dir.path().into()), "two are not one");
    let error = ModelFiles::find("nowhere/model.gguf", &options).unwrap_err().to_string();
    assert!(error.contains("nowhere/model.gguf") && error.contains("no such file"), "{error}");
    let mut names: Vec<_> = files.list().unwrap().into_iter().map(|(n, _)| n).collect();
    names.sort();
    assert_eq!(names, ["config.json", "generation_config.json", "tokenizer_config.json"]);
    assert!(files.contains("config.json") && !files.contains("tokenizer.json"));
    assert!(files.read("config.json", 10).unwrap_err().to_string().contains("at most 10"));
    let mut text = String::new();
    std::io::Read::read_to_string(&mut files.reader("config.json").unwrap(), &mut text).unwrap();
    assert!(text.contains("BitNetForCausalLM") && files.reader("merges.txt").is_err());
}

#[test]
fn a_file_of_a_hub_repository_runs_from_the_cache() {
    let cache = tempfile::tempdir().unwrap();
    let (commit, repository) = ("0123456789abcdef0123456789abcdef01234567", "models--owner--model-gguf");
    let root = cache.path().join(repository);
    let snapshot = root.join("snapshots").join(commit);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(root.join("refs")).unwrap();
    std::fs::write(root.join("refs/main"), commit).unwrap();
    std::fs::copy(fixture("gguf_a1").join(FILES[2]), snapshot.join("tiny.gguf")).unwrap();
    let options = HubOptions { offline: true, cache_dir: Some(cache.path().into()), ..HubOptions::default() };
    let files = ModelFiles::find("owner/model-gguf:tiny.gguf", &options).unwrap();
    assert_eq!(files, ModelFiles::Gguf { path: snapshot.join("tiny.gguf"), i2s_layout: None });
    assert!(decoder(&files, fastest()).is_ok());
}

#[test]
fn every_type_of_one_model_has_the_same_codes() {
    let expected = Expected::load("gguf_a1");
    assert!(expected.prompts() > 0);
    let all: Vec<Vec<PackedTernary>> = FILES
        .iter()
        .map(|file| {
            let checkpoint = Checkpoint::open(&fixture("gguf_a1").join(file)).unwrap();
            let config = ModelConfig::parse(checkpoint.config().0, checkpoint.config().1).unwrap();
            let weights = CheckpointWeights::new(&checkpoint, &config).unwrap();
            let places = (0..2).flat_map(|layer| Projection::ALL.map(|which| (layer, which)));
            places.map(|(layer, which)| weights.ternary(layer, which).unwrap().unwrap()).collect()
        })
        .collect();
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    // Written again, they are the bytes of the files.
    for (file, weights) in FILES.iter().zip(&all) {
        let gguf = Gguf::open(&fixture("gguf_a1").join(file)).unwrap();
        for (which, w) in LINEARS.iter().zip(weights) {
            let name = format!("blk.0.{which}.weight");
            let info = gguf.header().tensors.iter().find(|t| t.name == name).unwrap();
            let d = f16::from_f32(w.scale().multiplier());
            let bytes = match *file {
                "model-i2_s.gguf" => w.to_i2s(I2sLayout::Blocks128),
                "model-tq1_0.gguf" => w.to_tq1_0(d),
                _ => w.to_tq2_0(d),
            };
            assert!(gguf.file().bytes()[info.range.clone()] == bytes.unwrap(), "{file} {name}");
        }
    }
}

#[test]
fn a_gguf_file_converts_to_a_directory() {
    let source = fixture("gguf_a1").join(FILES[0]);
    let want = first_logits(&decoder(&source, fastest()).unwrap());
    for form in [Form::Packed(ScaleStyle::Multiply), Form::Packed(ScaleStyle::Divide), Form::Masters] {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let summary = convert(&source, &target, form, &mut |_| std::ops::ControlFlow::Continue(())).unwrap();
        assert_eq!(summary.verified.matrices, 14);
        assert_eq!(summary.copied, ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]);
        let [had, has] = [&source, &target].map(|m| Tokenizer::open(&m.into()).unwrap());
        let text = "Hello, <|eot_id|> wörld 123";
        assert_eq!(has.encode(text, true).unwrap(), had.encode(text, true).unwrap());
        assert_eq!(has.bos_id(), had.bos_id());
        if summary.verified.inexact_scales == 0 {
            assert!(first_logits(&decoder(&target, fastest()).unwrap()) == want, "{form:?}");
        }
    }
}

/// Opening reads the head of a file and nothing else, whatever its size.
#[test]
#[cfg(unix)]
fn a_sparse_gigabyte_opens_at_once() {
    let b = model(&fixture("a1_packed"), "bitnet-b1.58", &i2s(I2sLayout::Blocks128))
        // A tokenizer of the size of Llama 3's.
        .strings("tokenizer.ggml.tokens", &(0..128_256).map(|i| format!("token{i}")).collect::<Vec<_>>())
        .strings("tokenizer.ggml.merges", &(0..280_147).map(|i| format!("to ken{i}")).collect::<Vec<_>>());
    let dir = tempfile::tempdir().unwrap();
    let path = b.write(dir.path());
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 30).unwrap();
    let start = std::time::Instant::now();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let took = start.elapsed();
    assert_eq!(checkpoint.files()[0].bytes().len(), 1 << 30);
    println!("opened a file of 1 GiB in {took:?}");
    assert!(took.as_secs_f64() < 0.2, "{took:?}");
}
