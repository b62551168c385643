//! A checkpoint's `tokenizer.model`, with the tokens and switches that the files beside it add.

use super::{ExtraToken, MAX_SENTENCEPIECE_BYTES, SentencePiece};
use crate::checkpoint::ModelFiles;
use crate::checkpoint::limits::quoted;
use crate::text::read_json;
use crate::{Error, Result};
use serde_json::Value;
use std::collections::BTreeMap;

/// Name of a SentencePiece model.
pub(crate) const FILE: &str = "tokenizer.model";
const CONFIG: &str = "tokenizer_config.json";
const ADDED: &str = "added_tokens.json";

/// Builds the tokenizer of a checkpoint that has a `tokenizer.model`; `None` if it has none. As transformers'
/// `LlamaTokenizer`, it reads `add_bos_token`, `add_eos_token` and `added_tokens_decoder` of `tokenizer_config.json`,
/// and `added_tokens.json`. `special` names special tokens by key; those that the model itself knows are added.
pub(crate) fn open(files: &ModelFiles, special: &mut Vec<(String, String)>) -> Result<Option<tokenizers::Tokenizer>> {
    let Some(bytes) = files.read(FILE, MAX_SENTENCEPIECE_BYTES)? else { return Ok(None) };
    let path = files.path(FILE);
    let model = SentencePiece::parse(&path, &bytes)?;
    let config = read_json(files, CONFIG)?;
    let extra = extra(files, &model, config.as_ref(), special)?;
    let named = |key: &str| special.iter().find(|(k, _)| k == key).map(|(_, text)| text.as_str());
    let id = |text: &str| {
        let at = model.pieces.iter().position(|p| p.text == text);
        let at = at.or_else(|| Some(model.pieces.len() + extra.iter().position(|t| t.text == text)?))?;
        u32::try_from(at).ok()
    };
    let bos = named("bos_token").and_then(id).or(model.bos);
    let eos = named("eos_token").and_then(id).or(model.eos);
    let flag = |key: &str, default| config.as_ref().and_then(|c| c.get(key)?.as_bool()).unwrap_or(default);
    let around = |add: bool, id: Option<u32>| id.filter(|_| add);
    let (add_bos, add_eos) = (around(flag("add_bos_token", true), bos), around(flag("add_eos_token", false), eos));
    let tokenizer = model.to_tokenizer(&path, &extra, add_bos, add_eos)?;
    for (key, id) in [("bos_token", bos), ("eos_token", eos)] {
        if !special.iter().any(|(k, _)| k == key) {
            special.extend(id.and_then(|id| tokenizer.id_to_token(id)).map(|text| (key.to_owned(), text)));
        }
    }
    Ok(Some(tokenizer))
}

/// The tokens beyond the pieces, in the order of their ids, which must go on where the pieces end.
fn extra(
    files: &ModelFiles,
    model: &SentencePiece,
    config: Option<&Value>,
    named: &[(String, String)],
) -> Result<Vec<ExtraToken>> {
    let mut found: BTreeMap<u64, (ExtraToken, &str)> = BTreeMap::new();
    let added = read_json(files, ADDED)?;
    for (text, id) in added.as_ref().and_then(Value::as_object).into_iter().flatten() {
        let Some(id) = id.as_u64() else {
            return Err(Error::file(files.path(ADDED), format!("{:?} has no id", quoted(text))));
        };
        let special = named.iter().any(|(_, t)| t == text);
        found.insert(id, (ExtraToken { text: text.clone(), special }, ADDED));
    }
    let decoder = config.and_then(|c| c.get("added_tokens_decoder")?.as_object());
    for (id, token) in decoder.into_iter().flatten() {
        let text = token.get("content").and_then(Value::as_str);
        let (Ok(id), Some(text)) = (id.parse(), text) else {
            let reason = format!("added_tokens_decoder: {:?} is no id, or has no content", quoted(id));
            return Err(Error::file(files.path(CONFIG), reason));
        };
        let special = token.get("special").and_then(Value::as_bool).unwrap_or(false);
        found.insert(id, (ExtraToken { text: text.to_owned(), special }, CONFIG));
    }
    let mut extra = Vec::new();
    for (id, (token, file)) in found {
        let text = quoted(&token.text);
        let piece = usize::try_from(id).ok().and_then(|id| model.pieces.get(id));
        match piece {
            // Transformers lists the special pieces as well.
            Some(piece) if piece.text == token.text => {}
            Some(piece) => {
                let reason = format!("token {id} is {text:?}, but {:?} in {FILE}", quoted(&piece.text));
                return Err(Error::file(files.path(file), reason));
            }
            None if id == (model.pieces.len() + extra.len()) as u64 => extra.push(token),
            None => {
                let next = model.pieces.len() + extra.len();
                let reason =
                    format!("token {id} ({text:?}) leaves a gap: after {FILE} and what is added, {next} follows");
                return Err(Error::file(files.path(file), reason));
            }
        }
    }
    Ok(extra)
}
