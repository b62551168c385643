//! Identities of packed layouts, carried by every packed weight and checked at every kernel call; and how several
//! weights lie in one.

use crate::ternary::PackedTernary;
use crate::{Error, Result};

/// How weights that share their input lie in one packed weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arrangement {
    /// One below the other: the product gives their outputs side by side.
    Stacked,
    /// Exactly two, gate and up, of one shape: the product gives `act(gate) · up`.
    GateUp,
}

impl Arrangement {
    /// From one tile of a weight to its next one in the CPU's packing.
    pub(super) fn tile_step(self) -> usize {
        match self {
            Self::Stacked => 1,
            Self::GateUp => 2,
        }
    }

    /// Refuses weights that cannot be arranged so.
    ///
    /// # Errors
    /// [`Error::Shape`] for [`Self::GateUp`] of other than two weights of one shape.
    pub fn check(self, weights: &[PackedTernary]) -> Result<()> {
        match (self, weights) {
            (Self::Stacked, _) => Ok(()),
            (Self::GateUp, [gate, up]) if gate.rows() == up.rows() && gate.cols() == up.cols() => Ok(()),
            (Self::GateUp, _) => {
                let shapes: Vec<_> = weights.iter().map(|w| [w.rows(), w.cols()]).collect();
                Err(Error::Shape { op: "pack", reason: format!("{shapes:?} are not a gate and an up of one shape") })
            }
        }
    }
}

/// The layout that a weight was packed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LayoutId {
    /// Read by no kernel; for tests of the check.
    #[cfg(test)]
    Unknown,
    /// 16 rows by 16 columns in a 64-byte line, four codes a byte; see `backend/cpu/packing.rs`.
    CpuRows16,
    /// 16 rows by 20 columns in a 64-byte line, five codes a byte; see `backend/cpu/packing.rs`.
    CpuBase3Rows16,
    /// Tiles of 16 rows by 256 columns; see `kernels/README.md`.
    #[cfg(feature = "cuda")]
    CudaTiles,
    /// The same tiles, for Metal's kernels.
    #[cfg(feature = "metal")]
    MetalTiles,
}

impl LayoutId {
    /// The layout's name in messages and reports.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(test)]
            Self::Unknown => "unknown",
            Self::CpuRows16 => "cpu-rows16",
            Self::CpuBase3Rows16 => "cpu-base3-rows16",
            #[cfg(feature = "cuda")]
            Self::CudaTiles => "cuda-tiles",
            #[cfg(feature = "metal")]
            Self::MetalTiles => "metal-tiles",
        }
    }
}
