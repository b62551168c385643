//! Times of kernels by CUDA events, for `bench --profile`. Kernels then run one after the other and outside of graphs.

use super::{Cuda, failure};
use crate::Result;
use crate::backend::gpu::profile::{KernelTime, Totals};
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, DriverError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Launches whose events wait to be read; more are read at once.
const PENDING: usize = 4096;

#[derive(Default)]
pub(super) struct Profile {
    on: AtomicBool,
    record: Mutex<Record>,
}

#[derive(Default)]
struct Record {
    pending: Vec<(&'static str, usize, CudaEvent, CudaEvent)>,
    totals: Totals,
}

impl Record {
    fn read(&mut self) -> Result<(), DriverError> {
        for (kernel, bytes, start, end) in self.pending.drain(..) {
            self.totals.add(kernel, bytes, f64::from(start.elapsed_ms(&end)?) / 1e3);
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
        Ok(record.totals.take())
    }
}
