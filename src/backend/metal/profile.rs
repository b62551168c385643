//! Times of kernels, for `bench --profile`. Kernels then run one after the other, each in a command buffer of its own, whose
//! time on the GPU is taken.

use super::Metal;
use crate::Result;
use crate::backend::gpu::profile::{KernelTime, Totals};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Default)]
pub(super) struct Profile {
    on: AtomicBool,
    totals: Mutex<Totals>,
}

impl Profile {
    pub(super) fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Counts a launch.
    pub(super) fn add(&self, kernel: &'static str, bytes: usize, seconds: f64) {
        self.totals().add(kernel, bytes, seconds);
    }

    fn totals(&self) -> MutexGuard<'_, Totals> {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Metal {
    /// Turns the timing of kernels on or off; what was timed before stays.
    pub fn profile(&self, on: bool) {
        self.profile.on.store(on, Ordering::Relaxed);
    }

    /// What was timed since the last call, the longest first; waits for the device.
    ///
    /// # Errors
    /// [`crate::Error::Device`] for what went wrong on the device.
    pub fn take_profile(&self) -> Result<Vec<KernelTime>> {
        self.synchronize()?;
        Ok(self.profile.totals().take())
    }
}
