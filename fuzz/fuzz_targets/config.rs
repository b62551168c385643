//! A config.json: what is accepted must be consistent and survive being written and read again.
#![no_main]

use candle_bitnet::model::config::{ModelConfig, Projection};
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|text: &str| {
    let path = Path::new("config.json");
    let Ok(config) = ModelConfig::parse(path, text) else { return };
    assert_eq!(config.num_heads % config.num_kv_heads, 0);
    assert_eq!(config.head_dim % 2, 0);
    assert!(Projection::ALL.iter().all(|p| config.projection_shape(*p) > (0, 0)));
    assert!(config.parameters() > 0);
    let _ = config.is_converted("model.layers.0.mlp.down_proj");
    let mut again = ModelConfig::parse(path, &config.to_json()).unwrap();
    // serde_json may read a decimal number one unit in the last place off.
    assert!((again.rope_theta / config.rope_theta - 1.0).abs() < 1e-15);
    again.rope_theta = config.rope_theta;
    assert_eq!(again, config);
});
