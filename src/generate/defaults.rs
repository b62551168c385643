//! What a checkpoint recommends for generation.

use crate::checkpoint::ModelFiles;
use crate::text::{ChatTemplate, Tokenizer, read_json};
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Most end-of-sequence tokens that a checkpoint may name.
const MAX_EOS: usize = 256;

/// Tokens that end a turn in known chat templates. One counts if the template writes it and the tokenizer has it as a
/// special token: checkpoints may leave it out of their end-of-sequence lists, and would then talk to themselves.
const END_OF_TURN: [&str; 7] =
    ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|eot|>", "<|eom_id|>"];

/// Top-k of transformers (4 and 5) where a checkpoint asks for sampling and says nothing of it. It leaves its own default out
/// of the files that it writes.
const TRANSFORMERS_TOP_K: usize = 50;

/// Recommended values of a checkpoint. [`super::GenerateOptions::resolve`] says how they are used.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end generation, ascending: the union of what generation_config.json, config.json, the tokenizer and
    /// the chat template's end of turn say.
    pub eos: Vec<u32>,
    /// Whether tokens are drawn instead of the most likely one being taken.
    pub do_sample: bool,
    /// Temperature.
    pub temperature: Option<f32>,
    /// Top-k; 0 is off. Of a checkpoint that samples and does not say, what transformers takes: 50.
    pub top_k: Option<usize>,
    /// Top-p.
    pub top_p: Option<f32>,
    /// Min-p.
    pub min_p: Option<f32>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
    /// Tokens to generate at most.
    pub max_new_tokens: Option<usize>,
    /// Length of prompt and answer together at most.
    pub max_length: Option<usize>,
}

impl GenerationDefaults {
    /// [`Self::open`] for the directory `dir`.
    ///
    /// # Errors
    /// The same.
    pub fn from_dir(dir: impl AsRef<Path>, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Result<Self> {
        Self::open(&dir.as_ref().into(), tokenizer, template)
    }

    /// Reads a model's `generation_config.json` and the `eos_token_id` of its `config.json`; both files may be missing.
    ///
    /// # Errors
    /// [`Error::Config`] naming file and key, or [`Error::File`] if a file is no JSON object.
    pub fn open(files: &ModelFiles, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Result<Self> {
        let (generation, model) = ("generation_config.json", "config.json");
        let mut defaults = match read_json(files, generation)? {
            Some(config) => Self::from_generation_config(&files.path(generation), &config)?,
            None => Self::default(),
        };
        if let Some(config) = read_json(files, model)? {
            defaults.eos.extend(eos(&files.path(model), &config)?);
        }
        defaults.add_text_eos(tokenizer, template);
        Ok(defaults)
    }

    /// Reads a parsed generation_config.json; `path` names it in errors. End-of-sequence tokens are those of the file
    /// alone.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn from_generation_config(path: &Path, config: &Value) -> Result<Self> {
        let number = |key: &str, accepts: fn(f32) -> bool, range: &str| {
            field(path, config, key, &format!("a number, {range}"), |v| {
                v.as_f64().map(|v| v as f32).filter(|v| v.is_finite() && accepts(*v))
            })
        };
        let count = |key: &str| {
            field(path, config, key, "an integer, 0 or more", |v| {
                v.as_u64().map(|n| usize::try_from(n).unwrap_or(usize::MAX))
            })
        };
        let do_sample = field(path, config, "do_sample", "true or false", Value::as_bool)?.unwrap_or(false);
        Ok(Self {
            eos: eos(path, config)?,
            do_sample,
            temperature: number("temperature", |v| v >= 0.0, "0 or more")?,
            top_k: count("top_k")?.or(do_sample.then_some(TRANSFORMERS_TOP_K)),
            top_p: number("top_p", |v| v > 0.0 && v <= 1.0, "greater than 0, up to 1")?,
            min_p: number("min_p", |v| (0.0..=1.0).contains(&v), "0 to 1")?,
            repetition_penalty: number("repetition_penalty", |v| v > 0.0, "greater than 0")?,
            max_new_tokens: count("max_new_tokens")?.filter(|n| *n > 0),
            max_length: count("max_length")?.filter(|n| *n > 0),
        })
    }

    /// Adds the end-of-sequence token of the tokenizer and the end-of-turn token that the chat template writes.
    pub fn add_text_eos(&mut self, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) {
        self.eos.extend(tokenizer.eos_id());
        for token in END_OF_TURN {
            let id = tokenizer.token_to_id(token).filter(|id| tokenizer.is_special(*id));
            self.eos.extend(id.filter(|_| template.is_some_and(|t| t.source().contains(token))));
        }
        self.eos.sort_unstable();
        self.eos.dedup();
    }
}

/// A key that may be missing or null.
fn field<T>(
    path: &Path,
    config: &Value,
    key: &str,
    expected: &str,
    parse: impl FnOnce(&Value) -> Option<T>,
) -> Result<Option<T>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => parse(value).map(Some).ok_or_else(|| {
            let shown: String = value.to_string().chars().take(80).collect();
            Error::config(path, key, format!("is {shown}; expected {expected}"))
        }),
    }
}

/// `eos_token_id`: an id or a list of ids.
fn eos(path: &Path, config: &Value) -> Result<Vec<u32>> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids =
        field(path, config, "eos_token_id", "a token id or a list of at most 256 token ids", |value| match value {
            Value::Array(list) if list.len() <= MAX_EOS => list.iter().map(id).collect(),
            value => id(value).map(|id| vec![id]),
        })?;
    Ok(ids.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(config: Value) -> Result<GenerationDefaults> {
        GenerationDefaults::from_generation_config(Path::new("generation_config.json"), &config)
    }

    #[test]
    fn reads_what_is_there() {
        let d =
            parse(json!({"eos_token_id": [1, 2], "do_sample": true, "temperature": 0.6, "top_k": 40, "top_p": null,
                             "repetition_penalty": 1.1, "max_length": 512, "other": {}}))
            .unwrap();
        assert_eq!(d.eos, [1, 2]);
        assert_eq!((d.do_sample, d.temperature, d.top_k, d.top_p), (true, Some(0.6), Some(40), None));
        assert_eq!((d.repetition_penalty, d.max_length, d.max_new_tokens), (Some(1.1), Some(512), None));
        assert_eq!(parse(json!({"eos_token_id": 3})).unwrap().eos, [3]);
        let top_k = |config: Value| parse(config).unwrap().top_k;
        assert_eq!(top_k(json!({"do_sample": true, "temperature": 0.6, "top_p": 0.9})), Some(50), "as transformers");
        assert_eq!(top_k(json!({"do_sample": true, "top_k": null})), Some(50));
        assert_eq!(top_k(json!({"do_sample": true, "top_k": 0})), Some(0));
        assert_eq!(top_k(json!({"temperature": 0.6})), None);
        assert_eq!(parse(json!({})).unwrap(), GenerationDefaults::default());
    }

    #[test]
    fn malformed_values_are_named() {
        for (config, key) in [
            (json!({"eos_token_id": -1}), "eos_token_id"),
            (json!({"eos_token_id": [1, "2"]}), "eos_token_id"),
            (json!({"eos_token_id": vec![1; 257]}), "eos_token_id"),
            (json!({"eos_token_id": 4_294_967_296u64}), "eos_token_id"),
            (json!({"do_sample": "yes"}), "do_sample"),
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"temperature": 1e300}), "temperature"),
            (json!({"top_p": 2}), "top_p"),
            (json!({"top_k": -3}), "top_k"),
            (json!({"repetition_penalty": 0}), "repetition_penalty"),
            (json!({"max_length": 1.5}), "max_length"),
        ] {
            let error = parse(config).unwrap_err();
            assert!(matches!(&error, Error::Config { key: k, .. } if k == key), "{error}");
            assert!(error.to_string().contains("generation_config.json"));
        }
    }
}
