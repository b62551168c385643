//! The lines that `bitnet finetune` learns from: conversations that are accepted are in order.
#![no_main]

use candle_bitnet::train::examples::{MAX_MESSAGES, Sample, read_samples};
use candle_bitnet_fuzz::Scratch;
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static FILE: LazyLock<Scratch> = LazyLock::new(|| Scratch::new(".jsonl"));

fuzz_target!(|bytes: &[u8]| {
    let Ok(samples) = read_samples(FILE.write(bytes)) else { return };
    assert!(!samples.is_empty() && samples.windows(2).all(|pair| pair[0].0 < pair[1].0));
    for (_, sample) in samples {
        if let Sample::Conversation(messages) = sample {
            assert!(messages.len() <= MAX_MESSAGES && messages.last().is_some_and(|m| m.role == "assistant"));
            assert!(messages.windows(2).all(|pair| pair[0].role != pair[1].role));
        }
    }
});
