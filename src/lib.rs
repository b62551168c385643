//! A tensor backend for BitNet b1.58 language models (ternary weights, 8-bit activations) on candle.
//!
//! ```no_run
//! use candle_bitnet::generate::GenerateOptions;
//! use candle_bitnet::text::Message;
//! use candle_bitnet::{BitNet, DeviceChoice, LoadOptions, select_device};
//!
//! let device = select_device(DeviceChoice::Auto)?;
//! let mut model = BitNet::load("microsoft/bitnet-b1.58-2B-4T", LoadOptions::new(&device))?;
//! println!("{}", model.report());
//! let prompt = model.chat_prompt(&[Message::user("Why is the sky blue?")])?;
//! let options = GenerateOptions::default().temperature(0.7).top_p(0.9).seed(42);
//! for piece in model.generate(&prompt, &options)? {
//!     print!("{}", piece?.text);
//! }
//! # Ok::<(), candle_bitnet::Error>(())
//! ```
//!
//! The layer alone, for anybody's candle model, is [`nn::BitLinear`]. The rooms, from files to text:
//! [`checkpoint`] → [`ternary`] → [`backend`] → [`ops`] → [`nn`] → [`model`] → [`generate`], [`evaluate`], [`mod@bench`].
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

pub mod backend;
pub mod bench;
mod bitnet;
mod chart;
pub mod checkpoint;
mod error;
pub mod evaluate;
pub mod generate;
mod load;
pub mod model;
pub mod nn;
pub mod ops;
mod report;
pub mod ternary;
pub mod text;
mod token_draw;
pub mod train;

pub use backend::{DeviceChoice, select_device};
pub use bitnet::BitNet;
pub use error::{Error, Result};
pub use load::{DEFAULT_CONTEXT, LoadOptions, LoadedDecoder};
pub use report::{AdapterReport, Report};
pub use token_draw::TokenDraw;

/// The program in README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
