//! Layers as candle modules: usable alone in any candle model, and assembled into the decoder by `model`.

mod bit_linear;
mod group;
mod kv_cache;
mod linear;
mod low_rank;
mod norm;
mod output_head;

pub use crate::ops::HeadReads;
pub use bit_linear::BitLinear;
pub use group::LinearGroup;
pub use kv_cache::KvCache;
pub use linear::{Linear, LinearParts, LinearWeight};
pub use low_rank::LowRank;
pub use norm::RmsNorm;
pub use output_head::{HeadChoice, HeadKind, OutputHead};
