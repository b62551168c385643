//! An adapter_config.json: what is accepted must be in range and survive being written and read again.
#![no_main]

use candle_bitnet::checkpoint::adapter::{AdapterConfig, MAX_RANK};
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|text: &str| {
    let path = Path::new("adapter_config.json");
    let Ok(config) = AdapterConfig::parse(path, text) else { return };
    for module in ["model.layers.0.self_attn.q_proj", "model.layers.12.mlp.down_proj", "lm_head", ""] {
        config.targets(module);
        assert!((1..=MAX_RANK).contains(&config.rank_of(module)));
        assert!(config.scaling_of(module).is_finite());
    }
    assert_eq!(AdapterConfig::parse(path, &config.to_json()).unwrap(), config);
});
