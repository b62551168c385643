//! A byte-level BPE tokenizer learnt from the training text.

use crate::checkpoint::write::write_text;
use crate::text::Tokenizer;
use crate::{Error, Result};
use std::path::Path;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as Inner};

/// The only special token: between documents, and the end of a text.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Learns `vocab` entries: [`END_OF_TEXT`] (id 0), the 256 bytes, and merges by frequency.
///
/// # Errors
/// [`Error::Text`] if the library fails or the text is too small for so many entries.
pub fn train_bpe(documents: &[String], vocab: usize) -> Result<Tokenizer> {
    let error = |reason: String| Error::Text { what: "training the tokenizer".into(), reason };
    let mut inner = Inner::new(BPE::default());
    // No space is put in front, so that decoding gives the text back byte for byte.
    inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    inner.with_decoder(Some(ByteLevel::default()));
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(vocab)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    inner.train(&mut trainer, documents.iter()).map_err(|e| error(e.to_string()))?;
    let learnt = inner.get_vocab_size(true);
    if learnt != vocab {
        return Err(error(format!(
            "the text gives only {learnt} entries, {vocab} were asked for: set vocab to {learnt}"
        )));
    }
    Tokenizer::from_tokenizers(inner, special(), "the trained tokenizer")
}

fn special() -> Vec<(String, String)> {
    ["bos_token", "eos_token"].map(|key| (key.to_owned(), END_OF_TEXT.to_owned())).into()
}

/// Writes `tokenizer.json` and `tokenizer_config.json`.
///
/// # Errors
/// [`Error::Io`].
pub fn write_tokenizer(tokenizer: &Tokenizer, dir: &Path) -> Result<()> {
    write_text(&dir.join("tokenizer.json"), &tokenizer.to_json()?)?;
    let mut config = serde_json::Map::new();
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    config.extend(tokenizer.special_tokens().map(|(key, text)| (key.to_owned(), text.into())));
    write_text(&dir.join("tokenizer_config.json"), &format!("{:#}\n", serde_json::Value::Object(config)))
}
