//! The GPUs of this machine, asked for what they are without opening them.

use super::chip::Chip;
use super::{failure, open};
use crate::Result;
use candle_core::cuda_backend::cudarc::driver::CudaContext;

/// What the driver tells about every GPU that it shows to this process, those that no kernel runs on too.
///
/// # Errors
/// [`crate::Error::Unavailable`] without a driver, or if it does not answer.
pub fn chips() -> Result<Vec<Chip>> {
    (0..open::devices()?).map(Chip::at).collect()
}

/// Free bytes of a GPU's memory. Opens it, for as long as this takes.
///
/// # Errors
/// [`crate::Error::Unavailable`] if there is no such GPU, or it cannot be opened.
pub fn free_memory(ordinal: usize) -> Result<usize> {
    // Without a driver this ends here; below, a build that loads it at run time would panic.
    open::devices()?;
    let memory = CudaContext::new(ordinal).and_then(|context| context.mem_get_info());
    memory.map(|(free, _)| free).map_err(|e| failure::unavailable(format!("GPU {ordinal}"), failure::text(e)))
}
