//! From logits to tokens to text: parameters, the sampler, stop conditions and the token stream.

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
