//! The tokens of a forward pass where the kernels read them.
//!
//! ```text
//! | ids | positions | slots | starts |      i32; ids, positions, slots: one a token; starts: sequences + 1
//! ```

use super::{Metal, MetalBuffer, MetalSlice};
use crate::Result;
use crate::backend::HostBatch;
use crate::backend::attention::RowPosition;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Token ids with the slot and position of each, on the host and where kernels read them.
///
/// Tokens of a sequence are contiguous and ascend by one position; no slot has two sequences.
#[derive(Debug)]
pub struct MetalBatch {
    metal: Arc<Metal>,
    memory: MetalBuffer<i32>,
    staging: Vec<i32>,
    host: HostBatch,
    extent: Extent,
}

/// What is known of a batch's sequences.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Extent {
    /// Sequences.
    pub sequences: usize,
    /// Most tokens of one sequence.
    pub longest_run: usize,
    /// Positions that the longest sequence has with this batch.
    pub longest: usize,
    /// Slots that must exist.
    pub slots: usize,
}

impl MetalBatch {
    /// Room for `capacity` tokens.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if memory is short.
    pub fn new(metal: &Arc<Metal>, capacity: usize) -> Result<Self> {
        let (metal, host) = (Arc::clone(metal), HostBatch::new(capacity)?);
        let memory = memory(&metal, capacity)?;
        Ok(Self { metal, memory, staging: Vec::new(), host, extent: Extent::default() })
    }

    /// Replaces the tokens; the device has them before any kernel that is launched later.
    ///
    /// # Errors
    /// As [`HostBatch::set`], and [`crate::Error::Shape`] for numbers that kernels do not take, with the batch as it was;
    /// [`crate::Error::Unavailable`] if memory is short.
    pub fn set(&mut self, ids: &[u32], rows: &[RowPosition]) -> Result<()> {
        check(ids, rows)?;
        if self.metal.busy.load(Ordering::Relaxed) {
            // Kernels that are on their way may still read the last batch, and keep its memory for as long as they do.
            self.memory = memory(&self.metal, self.host.capacity())?;
        }
        self.host.set(ids, rows)?;
        self.extent = stage(ids, rows, &mut self.staging);
        self.memory.write(&self.staging)
    }

    /// Tokens.
    pub fn len(&self) -> usize {
        self.host.ids().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.host.ids().is_empty()
    }

    /// Tokens that there is room for.
    pub fn capacity(&self) -> usize {
        self.host.capacity()
    }

    /// The tokens' ids.
    pub fn ids(&self) -> &[u32] {
        self.host.ids()
    }

    /// Their slots and positions.
    pub fn rows(&self) -> &[RowPosition] {
        self.host.rows()
    }

    /// Whether every sequence has one token.
    pub fn decode(&self) -> bool {
        self.extent.sequences == self.len()
    }

    /// The largest id.
    pub(super) fn largest_id(&self) -> Option<u32> {
        self.host.ids().iter().max().copied()
    }

    pub(super) fn extent(&self) -> Extent {
        self.extent
    }

    /// The ids.
    pub(super) fn ids_slice(&self) -> MetalSlice<'_, i32> {
        self.memory.slice(..self.len())
    }

    /// Positions, slots and starts.
    pub(super) fn row_slices(&self) -> [MetalSlice<'_, i32>; 3] {
        let n = self.len();
        [n..2 * n, 2 * n..3 * n, 3 * n..3 * n + self.extent.sequences + 1].map(|part| self.memory.slice(part))
    }
}

/// Memory for a batch of up to `capacity` tokens.
fn memory(metal: &Metal, capacity: usize) -> Result<MetalBuffer<i32>> {
    metal.zeroed(capacity.saturating_mul(4).saturating_add(1), "a batch's tokens")
}

/// Refuses numbers that kernels do not take.
fn check(ids: &[u32], rows: &[RowPosition]) -> Result<()> {
    let least = |name: &str, v: Option<usize>| super::int("batch", name, v.unwrap_or(0)).map(drop);
    least("as a token id", ids.iter().max().map(|id| *id as usize))?;
    least("as a position", rows.iter().map(|r| r.position).max())?;
    least("as a slot", rows.iter().map(|r| r.slot).max())?;
    least("tokens", Some(ids.len()))
}

/// Lays out what kernels read, of checked numbers and rows.
fn stage(ids: &[u32], rows: &[RowPosition], to: &mut Vec<i32>) -> Extent {
    to.clear();
    to.extend(ids.iter().map(|id| *id as i32));
    to.extend(rows.iter().map(|r| r.position as i32));
    to.extend(rows.iter().map(|r| r.slot as i32));
    let starts = to.len();
    let mut extent = Extent::default();
    for (i, row) in rows.iter().enumerate() {
        if i == 0 || rows[i - 1].slot != row.slot {
            to.push(i as i32);
        }
        extent.longest = extent.longest.max(row.position + 1);
        extent.slots = extent.slots.max(row.slot + 1);
    }
    to.push(ids.len() as i32);
    let starts = &to[starts..];
    extent.sequences = starts.len() - 1;
    extent.longest_run = starts.windows(2).map(|w| (w[1] - w[0]) as usize).max().unwrap_or(0);
    extent
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(rows: &[(usize, usize)]) -> Vec<RowPosition> {
        rows.iter().map(|(slot, position)| RowPosition { slot: *slot, position: *position }).collect()
    }

    #[test]
    fn sequences_are_found_in_the_rows() {
        let mut staged = Vec::new();
        let at = rows(&[(2, 5), (2, 6), (0, 0), (3, 300)]);
        let extent = stage(&[10, 11, 12, 13], &at, &mut staged);
        assert_eq!(extent, Extent { sequences: 3, longest_run: 2, longest: 301, slots: 4 });
        assert_eq!(staged, [10, 11, 12, 13, 5, 6, 0, 300, 2, 2, 0, 3, 0, 2, 3, 4]);
        let extent = stage(&[1, 2], &rows(&[(0, 3), (1, 4)]), &mut staged);
        assert_eq!((extent.sequences, extent.longest_run, staged.len()), (2, 1, 9));
    }

    #[test]
    fn numbers_that_kernels_do_not_take_are_refused() {
        assert!(check(&[1, 2], &rows(&[(0, 0), (0, 1)])).is_ok());
        assert!(check(&[u32::MAX], &rows(&[(0, 0)])).is_err());
        assert!(check(&[1], &rows(&[(0, 1 << 40)])).is_err());
        assert!(check(&[1], &rows(&[(1 << 31, 0)])).is_err());
    }
}
