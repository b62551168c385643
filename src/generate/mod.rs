//! From logits to tokens to text: parameters, the sampler, stop conditions and the token stream.

mod defaults;
mod device;
mod exp;
mod history;
mod nucleus;
mod options;
mod sampler;
mod stats;
mod stop;
mod stream;

pub use defaults::GenerationDefaults;
pub use device::{DeviceSampling, MarksHeld, TokenMark};
pub use options::{GenerateOptions, GenerationParams, MAX_STOP_BYTES, MAX_STOP_STRINGS, SamplingParams};
pub use sampler::{Sampled, Sampler};
pub use stats::{Generation, GenerationStats};
pub use stream::{FinishReason, PREFILL_CHUNK, Piece, TokenStream, common_prefix};

use crate::Result;

/// What generation needs of a model: one sequence that grows, and the logits after its last token.
///
/// [`Self::advance`] is enough. A model whose logits are far away overrides [`Self::feed`] and [`Self::draw`] as well, so
/// that they need not be computed or fetched.
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

    /// Appends `tokens` (at least one) where nobody asks for logits: all of a long prompt but its end.
    ///
    /// # Errors
    /// As [`Self::advance`].
    fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        self.advance(tokens).map(|_| ())
    }

    /// Appends `tokens` (at least one) and draws the token after the last of them. The sampler is told which tokens are
    /// kept by the caller.
    ///
    /// # Errors
    /// As [`Self::advance`] and [`Sampler::sample`].
    fn draw(&mut self, tokens: &[u32], sampler: &mut Sampler) -> Result<Sampled> {
        sampler.sample(self.advance(tokens)?)
    }

    /// Forgets all positions from `position` on. Does nothing if there are none.
    fn truncate(&mut self, position: usize);
}
