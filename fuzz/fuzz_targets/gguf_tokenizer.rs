//! The tokenizer in a GGUF file's metadata: what is accepted must encode, and streaming must show what decoding shows.
#![no_main]

use candle_bitnet::checkpoint::ModelFiles;
use candle_bitnet::text::Tokenizer;
use candle_bitnet_fuzz::{Scratch, allow_panics_of_libraries};
use libfuzzer_sys::{Corpus, fuzz_target};
use std::sync::LazyLock;

static FILE: LazyLock<Scratch> = LazyLock::new(|| Scratch::new(".gguf"));

fuzz_target!(init: allow_panics_of_libraries(), |lines: &[u8]| -> Corpus {
    let input = candle_bitnet_fuzz::Tokenizer::new(lines);
    // The expressions of those pre-tokenisers are constant and take milliseconds to compile.
    if input.slow {
        return Corpus::Reject;
    }
    let files = ModelFiles::from(FILE.write(&input.file));
    let Ok(tokenizer) = Tokenizer::open(&files) else { return Corpus::Keep };
    let text = String::from_utf8_lossy(&input.text);
    let Ok(ids) = tokenizer.encode(&text, true) else { return Corpus::Keep };
    assert!(ids.iter().all(|id| tokenizer.id_to_token(*id).is_some()));
    for skip in [false, true] {
        let mut decoder = tokenizer.incremental(skip);
        let mut streamed: String = ids.iter().map(|id| decoder.push(*id).unwrap()).collect();
        streamed += &decoder.flush().unwrap();
        assert_eq!(streamed, tokenizer.decode(&ids, skip).unwrap());
    }
    Corpus::Keep
});
