//! A chat template: rendering ends, and gives a bounded text or an error.
#![no_main]

use candle_bitnet::text::{ChatTemplate, MAX_RENDERED_BYTES, Message, Tokenizer};
use candle_bitnet_fuzz::allow_panics_of_libraries;
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let json = br#"{"model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "unk_token": "a"}}"#;
    let config = br#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}}"#;
    Tokenizer::from_json(json, Some(config), "tokenizer.json").unwrap()
});

fuzz_target!(init: allow_panics_of_libraries(), |source: &str| {
    let template = ChatTemplate::new(source, "template");
    let messages = [Message::system(" S\n"), Message::user("U <|eot_id|>"), Message::assistant("Ä"), Message::user("{{ x }}")];
    for messages in [&messages[..], &messages[1..2], &[]] {
        if let Ok(text) = template.render(&TOKENIZER, messages, messages.len() > 1) {
            assert!(text.len() <= MAX_RENDERED_BYTES);
        }
    }
});
