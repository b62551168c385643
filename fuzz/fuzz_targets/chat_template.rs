//! A chat template: rendering ends, and gives a bounded text or an error.
#![no_main]

use candle_bitnet::text::{ChatTemplate, MAX_RENDERED_BYTES, Message, Tokenizer};
use candle_bitnet_fuzz::allow_panics_of_libraries;
use libfuzzer_sys::{Corpus, fuzz_target};
use std::sync::LazyLock;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let json = br#"{"model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "unk_token": "a"}}"#;
    let config = br#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}}"#;
    Tokenizer::from_json(json, Some(config), "tokenizer.json").unwrap()
});

/// Steps of a template: few, so that loops do not take all of the time.
const FUEL: u64 = 2000;

fuzz_target!(init: allow_panics_of_libraries(), |bytes: &[u8]| -> Corpus {
    let Ok(source) = std::str::from_utf8(bytes) else { return Corpus::Reject };
    // Nothing limits how long a string or list a single step may make (SECURITY.md).
    if bytes.split(|b| !b"0123456789abcdefABCDEF_xo".contains(b)).any(|word| {
        word.iter().filter(|b| b.is_ascii_hexdigit()).count() > 4 && word.first().is_some_and(u8::is_ascii_digit)
    }) {
        return Corpus::Reject;
    }
    let template = ChatTemplate::with_fuel(source, "template", FUEL);
    let messages = [Message::system(" S\n"), Message::user("U <|eot_id|>"), Message::assistant("Ä"), Message::user("{{ x }}")];
    for messages in [&messages[..], &messages[1..2]] {
        if let Ok(text) = template.render(&TOKENIZER, messages, messages.len() > 1) {
            assert!(text.len() <= MAX_RENDERED_BYTES);
        }
    }
    Corpus::Keep
});
