//! From logits to one token.
//!
//! The order is that of transformers: repetition, presence and frequency penalties, logit bias, temperature, top-k,
//! top-p, min-p, and a draw from what is left. 128k logits are never sorted: top-k and top-p select (see `nucleus`), and
//! nothing is allocated per token once the buffers have their size. The draw walks the tokens in the order of their
//! ids, so that it depends on nothing but the logits, the parameters and the seed. A device can draw instead, from the
//! same distribution with other random numbers (see `device`).

use super::SamplingParams;
use super::exp::exp_nonpositive;
use super::history::History;
use super::nucleus::{Candidate, nucleus, top_k};
use crate::{Error, Result};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Scores whose weights are summed together; a draw skips whole blocks.
const BLOCK: usize = 256;

/// Parallel accumulators, so that sums and maxima over the vocabulary vectorise.
const LANES: usize = 16;

/// A token that was drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability in the model's own distribution (before penalties, bias, temperature and
    /// truncation), if it was asked for.
    pub logprob: Option<f32>,
}

/// Draws tokens. One sampler serves one sequence: it remembers what the penalties need, and its random state.
#[derive(Debug, Clone)]
pub struct Sampler {
    pub(super) params: SamplingParams,
    pub(super) vocab: usize,
    rng: ChaCha8Rng,
    pub(super) history: History,
    /// Tokens drawn so far, here or on a device.
    pub(super) draws: u64,
    /// Logits after penalties and bias; empty if there are none.
    scores: Vec<f32>,
    /// Weight of every token, where every token can be drawn or weighed.
    weights: Vec<f32>,
    /// Sums of `weights` by blocks.
    blocks: Vec<f64>,
    candidates: Vec<Candidate>,
}

/// What can be drawn.
enum Support {
    /// Nothing else is possible.
    One(u32),
    /// All tokens, by `weights` and `blocks`.
    All,
    /// `candidates`, ascending by id.
    Some,
}

impl Sampler {
    /// A sampler for logits of `vocab` entries.
    #[must_use]
    pub fn new(params: &SamplingParams, vocab: usize) -> Self {
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&params.seed.to_le_bytes());
        Self {
            history: History::new(params, vocab),
            params: params.clone(),
            vocab,
            rng: ChaCha8Rng::from_seed(seed),
            draws: 0,
            scores: Vec::new(),
            weights: Vec::new(),
            blocks: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// A sampler that takes the most likely token, whatever a checkpoint recommends.
    #[must_use]
    pub fn greedy(vocab: usize) -> Self {
        Self::new(&SamplingParams::greedy(), vocab)
    }

    /// Tells the sampler the prompt's tokens, which count for the repetition penalty.
    pub fn observe_prompt(&mut self, prompt: &[u32]) {
        for &token in prompt {
            self.history.observe(token, false);
        }
    }

    /// Tells the sampler a token of the answer, which counts for all penalties. To be called with each token that
    /// [`Self::sample`] or [`Self::drawn`] gave and that was kept.
    pub fn accept(&mut self, token: u32) {
        self.history.observe(token, true);
    }

    /// How many of the largest logits, of equal ones the first, decide the next token: with any others, −∞ among them,
    /// [`Self::sample`] draws the same. `None` if all can matter, or be asked for: with penalties, bias or
    /// log-probabilities, or without top-k.
    #[must_use]
    pub fn decided_by(&self) -> Option<usize> {
        let p = &self.params;
        if self.history.is_active() || !p.logit_bias.is_empty() || p.logprobs {
            return None;
        }
        match p.top_k {
            _ if p.temperature == 0.0 => Some(1),
            0 => None,
            k => (k < self.vocab).then_some(k),
        }
    }

    /// Draws a token by `logits` (`[vocab]`). Of equal largest logits, greedy takes the lowest id.
    ///
    /// # Errors
    /// [`Error::Shape`] if `logits` has another length, [`Error::Logits`] naming the token if a logit is NaN or +∞, or
    /// if no token is possible.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Sampled> {
        let token = match self.support(logits)? {
            Support::One(token) => token,
            Support::All => self.draw_from_all(),
            Support::Some => self.draw_from_candidates(),
        };
        self.draws += 1;
        let logprob = self.params.logprobs.then(|| log_softmax_at(logits, token));
        Ok(Sampled { token, logprob })
    }

    /// Everything but the draw.
    fn support(&mut self, logits: &[f32]) -> Result<Support> {
        if logits.len() != self.vocab || logits.is_empty() {
            return Err(Error::Shape {
                op: "sample",
                reason: format!("expected {} logits (at least 1), found {}", self.vocab, logits.len()),
            });
        }
        let mut scores = std::mem::take(&mut self.scores);
        let edited = self.history.applies() || !self.params.logit_bias.is_empty();
        if edited {
            scores.clear();
            scores.extend_from_slice(logits);
            self.history.apply(&mut scores);
            for &(token, bias) in &self.params.logit_bias {
                if let Some(score) = scores.get_mut(token as usize) {
                    *score += bias;
                }
            }
        }
        let support = self.truncate(if edited { &scores } else { logits });
        self.scores = scores;
        support
    }

    /// Temperature, top-k, top-p and min-p.
    fn truncate(&mut self, scores: &[f32]) -> Result<Support> {
        let (best, max) = argmax(scores)?;
        let SamplingParams { temperature, top_p, min_p, .. } = self.params;
        if temperature == 0.0 || self.params.top_k == 1 {
            return Ok(Support::One(best));
        }
        let weight = |score: f32| exp_nonpositive((score - max) / temperature);
        let (by_k, by_p) = (self.params.top_k != 0 && self.params.top_k < scores.len(), top_p < 1.0);
        let mass = if by_k {
            top_k(scores, self.params.top_k, &mut self.candidates);
            self.candidates.iter_mut().for_each(|c| c.weight = weight(c.score));
            // In id order, so that the sum does not depend on how the selection left them.
            self.candidates.sort_unstable_by_key(|c| c.id);
            self.candidates.iter().map(|c| f64::from(c.weight)).sum()
        } else if by_p || min_p == 0.0 {
            self.weigh_all(scores, weight);
            self.blocks.iter().sum()
        } else {
            0.0
        };
        if !by_k {
            if !by_p && min_p == 0.0 {
                return Ok(Support::All);
            }
            self.candidates.clear();
            if by_p {
                // A token below this share cannot belong: all that are no better than it sum to less than 1 - p.
                let share = (1.0 - f64::from(top_p)) * mass / scores.len().saturating_sub(1).max(1) as f64;
                let floor = (share * 0.999) as f32;
                let weighed = (0u32..).zip(scores.iter().zip(&self.weights));
                self.candidates.extend(
                    weighed
                        .filter(|&(id, (_, &weight))| weight >= floor || id == best)
                        .map(|(id, (&score, &weight))| Candidate { score, weight, id }),
                );
            } else {
                // A little below the bound, which is applied exactly to the weights.
                let floor = max + temperature * (min_p.ln() - 0.001);
                self.candidates.extend(
                    (0u32..)
                        .zip(scores)
                        .filter(|&(id, &score)| score >= floor || id == best)
                        .map(|(id, &score)| Candidate { score, weight: weight(score), id }),
                );
            }
        }
        if by_p {
            nucleus(&mut self.candidates, f64::from(top_p) * mass);
            self.candidates.sort_unstable_by_key(|c| c.id);
        }
        // The best token's weight is e^0 = 1.
        self.candidates.retain(|c| c.weight >= min_p && c.weight > 0.0);
        Ok(match self.candidates.as_slice() {
            [] => Support::One(best),
            [only] => Support::One(only.id),
            _ => Support::Some,
        })
    }

    /// Fills `weights` and `blocks`.
    fn weigh_all(&mut self, scores: &[f32], weight: impl Fn(f32) -> f32) {
        self.weights.resize(scores.len(), 0.0);
        self.blocks.clear();
        for (scores, weights) in scores.chunks(BLOCK).zip(self.weights.chunks_mut(BLOCK)) {
            for (out, &score) in weights.iter_mut().zip(scores) {
                *out = weight(score);
            }
            self.blocks.push(sum(weights));
        }
    }

    fn draw_from_all(&mut self) -> u32 {
        let mut left = uniform(&mut self.rng) * self.blocks.iter().sum::<f64>();
        let mut last = 0;
        for (block, (&total, weights)) in self.blocks.iter().zip(self.weights.chunks(BLOCK)).enumerate() {
            // A block without weight is never entered, so `last` only changes where something can be drawn.
            if total <= 0.0 {
                continue;
            }
            if left >= total {
                left -= total;
                last = block * BLOCK + weights.iter().rposition(|&w| w > 0.0).unwrap_or(0);
                continue;
            }
            for (i, &weight) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
                last = block * BLOCK + i;
                left -= f64::from(weight);
                if left < 0.0 {
                    return last as u32;
                }
            }
            // Rounding: the block's sum was a little more than its parts.
            return last as u32;
        }
        last as u32
    }

    fn draw_from_candidates(&mut self) -> u32 {
        let total: f64 = self.candidates.iter().map(|c| f64::from(c.weight)).sum();
        let mut left = uniform(&mut self.rng) * total;
        let mut last = 0;
        for candidate in &self.candidates {
            last = candidate.id;
            left -= f64::from(candidate.weight);
            if left < 0.0 {
                break;
            }
        }
        last
    }
}

/// A number in [0, 1) with 53 random bits.
fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// Sum in f64, in an order that depends only on the length.
fn sum(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let chunks = values.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(tail) {
        *lane += f64::from(value);
    }
    lanes.iter().sum()
}

/// The largest value that is not NaN, and whether there is a NaN.
fn largest(values: &[f32]) -> (f32, bool) {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut nan = [0u32; LANES];
    let (chunks, tail) = values.as_chunks::<LANES>();
    let mut padded = [f32::NEG_INFINITY; LANES];
    for (out, &value) in padded.iter_mut().zip(tail) {
        *out = value;
    }
    for chunk in chunks.iter().chain([&padded]) {
        for ((lane, nan), &value) in lanes.iter_mut().zip(&mut nan).zip(chunk) {
            *lane = if value > *lane { value } else { *lane };
            *nan |= u32::from(value.is_nan());
        }
    }
    (lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max), nan.contains(&1))
}

/// The lowest index of the largest value, and the value.
fn argmax(scores: &[f32]) -> Result<(u32, f32)> {
    let (max, nan) = largest(scores);
    let bad = |what: &str, token: Option<usize>| {
        let token = token.map(|t| format!("the logit of token {t} is {what}")).unwrap_or_else(|| what.into());
        Error::Logits(token)
    };
    if nan {
        return Err(bad("NaN", scores.iter().position(|s| s.is_nan())));
    }
    let index = scores.iter().position(|&s| s == max);
    if max == f32::INFINITY {
        return Err(bad("infinite", index));
    }
    if max == f32::NEG_INFINITY {
        return Err(bad("no token has a finite logit", None));
    }
    Ok((index.unwrap_or(0) as u32, max))
}

/// Logarithm of the softmax of `logits` at `token`.
fn log_softmax_at(logits: &[f32], token: u32) -> f32 {
    let (max, _) = largest(logits);
    let mut block = [0.0f32; BLOCK];
    let mut total = 0.0;
    for chunk in logits.chunks(BLOCK) {
        for (out, &logit) in block.iter_mut().zip(chunk) {
            *out = exp_nonpositive(logit - max);
        }
        total += sum(block.get(..chunk.len()).unwrap_or_default());
    }
    let logit = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    (f64::from(logit - max) - total.ln()) as f32
}

#[cfg(test)]
mod tests;
