//! Whether something fits in this machine's memory, asked before it is made: afterwards the system would end the process.

use crate::backend::DenseType;
use crate::backend::host;
use crate::model::config::{ModelConfig, Projection};
use crate::{Error, Result};

/// Left for everything else: the program, scratch memory, the system.
const RESERVE: u64 = 256 << 20;

/// Bytes that a preset's random weights occupy: 2 bits a ternary weight, bf16 for the rest.
pub(super) fn synthetic_bytes(config: &ModelConfig) -> u64 {
    let linears: u64 =
        Projection::ALL.iter().map(|p| config.projection_shape(*p)).map(|(r, c)| r as u64 * c as u64).sum();
    let linears = linears * config.num_layers as u64;
    linears / 4 + 2 * config.parameters().saturating_sub(linears)
}

/// Bytes of the keys and values of `slots` sequences.
pub(super) fn kv_bytes(config: &ModelConfig, dtype: DenseType, slots: usize, positions: usize) -> u64 {
    let elements = 2 * config.num_layers as u64 * config.kv_size() as u64;
    elements * dtype.size() as u64 * (slots as u64).saturating_mul(positions as u64)
}

/// Refuses what needs more memory than is available, where the system tells.
///
/// # Errors
/// [`Error::Unavailable`] with both numbers.
pub(super) fn ensure(what: &str, bytes: u64) -> Result<()> {
    ensure_within(what, bytes, host::available_bytes())
}

fn ensure_within(what: &str, bytes: u64, available: Option<u64>) -> Result<()> {
    match available {
        Some(available) if bytes.saturating_add(RESERVE) > available => Err(Error::Unavailable {
            what: what.to_owned(),
            reason: format!(
                "it needs {:.1} GB of memory, and {:.1} GB are available; take a smaller model, a shorter context or fewer \
                 sequences",
                bytes as f64 / 1e9,
                available as f64 / 1e9
            ),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::presets::Preset;

    #[test]
    fn a_presets_bytes_are_its_weights() {
        let config = Preset::find("2b4t").unwrap().config();
        let bytes = synthetic_bytes(&config) as f64;
        // 521 MB of ternary weights and 657 MB of embedding, which is the head as well.
        assert!((1.177e9..1.182e9).contains(&bytes), "{bytes}");
        assert_eq!(kv_bytes(&config, DenseType::F32, 2, 10), 2 * 10 * 30 * 2 * 640 * 4);
        assert!((8e9..10e9).contains(&(synthetic_bytes(&Preset::find("30b").unwrap().config()) as f64)));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_both_numbers() {
        ensure_within("x", u64::MAX, None).unwrap();
        ensure_within("x", 1 << 30, Some(2 << 30)).unwrap();
        let error = ensure_within("synthetic 30b", 9_000_000_000, Some(4_000_000_000)).unwrap_err().to_string();
        for part in ["synthetic 30b is not available", "9.0 GB", "4.0 GB"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(ensure_within("x", u64::MAX, Some(1)).is_err());
    }
}
