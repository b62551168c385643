//! Codes in bit planes: what I2_S, TQ2_0 and TQ1_0 have in common.
//!
//! A run of `lane` bytes holds `4 · lane` consecutive values; value `j` lies in byte `j % lane`, in the bit pair that
//! counts `j / lane` up from the low bits, or down from the high ones.

use super::transpose4x4;

/// Which bit pair of a byte comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    LowFirst,
    HighFirst,
}

impl Order {
    /// The bit pair that holds the `group`-th quarter of a run.
    fn pair(self, group: usize) -> usize {
        match self {
            Self::LowFirst => group,
            Self::HighFirst => 3 - group,
        }
    }
}

/// One run of `lane` bytes (a multiple of four) to as many canonical bytes, and back: four bytes of the run hold one
/// canonical byte of each quarter.
pub(super) fn to_canonical(run: &[u8], order: Order, out: &mut [u8]) {
    let quarter = run.len() / 4;
    for (q, four) in run.as_chunks::<4>().0.iter().enumerate() {
        let pairs = transpose4x4(u32::from_le_bytes(*four)).to_le_bytes();
        for group in 0..4 {
            out[group * quarter + q] = pairs[order.pair(group)];
        }
    }
}

/// The inverse of [`to_canonical`].
pub(super) fn from_canonical(canonical: &[u8], order: Order, run: &mut [u8]) {
    let quarter = run.len() / 4;
    for (q, four) in run.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let mut pairs = [0; 4];
        for group in 0..4 {
            pairs[order.pair(group)] = canonical[group * quarter + q];
        }
        *four = transpose4x4(u32::from_le_bytes(pairs)).to_le_bytes();
    }
}
