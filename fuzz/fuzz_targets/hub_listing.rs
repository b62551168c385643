//! The hub's list of files: no name that is accepted leaves the cache, as a file or as a blob.
#![no_main]

use candle_bitnet::checkpoint::hub;
use libfuzzer_sys::fuzz_target;
use std::path::{Component, Path};

fuzz_target!(|answer: &[u8]| {
    for (name, blob) in hub::listed(answer).into_iter().flatten() {
        assert!(Path::new(&name).components().all(|c| matches!(c, Component::Normal(_))));
        assert!(!name.contains(['\\', ':', '\0', '\n']) && !name.is_empty());
        if let Some(blob) = blob {
            let mut parts = Path::new(&blob).components();
            assert!(matches!(parts.next(), Some(Component::Normal(_))) && parts.next().is_none());
            assert!(!blob.contains(['/', '\\', '.', ':']));
        }
    }
});
