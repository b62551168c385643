//! Launching a kernel.

use super::{Cuda, failure, shape};
use crate::Result;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::cuda_backend::cudarc::driver::sys;
use std::ffi::c_void;
use std::sync::atomic::Ordering;

/// Most blocks of a grid in its second and third dimension.
pub(super) const MAX_GRID_YZ: usize = 65_535;

/// Which kernel runs how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Launch {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: (usize, usize, usize),
    /// Threads of a block.
    pub block: usize,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
    /// Bytes of device memory that it moves, for the profile.
    pub bytes: usize,
}

impl Launch {
    /// A launch without shared memory.
    pub(super) fn new(kernel: &'static str, grid: (usize, usize, usize), block: usize) -> Self {
        Self { kernel, grid, block, shared: 0, bytes: 0 }
    }

    /// With dynamic shared memory.
    pub(super) fn shared(self, shared: usize) -> Self {
        Self { shared, ..self }
    }

    /// With the bytes that it moves.
    pub(super) fn bytes(self, bytes: usize) -> Self {
        Self { bytes, ..self }
    }

    /// The grid as the driver takes it; refuses what no chip can run.
    fn checked(&self, shared_per_block: usize) -> Result<[u32; 3]> {
        let Self { kernel, grid: (x, y, z), block, shared, .. } = *self;
        let fits = (1..=i32::MAX as usize).contains(&x)
            && (1..=MAX_GRID_YZ).contains(&y)
            && (1..=MAX_GRID_YZ).contains(&z)
            && (32..=1024).contains(&block)
            && block.is_multiple_of(32)
            && shared <= shared_per_block;
        if !fits {
            let reason = format!(
                "{kernel}: no GPU runs a grid of {x} × {y} × {z} with blocks of {block} threads and {shared} bytes of \
                 shared memory (here at most {shared_per_block})"
            );
            return Err(shape("launch", reason));
        }
        Ok([x as u32, y as u32, z as u32])
    }
}

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
            blockDimX: launch.block as u32,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_launches_are_refused_by_name() {
        let good = Launch::new("k", (7, 2, 3), 256).shared(48 << 10);
        assert_eq!(good.checked(64 << 10).unwrap(), [7, 2, 3]);
        for bad in [
            Launch { grid: (0, 1, 1), ..good },
            Launch { grid: (1, 65_536, 1), ..good },
            Launch { grid: (1, 1, 65_536), ..good },
            Launch { grid: (1 << 31, 1, 1), ..good },
            Launch { block: 1056, ..good },
            Launch { block: 33, ..good },
            Launch { shared: (64 << 10) + 1, ..good },
        ] {
            let message = bad.checked(64 << 10).unwrap_err().to_string();
            assert!(message.contains("k: "), "{message}");
        }
    }
}
