//! Finding and opening a GPU. Without a driver or a GPU these return; they never panic.

use super::failure;
use crate::backend::gpu::no_such_gpu;
use crate::{Error, Result};
use candle_core::Device;
use candle_core::cuda_backend::CudaError;
use candle_core::cuda_backend::cudarc::driver::CudaContext;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many GPUs the driver shows to this process; 0 without a driver.
pub fn count() -> usize {
    devices().unwrap_or(0)
}

/// Opens a GPU as a candle device with a stream of its own and without event tracking: all work of such a device is in one
/// stream, and events would make a captured graph wait for what was not captured.
///
/// # Errors
/// [`Error::Unavailable`] without a driver or such a GPU, saying what was found, or if the driver refuses a context.
pub fn open(ordinal: usize) -> Result<Device> {
    let found = devices()?;
    if ordinal >= found {
        return Err(no_such_gpu(ordinal, found, "the driver", " (see nvidia-smi and CUDA_VISIBLE_DEVICES)"));
    }
    let device = {
        let _alone = opening_or_recording();
        guarded(|| Device::new_cuda_with_stream(ordinal))?
    };
    let device = device.map_err(|e| failure::unavailable(format!("GPU {ordinal}"), told(&e)))?;
    if let Device::Cuda(cuda) = &device {
        // SAFETY: candle allocates, uses and frees all memory of this device in its one stream, so the order of the
        // stream is all the synchronization that is needed.
        unsafe { cuda.disable_event_tracking() };
    }
    Ok(device)
}

/// Held while a GPU is opened and while a step is recorded. Opening waits for all streams of the context, which the driver
/// refuses while one of them is being captured, whoever captures; the recording would be lost as well.
pub(super) fn opening_or_recording() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the driver told candle, without a stack trace.
fn told(e: &candle_core::Error) -> String {
    match e {
        candle_core::Error::WithBacktrace { inner, .. } => told(inner),
        candle_core::Error::Cuda(e) => match e.downcast_ref() {
            Some(CudaError::Cuda(e)) => failure::text(*e),
            _ => e.to_string(),
        },
        e => e.to_string(),
    }
}

/// The number of GPUs.
///
/// # Errors
/// [`Error::Unavailable`] without a driver, or if it does not answer.
pub(super) fn devices() -> Result<usize> {
    #[cfg(target_os = "linux")]
    if !super::driver::is_present() {
        return Err(no_driver());
    }
    let count = guarded(CudaContext::device_count)?;
    let count = count.map_err(|e| failure::unavailable("CUDA", failure::text(e)))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Runs calls into the driver. A build that links the driver gets errors from all of them; one that loads it at run time
/// (cudarc's `dynamic-loading`, which another crate of a program can turn on) panics where there is no driver.
fn guarded<T>(call: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|_| no_driver())
}

fn no_driver() -> Error {
    let library = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };
    let reason =
        format!("the driver's library ({library}) cannot be loaded; install the NVIDIA driver or use --device cpu");
    failure::unavailable("CUDA", reason)
}
