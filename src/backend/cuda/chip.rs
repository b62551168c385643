//! What the driver tells about a GPU, and the least that the kernels need.

use super::failure;
use crate::Result;
use candle_core::cuda_backend::cudarc::driver::result::device;
use candle_core::cuda_backend::cudarc::driver::sys::{self, CUdevice_attribute};
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DriverError};

/// A GPU and its driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chip {
    /// Marketing name.
    pub name: String,
    /// The driver's number of this GPU.
    pub ordinal: usize,
    /// Compute capability, major and minor.
    pub compute: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Most bytes of shared memory that one block can have.
    pub shared_per_block: usize,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_per_multiprocessor: usize,
    /// Bytes of the L2 cache.
    pub l2_bytes: usize,
    /// Bytes of device memory.
    pub total_memory: usize,
    /// The newest CUDA version that the driver knows, major and minor.
    pub driver: (u32, u32),
}

impl Chip {
    /// Oldest compute capability with kernels.
    pub const OLDEST: (u32, u32) = (7, 5);

    /// Asks the driver about the GPU of a stream.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] for an old chip or driver, or if the driver does not answer.
    pub(super) fn of(stream: &CudaStream) -> Result<Self> {
        let chip = Self::at(stream.context().ordinal())?;
        chip.usable().map(|()| chip)
    }

    /// Asks the driver about a GPU, which need not be open; the driver must have been initialized.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if there is no such GPU, or the driver does not answer.
    pub(super) fn at(ordinal: usize) -> Result<Self> {
        use CUdevice_attribute::*;
        let failed = |e: DriverError| failure::unavailable(format!("GPU {ordinal}"), failure::text(e));
        let gpu = device::get(i32::try_from(ordinal).unwrap_or(i32::MAX)).map_err(failed)?;
        let attribute = |which| -> Result<usize> {
            // SAFETY: the driver gave the device just now.
            let value = unsafe { device::get_attribute(gpu, which) };
            Ok(usize::try_from(value.map_err(failed)?).unwrap_or(0))
        };
        let version = |which| attribute(which).map(|v| u32::try_from(v).unwrap_or(0));
        Ok(Self {
            name: device::get_name(gpu).map_err(failed)?,
            ordinal,
            compute: (
                version(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                version(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1),
            shared_per_block: attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            shared_per_multiprocessor: attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
            l2_bytes: attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
            // SAFETY: as above.
            total_memory: unsafe { device::total_mem(gpu) }.map_err(failed)?,
            driver: driver_version().map_err(failed)?,
        })
    }

    /// Refuses a chip or driver that this build's kernels cannot run on.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] for an old chip or driver.
    pub fn usable(&self) -> Result<()> {
        self.check(version(sys::CUDA_VERSION))
    }

    /// Refuses chips and drivers that the kernels, made by a toolkit of version `built`, cannot run on.
    fn check(&self, built: (u32, u32)) -> Result<()> {
        let Self { name, compute, driver, .. } = self;
        if *compute < Self::OLDEST {
            return Err(failure::unavailable(
                format!("{name} (GPU {}, compute capability {}.{})", self.ordinal, compute.0, compute.1),
                format!(
                    "the kernels need {}.{} or later (Turing, 2018); use another GPU or --device cpu",
                    Self::OLDEST.0,
                    Self::OLDEST.1
                ),
            ));
        }
        // Within a major version, a driver runs machine code of every toolkit.
        if driver.0 < built.0 {
            return Err(failure::unavailable(
                format!("{name} (GPU {})", self.ordinal),
                format!(
                    "its driver knows CUDA up to {}.{}, but this program was built with CUDA {}.{}; update the NVIDIA \
                     driver, or build with a CUDA {} toolkit",
                    driver.0, driver.1, built.0, built.1, driver.0
                ),
            ));
        }
        Ok(())
    }

    /// Whether a kernel may start while its predecessor ends (programmatic stream serialization).
    pub(super) fn overlaps_launches(&self) -> bool {
        self.compute >= (9, 0)
    }

    /// Whether such launches can be captured into a graph.
    pub(super) fn overlaps_in_graphs(&self) -> bool {
        self.driver >= (12, 3)
    }

    /// Whether the chip has asynchronous copies and bf16 matrix units.
    pub(super) fn is_ampere(&self) -> bool {
        self.compute >= (8, 0)
    }

    /// Whether `blocks` blocks of `shared` bytes each fit on a multiprocessor.
    pub(super) fn fits(&self, shared: usize, blocks: usize) -> bool {
        // The system keeps 1 KiB of each block's share since 8.0; it is in the total, not in the limit of a block.
        const SYSTEM: usize = 1024;
        shared <= self.shared_per_block && (blocks <= 1 || blocks * (shared + SYSTEM) <= self.shared_per_multiprocessor)
    }
}

/// CUDA's version numbers: 12040 is 12.4.
fn version(number: u32) -> (u32, u32) {
    (number / 1000, number % 1000 / 10)
}

fn driver_version() -> Result<(u32, u32), DriverError> {
    let mut number = 0;
    // SAFETY: the pointer is to a live, writable integer.
    unsafe { sys::cuDriverGetVersion(&mut number) }.result()?;
    Ok(version(number.unsigned_abs()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The limits of real chips, by compute capability.
    pub(in crate::backend::cuda) fn chip(compute: (u32, u32)) -> Chip {
        let (multiprocessors, block, all) = match compute {
            (7, 5) => (40, 64, 64),
            (8, 0) => (108, 163, 164),
            (8, 6) | (8, 9) => (84, 99, 100),
            _ => (132, 227, 228),
        };
        Chip {
            name: "test".into(),
            ordinal: 0,
            compute,
            multiprocessors,
            shared_per_block: block << 10,
            shared_per_multiprocessor: all << 10,
            l2_bytes: 50 << 20,
            total_memory: 24 << 30,
            driver: (13, 0),
        }
    }

    #[test]
    fn old_chips_and_drivers_are_named() {
        let old = Chip { name: "Tesla V100".into(), ..chip((7, 0)) };
        let message = old.check((12, 4)).unwrap_err().to_string();
        assert!(message.contains("Tesla V100") && message.contains("7.0") && message.contains("7.5"), "{message}");
        let driver = Chip { driver: (12, 8), ..chip((8, 6)) };
        let message = driver.check((13, 0)).unwrap_err().to_string();
        assert!(message.contains("12.8") && message.contains("13.0"), "{message}");
        assert!(driver.check((12, 9)).is_ok(), "minor versions of one major are compatible");
        assert_eq!(version(12_040), (12, 4));
    }

    #[test]
    fn blocks_share_a_multiprocessor() {
        let h100 = chip((9, 0));
        assert!(h100.fits(227 << 10, 1) && !h100.fits(227 << 10, 2) && !h100.fits(228 << 10, 1));
        assert!(h100.fits(113 << 10, 2) && !h100.fits(114 << 10, 2));
    }
}
