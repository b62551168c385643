//! Times of kernels by CUDA events, for `bench --profile`. Kernels then run one after the other and outside of graphs.

use super::{Cuda, failure};
use crate::Result;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, DriverError};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Launches whose events wait to be read; more are read at once.
const PENDING: usize = 4096;

/// What all launches of a kernel took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KernelTime {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Launches.
    pub launches: usize,
    /// Seconds on the device, all launches together.
    pub seconds: f64,
    /// Bytes of device memory that they had to move.
    pub bytes: usize,
}

#[derive(Default)]
pub(super) struct Profile {
    on: AtomicBool,
    record: Mutex<Record>,
}

#[derive(Default)]
struct Record {
    pending: Vec<(&'static str, usize, CudaEvent, CudaEvent)>,
    totals: BTreeMap<&'static str, KernelTime>,
}

impl Record {
    fn read(&mut self) -> Result<(), DriverError> {
        for (kernel, bytes, start, end) in self.pending.drain(..) {
            let seconds = f64::from(start.elapsed_ms(&end)?) / 1e3;
            let none = KernelTime { kernel, launches: 0, seconds: 0.0, bytes: 0 };
            let total = self.totals.entry(kernel).or_insert(none);
            total.launches += 1;
            total.seconds += seconds;
            total.bytes += bytes;
        }
        Ok(())
    }
}

impl Profile {
    pub(super) fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks the start of a launch, if the profile is on.
    pub(super) fn start(&self, stream: &CudaStream) -> Result<Option<CudaEvent>, DriverError> {
        self.is_on().then(|| stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))).transpose()
    }

    /// Marks its end.
    pub(super) fn end(
        &self,
        stream: &CudaStream,
        kernel: &'static str,
        bytes: usize,
        start: CudaEvent,
    ) -> Result<(), DriverError> {
        let end = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        let mut record = self.record();
        record.pending.push((kernel, bytes, start, end));
        if record.pending.len() >= PENDING {
            record.read()?;
        }
        Ok(())
    }
}

impl Cuda {
    /// Turns the timing of kernels on or off; what was timed before stays.
    pub fn profile(&self, on: bool) {
        self.profile.on.store(on, Ordering::Relaxed);
    }

    /// What was timed since the last call, the longest first; waits for the device.
    ///
    /// # Errors
    /// [`crate::Error::Device`] for what went wrong on the device.
    pub fn take_profile(&self) -> Result<Vec<KernelTime>> {
        let mut record = self.profile.record();
        record.read().map_err(|e| failure::driver(&self.stream, "timing kernels", e))?;
        let mut times: Vec<_> = std::mem::take(&mut record.totals).into_values().collect();
        times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(times)
    }
}
