//! A tokenizer.model: what is accepted must encode any text, and streaming must show what decoding shows.
#![no_main]

use candle_bitnet::text::Tokenizer;
use candle_bitnet::text::sentencepiece::SentencePiece;
use candle_bitnet_fuzz::allow_panics_of_libraries;
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(init: allow_panics_of_libraries(), |bytes: &[u8]| {
    let path = Path::new("tokenizer.model");
    let Ok(model) = SentencePiece::parse(path, bytes) else { return };
    let Ok(inner) = model.to_tokenizer(path, &[], None, None) else { return };
    let Ok(tokenizer) = Tokenizer::from_tokenizers(inner, [], path) else { return };
    assert_eq!(tokenizer.vocab_size(), model.pieces.len());
    // Rules for single characters can be contradictory in ways that show only when they are used.
    let Ok(ids) = tokenizer.encode("a b, wörld 你\n", true) else { return };
    assert!(ids.iter().all(|id| (*id as usize) < model.pieces.len()));
    let mut decoder = tokenizer.incremental(true);
    let mut text: String = ids.iter().map(|id| decoder.push(*id).unwrap()).collect();
    text += &decoder.flush().unwrap();
    assert_eq!(text, tokenizer.decode(&ids, true).unwrap());
});
