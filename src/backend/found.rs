//! The GPUs of this machine, without opening them, and what `--device auto` makes of them.

#[cfg(feature = "cuda")]
use super::cuda;
#[cfg(feature = "metal")]
use super::metal;
#[cfg(not(feature = "cuda"))]
use super::select::CUDA_REMEDY;
use super::select::DeviceChoice;
#[cfg(not(feature = "metal"))]
use super::select::METAL_REMEDY;
#[cfg(not(all(feature = "cuda", feature = "metal")))]
use super::select::not_built;
use crate::{Error, Result};

/// A GPU that its driver shows to this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// How `--device` names it.
    pub device: DeviceChoice,
    /// Marketing name.
    pub name: String,
    /// Compute capability of an NVIDIA GPU, major and minor.
    pub compute: Option<(u32, u32)>,
    /// The newest CUDA version that an NVIDIA GPU's driver knows, major and minor.
    pub driver: Option<(u32, u32)>,
    /// Architecture of an Apple GPU.
    pub architecture: Option<String>,
    /// Bytes of its memory; of an Apple GPU, which shares the machine's, the most that it should be given (Metal's
    /// recommended working set).
    pub total_memory: usize,
    /// Why this build's kernels do not run on it.
    pub problem: Option<String>,
}

impl Gpu {
    /// Bytes of its memory that no process uses. Opens the GPU, which takes a moment.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the driver does not answer, as Metal never does.
    pub fn free_memory(&self) -> Result<usize> {
        match self.device {
            #[cfg(feature = "cuda")]
            DeviceChoice::Cuda(ordinal) => cuda::free_memory(ordinal),
            device => Err(Error::Unavailable {
                what: format!("the free memory of {device}"),
                reason: "its driver does not tell".into(),
            }),
        }
    }
}

/// NVIDIA's GPUs that the driver shows, in its order.
///
/// # Errors
/// [`Error::Unavailable`] if this build has no kernels for them, or without a driver.
#[cfg(feature = "cuda")]
pub fn gpus() -> Result<Vec<Gpu>> {
    let gpu = |chip: cuda::Chip| Gpu {
        device: DeviceChoice::Cuda(chip.ordinal),
        problem: chip.usable().err().map(|e| e.to_string()),
        name: chip.name,
        compute: Some(chip.compute),
        driver: Some(chip.driver),
        architecture: None,
        total_memory: chip.total_memory,
    };
    Ok(cuda::chips()?.into_iter().map(gpu).collect())
}

/// NVIDIA's GPUs that the driver shows, in its order.
///
/// # Errors
/// [`Error::Unavailable`]: this build has no kernels for them.
#[cfg(not(feature = "cuda"))]
pub fn gpus() -> Result<Vec<Gpu>> {
    Err(not_built("cuda", CUDA_REMEDY))
}

/// The GPUs that Metal shows, in its order.
///
/// # Errors
/// [`Error::Unavailable`] if this build has no kernels for them, or without Metal.
#[cfg(feature = "metal")]
pub fn metal_gpus() -> Result<Vec<Gpu>> {
    let gpu = |chip: metal::MetalChip| Gpu {
        device: DeviceChoice::Metal(chip.ordinal),
        problem: chip.usable().err().map(|e| e.to_string()),
        name: chip.name,
        compute: None,
        driver: None,
        architecture: Some(chip.architecture),
        total_memory: chip.working_set,
    };
    Ok(metal::chips()?.into_iter().map(gpu).collect())
}

/// The GPUs that Metal shows, in its order.
///
/// # Errors
/// [`Error::Unavailable`]: this build has no kernels for them.
#[cfg(not(feature = "metal"))]
pub fn metal_gpus() -> Result<Vec<Gpu>> {
    Err(not_built("metal", METAL_REMEDY))
}

/// What [`DeviceChoice::Auto`] stands for on this machine, and why: the first GPU that this build's kernels run on, NVIDIA's
/// before Apple's, and else the CPU.
pub fn auto_device() -> (DeviceChoice, String) {
    let cuda = (cfg!(feature = "cuda") || !cfg!(any(feature = "metal", target_os = "macos"))).then(gpus);
    let metal = cfg!(any(feature = "metal", target_os = "macos")).then(metal_gpus);
    let mut reasons = Vec::new();
    for found in [cuda, metal].into_iter().flatten() {
        match found {
            Ok(gpus) => match (gpus.iter().find(|g| g.problem.is_none()), gpus.first()) {
                (Some(gpu), _) => return (gpu.device, format!("the first GPU that the kernels run on: {}", gpu.name)),
                (None, Some(Gpu { problem: Some(problem), .. })) => reasons.push(problem.clone()),
                (None, _) => reasons.push("the driver shows no GPU to this process".into()),
            },
            Err(e) => reasons.push(e.to_string()),
        }
    }
    (DeviceChoice::Cpu, reasons.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_is_a_usable_gpu_or_the_cpu() {
        let (device, why) = auto_device();
        assert!(!why.is_empty());
        let usable = |found: Result<Vec<Gpu>>| found.is_ok_and(|gpus| gpus.iter().any(|g| g.problem.is_none()));
        match (usable(gpus()), usable(metal_gpus())) {
            (true, _) => assert!(matches!(device, DeviceChoice::Cuda(_))),
            (false, true) => assert!(matches!(device, DeviceChoice::Metal(_))),
            (false, false) => assert_eq!(device, DeviceChoice::Cpu),
        }
        assert_eq!(cfg!(any(feature = "cuda", feature = "metal")), !why.contains("--features"));
    }
}
