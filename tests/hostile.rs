//! SECURITY.md says what the code does.

use candle_bitnet::checkpoint::{adapter, limits};
use candle_bitnet::model::config;
use candle_bitnet::text::{self, sentencepiece};
use candle_bitnet::train::examples;

#[test]
fn the_limits_of_the_security_page_are_those_of_the_code() {
    let page = include_str!("../SECURITY.md");
    let listed = |constant: &str| {
        let row = page.lines().find(|line| line.contains(&format!("`{constant}`"))).expect(constant);
        row.split('|').nth(2).unwrap().trim().replace(',', "").parse::<u64>().expect(constant)
    };
    for (constant, value) in [
        ("checkpoint::limits::MAX_HEADER_SIZE", limits::MAX_HEADER_SIZE as u64),
        ("checkpoint::limits::MAX_INDEX_SIZE", limits::MAX_INDEX_SIZE as u64),
        ("checkpoint::limits::MAX_TENSORS", limits::MAX_TENSORS as u64),
        ("checkpoint::limits::MAX_DIMS", limits::MAX_DIMS as u64),
        ("checkpoint::limits::MAX_NAME_LENGTH", limits::MAX_NAME_LENGTH as u64),
        ("checkpoint::limits::MAX_SHARDS", limits::MAX_SHARDS as u64),
        ("checkpoint::limits::MAX_GGUF_HEADER_SIZE", limits::MAX_GGUF_HEADER_SIZE as u64),
        ("checkpoint::limits::MAX_GGUF_METADATA", limits::MAX_GGUF_METADATA as u64),
        ("checkpoint::limits::MAX_GGUF_KEY_LENGTH", limits::MAX_GGUF_KEY_LENGTH as u64),
        ("checkpoint::limits::MAX_GGUF_ARRAY_DEPTH", limits::MAX_GGUF_ARRAY_DEPTH as u64),
        ("checkpoint::limits::MAX_GGUF_ALIGNMENT", limits::MAX_GGUF_ALIGNMENT as u64),
        ("checkpoint::limits::MAX_CONFIG_SIZE", limits::MAX_CONFIG_SIZE),
        ("checkpoint::limits::MAX_CONFIG_VALUES", limits::MAX_CONFIG_VALUES as u64),
        ("model::config::MAX_FEATURES", config::MAX_FEATURES as u64),
        ("model::config::MAX_LAYERS", config::MAX_LAYERS as u64),
        ("model::config::MAX_HEADS", config::MAX_HEADS as u64),
        ("model::config::MAX_HEAD_DIM", config::MAX_HEAD_DIM as u64),
        ("model::config::MAX_VOCAB", config::MAX_VOCAB as u64),
        ("model::config::MAX_POSITIONS", config::MAX_POSITIONS as u64),
        ("model::config::MAX_EOS_TOKENS", config::MAX_EOS_TOKENS as u64),
        ("checkpoint::adapter::MAX_RANK", adapter::MAX_RANK as u64),
        ("text::MAX_TOKENIZER_BYTES", text::MAX_TOKENIZER_BYTES),
        ("text::sentencepiece::MAX_SENTENCEPIECE_BYTES", sentencepiece::MAX_SENTENCEPIECE_BYTES),
        ("text::sentencepiece::MAX_PIECES", sentencepiece::MAX_PIECES as u64),
        ("text::sentencepiece::MAX_PIECE_BYTES", sentencepiece::MAX_PIECE_BYTES as u64),
        ("text::sentencepiece::MAX_MERGES", sentencepiece::MAX_MERGES as u64),
        ("text::sentencepiece::MAX_MERGE_BYTES", sentencepiece::MAX_MERGE_BYTES as u64),
        ("text::MAX_TEMPLATE_BYTES", text::MAX_TEMPLATE_BYTES),
        ("text::TEMPLATE_FUEL", text::TEMPLATE_FUEL),
        ("text::MAX_RENDERED_BYTES", text::MAX_RENDERED_BYTES as u64),
        ("train::examples::MAX_MESSAGES", examples::MAX_MESSAGES as u64),
    ] {
        assert_eq!(listed(constant), value, "{constant}");
    }
}
