//! Launching a kernel.

use super::{Cuda, failure};
use crate::Result;
use crate::backend::gpu::Launch;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::cuda_backend::cudarc::driver::sys;
use std::ffi::c_void;
use std::sync::atomic::Ordering;

/// An argument of a kernel: where the driver finds its value during the launch.
pub(super) fn arg<T: DeviceRepr>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

impl Cuda {
    /// Launches a kernel in the device's stream.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for a grid or block that cannot be, [`crate::Error::Device`] with the kernel's name
    /// for what the driver refuses, which may be what went wrong in an earlier launch.
    ///
    /// # Safety
    /// `arguments` are the kernel's, in number, type and order, and every address among them is of memory of this
    /// device that lives until the kernel has run and is as large as the kernel's other arguments and grid make it.
    pub(super) unsafe fn launch(&self, launch: Launch, arguments: &mut [*mut c_void]) -> Result<()> {
        let [x, y, z] = launch.checked(self.chip.shared_per_block)?;
        let function = self.functions.get(launch.kernel)?;
        let capturing = self.capturing.load(Ordering::Relaxed);
        // The kernel may start while its predecessor ends; all kernels wait for it before they touch what it wrote.
        let overlaps =
            self.chip.overlaps_launches() && (!capturing || self.chip.overlaps_in_graphs()) && !self.profile.is_on();
        let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
        value.programmaticStreamSerializationAllowed = 1;
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value,
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared as u32,
            hStream: self.stream.cu_stream(),
            attrs: &mut attribute,
            numAttrs: u32::from(overlaps),
        };
        let failed = |e| failure::driver(&self.stream, &format!("kernel {}", launch.kernel), e);
        self.stream.context().bind_to_thread().map_err(failed)?;
        let start = if capturing { None } else { self.profile.start(&self.stream).map_err(failed)? };
        // SAFETY: config, attribute and the values behind `arguments` live until the call has copied them; the function
        // lives as long as `self` and belongs to the stream's context, which is current; the caller vouches for the
        // arguments.
        let result = unsafe {
            sys::cuLaunchKernelEx(&config, function.cu_function(), arguments.as_mut_ptr(), std::ptr::null_mut())
        };
        result.result().map_err(failed)?;
        match start {
            Some(start) => self.profile.end(&self.stream, launch.kernel, launch.bytes, start).map_err(failed),
            None => Ok(()),
        }
    }
}
