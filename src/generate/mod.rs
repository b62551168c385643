//! From logits to tokens to text: parameters, the sampler, stop conditions and the token stream.

mod defaults;
mod exp;
mod history;
mod nucleus;
mod options;
mod sampler;
mod stats;
mod stop;
mod stream;

pub use defaults::GenerationDefaults;
pub use options::{GenerateOptions, GenerationParams, MAX_STOP_BYTES, MAX_STOP_STRINGS, SamplingParams};
pub use sampler::{Sampled, Sampler};
pub use stats::{Generation, GenerationStats};
pub use stream::{FinishReason, PREFILL_CHUNK, Piece, TokenStream, common_prefix};

use crate::Result;

/// What generation needs of a model: one sequence that grows, and the logits after its last token.
pub trait LanguageModel {
    /// Entries of the logits.
    fn vocab_size(&self) -> usize;

    /// Positions that the sequence can have at most.
    fn context_length(&self) -> usize;

    /// Positions that the sequence has now.
    fn position(&self) -> usize;

    /// Appends `tokens` (at least one) and returns the logits `[vocab_size]` after the last of them.
    ///
    /// # Errors
    /// [`crate::Error::ContextFull`] if they do not fit; the sequence is then unchanged.
    fn advance(&mut self, tokens: &[u32]) -> Result<&[f32]>;

    /// Forgets all positions from `position` on. Does nothing if there are none.
    fn truncate(&mut self, position: usize);
}
