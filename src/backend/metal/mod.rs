//! Apple GPUs: packed weights, KV caches and the kernels of `kernels/metal` on them (`kernels/README.md`).
//!
//! Kernels are encoded in the order of the calls into the command buffer of a candle device, which is committed when somebody
//! waits: a decode step is one command buffer. Memory is the CPU's and the GPU's at once, so weights are packed where they
//! stay, and nothing is copied there twice. Scratch memory is kept and only grows.
//!
//! `driver` holds all that is Metal's; without a Mac the same host code runs on the emulator that stands in there.

mod attention;
mod bandwidth;
mod batch;
mod chip;
mod dense;
mod driver;
mod failure;
mod found;
mod kernels;
mod launch;
mod linear;
mod low_rank;
mod memory;
mod norm;
mod params;
mod plan;
mod profile;
mod sample;
mod scratch;
mod self_test;
mod ternary;
#[cfg(test)]
mod tests;

pub use attention::{MetalKv, MetalRope};
pub use batch::MetalBatch;
pub use chip::MetalChip;
pub use dense::MetalDense;
pub use found::{chips, count, open};
pub use low_rank::MetalLowRank;
pub use memory::{MetalBuffer, MetalSlice};
pub use sample::MetalSampler;
pub use self_test::{SelfTest, self_test};
pub use ternary::MetalTernary;

use super::gpu::{Open, shape};
use crate::Result;
use candle_core::MetalDevice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A GPU with its kernels and scratch memory: a candle device's.
pub struct Metal {
    chip: MetalChip,
    gpu: driver::Gpu,
    scratch: Mutex<scratch::Scratch>,
    /// Kernels may be on their way that nobody has waited for.
    busy: AtomicBool,
    profile: profile::Profile,
}

impl Metal {
    /// The GPU behind a candle device: compiles the kernels of products, and compares a small product with the reference.
    ///
    /// # Errors
    /// [`Error::Unavailable`] for a GPU other than Apple's or a lack of memory, [`Error::Device`] if a kernel does not
    /// compile, [`Error::SelfCheck`] if the device's result is wrong.
    pub fn new(device: &MetalDevice) -> Result<Self> {
        let gpu = driver::Gpu::new(device)?;
        let chip = gpu.chip();
        chip.usable()?;
        let (scratch, busy, profile) = (Mutex::default(), AtomicBool::new(false), profile::Profile::default());
        let metal = Self { chip, gpu, scratch, busy, profile };
        metal.self_check()?;
        Ok(metal)
    }

    /// As [`Metal::new`]; backends of the same candle device that live at the same time share one.
    ///
    /// # Errors
    /// As [`Metal::new`].
    pub fn shared(device: &MetalDevice) -> Result<Arc<Self>> {
        static OPEN: Open<found::Identity, Metal> = Open::new();
        OPEN.shared(found::identity(device), || Self::new(device))
    }

    /// What is known of the chip.
    pub fn chip(&self) -> &MetalChip {
        &self.chip
    }

    /// Bytes that this process has left of the memory that the GPU should be given at most (Metal's recommended working
    /// set), and all of that.
    pub fn memory(&self) -> (usize, usize) {
        (self.chip.working_set.saturating_sub(self.gpu.allocated()), self.chip.working_set)
    }

    /// Waits until the device has done all that was asked of it.
    ///
    /// # Errors
    /// [`Error::Device`] for what went wrong on the device since the last time.
    pub fn synchronize(&self) -> Result<()> {
        self.gpu.wait()?;
        self.busy.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn scratch(&self) -> MutexGuard<'_, scratch::Scratch> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Metal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Metal").field(&self.chip).finish()
    }
}

/// Refuses rows that kernels read 16 bytes at a time and could not. Memory begins at such addresses, and so does every row
/// of a multiple of 4 values in it.
fn aligned<const N: usize>(op: &'static str, operands: [MetalSlice<'_>; N]) -> Result<()> {
    match operands.iter().all(MetalSlice::is_aligned) {
        true => Ok(()),
        false => Err(shape(op, "rows that do not begin at a multiple of 16 bytes of their memory".into())),
    }
}
