//! A whole safetensors file: whatever is accepted must lie inside it.
#![no_main]

use candle_bitnet::checkpoint::{header, limits};
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|bytes: &[u8]| {
    let Ok(tensors) = header::parse(Path::new("fuzz.safetensors"), bytes) else { return };
    assert!(tensors.len() <= limits::MAX_TENSORS);
    let mut data = 0;
    for t in &tensors {
        assert!(t.range.start <= t.range.end && t.range.end <= bytes.len());
        assert_eq!(t.shape.iter().product::<usize>() * t.dtype.size(), t.range.len());
        assert_eq!(t.elements() * t.dtype.size(), t.range.len());
        data += t.range.len();
    }
    // Back to back, without a hole: together they are all of the data.
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    assert_eq!(8 + header + data, bytes.len());
    assert!(tensors.windows(2).all(|pair| pair[0].name < pair[1].name));
});
