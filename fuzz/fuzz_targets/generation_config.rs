//! A generation_config.json: what is accepted is in range, and resolves to parameters or an error.
#![no_main]

use candle_bitnet::generate::{GenerateOptions, GenerationDefaults};
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|json: &[u8]| {
    let Ok(value) = serde_json::from_slice(json) else { return };
    let Ok(defaults) = GenerationDefaults::from_generation_config(Path::new("generation_config.json"), &value) else {
        return;
    };
    assert!(defaults.eos.len() <= 256);
    assert!(defaults.temperature.is_none_or(|t| t.is_finite() && t >= 0.0));
    assert!(
        defaults.top_p.is_none_or(|p| p > 0.0 && p <= 1.0) && defaults.min_p.is_none_or(|p| (0.0..=1.0).contains(&p))
    );
    assert!(defaults.repetition_penalty.is_none_or(|p| p > 0.0 && p.is_finite()));
    for options in [GenerateOptions::new(), GenerateOptions::new().temperature(0.5)] {
        let _ = options.resolve(&defaults, 1000);
    }
});
