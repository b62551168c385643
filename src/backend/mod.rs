//! What a device can do: packed weights, kernels, caches. Knows nothing of models and files.
//!
//! `cpu` holds the kernels of this CPU, `cuda` those of NVIDIA GPUs, `metal` those of Apple GPUs, `gpu` what the
//! latter two have in common; the device and its kernel are chosen once, in `select`.
//! What lies on a device (weights, caches, batches) is an enum with a variant for each kind. All `unsafe` code of the crate
//! is in this room.

pub mod activation;
mod any;
pub mod attention;
mod batch;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dense_type;
mod found;
#[cfg(any(feature = "cuda", feature = "metal"))]
pub mod gpu;
pub mod host;
mod layout;
mod measure;
#[cfg(feature = "metal")]
pub mod metal;
mod profile;
mod rope;
mod select;
mod steps;
pub mod topology;
mod weights;

pub use batch::{Batch, HostBatch};
pub use dense_type::DenseType;
pub use found::{Gpu, auto_device, gpus, metal_gpus};
pub use layout::{Arrangement, LayoutId};
pub use measure::DeviceMemory;
pub use profile::OpTime;
pub use rope::Rope;
pub use select::{Backend, DeviceChoice, select_device};
pub use steps::Steps;
pub use weights::{DenseWeight, KvLayer, LowRankWeight, TernaryWeight};
