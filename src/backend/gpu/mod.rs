//! What the GPUs' host sides have in common: packed tiles, batches and caches, whatever memory they lie in, the checks of
//! operands, and the numbers that kernels of both kinds take. Knows of no device; `cuda` and `metal` build on it.

pub(super) mod attention;
pub(super) mod batch;
pub(super) mod dense;
mod failure;
mod launch;
pub(super) mod linear;
pub(super) mod low_rank;
pub(super) mod norm;
mod open;
pub(super) mod params;
pub(super) mod plan;
pub(super) mod profile;
pub(super) mod sample;
mod scratch;
mod self_check;
pub(super) mod ternary;

pub use attention::{Angles, Kv};
pub use batch::GpuBatch;
pub use dense::Dense;
pub(super) use failure::{no_such_gpu, size, unavailable};
pub(super) use launch::{Launch, MAX_GRID_YZ};
pub use low_rank::LowRank;
pub(super) use open::Open;
pub use params::{MarkUpdate, SampleSettings};
pub use profile::KernelTime;
pub(super) use scratch::Kept;
pub(super) use self_check::SelfCheck;
pub use ternary::Ternary;

use crate::{Error, Result};

/// Memory of a GPU for values of a type.
pub trait Memory {
    /// Values.
    fn len(&self) -> usize;

    /// Bytes.
    fn bytes(&self) -> usize;

    /// Whether there are no values.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The error for operands that do not fit.
pub(super) fn shape(op: &'static str, reason: String) -> Error {
    Error::Shape { op, reason }
}

/// A number as kernels take it.
pub(super) fn int(op: &'static str, name: &str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| shape(op, format!("{value} {name} exceed {}", i32::MAX)))
}

/// Cuts `total` into runs of up to `most`: first and count of each.
pub(super) fn groups(total: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..total).step_by(most).map(move |first| (first, most.min(total - first)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_cover_all() {
        assert_eq!(groups(0, 8).count(), 0);
        assert_eq!(groups(17, 8).collect::<Vec<_>>(), [(0, 8), (8, 8), (16, 1)]);
        assert_eq!(groups(8, 8).collect::<Vec<_>>(), [(0, 8)]);
    }
}
