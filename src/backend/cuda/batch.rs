//! The tokens of a forward pass where the kernels read them.
//!
//! One buffer, one upload a pass. The arrays of a batch of n tokens are as far apart as the power of two above n, so a
//! decode step uploads little, and its arrays are where a captured graph of as many tokens expects them.
//!
//! ```text
//! | ids | positions | slots | starts |      i32; ids, positions, slots: `stride` each; starts: sequences + 1
//! ```

use super::{Cuda, CudaSlice, plan, zeroed};
use crate::Result;
use crate::backend::HostBatch;
use crate::backend::attention::RowPosition;
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use std::sync::Arc;

/// Shortest distance between two arrays.
const MIN_STRIDE: usize = 8;

/// Token ids with the slot and position of each, on the host and in device memory.
///
/// Tokens of a sequence are contiguous and ascend by one position; no slot has two sequences.
#[derive(Debug)]
pub struct CudaBatch {
    stream: Arc<CudaStream>,
    memory: CudaSlice<i32>,
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

impl CudaBatch {
    /// Room for `capacity` tokens.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if memory is short.
    pub fn new(cuda: &Cuda, capacity: usize) -> Result<Self> {
        let stride = stride(capacity);
        let size = stride.saturating_mul(3).saturating_add(capacity).saturating_add(1);
        Ok(Self {
            stream: cuda.stream.clone(),
            memory: zeroed(&cuda.stream, size, "a batch's tokens")?,
            staging: Vec::new(),
            host: HostBatch::new(capacity)?,
            extent: Extent::default(),
        })
    }

    /// Replaces the tokens; the device has them before any kernel that is launched later.
    ///
    /// # Errors
    /// As [`HostBatch::set`], and [`crate::Error::Shape`] for numbers that kernels do not take, with the batch as it was;
    /// [`crate::Error::Device`] if the upload fails.
    pub fn set(&mut self, ids: &[u32], rows: &[RowPosition]) -> Result<()> {
        check(ids, rows)?;
        self.host.set(ids, rows)?;
        self.extent = stage(ids, rows, &mut self.staging);
        let mut to = self.memory.slice_mut(..self.staging.len());
        // Not pinned: the driver has read pageable memory when it returns, so it can be written again at once.
        self.stream
            .memcpy_htod(&self.staging[..], &mut to)
            .map_err(|e| super::failure::driver(&self.stream, "a batch's tokens", e))
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

    /// The tokens in this machine's memory.
    pub fn host(&self) -> &HostBatch {
        &self.host
    }

    /// The tokens' ids.
    pub fn ids(&self) -> &[u32] {
        self.host.ids()
    }

    /// Their slots and positions.
    pub fn rows(&self) -> &[RowPosition] {
        self.host.rows()
    }

    /// Sequences.
    pub fn sequences(&self) -> usize {
        self.extent.sequences
    }

    /// Whether every sequence has one token.
    pub fn decode(&self) -> bool {
        self.extent.sequences == self.len()
    }

    /// Positions that the longest sequence has with this batch.
    pub fn longest(&self) -> usize {
        self.extent.longest
    }

    /// The class of lengths that one captured graph serves: [`CudaBatch::longest`] rounded up to a power of two, at
    /// least 256.
    pub fn bucket(&self) -> usize {
        plan::bucket(self.extent.longest)
    }

    /// The largest id.
    pub(super) fn largest_id(&self) -> Option<u32> {
        self.host.ids().iter().max().copied()
    }

    pub(super) fn extent(&self) -> Extent {
        self.extent
    }

    /// Addresses of ids, positions, slots and starts.
    fn addresses(&self, cuda: &Cuda) -> [u64; 4] {
        let (start, stride) = (cuda.read(&self.memory), stride(self.len()));
        [0, 1, 2, 3].map(|i| start + (i * stride * size_of::<i32>()) as u64)
    }

    /// Address of the ids.
    pub(super) fn ids_address(&self, cuda: &Cuda) -> u64 {
        self.addresses(cuda)[0]
    }

    /// Addresses of positions, slots and starts.
    pub(super) fn row_addresses(&self, cuda: &Cuda) -> [u64; 3] {
        let [_, positions, slots, starts] = self.addresses(cuda);
        [positions, slots, starts]
    }
}

/// Elements from one array to the next in a batch of `tokens`.
fn stride(tokens: usize) -> usize {
    tokens.max(MIN_STRIDE).checked_next_power_of_two().unwrap_or(usize::MAX)
}

/// Refuses numbers that kernels do not take.
fn check(ids: &[u32], rows: &[RowPosition]) -> Result<()> {
    let least = |name: &str, v: Option<usize>| super::int("batch", name, v.unwrap_or(0)).map(drop);
    least("as a token id", ids.iter().max().map(|id| *id as usize))?;
    least("as a position", rows.iter().map(|r| r.position).max())?;
    least("as a slot", rows.iter().map(|r| r.slot).max())?;
    least("tokens", Some(ids.len()))
}

/// Lays out what is uploaded, of checked numbers and rows.
fn stage(ids: &[u32], rows: &[RowPosition], to: &mut Vec<i32>) -> Extent {
    let stride = stride(ids.len());
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
        let extent = stage(&[10, 11, 12, 13], &at, &mut staged);
        assert_eq!(extent, Extent { sequences: 3, longest_run: 2, longest: 301, slots: 4 });
        assert_eq!(staged[..4], [10, 11, 12, 13]);
        assert_eq!(staged[8..12], [5, 6, 0, 300]);
        assert_eq!(staged[16..20], [2, 2, 0, 3]);
        assert_eq!(staged[24..], [0, 2, 3, 4]);
        assert_eq!(plan::bucket(extent.longest), 512);
    }

    #[test]
    fn decode_steps_of_one_size_are_laid_out_alike() {
        let mut staged = Vec::new();
        for position in [3, 700] {
            let extent = stage(&[1, 2], &rows(&[(0, position), (1, 4)]), &mut staged);
            assert_eq!((extent.sequences, extent.longest_run, staged.len()), (2, 1, 3 * 8 + 3));
        }
        assert_eq!([0, 1, 8, 9, 2000].map(stride), [8, 8, 8, 16, 2048]);
    }

    #[test]
    fn numbers_that_kernels_do_not_take_are_refused() {
        assert!(check(&[1, 2], &rows(&[(0, 0), (0, 1)])).is_ok());
        assert!(check(&[u32::MAX], &rows(&[(0, 0)])).is_err());
        assert!(check(&[1], &rows(&[(0, 1 << 40)])).is_err());
        assert!(check(&[1], &rows(&[(1 << 31, 0)])).is_err());
    }
}
