//! GGUF files: parity with transformers, round trips, tokenizers, and files that mean harm.

mod common;

#[path = "gguf/builder.rs"]
mod builder;
#[path = "gguf/hostile.rs"]
mod hostile;
#[path = "gguf/models.rs"]
mod models;
#[path = "gguf/text.rs"]
mod text;
#[path = "gguf/write.rs"]
mod write;

use candle_bitnet::backend::cpu::{CpuOptions, KernelKind};
use candle_bitnet::backend::{Backend, DenseType};
use candle_bitnet::checkpoint::{Checkpoint, ModelFiles};
use candle_bitnet::generate::GenerationDefaults;
use candle_bitnet::model::config::ModelConfig;
use candle_bitnet::model::{CheckpointWeights, Decoder, Logits, Sequence};
use candle_bitnet::text::{ChatTemplate, Message, Tokenizer};
use candle_core::Device;
use common::{Expected, argmax, fixture};

const FILES: [&str; 3] = ["model-i2_s.gguf", "model-tq1_0.gguf", "model-tq2_0.gguf"];

pub fn decoder(files: impl Into<ModelFiles>, kernel: KernelKind) -> candle_bitnet::Result<Decoder> {
    let checkpoint = Checkpoint::open(files)?;
    let (path, text) = checkpoint.config();
    let config = ModelConfig::parse(path, text)?;
    let backend = Backend::new(&Device::Cpu, CpuOptions { kernel: Some(kernel), threads: Some(2) })?;
    let weights = CheckpointWeights::new(&checkpoint, &config)?;
    Decoder::load(&backend, config.clone(), &weights, 256, |_| ())
}

pub fn logits(model: &Decoder, ids: &[u32]) -> Vec<Vec<f32>> {
    let cache = model.kv_cache(DenseType::F32, 1).unwrap();
    let sequence = Sequence { slot: 0, position: 0, tokens: ids };
    model.forward(&[sequence], &cache, Logits::All).unwrap().to_vec2().unwrap()
}

#[test]
fn every_ternary_type_passes_against_transformers_with_the_same_bits() {
    let expected = Expected::load("gguf_a1");
    let mut first: Option<Vec<Vec<Vec<f32>>>> = None;
    for file in FILES {
        for kernel in KernelKind::available() {
            let model = decoder(&fixture("gguf_a1").join(file), kernel).unwrap();
            let got: Vec<_> = (0..expected.prompts()).map(|i| logits(&model, &expected.ids(i))).collect();
            expected.judge(&got).unwrap_or_else(|e| panic!("{file}, {kernel}: {e}"));
            assert!(first.get_or_insert_with(|| got.clone()) == &got, "{file}, {kernel}: logits differ");
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    let expected = Expected::load("gguf_a1");
    let model = decoder(&fixture("gguf_a1").join(FILES[0]), KernelKind::available()[0]).unwrap();
    for prompt in (0..expected.prompts()).filter(|p| expected.greedy_firm(*p)) {
        let mut ids = expected.ids(prompt);
        let (start, want) = (ids.len(), expected.greedy(prompt));
        while ids.len() < start + want.len() {
            ids.push(argmax(logits(&model, &ids).last().unwrap()));
        }
        assert_eq!(ids[start..], want, "prompt {prompt}");
    }
}

#[test]
fn the_tokenizer_and_the_template_are_those_of_the_directory() {
    let dir = fixture("gguf_a1");
    let (want, expected) = (Tokenizer::from_dir(&dir).unwrap(), Expected::load("gguf_a1"));
    let want_template = ChatTemplate::from_dir(&dir).unwrap().unwrap();
    for file in FILES {
        let files = ModelFiles::from(&dir.join(file));
        let got = Tokenizer::open(&files).unwrap();
        for case in expected.json["tokenizer"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids = |key: &str| -> Vec<u32> { serde_json::from_value(case[key].clone()).unwrap() };
            assert_eq!(got.encode(text, false).unwrap(), ids("ids"), "{text:?}");
            assert_eq!(got.encode(text, true).unwrap(), ids("ids_with_special"), "{text:?}");
            assert_eq!(got.decode(&ids("ids"), false).unwrap(), case["decoded"].as_str().unwrap());
        }
        assert_eq!(
            (got.vocab_size(), got.special_ids(), got.bos_id(), got.eos_id(), got.adds_bos()),
            (want.vocab_size(), want.special_ids(), want.bos_id(), want.eos_id(), want.adds_bos())
        );
        let template = ChatTemplate::open(&files).unwrap().unwrap();
        let messages = [Message::user("Why is the sky blue?"), Message::assistant("It is."), Message::user("Yes")];
        let prompt = template.apply(&got, &messages, true).unwrap();
        assert_eq!(prompt, want_template.apply(&want, &messages, true).unwrap());
        for case in expected.json["chat"].as_array().unwrap() {
            let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
            let prompt = template.apply(&got, &messages, case["add_generation_prompt"].as_bool().unwrap()).unwrap();
            assert_eq!(prompt.text, case["text"].as_str().unwrap());
            assert_eq!(prompt.ids, serde_json::from_value::<Vec<u32>>(case["ids"].clone()).unwrap());
        }
        let defaults = GenerationDefaults::open(&files, &got, Some(&template)).unwrap();
        assert_eq!(defaults.eos, [375, 383], "end of text, and the end of turn that the template writes");
    }
}

#[test]
fn the_configuration_is_that_of_the_directory() {
    let dir = fixture("gguf_a1");
    let read = |path: &std::path::Path, text: &str| ModelConfig::parse(path, text).unwrap();
    let text = std::fs::read_to_string(dir.join("config.json")).unwrap();
    let want = read(&dir, &text);
    for file in FILES {
        let checkpoint = Checkpoint::open(&dir.join(file)).unwrap();
        assert_eq!(read(checkpoint.config().0, checkpoint.config().1), want, "{file}");
        assert!(checkpoint.is_gguf() && checkpoint.contains("model.layers.1.mlp.down_proj.weight"));
    }
}
