//! Opens checkpoints: local directories and hub repositories of safetensors, GGUF files, and the built-in model,
//! validated before anything is allocated for them.
//!
//! A checkpoint is untrusted input. [`header`] and [`gguf::Header`] check every length and offset of a file against its size,
//! [`limits`] names the limits, and errors name the file and the tensor. SECURITY.md says what is promised.

pub mod adapter;
mod builtin;
mod dense;
mod files;
pub mod gguf;
pub mod header;
pub mod hub;
pub mod index;
pub(crate) mod json;
pub mod limits;
mod linear;
mod open;
mod recode;
mod tensor;
pub mod write;

pub use dense::DenseView;
pub(crate) use dense::NotTernary;
pub(crate) use files::is_gguf;
pub use files::{BUILTIN, ModelFiles};
pub use linear::{LinearWeight, ScaleStyle};
pub use open::Checkpoint;
pub use tensor::{StoredType, TensorInfo, TensorView};
