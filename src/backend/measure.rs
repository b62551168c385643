//! What a device tells of itself while it runs: memory, bandwidth, and when it is done.

use super::select::Backend;
use crate::Result;

/// Memory of a GPU. On NVIDIA's, as the driver counts it for all processes; on Apple's, which share the machine's, what this
/// process uses of the most that a GPU should be given (Metal's recommended working set).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes that are free.
    pub free: usize,
    /// Bytes that there are.
    pub total: usize,
}

impl DeviceMemory {
    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.total.saturating_sub(self.free)
    }
}

impl std::fmt::Display for DeviceMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2} of {:.1} GB", self.used() as f64 / 1e9, self.total as f64 / 1e9)
    }
}

impl Backend {
    /// Waits until the device has done all that was asked of it; the CPU always has.
    ///
    /// # Errors
    /// [`crate::Error::Device`] for what went wrong on the device since the last time.
    pub fn synchronize(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Ok(cuda) = self.cuda() {
            return cuda.synchronize();
        }
        #[cfg(feature = "metal")]
        if let Ok(metal) = self.metal() {
            return metal.synchronize();
        }
        Ok(())
    }

    /// The GPU's memory; none on the CPU, whose memory [`super::host`] tells.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if the driver does not answer.
    pub fn device_memory(&self) -> Result<Option<DeviceMemory>> {
        #[cfg(feature = "cuda")]
        if let Ok(cuda) = self.cuda() {
            let (free, total) = cuda.memory()?;
            return Ok(Some(DeviceMemory { free, total }));
        }
        #[cfg(feature = "metal")]
        if let Ok(metal) = self.metal() {
            let (free, total) = metal.memory();
            return Ok(Some(DeviceMemory { free, total }));
        }
        Ok(None)
    }

    /// Bytes a second that a copy within the GPU's memory reads and writes; none on the CPU, for which there is
    /// [`super::cpu::read_bandwidth`].
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if there is no room for the buffers, or for what fails on the device.
    pub fn copy_bandwidth(&self) -> Result<Option<f64>> {
        #[cfg(feature = "cuda")]
        if let Ok(cuda) = self.cuda() {
            return cuda.copy_bandwidth().map(Some);
        }
        #[cfg(feature = "metal")]
        if let Ok(metal) = self.metal() {
            return metal.copy_bandwidth().map(Some);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn the_cpu_has_no_memory_of_a_device() {
        let backend = Backend::for_device(&Device::Cpu).unwrap();
        backend.synchronize().unwrap();
        assert_eq!((backend.device_memory().unwrap(), backend.copy_bandwidth().unwrap()), (None, None));
        let memory = DeviceMemory { free: 78_390_000_000, total: 79_600_000_000 };
        assert_eq!((memory.used(), memory.to_string().as_str()), (1_210_000_000, "1.21 of 79.6 GB"));
    }
}
