//! The head of a GGUF file: whatever is accepted must lie inside it, and no value may be read past its end.
#![no_main]

use candle_bitnet::checkpoint::gguf::{Header, Value};
use candle_bitnet::checkpoint::limits;
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = Header::parse(Path::new("fuzz.gguf"), bytes) else { return };
    assert!(header.tensors.len() <= limits::MAX_TENSORS && header.metadata.len() <= limits::MAX_GGUF_METADATA);
    assert!(header.alignment.is_power_of_two() && header.data_start <= bytes.len());
    for (key, value) in &header.metadata {
        assert!(!key.is_empty() && header.get(key) == Some(value) || matches!(value, Value::F32(_) | Value::F64(_)));
        match value {
            Value::Text(range) => assert!(std::str::from_utf8(&bytes[range.clone()]).is_ok()),
            Value::Array(array) => assert!(array.range.end <= header.data_start.max(bytes.len())),
            _ => {}
        }
    }
    let mut ranges: Vec<_> = header.tensors.iter().map(|t| t.range.clone()).filter(|r| !r.is_empty()).collect();
    for range in &ranges {
        assert!(range.start >= header.data_start && range.end <= bytes.len());
        assert_eq!(range.start % 8, header.data_start % 8);
    }
    ranges.sort_by_key(|r| r.start);
    assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
});
