//! An index of shards: no accepted name may leave the checkpoint's directory.
#![no_main]

use candle_bitnet::checkpoint::index;
use libfuzzer_sys::fuzz_target;
use std::path::{Component, Path};

fuzz_target!(|bytes: &[u8]| {
    let Ok(index) = index::parse(Path::new("fuzz.json"), bytes) else { return };
    for shard in &index.shards {
        let mut parts = Path::new(shard).components();
        assert!(matches!(parts.next(), Some(Component::Normal(_))) && parts.next().is_none());
        assert!(!shard.contains(['/', '\\', '\0', ':']));
    }
    assert!(index.entries.iter().all(|(_, shard)| (*shard as usize) < index.shards.len()));
    assert!(index.entries.windows(2).all(|pair| pair[0].0 < pair[1].0));
});
