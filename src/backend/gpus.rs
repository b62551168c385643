//! The GPUs of this machine, without opening them, and what `--device auto` makes of them.

#[cfg(feature = "cuda")]
use super::cuda;
use super::select::DeviceChoice;
#[cfg(not(feature = "cuda"))]
use super::select::{CUDA_REMEDY, not_built};
use crate::Result;

/// A GPU that its driver shows to this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// How `--device` names it.
    pub device: DeviceChoice,
    /// Marketing name.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute: (u32, u32),
    /// The newest CUDA version that its driver knows, major and minor.
    pub driver: (u32, u32),
    /// Bytes of its memory.
    pub total_memory: usize,
    /// Why this build's kernels do not run on it.
    pub problem: Option<String>,
}

impl Gpu {
    /// Bytes of its memory that no process uses. Opens the GPU, which takes a moment.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if the driver does not answer.
    #[cfg(feature = "cuda")]
    pub fn free_memory(&self) -> Result<usize> {
        match self.device {
            DeviceChoice::Cuda(ordinal) => cuda::free_memory(ordinal),
            _ => Ok(0),
        }
    }

    /// Bytes of its memory that no process uses.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] always: this build opens no GPU.
    #[cfg(not(feature = "cuda"))]
    pub fn free_memory(&self) -> Result<usize> {
        Err(not_built("cuda", CUDA_REMEDY))
    }
}

/// The GPUs that the driver shows, in its order.
///
/// # Errors
/// [`crate::Error::Unavailable`] if this build has no kernels for GPUs, or without a driver.
#[cfg(feature = "cuda")]
pub fn gpus() -> Result<Vec<Gpu>> {
    let gpu = |chip: cuda::Chip| Gpu {
        device: DeviceChoice::Cuda(chip.ordinal),
        problem: chip.usable().err().map(|e| e.to_string()),
        name: chip.name,
        compute: chip.compute,
        driver: chip.driver,
        total_memory: chip.total_memory,
    };
    Ok(cuda::chips()?.into_iter().map(gpu).collect())
}

/// The GPUs that the driver shows, in its order.
///
/// # Errors
/// [`crate::Error::Unavailable`]: this build has no kernels for GPUs.
#[cfg(not(feature = "cuda"))]
pub fn gpus() -> Result<Vec<Gpu>> {
    Err(not_built("cuda", CUDA_REMEDY))
}

/// What [`DeviceChoice::Auto`] stands for on this machine, and why: the first GPU that this build's kernels run on, and else
/// the CPU.
pub fn auto_device() -> (DeviceChoice, String) {
    let gpus = match gpus() {
        Ok(gpus) => gpus,
        Err(e) => return (DeviceChoice::Cpu, e.to_string()),
    };
    match (gpus.iter().find(|g| g.problem.is_none()), gpus.first()) {
        (Some(gpu), _) => (gpu.device, format!("the first GPU that the kernels run on: {}", gpu.name)),
        (None, Some(Gpu { problem: Some(problem), .. })) => (DeviceChoice::Cpu, problem.clone()),
        (None, _) => (DeviceChoice::Cpu, "the driver shows no GPU to this process".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_is_a_usable_gpu_or_the_cpu() {
        let (device, why) = auto_device();
        assert!(!why.is_empty());
        match gpus() {
            Ok(gpus) if gpus.iter().any(|g| g.problem.is_none()) => assert!(matches!(device, DeviceChoice::Cuda(_))),
            _ => assert_eq!(device, DeviceChoice::Cpu),
        }
        assert_eq!(cfg!(feature = "cuda"), !why.contains("--features cuda"));
    }
}
