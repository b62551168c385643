//! What the driver reports, as this crate's errors: the thing, CUDA's name and text for it, and the remedy.

use crate::Error;
use crate::backend::gpu::size;
use candle_core::cuda_backend::cudarc::driver::sys::CUresult;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DriverError};

pub(super) use crate::backend::gpu::unavailable;

/// CUDA's name and text for an error, and what can be done about it.
pub(super) fn text(e: DriverError) -> String {
    // The driver itself translates; without one there is only the name that was compiled in.
    let name = e.error_name().map_or_else(|_| format!("{:?}", e.0), |n| n.to_string_lossy().into_owned());
    let text = e.error_string().map_or_else(|_| String::new(), |t| format!(" ({})", t.to_string_lossy()));
    format!("{name}{text}{}", remedy(e.0))
}

/// Whether nothing can run on the device in this process any more.
pub(super) fn is_lost(code: CUresult) -> bool {
    use CUresult::*;
    matches!(
        code,
        CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_DEINITIALIZED
            | CUDA_ERROR_UNKNOWN
    )
}

fn remedy(code: CUresult) -> &'static str {
    use CUresult::*;
    match code {
        CUDA_ERROR_ECC_UNCORRECTABLE => {
            "; the GPU's memory is faulty and lost to this process, which must be restarted; see nvidia-smi -q -d ECC"
        }
        code if is_lost(code) => "; the GPU is lost to this process, which must be restarted",
        CUDA_ERROR_NO_DEVICE => "; no NVIDIA GPU was found, or no driver is running: see nvidia-smi; use --device cpu",
        CUDA_ERROR_INVALID_DEVICE => "; see nvidia-smi for the GPUs of this machine",
        CUDA_ERROR_NO_BINARY_FOR_GPU
        | CUDA_ERROR_INVALID_IMAGE
        | CUDA_ERROR_INVALID_PTX
        | CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        | CUDA_ERROR_JIT_COMPILER_NOT_FOUND
        | CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
        | CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            "; update the NVIDIA driver, or build with an older CUDA toolkit"
        }
        CUDA_ERROR_OUT_OF_MEMORY => "; use a smaller context or fewer sequences, or free the GPU of other processes",
        _ => "",
    }
}

/// A driver call that failed while it did `what`.
pub(super) fn driver(stream: &CudaStream, what: &str, e: DriverError) -> Error {
    Error::Device { what: format!("{what} on GPU {}", stream.context().ordinal()), reason: text(e) }
}

/// An allocation of `bytes` for `what` that failed.
pub(super) fn allocation(stream: &CudaStream, what: &str, bytes: usize, e: DriverError) -> Error {
    match e.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => out_of_memory(stream, what, bytes),
        _ => driver(stream, what, e),
    }
}

/// The error that says what was needed and what there was.
pub(super) fn out_of_memory(stream: &CudaStream, what: &str, bytes: usize) -> Error {
    let there = match stream.context().mem_get_info() {
        Ok((free, total)) => format!("{} of {} are free", size(free), size(total)),
        Err(_) => "the driver does not tell how much is free".into(),
    };
    unavailable(
        format!("{} of memory for {what} on GPU {}", size(bytes), stream.context().ordinal()),
        format!("{there}{}", remedy(CUresult::CUDA_ERROR_OUT_OF_MEMORY)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_devices_and_short_memory_have_their_remedies() {
        for code in [CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, CUresult::CUDA_ERROR_LAUNCH_FAILED] {
            assert!(is_lost(code) && remedy(code).contains("restarted"));
        }
        assert!(remedy(CUresult::CUDA_ERROR_ECC_UNCORRECTABLE).contains("restarted"));
        assert!(!is_lost(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        assert!(remedy(CUresult::CUDA_ERROR_OUT_OF_MEMORY).contains("smaller context"));
        assert!(remedy(CUresult::CUDA_ERROR_NO_DEVICE).contains("--device cpu"));
    }
}
