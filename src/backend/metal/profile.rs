//! Times of kernels, for `bench --profile`. Kernels then run one after the other, each in a command buffer of its own, whose
//! time on the GPU is taken.

use super::Metal;
use crate::Result;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// What all launches of a kernel took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MetalKernelTime {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Launches.
    pub launches: usize,
    /// Seconds on the device, all launches together.
    pub seconds: f64,
    /// Bytes of memory that they had to move.
    pub bytes: usize,
}

#[derive(Default)]
pub(super) struct Profile {
    on: AtomicBool,
    totals: Mutex<BTreeMap<&'static str, MetalKernelTime>>,
}

impl Profile {
    pub(super) fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Counts a launch.
    pub(super) fn add(&self, kernel: &'static str, bytes: usize, seconds: f64) {
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        let none = MetalKernelTime { kernel, launches: 0, seconds: 0.0, bytes: 0 };
        let total = totals.entry(kernel).or_insert(none);
        total.launches += 1;
        total.seconds += seconds;
        total.bytes += bytes;
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
    pub fn take_profile(&self) -> Result<Vec<MetalKernelTime>> {
        self.synchronize()?;
        let mut totals = self.profile.totals.lock().unwrap_or_else(PoisonError::into_inner);
        let mut times: Vec<_> = std::mem::take(&mut *totals).into_values().collect();
        times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(times)
    }
}
