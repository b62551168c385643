//! The bandwidth of device memory, which bounds decode.

use super::{Cuda, CudaSlice, failure};
use crate::Result;
use candle_core::cuda_backend::cudarc::driver::DriverError;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;

/// Bytes of a copy: far more than any L2 cache.
const COPY: usize = 256 << 20;
/// Copies, of which the fastest counts.
const COPIES: usize = 10;

impl Cuda {
    /// Copies device memory to device memory: bytes read and written a second, the best of several.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if there is no room for two buffers of up to 256 MiB, or for what fails on the device.
    pub fn copy_bandwidth(&self) -> Result<f64> {
        let (free, _) = self.memory()?;
        let size = COPY.min(free / 4).max(1 << 20);
        let from = self.zeroed::<u8>(size, "measuring bandwidth")?;
        let mut to = self.zeroed::<u8>(size, "measuring bandwidth")?;
        let mut best = f64::INFINITY;
        for _ in 0..COPIES {
            let seconds = self.time_copy(&from, &mut to);
            best = best.min(seconds.map_err(|e| failure::driver(&self.stream, "measuring bandwidth", e))?);
        }
        Ok(2.0 * size as f64 / best)
    }

    fn time_copy(&self, from: &CudaSlice<u8>, to: &mut CudaSlice<u8>) -> Result<f64, DriverError> {
        let timing = Some(CUevent_flags::CU_EVENT_DEFAULT);
        let start = self.stream.record_event(timing)?;
        self.stream.memcpy_dtod(from, to)?;
        let end = self.stream.record_event(timing)?;
        Ok(f64::from(start.elapsed_ms(&end)?).max(1e-3) / 1e3)
    }
}
