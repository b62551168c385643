//! The tokens of a forward pass where kernels read them.
//!
//! ```text
//! | ids | positions | slots | starts |      i32; ids, positions, slots: a stride apart; starts: sequences + 1
//! ```

use super::int;
use crate::Result;
use crate::backend::HostBatch;
use crate::backend::attention::RowPosition;

/// Token ids with the slot and position of each, on the host and where kernels read them.
///
/// Tokens of a sequence are contiguous and ascend by one position; no slot has two sequences.
#[derive(Debug)]
pub struct GpuBatch<M> {
    pub(in crate::backend) memory: M,
    staged: Vec<i32>,
    host: HostBatch,
    extent: Extent,
}

/// What is known of a batch's sequences.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Sequences.
    pub sequences: usize,
    /// Most tokens of one sequence.
    pub longest_run: usize,
    /// Positions that the longest sequence has with this batch.
    pub longest: usize,
    /// Slots that must exist.
    pub slots: usize,
}

impl<M> GpuBatch<M> {
    /// No tokens yet, in memory for up to `capacity`.
    pub(in crate::backend) fn within(memory: M, capacity: usize) -> Result<Self> {
        Ok(Self { memory, staged: Vec::new(), host: HostBatch::new(capacity)?, extent: Extent::default() })
    }

    /// Replaces the tokens on the host; the device has yet to get what [`GpuBatch::staged`] gives, arrays `stride` apart.
    ///
    /// # Errors
    /// As [`HostBatch::set`], and [`crate::Error::Shape`] for numbers that kernels do not take, with the batch as it was.
    pub(in crate::backend) fn stage(&mut self, ids: &[u32], rows: &[RowPosition], stride: usize) -> Result<()> {
        check(ids, rows)?;
        self.host.set(ids, rows)?;
        self.extent = stage(ids, rows, stride, &mut self.staged);
        Ok(())
    }

    /// The memory, and what belongs there.
    pub(in crate::backend) fn staged(&mut self) -> (&mut M, &[i32]) {
        (&mut self.memory, &self.staged)
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

    pub(in crate::backend) fn extent(&self) -> Extent {
        self.extent
    }
}

/// Refuses numbers that kernels do not take.
fn check(ids: &[u32], rows: &[RowPosition]) -> Result<()> {
    let least = |name: &str, v: Option<usize>| int("batch", name, v.unwrap_or(0)).map(drop);
    least("as a token id", ids.iter().max().map(|id| *id as usize))?;
    least("as a position", rows.iter().map(|r| r.position).max())?;
    least("as a slot", rows.iter().map(|r| r.slot).max())?;
    least("tokens", Some(ids.len()))
}

/// Lays out what kernels read, of checked numbers and rows; `stride` is at least the number of tokens.
fn stage(ids: &[u32], rows: &[RowPosition], stride: usize, to: &mut Vec<i32>) -> Extent {
    to.clear();
    to.resize(3 * stride, 0);
    let mut extent = Extent::default();
    for (i, (id, row)) in ids.iter().zip(rows).enumerate() {
        to[i] = *id as i32;
        to[stride + i] = row.position as i32;
        to[2 * stride + i] = row.slot as i32;
        if i == 0 || rows[i - 1].slot != row.slot {
            to.push(i as i32);
        }
        extent.longest = extent.longest.max(row.position + 1);
        extent.slots = extent.slots.max(row.slot + 1);
    }
    to.push(ids.len() as i32);
    let starts = &to[3 * stride..];
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
        let extent = stage(&[10, 11, 12, 13], &at, 8, &mut staged);
        assert_eq!(extent, Extent { sequences: 3, longest_run: 2, longest: 301, slots: 4 });
        assert_eq!(staged[..4], [10, 11, 12, 13]);
        assert_eq!(staged[8..12], [5, 6, 0, 300]);
        assert_eq!(staged[16..20], [2, 2, 0, 3]);
        assert_eq!(staged[24..], [0, 2, 3, 4]);
        assert_eq!(stage(&[10, 11, 12, 13], &at, 4, &mut staged), extent);
        assert_eq!(staged, [10, 11, 12, 13, 5, 6, 0, 300, 2, 2, 0, 3, 0, 2, 3, 4]);
        let extent = stage(&[1, 2], &rows(&[(0, 3), (1, 4)]), 2, &mut staged);
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
