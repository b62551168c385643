//! What a device can do: packed weights, kernels, caches. Knows nothing of models and files.
//!
//! `cpu` holds the kernels of this CPU; the device and its kernel are chosen once, in `select`. All `unsafe`
//! code of the crate is in this room.

pub mod activation;
mod arrangement;
pub mod attention;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dense_type;
pub mod host;
mod layout;
mod select;

pub use arrangement::Arrangement;
pub use dense_type::DenseType;
pub use layout::LayoutId;
pub(crate) use select::not_built;
pub use select::{Backend, DenseWeight, DeviceChoice, KvLayer, LowRankWeight, TernaryWeight, select_device};
