//! Training of b1.58 models: quantisation-aware from scratch or from masters, and adapters on packed weights.
//!
//! Master weights are real numbers; every forward pass sees them quantised as inference does, and gradients pass the
//! quantisers unchanged (straight-through). Shapes and names are those of inference, so a checkpoint of masters is
//! written without any mapping and loads in [`crate::model`] with exactly the codes that were trained.

mod bit_linear;
pub mod corpus;
mod curve;
mod decoder;
mod directory;
pub mod examples;
mod export;
pub mod finetune;
mod in_order;
mod lora;
mod metrics;
mod optimization;
mod optimizer;
mod parameters;
mod recipe;
mod schedule;
pub mod scratch;
mod state;
mod tokenizer;
mod trainer;

pub use crate::ops::grad::Precision;
pub use bit_linear::BitLinear;
pub use curve::write_curve;
pub use decoder::{Batch, Decoder, Prepared, Regularization};
pub use export::write_masters;
pub use lora::{ALL_LINEAR, LoraModel, LoraOptions, LoraPrepared};
pub use metrics::MetricsLog;
pub use optimization::{MAX_STEPS, Optimization};
pub use optimizer::{AdamW, AdamWOptions};
pub use parameters::{Kind, Masters, Parameter, Parameters};
pub use recipe::{Batching, Blocks, MAX_TRAINED_VOCAB, MIN_VOCAB, Recipe, Shape};
pub use schedule::Schedule;
pub use state::Progress;
pub use tokenizer::{END_OF_TEXT, train_bpe, write_tokenizer};
pub use trainer::{Data, Event, MAX_BAD_STEPS, Outcome, StepMetrics, Trainable, Trainer, Validation};
