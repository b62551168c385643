//! One decoder for every b1.58 family: its configuration, its weights, its forward pass. Knows no text.

pub mod config;
pub mod convert;
mod decoder;
mod dense_ternary;
pub mod presets;
mod source;
mod workspace;

pub use decoder::{Decoder, Footprint, Logits, Sequence, read_logits};
pub use dense_ternary::ternary_of;
pub use source::{AdaptedWeights, CheckpointWeights, WeightSource};
