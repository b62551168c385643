//! Generation as an iterator.

use super::stop::StopMatcher;
use super::{Generation, GenerationParams, GenerationStats, LanguageModel, Sampler};
use crate::text::{IncrementalDecoder, Tokenizer};
use crate::{Error, Result};
use serde::Serialize;
use std::fmt;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Prompt tokens that are read at a time; between two chunks, a timeout or cancellation is noticed.
pub const PREFILL_CHUNK: usize = 512;

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model wrote an end-of-sequence token.
    Eos,
    /// The answer contained a stop string.
    StopString,
    /// As many tokens as asked for.
    Length,
    /// The context is full.
    ContextFull,
    /// The cancel flag was set.
    Cancelled,
    /// The time was up.
    Timeout,
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eos => "eos",
            Self::StopString => "stop_string",
            Self::Length => "length",
            Self::ContextFull => "context_full",
            Self::Cancelled => "cancelled",
            Self::Timeout => "timeout",
        })
    }
}

/// A step of generation.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// The token that was drawn; `None` in the closing piece of a generation that was cancelled or timed out.
    pub token: Option<u32>,
    /// Text that became certain; empty while a character is unfinished or a stop string may have begun.
    pub text: String,
    /// Log-probability of the token, if asked for.
    pub logprob: Option<f32>,
    /// Why generation ended, in the last piece.
    pub finish: Option<FinishReason>,
}

/// A running generation: an iterator over its pieces. The last piece has a finish reason; after an error nothing
/// follows.
pub struct TokenStream<'a, M: LanguageModel + ?Sized> {
    model: &'a mut M,
    decoder: IncrementalDecoder,
    sampler: Sampler,
    stop: StopMatcher,
    params: GenerationParams,
    /// Prompt and answer.
    sequence: Vec<u32>,
    /// Tokens of `sequence` that the model holds.
    fed: usize,
    /// Tokens to draw at most.
    limit: usize,
    context: usize,
    started: Instant,
    stats: GenerationStats,
    finish: Option<FinishReason>,
    ended: bool,
}

impl<'a, M: LanguageModel + ?Sized> TokenStream<'a, M> {
    /// Continues `prompt`, from an empty sequence: whatever the model holds is forgotten.
    ///
    /// # Errors
    /// [`Error::ContextFull`] if the prompt alone is longer than the context, [`Error::Request`] if it is empty, holds
    /// tokens that the model does not have, or leaves no room within the checkpoint's `max_length`.
    pub fn new(model: &'a mut M, tokenizer: Tokenizer, prompt: &[u32], params: GenerationParams) -> Result<Self> {
        Self::resume(model, tokenizer, prompt, 0, params)
    }

    /// As [`Self::new`] for a model that already holds the first `held` tokens of `prompt` (see [`common_prefix`]): only
    /// the rest is read. At least the last token of the prompt is always read, for its logits.
    ///
    /// # Errors
    /// As [`Self::new`], and [`Error::Request`] if the model holds fewer than `held` positions.
    pub fn resume(
        model: &'a mut M,
        tokenizer: Tokenizer,
        prompt: &[u32],
        held: usize,
        params: GenerationParams,
    ) -> Result<Self> {
        let (context, vocab) = (model.context_length(), model.vocab_size());
        if prompt.is_empty() {
            return Err(Error::request("prompt", "has no tokens; give at least one"));
        }
        if let Some(bad) = prompt.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::request("prompt", format!("token {bad} is outside the model's vocabulary of {vocab}")));
        }
        if prompt.len() > context {
            return Err(Error::ContextFull { needed: prompt.len(), available: context });
        }
        let limit = match (params.max_tokens, params.max_length) {
            (Some(n), _) => n,
            (None, Some(length)) => match length.saturating_sub(prompt.len()) {
                0 => {
                    return Err(Error::request(
                        "prompt",
                        format!(
                            "{} tokens leave no room within the max_length of {length} in generation_config.json; \
                             set max_tokens to override it",
                            prompt.len()
                        ),
                    ));
                }
                room => room,
            },
            (None, None) => usize::MAX,
        };
        let held = held.min(prompt.len() - 1);
        if held > model.position() {
            return Err(Error::request(
                "held",
                format!("{held} positions of the prompt, but the model holds {}", model.position()),
            ));
        }
        model.truncate(held);
        let mut sampler = Sampler::new(&params.sampling, vocab);
        sampler.observe_prompt(prompt);
        Ok(Self {
            model,
            decoder: tokenizer.incremental(true),
            sampler,
            stop: StopMatcher::new(params.stop.clone()),
            params,
            sequence: prompt.to_vec(),
            fed: held,
            limit,
            context,
            started: Instant::now(),
            stats: GenerationStats { prompt_tokens: prompt.len(), cached_tokens: held, ..GenerationStats::default() },
            finish: None,
            ended: false,
        })
    }

    /// Counts and times so far.
    #[must_use]
    pub fn stats(&self) -> GenerationStats {
        self.stats
    }

    /// The seed that draws the same tokens again.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.params.sampling.seed
    }

    /// Why generation ended; `None` while it runs and after an error.
    #[must_use]
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish
    }

    /// The tokens whose positions the model holds now: the beginning of prompt and answer.
    #[must_use]
    pub fn held_tokens(&self) -> &[u32] {
        self.sequence.get(..self.fed).unwrap_or_default()
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// The first error of the stream.
    pub fn collect_all(mut self) -> Result<Generation> {
        let mut generation = Generation {
            text: String::new(),
            tokens: Vec::new(),
            logprobs: Vec::new(),
            finish_reason: FinishReason::Cancelled,
            seed: self.seed(),
            stats: self.stats,
        };
        for piece in &mut self {
            let piece = piece?;
            generation.text.push_str(&piece.text);
            generation.tokens.extend(piece.token);
            generation.logprobs.extend(piece.logprob);
            if let Some(reason) = piece.finish {
                generation.finish_reason = reason;
            }
        }
        generation.stats = self.stats;
        Ok(generation)
    }

    /// Reads what the model has not read yet, and draws the next token.
    fn step(&mut self) -> Result<Piece> {
        let begun = Instant::now();
        loop {
            if let Some(reason) = self.interrupted() {
                self.count_time(begun, false);
                let (text, reason) = self.close(String::new(), reason)?;
                return Ok(Piece { token: None, text, logprob: None, finish: Some(reason) });
            }
            let end = self.sequence.len().min(self.fed + PREFILL_CHUNK);
            let tokens = self.sequence.get(self.fed..end).unwrap_or_default();
            let sampled = if end < self.sequence.len() {
                self.model.feed(tokens).map(|()| None)
            } else {
                self.model.draw(tokens, &mut self.sampler).map(Some)
            };
            // After an error the model may hold the tokens or not.
            self.fed = self.model.position().clamp(self.fed, end);
            let Some(sampled) = sampled? else { continue };
            self.count_time(begun, true);
            let (text, finish) = self.take(sampled.token)?;
            return Ok(Piece { token: Some(sampled.token), text, logprob: sampled.logprob, finish });
        }
    }

    /// Appends a token that was drawn; returns the text that is certain and whether that was the end.
    fn take(&mut self, token: u32) -> Result<(String, Option<FinishReason>)> {
        self.sampler.accept(token);
        self.sequence.push(token);
        if self.params.eos.contains(&token) {
            return self.close(String::new(), FinishReason::Eos).map(|(text, reason)| (text, Some(reason)));
        }
        let (text, stopped) = self.stop.push(self.decoder.push(token)?);
        if stopped {
            self.finish = Some(FinishReason::StopString);
            return Ok((text, self.finish));
        }
        let reason = if self.stats.generated_tokens >= self.limit {
            FinishReason::Length
        } else if self.sequence.len() > self.context {
            FinishReason::ContextFull
        } else {
            return Ok((text, None));
        };
        self.close(text, reason).map(|(text, reason)| (text, Some(reason)))
    }

    /// Ends the stream: `text` and all that was held back, in which a stop string can still be found.
    fn close(&mut self, mut text: String, mut reason: FinishReason) -> Result<(String, FinishReason)> {
        let (rest, stopped) = self.stop.push(self.decoder.flush()?);
        text.push_str(&rest);
        if stopped {
            reason = FinishReason::StopString;
        } else {
            text.push_str(&self.stop.flush());
        }
        self.finish = Some(reason);
        Ok((text, reason))
    }

    fn interrupted(&self) -> Option<FinishReason> {
        if self.params.cancel.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed)) {
            return Some(FinishReason::Cancelled);
        }
        let expired = self.params.timeout.is_some_and(|timeout| self.started.elapsed() >= timeout);
        expired.then_some(FinishReason::Timeout)
    }

    fn count_time(&mut self, begun: Instant, drawn: bool) {
        let seconds = begun.elapsed().as_secs_f64();
        if self.stats.generated_tokens == 0 {
            self.stats.prefill_seconds += seconds;
        } else {
            self.stats.decode_seconds += seconds;
        }
        if drawn {
            self.stats.generated_tokens += 1;
            self.stats.time_to_first_token.get_or_insert_with(|| self.started.elapsed().as_secs_f64());
        }
    }
}

impl<M: LanguageModel + ?Sized> Iterator for TokenStream<'_, M> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let piece = self.step();
        self.ended = !matches!(&piece, Ok(Piece { finish: None, .. }));
        Some(piece)
    }
}

impl<M: LanguageModel + ?Sized> std::iter::FusedIterator for TokenStream<'_, M> {}

/// Tokens with which both sequences begin: what a KV cache that holds one of them has of the other.
#[must_use]
pub fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}
