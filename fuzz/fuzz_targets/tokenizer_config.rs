//! A tokenizer_config.json beside a good tokenizer: special tokens and the choice of a chat template.
#![no_main]

use candle_bitnet::text::{ChatTemplate, Tokenizer};
use libfuzzer_sys::fuzz_target;

const TOKENIZER: &[u8] =
    br#"{"model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "unk_token": "a"}}"#;

fuzz_target!(|json: &[u8]| {
    if let Ok(Some(template)) = ChatTemplate::from_json(json, "tokenizer_config.json") {
        assert!(json.len() >= template.source().len());
    }
    let Ok(tokenizer) = Tokenizer::from_json(TOKENIZER, Some(json), "tokenizer_config.json") else { return };
    for (key, text) in tokenizer.special_tokens() {
        assert!(key.ends_with("_token") && tokenizer.special_token(key).is_some() && text.len() <= json.len());
    }
    assert!([tokenizer.bos_id(), tokenizer.eos_id()].into_iter().flatten().all(|id| id < 3));
    assert!(!tokenizer.adds_bos());
});
