//! One decoder for every b1.58 family: its configuration, its weights, its forward pass. Knows no text.

pub mod config;
pub mod convert;
mod decoder;
pub mod presets;
mod source;
mod workspace;

pub use decoder::{Decoder, Footprint, Logits, Sequence, read_logits};
pub use source::{AdaptedWeights, CheckpointWeights, WeightSource};
