//! The built-in model: there without a file, a network or a cache, and what it should be.

use candle_bitnet::checkpoint::hub::HubOptions;
use candle_bitnet::checkpoint::{BUILTIN, Checkpoint, ModelFiles};
use candle_bitnet::evaluate::{Windows, score};
use candle_bitnet::generate::GenerateOptions;
use candle_bitnet::model::CheckpointWeights;
use candle_bitnet::model::config::{Mode, ModelConfig, Projection};
use candle_bitnet::model::convert::verify;
use candle_bitnet::text::Message;
use candle_bitnet::train::Recipe;
use candle_bitnet::{BitNet, Error, LoadOptions, LoadedDecoder};
use candle_core::Device;
use std::path::{Path, PathBuf};

/// Bytes that it may take of the repository, and of the program.
const MAX_BYTES: u64 = 6_000_000;

/// Nothing outside the program can be reached.
fn options() -> LoadOptions {
    LoadOptions::new(&Device::Cpu).hub(HubOptions { offline: true, ..HubOptions::default() })
}

fn load() -> BitNet {
    BitNet::load(BUILTIN, options()).unwrap()
}

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/shakespeare")
}

#[test]
fn it_is_there_and_writes() {
    let mut model = load();
    assert_eq!(model.report().family, "BitNetForCausalLM");
    let prompt = model.encode("ROMEO:").unwrap();
    let options = GenerateOptions::default().seed(1).max_tokens(24);
    let text: String = model.generate(&prompt, &options).unwrap().map(|piece| piece.unwrap().text).collect();
    assert!(text.chars().filter(|c| c.is_alphabetic()).count() >= 8, "{text:?}");
    let decoder = LoadedDecoder::load(BUILTIN, &crate::options()).unwrap();
    assert_eq!(decoder.files, Some(ModelFiles::Builtin));
}

#[test]
fn it_is_the_model_in_the_repository_and_small() {
    let files = ModelFiles::Builtin;
    let mut bytes = 0;
    for (name, _) in files.list().unwrap() {
        let stored = std::fs::read(dir().join(&name)).unwrap();
        assert!(files.read(&name, MAX_BYTES).unwrap().unwrap() == stored, "{name}");
        bytes += stored.len() as u64;
    }
    assert!(bytes <= MAX_BYTES, "{bytes}");
    let verified = verify(&dir(), files).unwrap();
    assert_eq!(verified.inexact_scales, 0);
}

#[test]
fn the_recipe_beside_it_is_its_own() {
    let recipe = Recipe::read(&dir().join("recipe.toml")).unwrap();
    recipe.check().unwrap();
    let model = load();
    let (config, end) = (model.decoder().config(), model.tokenizer().eos_id().unwrap());
    let mut trained = recipe.model.config(end).unwrap();
    // Trained as masters, shipped packed.
    trained.quantization = config.quantization.clone();
    assert_eq!(*config, trained);
    assert!(recipe.optimization.quantize);
}

#[test]
fn every_code_and_scale_is_a_weight() {
    let checkpoint = Checkpoint::open(ModelFiles::Builtin).unwrap();
    let (path, text) = checkpoint.config();
    let config = ModelConfig::parse(path, text).unwrap();
    assert!(config.sub_norms && config.quantization.mode == Mode::Offline && path == Path::new("builtin/config.json"));
    let weights = CheckpointWeights::new(&checkpoint, &config).unwrap();
    for layer in 0..config.num_layers {
        for which in Projection::ALL {
            let name = config.projection_name(layer, which);
            let packed = weights.ternary(layer, which).unwrap().unwrap();
            let (histogram, multiplier) = (packed.histogram(), packed.scale().multiplier());
            assert_eq!(histogram.iter().sum::<usize>(), packed.rows() * packed.cols(), "{name}");
            assert!(histogram.iter().all(|n| *n > 0), "{name}: {histogram:?}");
            assert!(multiplier.is_normal() && multiplier > 0.0, "{name}: {multiplier}");
        }
    }
}

#[test]
fn it_predicts_verse() {
    let model = load();
    let text = include_str!("texts/verse.txt");
    let ids = model.tokenizer().encode(text, false).unwrap();
    assert_eq!(model.tokenizer().decode(&ids, true).unwrap(), text);
    let bos: Vec<u32> = model.tokenizer().bos_id().into_iter().collect();
    let windows = Windows::new(model.decoder().context());
    let score = score(model.decoder(), model.report().kv_dtype, &bos, &ids, &windows, &mut |_| ()).unwrap();
    let bits = score.bits_per_byte(text.len());
    assert!((0.5..4.0).contains(&bits), "{bits} bits per byte");
}

#[test]
fn it_is_no_chat_model_and_says_which_one_is() {
    let error = load().chat_prompt(&[Message::user("Hello")]).unwrap_err();
    assert!(matches!(error, Error::Text { .. }), "{error}");
    for part in ["built-in", "microsoft/bitnet-b1.58-2B-4T", "plain prompt"] {
        assert!(error.to_string().contains(part), "{error}");
    }
}
