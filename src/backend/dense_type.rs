//! The floating-point types that weights and caches are stored in.

use crate::{Error, Result};
use half::{bf16, f16};

/// Element type of a dense weight or of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum DenseType {
    F32,
    F16,
    BF16,
}

impl DenseType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The name in reports and flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }

    /// Widens little-endian elements to f32, as many as both sides have.
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        fn each<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
                *out = value(*b);
            }
        }
        match self {
            Self::F32 => each(bytes, out, f32::from_le_bytes),
            Self::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Self::BF16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        }
    }
}

impl std::fmt::Display for DenseType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for DenseType {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        [Self::F32, Self::F16, Self::BF16]
            .into_iter()
            .find(|t| t.name() == s)
            .ok_or_else(|| Error::request("type", format!("'{s}' is not one of f32, bf16, f16")))
    }
}
