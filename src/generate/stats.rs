//! What a generation was and what it cost.

use super::FinishReason;
use serde::Serialize;

/// Counts and times of one generation. Times are of the generation alone, not of what the caller does between pieces.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct GenerationStats {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, tokens that the KV cache already held.
    pub cached_tokens: usize,
    /// Tokens drawn, an end-of-sequence token included.
    pub generated_tokens: usize,
    /// Seconds to read the prompt.
    pub prefill_seconds: f64,
    /// Seconds for all tokens after the first.
    pub decode_seconds: f64,
    /// Seconds from the request to the first token; `None` if there was none.
    pub time_to_first_token: Option<f64>,
}

impl GenerationStats {
    /// Decode speed: tokens after the first per second; `None` with fewer than two tokens.
    #[must_use]
    pub fn tokens_per_second(&self) -> Option<f64> {
        rate(self.generated_tokens.saturating_sub(1), self.decode_seconds)
    }

    /// Prefill speed: prompt tokens read (not cached) per second.
    #[must_use]
    pub fn prefill_tokens_per_second(&self) -> Option<f64> {
        rate(self.prompt_tokens.saturating_sub(self.cached_tokens), self.prefill_seconds)
    }
}

fn rate(tokens: usize, seconds: f64) -> Option<f64> {
    (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds)
}

/// A finished generation, as [`super::TokenStream::collect_all`] returns it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Generation {
    /// The answer.
    pub text: String,
    /// Its tokens, an end-of-sequence token included.
    pub tokens: Vec<u32>,
    /// Log-probability of each token, if asked for; else empty.
    pub logprobs: Vec<f32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The seed that draws the same tokens again.
    pub seed: u64,
    /// Counts and times.
    #[serde(flatten)]
    pub stats: GenerationStats,
}
