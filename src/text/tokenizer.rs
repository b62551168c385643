//! The tokenizer of a checkpoint.

use super::json::{parse_object, read_json};
use super::{IncrementalDecoder, MAX_JSON_BYTES, sentencepiece};
use crate::checkpoint::ModelFiles;
use crate::{Error, Result};
use serde_json::Value;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest `tokenizer.json` that is read: several times Llama 3's, whose 128k tokens and 280k merges take 9 to 17 MB.
pub const MAX_TOKENIZER_BYTES: u64 = 64 << 20;

/// Converts text to token ids and back, with the special tokens that the checkpoint declares. Cloning it is cheap.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    inner: tokenizers::Tokenizer,
    source: PathBuf,
    special: Vec<SpecialToken>,
    adds_bos: bool,
}

/// A `*_token` entry of tokenizer_config.json.
struct SpecialToken {
    /// The key, such as `bos_token`.
    key: String,
    text: String,
    id: Option<u32>,
}

impl Tokenizer {
    /// [`Self::open`] for the directory `dir`.
    ///
    /// # Errors
    /// The same.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        Self::open(&dir.as_ref().into())
    }

    /// Loads a model's `tokenizer.json`, or else its SentencePiece `tokenizer.model`, with the special tokens named by
    /// `tokenizer_config.json`, or by `special_tokens_map.json` where the former has none; or the tokenizer in a GGUF file.
    ///
    /// # Errors
    /// [`Error::Config`] naming the metadata key of a GGUF file;
    /// [`Error::File`] or [`Error::Io`] naming the file, if one is missing, larger than [`MAX_TOKENIZER_BYTES`], or not
    /// what it should be.
    pub fn open(files: &ModelFiles) -> Result<Self> {
        if let Some(gguf) = files.gguf()? {
            let built = guard(|| Ok(super::gguf::tokenizer(&gguf)));
            return built.map_err(|reason| Error::file(gguf.path(), reason))?;
        }
        let mut special = special_tokens(read_json(files, "tokenizer_config.json")?.as_ref());
        for (key, text) in special_tokens(read_json(files, "special_tokens_map.json")?.as_ref()) {
            if !special.iter().any(|(k, _)| *k == key) {
                special.push((key, text));
            }
        }
        let path = files.path("tokenizer.json");
        let Some(bytes) = files.read("tokenizer.json", MAX_TOKENIZER_BYTES)? else {
            if let Some(inner) = sentencepiece::open(files, &mut special)? {
                return Self::build(inner, files.path("tokenizer.model"), special);
            }
            let reason = "not found, and no tokenizer.model either; download it from the model's repository on the hub \
                          into the same directory";
            return Err(Error::file(path, reason));
        };
        Self::build(parse(&path, &bytes)?, path, special)
    }

    /// Builds a tokenizer from the bytes of a `tokenizer.json` and, if there is one, of a `tokenizer_config.json`.
    /// `source` names them in errors.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_json(tokenizer: &[u8], config: Option<&[u8]>, source: impl Into<PathBuf>) -> Result<Self> {
        let source = source.into();
        for (bytes, limit) in [(tokenizer, MAX_TOKENIZER_BYTES), (config.unwrap_or_default(), MAX_JSON_BYTES)] {
            if bytes.len() as u64 > limit {
                return Err(Error::file(source, format!("{} bytes, but at most {limit} are read", bytes.len())));
            }
        }
        let config = config.map(|bytes| parse_object(&source, bytes)).transpose()?;
        Self::build(parse(&source, tokenizer)?, source, special_tokens(config.as_ref()))
    }

    /// Wraps a tokenizer that was built elsewhere, such as from GGUF metadata. `special` holds pairs such as
    /// `("bos_token", "<s>")`; `source` names it in errors.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot encode an empty text.
    pub fn from_tokenizers(
        inner: tokenizers::Tokenizer,
        special: impl IntoIterator<Item = (String, String)>,
        source: impl Into<PathBuf>,
    ) -> Result<Self> {
        Self::build(inner, source.into(), special.into_iter().collect())
    }

    fn build(mut inner: tokenizers::Tokenizer, source: PathBuf, special: Vec<(String, String)>) -> Result<Self> {
        // Prompts are checked against the context; cutting or padding them silently would hide that.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::file(&source, e.to_string()))?;
        let special = special
            .into_iter()
            .map(|(key, text)| {
                let id = inner.token_to_id(&text);
                SpecialToken { key, text, id }
            })
            .collect();
        let mut tokenizer = Self { shared: Arc::new(Shared { inner, source, special, adds_bos: false }) };
        let prefix = tokenizer.encode("", true)?;
        let adds_bos = tokenizer.bos_id().is_some_and(|bos| prefix.first() == Some(&bos));
        if let Some(shared) = Arc::get_mut(&mut tokenizer.shared) {
            shared.adds_bos = adds_bos;
        }
        Ok(tokenizer)
    }

    /// The text of its `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Text`] if the library cannot write it.
    pub fn to_json(&self) -> Result<String> {
        self.shared.inner.to_string(true).map_err(|e| self.error(format!("cannot be written: {e}")))
    }

    /// Token ids of `text`. Special tokens spelt out in the text become their ids; `add_special` adds those that the
    /// tokenizer puts around every text, such as BOS.
    ///
    /// # Errors
    /// [`Error::Text`] if the tokenizer has no way to encode this text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = guard(|| self.shared.inner.encode_fast(text, add_special))
            .map_err(|reason| self.error(format!("cannot encode the text: {reason}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`; ids that the tokenizer does not know have none. `skip_special` leaves special tokens out. Bytes
    /// that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Text`] if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guard(|| self.shared.inner.decode(ids, skip_special))
            .map_err(|reason| self.error(format!("cannot decode: {reason}")))
    }

    /// A decoder for a stream of ids.
    #[must_use]
    pub fn incremental(&self, skip_special: bool) -> IncrementalDecoder {
        IncrementalDecoder::new(self.clone(), skip_special)
    }

    /// Number of tokens, added ones included. A model's vocabulary can be larger (padded).
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.shared.inner.get_vocab_size(true)
    }

    /// Id of a token as it is spelt in the vocabulary.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.shared.inner.token_to_id(token)
    }

    /// Spelling of a token in the vocabulary (byte-level tokenizers spell bytes as printable characters).
    #[must_use]
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.shared.inner.id_to_token(id)
    }

    /// Whether `id` is a special token: one that decoding can skip.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.id_to_token(id).is_some_and(|token| self.shared.inner.get_added_vocabulary().is_special_token(&token))
    }

    /// Ids of all special tokens, ascending.
    #[must_use]
    pub fn special_ids(&self) -> Vec<u32> {
        let added = self.shared.inner.get_added_tokens_decoder();
        let mut ids: Vec<u32> = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        ids.sort_unstable();
        ids
    }

    /// Spelling of a special token by its key in tokenizer_config.json, such as `bos_token`.
    #[must_use]
    pub fn special_token(&self, key: &str) -> Option<&str> {
        self.special(key).map(|token| token.text.as_str())
    }

    /// All `(key, spelling)` pairs of tokenizer_config.json, such as `("bos_token", "<s>")`.
    pub fn special_tokens(&self) -> impl Iterator<Item = (&str, &str)> {
        self.shared.special.iter().map(|token| (token.key.as_str(), token.text.as_str()))
    }

    /// Id of the beginning-of-sequence token.
    #[must_use]
    pub fn bos_id(&self) -> Option<u32> {
        self.special("bos_token").and_then(|token| token.id)
    }

    /// Id of the end-of-sequence token that tokenizer_config.json names.
    #[must_use]
    pub fn eos_id(&self) -> Option<u32> {
        self.special("eos_token").and_then(|token| token.id)
    }

    /// Whether encoding with special tokens begins with BOS.
    #[must_use]
    pub fn adds_bos(&self) -> bool {
        self.shared.adds_bos
    }

    pub(super) fn inner(&self) -> &tokenizers::Tokenizer {
        &self.shared.inner
    }

    fn special(&self, key: &str) -> Option<&SpecialToken> {
        self.shared.special.iter().find(|token| token.key == key)
    }

    pub(super) fn error(&self, reason: String) -> Error {
        Error::Text { what: self.shared.source.display().to_string(), reason }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("source", &self.shared.source)
            .field("vocab_size", &self.vocab_size())
            .finish_non_exhaustive()
    }
}

/// Tokenizer files are untrusted and this library was not written for hostile ones: a panic in it becomes an error.
fn guard<T>(f: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("the tokenizer library panicked; the tokenizer file is inconsistent".into()),
    }
}

fn parse(path: &Path, bytes: &[u8]) -> Result<tokenizers::Tokenizer> {
    guard(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(|reason| {
        Error::file(
            path,
            format!("not a usable tokenizer: {reason}; download the file again from the model's repository"),
        )
    })
}

/// The `*_token` entries of a tokenizer_config.json: a string, or an object with the string as `content`.
fn special_tokens(config: Option<&Value>) -> Vec<(String, String)> {
    let entries = config.and_then(Value::as_object).into_iter().flatten();
    entries
        .filter(|(key, _)| key.ends_with("_token"))
        .filter_map(|(key, value)| {
            let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str))?;
            Some((key.clone(), text.to_owned()))
        })
        .collect()
}
