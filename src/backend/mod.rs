//! What a device can do: packed weights, kernels, caches. Knows nothing of models and files.
//!
//! `cpu` holds the kernels of this CPU; the device and its kernel are chosen once, in `select`. All `unsafe`
//! code of the crate is in this room.

pub mod activation;
pub mod attention;
mod batch;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dense_type;
pub mod host;
mod layout;
mod rope;
mod select;

pub use batch::{Batch, HostBatch};
pub use dense_type::DenseType;
pub use layout::{Arrangement, LayoutId};
pub use rope::Rope;
pub use select::{Backend, DenseWeight, DeviceChoice, KvLayer, LowRankWeight, TernaryWeight, select_device};
