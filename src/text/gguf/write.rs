//! A tokenizer as the metadata of a GGUF file, in the terms of llama.cpp (`tokenizer.ggml.*`), and whether it is the
//! same one when it is read back.

use super::super::sentencepiece::{Algorithm, MAX_SENTENCEPIECE_BYTES, Piece, PieceKind, SentencePiece, is_byte};
use super::super::{ChatTemplate, Tokenizer};
use super::Words;
use crate::checkpoint::ModelFiles;
use crate::checkpoint::gguf::Metadata;
use crate::checkpoint::limits::quoted;
use crate::{Error, Result};
use serde_json::Value;
use std::collections::HashMap;
use tokenizers::Model;

/// Texts whose tokens are compared after reading back: words, spaces, numbers, contractions, other scripts, bytes.
const PROBES: [&str; 9] = [
    "",
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, a tab\tand\n\n\nlines \r\n end ",
    "It's 1234567890 o'clock, isn't it? I'LL say 3.14159e-10!",
    "fn main() { println!(\"{:?}\", [1, 2, 3]); } // done",
    "Größe, naïve, Ελληνικά, русский, العربية, עברית, हिन्दी",
    "日本語のテキスト、中文字符，한국어",
    "👩‍🚀🏳️‍🌈 \u{200b}\u{feff} ﬁne e\u{301}",
    "▁▁ <0x0A> <s> </s> <|eot_id|> <|endoftext|>",
];

/// The tokenizer of a model, to be written to a GGUF file.
pub(crate) struct Written {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
}

impl Written {
    /// Opens the tokenizer and the chat template in `files`; `None` if there is no tokenizer.
    ///
    /// # Errors
    /// As [`Tokenizer::open`] and [`ChatTemplate::open`].
    pub(crate) fn open(files: &ModelFiles) -> Result<Option<Self>> {
        let has_one = match files.gguf()? {
            Some(gguf) => gguf.tokens().is_some(),
            None => files.contains("tokenizer.json") || files.contains("tokenizer.model"),
        };
        match has_one {
            true => Ok(Some(Self { tokenizer: Tokenizer::open(files)?, template: ChatTemplate::open(files)? })),
            false => Ok(None),
        }
    }

    /// The beginning-of-sequence token.
    pub(crate) fn bos(&self) -> Option<u32> {
        self.tokenizer.bos_id()
    }

    /// Its metadata, for a model of `vocab` tokens (a GGUF source keeps its own): ids beyond the tokenizer's become unused tokens, as llama.cpp's
    /// converter has them.
    ///
    /// # Errors
    /// [`Error::Text`] naming what GGUF cannot say.
    pub(crate) fn metadata(&self, files: &ModelFiles, vocab: usize) -> Result<Vec<(String, Metadata)>> {
        let tokenizer = &self.tokenizer;
        let json: Value = serde_json::from_str(&tokenizer.to_json()?).map_err(|e| self.fail(e.to_string()))?;
        let mut metadata = match files.contains("tokenizer.json") {
            true => self.of_json(&json, vocab)?,
            false => self.of_sentencepiece(files, &json, vocab)?,
        };
        let mut put = |key: &str, value: Metadata| metadata.entries.push((format!("tokenizer.ggml.{key}"), value));
        for id in metadata.tokens.len()..vocab {
            metadata.tokens.push(unused(id));
        }
        put("tokens", Metadata::Texts(metadata.tokens.iter().map(|t| t.text.clone()).collect()));
        if metadata.scores {
            put("scores", Metadata::F32s(metadata.tokens.iter().map(|t| t.score).collect()));
        }
        put("token_type", Metadata::I32s(metadata.tokens.iter().map(|t| t.kind.code()).collect()));
        for (key, name) in [("unk_token", "unknown_token_id"), ("pad_token", "padding_token_id")] {
            if let Some(id) = tokenizer.special_token(key).and_then(|text| tokenizer.token_to_id(text)) {
                put(name, Metadata::U32(id));
            }
        }
        let ends = tokenizer.encode("", true)?;
        put("add_bos_token", Metadata::Bool(tokenizer.adds_bos()));
        put("add_eos_token", Metadata::Bool(ends.last().is_some_and(|id| Some(*id) == tokenizer.eos_id())));
        let mut entries = metadata.entries;
        if let Some(template) = &self.template {
            entries.push(("tokenizer.chat_template".into(), Metadata::Text(template.source().to_owned())));
        }
        Ok(entries)
    }

    fn fail(&self, reason: impl Into<String>) -> Error {
        let reason = format!("{}: it cannot be written to a GGUF file; use a form of safetensors", reason.into());
        self.tokenizer.error(reason)
    }

    /// The tokens of a tokenizer.json.
    fn of_json(&self, json: &Value, vocab: usize) -> Result<Tokens> {
        let model = &json["model"];
        for (key, what) in [
            ("dropout", "drops merges at random"),
            ("continuing_subword_prefix", "marks the insides of words"),
            ("end_of_word_suffix", "marks the ends of words"),
        ] {
            if !(model[key].is_null() || model[key] == "" || model[key] == 0.0) {
                return Err(self.fail(what));
            }
        }
        let mut tokens = self.tokens(json, vocab)?;
        let steps = steps(&json["pre_tokenizer"]);
        let model_name = match model["type"].as_str() {
            Some("BPE") if steps.iter().any(|s| s["type"] == "ByteLevel") => "gpt2",
            Some("BPE") => "llama",
            other => return Err(self.fail(format!("is of type {:?}, not BPE", other.unwrap_or_default()))),
        };
        let mut entries = vec![("tokenizer.ggml.model".to_owned(), Metadata::Text(model_name.into()))];
        let merges = self.merges(model)?;
        if model_name == "gpt2" {
            if !json["normalizer"].is_null() {
                return Err(self.fail("normalises text"));
            }
            let known = |words: &Words| words.pre_tokenizer().ok().and_then(|p| serde_json::to_value(p).ok());
            let same = |words: &Words| known(words).is_some_and(|p| self::steps(&p) == steps);
            let Some(words) = Words::ALL.into_iter().find(same) else {
                return Err(self.fail("cuts words as no tokenizer that llama.cpp knows"));
            };
            entries.push(("tokenizer.ggml.pre".into(), Metadata::Text(words.name().into())));
            let merges = merges.into_iter().map(|[left, right]| format!("{left} {right}")).collect();
            entries.push(("tokenizer.ggml.merges".into(), Metadata::Texts(merges)));
            return Ok(Tokens { entries, tokens, scores: false });
        }
        // Scores that give the merges again: the earlier a piece is made, the higher; below all, what no merge makes.
        let mut ranks: HashMap<String, usize> = HashMap::new();
        for [left, right] in merges {
            let rank = ranks.len();
            ranks.entry(left + &right).or_insert(rank);
        }
        let last = ranks.len();
        for token in &mut tokens {
            token.score = -(*ranks.get(&token.text).unwrap_or(&last) as f32);
        }
        let text = json["normalizer"].to_string() + &json["pre_tokenizer"].to_string();
        let prefix = text.contains("\"Prepend\"") || text.contains("\"first\"") || text.contains("\"always\"");
        entries.push(("tokenizer.ggml.pre".into(), Metadata::Text("default".into())));
        entries.push(("tokenizer.ggml.add_space_prefix".into(), Metadata::Bool(prefix)));
        Ok(Tokens { entries, tokens, scores: true })
    }

    /// The pieces of a tokenizer.model, with the tokens that were added to them.
    fn of_sentencepiece(&self, files: &ModelFiles, json: &Value, vocab: usize) -> Result<Tokens> {
        let name = "tokenizer.model";
        let bytes = files.read(name, MAX_SENTENCEPIECE_BYTES)?;
        let model = SentencePiece::parse(&files.path(name), &bytes.unwrap_or_default())?;
        let mut tokens = model.pieces;
        // Those from files beside it take the ids behind.
        for added in self.tokens(json, vocab)?.into_iter().skip(tokens.len()) {
            tokens.push(added);
        }
        let kind = match model.algorithm {
            Algorithm::Bpe => "llama",
            Algorithm::Unigram => "t5",
        };
        let mut entries = vec![
            ("tokenizer.ggml.model".to_owned(), Metadata::Text(kind.into())),
            ("tokenizer.ggml.pre".into(), Metadata::Text("default".into())),
            ("tokenizer.ggml.add_space_prefix".into(), Metadata::Bool(model.add_dummy_prefix)),
            ("tokenizer.ggml.remove_extra_whitespaces".into(), Metadata::Bool(model.remove_extra_whitespaces)),
        ];
        if !model.charsmap.is_empty() {
            entries.push(("tokenizer.ggml.precompiled_charsmap".into(), Metadata::Bytes(model.charsmap)));
        }
        Ok(Tokens { entries, tokens, scores: true })
    }

    /// All tokens by id; those of the vocabulary have no scores yet.
    fn tokens(&self, json: &Value, vocab: usize) -> Result<Vec<Piece>> {
        let mut by_id: HashMap<u64, Piece> = HashMap::new();
        let piece = |text: &str, kind| Piece { text: text.to_owned(), score: 0.0, kind };
        for (text, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
            let kind = if is_byte(text) { PieceKind::Byte } else { PieceKind::Normal };
            by_id.insert(id.as_u64().unwrap_or(u64::MAX), piece(text, kind));
        }
        let unknown = json["model"]["unk_token"].as_str();
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let text = added["content"].as_str().unwrap_or_default();
            for flag in ["lstrip", "rstrip", "single_word"] {
                if added[flag] == true {
                    let text = quoted(text);
                    return Err(self.fail(format!("token {text:?} is set apart from what is around it ({flag})")));
                }
            }
            let kind = match added["special"] == true {
                true if Some(text) == unknown => PieceKind::Unknown,
                true => PieceKind::Control,
                false => PieceKind::UserDefined,
            };
            by_id.insert(added["id"].as_u64().unwrap_or(u64::MAX), piece(text, kind));
        }
        let end = by_id.keys().max().map_or(0, |id| id.saturating_add(1));
        if end > vocab as u64 {
            return Err(self.fail(format!("has ids up to {}, but the model has {vocab} tokens", end - 1)));
        }
        Ok((0..end).map(|id| by_id.remove(&id).unwrap_or_else(|| unused(id as usize))).collect())
    }

    /// Merges, whichever way they are written.
    fn merges(&self, model: &Value) -> Result<Vec<[String; 2]>> {
        let pair = |merge: &Value| match merge {
            Value::Array(two) => match two.as_slice() {
                [Value::String(left), Value::String(right)] => Some([left.clone(), right.clone()]),
                _ => None,
            },
            Value::String(text) => text.split_once(' ').map(|(left, right)| [left.to_owned(), right.to_owned()]),
            _ => None,
        };
        let merges = model["merges"].as_array().into_iter().flatten();
        merges.map(|m| pair(m).ok_or_else(|| self.fail("has merges that are not two tokens"))).collect()
    }

    /// Compares what was read back from a GGUF file with this: every token's text and kind, what words of one token become,
    /// some texts there and back, and the chat template.
    ///
    /// # Errors
    /// [`Error::Text`] for the first difference.
    pub(crate) fn check(&self, files: &ModelFiles) -> Result<()> {
        let (want, got) = (&self.tokenizer, Tokenizer::open(files)?);
        let differs = |what: String| Err(self.fail(format!("read back, {what}")));
        let highest = |t: &Tokenizer| t.inner().get_vocab(true).into_values().max();
        let count = highest(want).map_or(0, |id| id + 1);
        if want.special_ids() != got.special_ids() {
            let (a, b) = (got.special_ids().len(), want.special_ids().len());
            return differs(format!("{a} tokens are special, not {b}, or others"));
        }
        let (from, to) = (want.inner().get_model(), got.inner().get_model());
        for id in 0..count {
            let Some(text) = want.id_to_token(id) else { continue };
            let again = got.id_to_token(id);
            if again.as_ref() != Some(&text) {
                return differs(format!("token {id} is {:?}, not {:?}", again.unwrap_or_default(), quoted(&text)));
            }
            let cut = |model: &tokenizers::ModelWrapper| {
                let tokens = model.tokenize(&text).unwrap_or_default();
                tokens.into_iter().map(|t| t.id).collect::<Vec<u32>>()
            };
            // An added token never reaches the model.
            if !want.inner().get_added_vocabulary().get_vocab().contains_key(&text) && cut(from) != cut(to) {
                return differs(format!("the word {:?} is cut in another way", quoted(&text)));
            }
        }
        for text in PROBES {
            for special in [false, true] {
                let (a, b) = (want.encode(text, special)?, got.encode(text, special)?);
                if a != b {
                    return differs(format!("{text:?} has the tokens {b:?}, not {a:?}"));
                }
                for skip in [false, true] {
                    let (a, b) = (want.decode(&a, skip)?, got.decode(&b, skip)?);
                    if a != b {
                        return differs(format!("the tokens of {text:?} spell {b:?}, not {a:?}"));
                    }
                }
            }
        }
        let template = ChatTemplate::open(files)?;
        match template.as_ref().map(ChatTemplate::source) == self.template.as_ref().map(ChatTemplate::source) {
            true => Ok(()),
            false => differs("the chat template is another".into()),
        }
    }
}

/// The token of an id that the tokenizer has not.
fn unused(id: usize) -> Piece {
    Piece { text: format!("[PAD{id}]"), score: -1e4, kind: PieceKind::Unused }
}

/// What is to be written.
struct Tokens {
    entries: Vec<(String, Metadata)>,
    tokens: Vec<Piece>,
    /// Whether tokens have scores.
    scores: bool,
}

/// The steps of a pre-tokeniser, without what only concerns offsets and with defaults left out.
fn steps(pre_tokenizer: &Value) -> Vec<Value> {
    let one = |step: &Value| {
        let mut step = step.clone();
        if let Some(fields) = step.as_object_mut() {
            fields.remove("trim_offsets");
            fields.retain(|key, value| key != "invert" || value != false);
        }
        step
    };
    match pre_tokenizer["pretokenizers"].as_array() {
        Some(all) => all.iter().flat_map(steps).collect(),
        None if pre_tokenizer.is_null() => Vec::new(),
        None => vec![one(pre_tokenizer)],
    }
}
