//! The metadata of a GGUF file: what config.json, generation_config.json and the tokenizer say, in llama.cpp's terms.

use super::super::{GgufType, Model};
use crate::checkpoint::gguf::{Architecture, Metadata};
use crate::text::{GgufTokenizer, read_json};
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Version of ggml's block types.
const QUANTIZATION_VERSION: u32 = 2;

/// Keys that say how tensors are stored, which changes.
const STORAGE: [&str; 5] =
    ["general.alignment", "general.file_type", "general.quantization_version", "split.count", "split.no"];

/// Tokens that end a text, by their names in a GGUF file.
const STOPS: [&str; 3] = ["eos", "eot", "eom"];

/// All of it, in the order in which it is written.
pub(super) fn of(
    model: &Model,
    arch: Architecture,
    kind: GgufType,
    tokenizer: Option<&GgufTokenizer>,
    target: &Path,
) -> Result<Vec<(String, Metadata)>> {
    let storage = [
        ("general.file_type".to_owned(), Metadata::U32(file_type(kind))),
        ("general.quantization_version".into(), Metadata::U32(QUANTIZATION_VERSION)),
    ];
    if let Some(gguf) = model.checkpoint.source().gguf()? {
        let kept = gguf.metadata().filter(|(key, _)| !STORAGE.contains(key));
        return Ok(kept.map(|(key, value)| (key.to_owned(), value)).chain(storage).collect());
    }
    let name = target.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    let mut all = vec![
        ("general.architecture".to_owned(), Metadata::Text(arch.name().into())),
        ("general.type".into(), Metadata::Text("model".into())),
        ("general.name".into(), Metadata::Text(name)),
    ];
    all.extend(storage);
    all.extend(sampling(model)?);
    all.extend(shape(model, arch)?);
    all.extend(special_tokens(model, tokenizer)?);
    if let Some(tokenizer) = tokenizer {
        all.extend(tokenizer.metadata(model.checkpoint.source(), model.config.vocab_size)?);
    }
    Ok(all)
}

/// llama.cpp's `LLAMA_FTYPE`; I2_S as microsoft/BitNet numbers it.
fn file_type(kind: GgufType) -> u32 {
    match kind {
        GgufType::TQ1_0 => 36,
        GgufType::TQ2_0 => 37,
        GgufType::I2_S(_) => 40,
    }
}

fn shape(model: &Model, arch: Architecture) -> Result<Vec<(String, Metadata)>> {
    let config = &model.config;
    let path = model.checkpoint.config().0;
    let mut all = Vec::new();
    for (key, size) in [
        ("vocab_size", config.vocab_size),
        ("context_length", config.max_positions),
        ("embedding_length", config.hidden_size),
        ("block_count", config.num_layers),
        ("feed_forward_length", config.intermediate_size),
        ("rope.dimension_count", config.head_dim),
        ("attention.head_count", config.num_heads),
        ("attention.head_count_kv", config.num_kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
    ] {
        let size =
            u32::try_from(size).map_err(|_| Error::config(path, key, format!("{size} is too large for GGUF")))?;
        all.push((format!("{}.{key}", arch.name()), Metadata::U32(size)));
    }
    let theta = config.rope_theta as f32;
    // The shortest decimal number that reads as this f32 is what a reader takes it for.
    if theta.to_string().parse() != Ok(config.rope_theta) {
        let reason = format!("{} is no f32, and GGUF has no other place for it; use safetensors", config.rope_theta);
        return Err(Error::config(path, "rope_theta", reason));
    }
    all.push((format!("{}.rope.freq_base", arch.name()), Metadata::F32(theta)));
    let eps = format!("{}.attention.layer_norm_rms_epsilon", arch.name());
    all.push((eps, Metadata::F32(config.rms_norm_eps)));
    Ok(all)
}

/// BOS, and what ends a text: the tokens of config.json, then those of generation_config.json.
fn special_tokens(model: &Model, tokenizer: Option<&GgufTokenizer>) -> Result<Vec<(String, Metadata)>> {
    let key = |name: &str| format!("tokenizer.ggml.{name}_token_id");
    let mut all = Vec::new();
    if let Some(id) = model.config.bos_token.or_else(|| tokenizer.and_then(GgufTokenizer::bos)) {
        all.push((key("bos"), Metadata::U32(id)));
    }
    let source = model.checkpoint.source();
    let mut stops = model.config.eos_tokens.clone();
    if let Some(generation) = read_json(source, "generation_config.json")? {
        let listed = match &generation["eos_token_id"] {
            Value::Array(ids) => ids.clone(),
            one => vec![one.clone()],
        };
        for id in listed.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()) {
            if !stops.contains(&id) {
                stops.push(id);
            }
        }
    }
    if stops.len() > STOPS.len() {
        let reason = format!("{} tokens; a GGUF file can name {} that end a text", stops.len(), STOPS.len());
        return Err(Error::config(source.path("generation_config.json"), "eos_token_id", reason));
    }
    all.extend(STOPS.iter().zip(stops).map(|(name, id)| (key(name), Metadata::U32(id))));
    Ok(all)
}

/// Recommended sampling, under llama.cpp's keys.
fn sampling(model: &Model) -> Result<Vec<(String, Metadata)>> {
    let Some(generation) = read_json(model.checkpoint.source(), "generation_config.json")? else {
        return Ok(Vec::new());
    };
    if generation["do_sample"] != true {
        return Ok(Vec::new());
    }
    let key = |name: &str| format!("general.sampling.{name}");
    let mut all = Vec::new();
    // transformers' own temperature, where there is none.
    let temperature = generation["temperature"].as_f64().unwrap_or(1.0);
    all.push((key("temp"), Metadata::F32(temperature as f32)));
    if let Some(n) = generation["top_k"].as_u64().and_then(|n| i32::try_from(n).ok()) {
        all.push((key("top_k"), Metadata::I32(n)));
    }
    for (name, field) in [("top_p", "top_p"), ("min_p", "min_p"), ("penalty_repeat", "repetition_penalty")] {
        if let Some(x) = generation[field].as_f64() {
            all.push((key(name), Metadata::F32(x as f32)));
        }
    }
    Ok(all)
}
