//! NVIDIA GPUs: packed weights, KV caches and the kernels of `kernels/cuda` on them (`kernels/README.md`).
//!
//! Everything runs in the one stream of a candle device and in the order of the calls; nothing waits for the device but
//! packing, reading ids back and measuring. Scratch memory is kept and only grows, so that a decode step allocates nothing
//! and can be captured into a graph.

mod attention;
mod bandwidth;
mod batch;
mod chip;
mod dense;
#[cfg(target_os = "linux")]
mod driver;
mod failure;
mod found;
mod graph;
mod images;
mod launch;
mod linear;
mod low_rank;
mod norm;
mod open;
mod params;
mod plan;
mod profile;
mod sample;
mod scratch;
mod ternary;
#[cfg(test)]
mod tests;

pub use attention::{CudaKv, CudaRope};
pub use batch::CudaBatch;
pub use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, CudaViewMut};
pub use chip::Chip;
pub use dense::CudaDense;
pub use found::{chips, free_memory};
pub use graph::{GraphKey, Graphs};
pub use low_rank::CudaLowRank;
pub use open::{count, open};
pub use sample::CudaSampler;
pub use ternary::CudaTernary;

use super::gpu::{Memory, Open, shape};
use crate::Result;
use candle_core::CudaDevice;
use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A GPU with its kernels, scratch memory and one stream: a candle device's.
pub struct Cuda {
    chip: Chip,
    stream: Arc<CudaStream>,
    functions: images::Functions,
    scratch: Mutex<scratch::Scratch>,
    /// How often scratch memory has moved: a captured graph knows the old addresses.
    generation: AtomicU64,
    /// Launches are being recorded, not run: nothing may be allocated.
    capturing: AtomicBool,
    profile: profile::Profile,
}

impl Cuda {
    /// The GPU behind a candle device: loads the kernels, and compares a small product with the reference.
    ///
    /// Any candle device will do. One from [`open`] has a stream of its own, on which graphs can be captured and which
    /// all threads share; `Device::new_cuda` gives each thread a stream, so such a device must stay on one thread.
    ///
    /// # Errors
    /// [`Error::Unavailable`] for a chip below 7.5, a driver that cannot load the kernels or a lack of memory,
    /// [`Error::SelfCheck`] if the device's result is wrong.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let chip = Chip::of(&stream)?;
        let functions = images::Functions::load(&stream, &chip)?;
        let cuda = Self {
            chip,
            stream,
            functions,
            scratch: Mutex::default(),
            generation: AtomicU64::new(0),
            capturing: AtomicBool::new(false),
            profile: profile::Profile::default(),
        };
        cuda.self_check()?;
        Ok(cuda)
    }

    /// As [`Cuda::new`]; backends of the same candle device that live at the same time share one.
    ///
    /// # Errors
    /// As [`Cuda::new`].
    pub fn shared(device: &CudaDevice) -> Result<Arc<Self>> {
        static OPEN: Open<DeviceId, Cuda> = Open::new();
        OPEN.shared(device.id(), || Self::new(device))
    }

    /// What is known of the chip and its driver.
    pub fn chip(&self) -> &Chip {
        &self.chip
    }

    /// Free and total bytes of device memory, as the driver counts them for all processes.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver does not answer.
    pub fn memory(&self) -> Result<(usize, usize)> {
        let memory = self.stream.context().mem_get_info();
        memory.map_err(|e| failure::driver(&self.stream, "the size of device memory", e))
    }

    /// Waits until the device has done all that was asked of it.
    ///
    /// # Errors
    /// [`Error::Device`] for what went wrong on the device since the last time.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(|e| failure::driver(&self.stream, "waiting for the device", e))
    }

    /// How often scratch memory has moved.
    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    fn scratch(&self) -> MutexGuard<'_, scratch::Scratch> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Zeroed device memory for `len` elements; `what` names it in errors.
    fn zeroed<T: DeviceRepr + ValidAsZeroBits>(&self, len: usize, what: &str) -> Result<CudaSlice<T>> {
        zeroed(&self.stream, len, what)
    }

    /// A copy of `values` in device memory; returns when they have been read.
    fn upload<T: DeviceRepr + ValidAsZeroBits>(&self, values: &[T], what: &str) -> Result<CudaSlice<T>> {
        let mut memory = self.zeroed(values.len(), what)?;
        self.copy_in(values, &mut memory.as_view_mut(), what)?;
        Ok(memory)
    }

    /// Copies `values` to the start of `to`, which is at least as long; returns when they have been read.
    fn copy_in<T: DeviceRepr>(&self, values: &[T], to: &mut CudaViewMut<'_, T>, what: &str) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        if to.len() < values.len() {
            return Err(shape("upload", format!("{} elements into {} of {what}", values.len(), to.len())));
        }
        self.stream.memcpy_htod(values, to).map_err(|e| failure::driver(&self.stream, what, e))
    }

    /// A copy of device memory; waits for all that was asked of the device before.
    fn download<T: DeviceRepr>(&self, memory: &impl DevicePtr<T>, what: &str) -> Result<Vec<T>> {
        let values = self.stream.clone_dtoh(memory).map_err(|e| failure::driver(&self.stream, what, e))?;
        self.synchronize()?;
        Ok(values)
    }

    /// The address of memory that a kernel reads.
    fn read<T>(&self, memory: &impl DevicePtr<T>) -> u64 {
        // Reader and writers use one stream, so there is no event that anything would have to wait for.
        memory.device_ptr(&self.stream).0
    }

    /// The address of memory that a kernel writes.
    fn write<T>(&self, memory: &mut impl DevicePtrMut<T>) -> u64 {
        memory.device_ptr_mut(&self.stream).0
    }
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Cuda").field(&self.chip).finish()
    }
}

/// Zeroed memory on a stream's device.
fn zeroed<T: DeviceRepr + ValidAsZeroBits>(stream: &Arc<CudaStream>, len: usize, what: &str) -> Result<CudaSlice<T>> {
    // The driver refuses empty allocations.
    let len = len.max(1);
    let bytes = len.checked_mul(size_of::<T>()).filter(|b| isize::try_from(*b).is_ok());
    let Some(bytes) = bytes else {
        return Err(failure::out_of_memory(stream, what, usize::MAX));
    };
    stream.alloc_zeros(len).map_err(|e| failure::allocation(stream, what, bytes, e))
}

/// Refuses addresses of rows that kernels read 16 bytes at a time and could not. Allocations start at such addresses, and so
/// does every row of a multiple of 4 values in them.
fn aligned<const N: usize>(op: &'static str, addresses: [u64; N]) -> Result<()> {
    match addresses.iter().find(|a| !a.is_multiple_of(16)) {
        None => Ok(()),
        Some(a) => Err(shape(op, format!("rows at address {a:#x}, which is no multiple of 16 bytes"))),
    }
}

impl<T> Memory for CudaSlice<T> {
    fn len(&self) -> usize {
        CudaSlice::len(self)
    }

    fn bytes(&self) -> usize {
        self.num_bytes()
    }
}
