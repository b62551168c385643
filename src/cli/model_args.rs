//! The flags that every command with a model shares.
//! (Owned by the lead; `load` returns the façade `candle_bitnet::BitNet`.)

use clap::Args;

/// Which model, and how to run it.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Model: a hub id (`owner/name` or `owner/name@revision`) or a directory
    #[arg(short, long, value_name = "MODEL")]
    pub model: String,
}
