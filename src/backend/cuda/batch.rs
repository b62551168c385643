//! The tokens of a forward pass in device memory.
//!
//! One buffer, one upload a pass. The arrays of a batch of n tokens are as far apart as the power of two above n, so a
//! decode step uploads little, and its arrays are where a captured graph of as many tokens expects them.

use super::{Cuda, CudaSlice, failure, plan, zeroed};
use crate::Result;
use crate::backend::attention::RowPosition;
use crate::backend::gpu::GpuBatch;
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use std::sync::Arc;

/// Shortest distance between two arrays.
const MIN_STRIDE: usize = 8;

/// Token ids with the slot and position of each, on the host and in device memory.
pub type CudaBatch = GpuBatch<CudaTokens>;

/// Device memory of a batch, with the stream that fills it.
#[derive(Debug)]
pub struct CudaTokens {
    stream: Arc<CudaStream>,
    memory: CudaSlice<i32>,
}

impl CudaBatch {
    /// Room for `capacity` tokens.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if memory is short.
    pub fn new(cuda: &Cuda, capacity: usize) -> Result<Self> {
        let size = stride(capacity).saturating_mul(3).saturating_add(capacity).saturating_add(1);
        let memory = zeroed(&cuda.stream, size, "a batch's tokens")?;
        Self::within(CudaTokens { stream: cuda.stream.clone(), memory }, capacity)
    }

    /// Replaces the tokens; the device has them before any kernel that is launched later.
    ///
    /// # Errors
    /// As [`crate::backend::HostBatch::set`], and [`crate::Error::Shape`] for numbers that kernels do not take, with the batch
    /// as it was; [`crate::Error::Device`] if the upload fails.
    pub fn set(&mut self, ids: &[u32], rows: &[RowPosition]) -> Result<()> {
        self.stage(ids, rows, stride(ids.len()))?;
        let (CudaTokens { stream, memory }, staged) = self.staged();
        let mut to = memory.slice_mut(..staged.len());
        // Not pinned: the driver has read pageable memory when it returns, so it can be written again at once.
        stream.memcpy_htod(staged, &mut to).map_err(|e| failure::driver(stream, "a batch's tokens", e))
    }

    /// The class of lengths that one captured graph serves: the positions of the longest sequence rounded up to a power of two,
    /// at least 256.
    pub fn bucket(&self) -> usize {
        plan::bucket(self.extent().longest)
    }

    /// Addresses of ids, positions, slots and starts.
    fn addresses(&self, cuda: &Cuda) -> [u64; 4] {
        let (start, stride) = (cuda.read(&self.memory.memory), stride(self.len()));
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

#[cfg(test)]
mod tests {
    #[test]
    fn decode_steps_of_one_size_are_laid_out_alike() {
        assert_eq!([0, 1, 2, 8, 9, 2000].map(super::stride), [8, 8, 8, 8, 16, 2048]);
    }
}
