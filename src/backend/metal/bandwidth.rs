//! The bandwidth of memory, which bounds decode.

use super::Metal;
use crate::Result;

/// Bytes of a copy: far more than any cache.
const COPY: usize = 256 << 20;
/// Copies, of which the fastest counts.
const COPIES: usize = 10;

impl Metal {
    /// Copies memory to memory on the GPU: bytes read and written a second, the best of several.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if there is no room for two buffers of up to 256 MiB, [`crate::Error::Device`] for what
    /// fails on the device.
    pub fn copy_bandwidth(&self) -> Result<f64> {
        let (free, _) = self.memory();
        let size = COPY.min(free / 4).max(1 << 20);
        let from = self.zeroed::<u8>(size, "measuring bandwidth")?;
        let to = self.zeroed::<u8>(size, "measuring bandwidth")?;
        let mut best = f64::INFINITY;
        for _ in 0..COPIES {
            best = best.min(self.gpu.copy_timed(from.owned(), to.owned(), size)?);
        }
        Ok(2.0 * size as f64 / best)
    }
}
