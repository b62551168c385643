//! The tokens of a forward pass where the kernels read them.
//!
//! One buffer, one upload a pass. The arrays of a batch of n tokens are as far apart as the power of two above n, so a
//! decode step uploads little, and its arrays are where a captured graph of as many tokens expects them.
//!
//! ```text
//! | ids | positions | slots | starts |      i32; ids, positions, slots: `stride` each; starts: sequences + 1
//! ```

use super::{Cuda, CudaSlice, plan, shape, zeroed};
use crate::Result;
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
    capacity: usize,
    staging: Vec<i32>,
    ids: Vec<u32>,
    rows: Vec<RowPosition>,
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
            capacity,
            staging: Vec::new(),
            ids: Vec::new(),
            rows: Vec::new(),
            extent: Extent::default(),
        })
    }

    /// Replaces the tokens; the device has them before any kernel that is launched later.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for more tokens than there is room for, numbers that kernels do not take, or rows that are
    /// no sequences, the batch being empty then; [`crate::Error::Unavailable`] if the upload fails.
    pub fn set(&mut self, ids: &[u32], rows: &[RowPosition]) -> Result<()> {
        self.ids.clear();
        self.rows.clear();
        self.extent = Extent::default();
        if ids.len() != rows.len() || ids.len() > self.capacity {
            let reason = format!("{} ids at {} positions, room for {}", ids.len(), rows.len(), self.capacity);
            return Err(shape("batch", reason));
        }
        if ids.is_empty() {
            return Ok(());
        }
        let extent = stage(ids, rows, &mut self.staging)?;
        let mut to = self.memory.slice_mut(..self.staging.len());
        // Not pinned: the driver has read pageable memory when it returns, so it can be written again at once.
        self.stream
            .memcpy_htod(&self.staging[..], &mut to)
            .map_err(|e| super::failure::driver(&self.stream, "a batch's tokens", e))?;
        self.ids.extend_from_slice(ids);
        self.rows.extend_from_slice(rows);
        self.extent = extent;
        Ok(())
    }

    /// Tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Tokens that there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The tokens' ids.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Their slots and positions.
    pub fn rows(&self) -> &[RowPosition] {
        &self.rows
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
        self.ids.iter().max().copied()
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

/// Lays out what is uploaded.
fn stage(ids: &[u32], rows: &[RowPosition], to: &mut Vec<i32>) -> Result<Extent> {
    let number = |name: &str, v: usize| super::int("batch", name, v);
    let stride = stride(ids.len());
    to.clear();
    to.resize(3 * stride, 0);
    let mut extent = Extent::default();
    for (i, (id, row)) in ids.iter().zip(rows).enumerate() {
        to[i] = number("as a token id", *id as usize)?;
        to[stride + i] = number("as a position", row.position)?;
        to[2 * stride + i] = number("as a slot", row.slot)?;
        let continues = i > 0 && {
            let before = rows[i - 1];
            before.slot == row.slot && before.position + 1 == row.position
        };
        if !continues {
            to.push(number("tokens", i)?);
        }
        extent.longest = extent.longest.max(row.position + 1);
        extent.slots = extent.slots.max(row.slot + 1);
    }
    to.push(number("tokens", ids.len())?);
    let starts = &to[3 * stride..];
    extent.sequences = starts.len() - 1;
    extent.longest_run = starts.windows(2).map(|w| (w[1] - w[0]) as usize).max().unwrap_or(0);
    // Two sequences in one slot would overwrite each other. Mostly slots ascend, which is quickly seen.
    let slot = |start: &i32| rows[*start as usize].slot;
    let firsts = &starts[..extent.sequences];
    if !firsts.windows(2).all(|w| slot(&w[0]) < slot(&w[1])) {
        let mut slots: Vec<usize> = firsts.iter().map(slot).collect();
        slots.sort_unstable();
        if let Some(twice) = slots.windows(2).find(|w| w[0] == w[1]) {
            let reason = format!("the tokens of slot {} are not contiguous and ascending by one position", twice[0]);
            return Err(shape("batch", reason));
        }
    }
    Ok(extent)
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
        let extent = stage(&[10, 11, 12, 13], &at, &mut staged).unwrap();
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
            let extent = stage(&[1, 2], &rows(&[(0, position), (1, 4)]), &mut staged).unwrap();
            assert_eq!((extent.sequences, extent.longest_run, staged.len()), (2, 1, 3 * 8 + 3));
        }
        assert_eq!([0, 1, 8, 9, 2000].map(stride), [8, 8, 8, 16, 2048]);
    }

    #[test]
    fn rows_that_are_no_sequences_are_refused() {
        let mut staged = Vec::new();
        for bad in [[(0, 1), (1, 0), (0, 2)], [(0, 1), (0, 3), (1, 0)], [(0, 1), (0, 1), (1, 0)]] {
            let message = stage(&[1, 2, 3], &rows(&bad), &mut staged).unwrap_err().to_string();
            assert!(message.contains("slot 0"), "{message}");
        }
        assert!(stage(&[u32::MAX], &rows(&[(0, 0)]), &mut staged).is_err());
        assert!(stage(&[1], &rows(&[(0, 1 << 40)]), &mut staged).is_err());
    }
}
