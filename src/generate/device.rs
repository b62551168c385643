//! What a device needs to draw tokens in the sampler's place.
//!
//! A model on a GPU overrides [`LanguageModel::draw`](super::LanguageModel::draw): it keeps the logits where they are,
//! draws there by [`DeviceSampling`] and copies back one id. The distribution is the host's: the same penalties on the
//! same tokens, ties, order of steps and weights. The random numbers are not: Philox 4×32-10 of seed and draw counter
//! there, ChaCha8 here, so a seed repeats its tokens on one kind of device only.

use super::{Sampled, Sampler};

/// How to draw the next token on a device. From [`Sampler::on_device`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceSampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Only the k most likely tokens; 0 for all.
    pub top_k: u32,
    /// Only the most likely tokens that together have this probability; 1 for all.
    pub top_p: f32,
    /// Only tokens with at least this share of the most likely one's probability; 0 for all.
    pub min_p: f32,
    /// Negative logits of marked tokens are multiplied by it, others divided; 1 for none.
    pub repetition_penalty: f32,
    /// Subtracted once from the logits of generated tokens.
    pub presence_penalty: f32,
    /// Subtracted from the logits of generated tokens, once per occurrence.
    pub frequency_penalty: f32,
    /// Key of the random numbers.
    pub seed: u64,
    /// Counter of the random numbers: tokens drawn so far.
    pub draw: u64,
}

impl DeviceSampling {
    /// Whether any penalty changes logits: then the device needs the marks of [`Sampler::marks_since`].
    #[must_use]
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Whether the token is the one with the largest logit, of equals the first, and nothing else matters.
    #[must_use]
    pub fn is_argmax(&self) -> bool {
        (self.temperature == 0.0 || self.top_k == 1) && !self.has_penalties()
    }
}

/// What the penalties know of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenMark {
    /// The token.
    pub token: u32,
    /// Bit 31: it is in the prompt or the answer. Below: how often it is in the answer.
    pub mark: u32,
}

/// Which marks a device holds in one of its slots; the default is none. See [`Sampler::marks_since`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MarksHeld {
    /// Identity of the sampler; 0 for none.
    pub(super) history: u64,
    /// Tokens it had observed.
    pub(super) observed: usize,
}

impl Sampler {
    /// How a device draws the next token, or `None` if only [`Self::sample`] can: with logit bias or log-probabilities.
    #[must_use]
    pub fn on_device(&self) -> Option<DeviceSampling> {
        let p = &self.params;
        (p.logit_bias.is_empty() && !p.logprobs).then(|| DeviceSampling {
            temperature: p.temperature,
            top_k: u32::try_from(p.top_k).unwrap_or(u32::MAX),
            top_p: p.top_p,
            min_p: p.min_p,
            repetition_penalty: p.repetition_penalty,
            presence_penalty: p.presence_penalty,
            frequency_penalty: p.frequency_penalty,
            seed: p.seed,
            draw: self.draws,
        })
    }

    /// Fills `marks` with what a device that holds `held` lacks, each token once, ascending, and moves `held` to now.
    /// Returns whether the device must first clear all marks of the slot, because they are another sequence's.
    ///
    /// If the marks do not arrive there, reset `held` to its default.
    pub fn marks_since(&self, held: &mut MarksHeld, marks: &mut Vec<TokenMark>) -> bool {
        self.history.since(held, marks)
    }

    /// Counts a token that a device drew, as [`Self::sample`] would have. `None` if `id` is no token: devices give a
    /// negative id for logits without a sound maximum. [`Self::sample`] then names the fault in the logits.
    pub fn drawn(&mut self, id: i32) -> Option<Sampled> {
        let token = u32::try_from(id).ok().filter(|&token| (token as usize) < self.vocab)?;
        self.draws += 1;
        Some(Sampled { token, logprob: None })
    }
}
