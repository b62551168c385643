//! A tokenizer.json: whatever the library makes of it, encoding and decoding give an answer or an error.
#![no_main]

use candle_bitnet::text::Tokenizer;
use candle_bitnet_fuzz::allow_panics_of_libraries;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: allow_panics_of_libraries(), |json: &[u8]| {
    let Ok(tokenizer) = Tokenizer::from_json(json, None, "tokenizer.json") else { return };
    let _ = (tokenizer.vocab_size(), tokenizer.special_ids(), tokenizer.id_to_token(u32::MAX), tokenizer.to_json());
    let Ok(ids) = tokenizer.encode("a b, wörld 你 12<s>\n", true) else { return };
    let _ = tokenizer.decode(&ids, true);
    let mut decoder = tokenizer.incremental(true);
    for id in ids {
        let _ = decoder.push(id);
    }
    let _ = decoder.flush();
});
