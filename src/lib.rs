//! A tensor backend for BitNet b1.58 language models on candle.
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

pub mod backend;
pub mod checkpoint;
mod error;
pub mod generate;
pub mod model;
pub mod nn;
pub mod ops;
pub mod ternary;
pub mod text;

pub use error::{Error, Result};
