//! The tokens of a forward pass where the kernels read them.

use super::{Metal, MetalBuffer, MetalSlice};
use crate::Result;
use crate::backend::attention::RowPosition;
use crate::backend::gpu::GpuBatch;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Token ids with the slot and position of each, on the host and where kernels read them.
pub type MetalBatch = GpuBatch<MetalTokens>;

/// Memory of a batch, with the device that reads it.
#[derive(Debug)]
pub struct MetalTokens {
    metal: Arc<Metal>,
    memory: MetalBuffer<i32>,
}

impl MetalBatch {
    /// Room for `capacity` tokens.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if memory is short.
    pub fn new(metal: &Arc<Metal>, capacity: usize) -> Result<Self> {
        Self::within(MetalTokens { metal: Arc::clone(metal), memory: memory(metal, capacity)? }, capacity)
    }

    /// Replaces the tokens; the device has them before any kernel that is launched later.
    ///
    /// # Errors
    /// As [`crate::backend::HostBatch::set`], and [`crate::Error::Shape`] for numbers that kernels do not take, with the batch
    /// as it was; [`crate::Error::Unavailable`] if memory is short.
    pub fn set(&mut self, ids: &[u32], rows: &[RowPosition]) -> Result<()> {
        self.stage(ids, rows, ids.len())?;
        let capacity = self.capacity();
        let (tokens, staged) = self.staged();
        if tokens.metal.busy.load(Ordering::Relaxed) {
            // Kernels that are on their way may still read the last batch, and keep its memory for as long as they do.
            tokens.memory = memory(&tokens.metal, capacity)?;
        }
        tokens.memory.write(staged)
    }

    /// The ids.
    pub(super) fn ids_slice(&self) -> MetalSlice<'_, i32> {
        self.memory.memory.slice(..self.len())
    }

    /// Positions, slots and starts.
    pub(super) fn row_slices(&self) -> [MetalSlice<'_, i32>; 3] {
        let n = self.len();
        let parts = [n..2 * n, 2 * n..3 * n, 3 * n..3 * n + self.extent().sequences + 1];
        parts.map(|part| self.memory.memory.slice(part))
    }
}

/// Memory for a batch of up to `capacity` tokens.
fn memory(metal: &Metal, capacity: usize) -> Result<MetalBuffer<i32>> {
    metal.zeroed(capacity.saturating_mul(4).saturating_add(1), "a batch's tokens")
}
