//! What a caller can ask of generation, and how it merges with what the checkpoint recommends.

use super::GenerationDefaults;
use crate::{Error, Result};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Stop strings that one request may have.
pub const MAX_STOP_STRINGS: usize = 64;

/// Length of one stop string at most, in bytes: text is held back while it may be the beginning of one.
pub const MAX_STOP_BYTES: usize = 4096;

/// How to generate. Everything is optional; see [`Self::resolve`] for what holds otherwise.
#[derive(Debug, Clone, Default)]
pub struct GenerateOptions {
    max_tokens: Option<usize>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Vec<(u32, f32)>,
    seed: Option<u64>,
    stop: Vec<String>,
    eos: Option<Vec<u32>>,
    ignore_eos: bool,
    logprobs: bool,
    timeout: Option<Duration>,
    cancel: Option<Arc<AtomicBool>>,
}

/// How tokens are drawn: all values settled. Made by [`GenerateOptions::resolve`].
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Only the k most likely tokens are drawn; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability are drawn; 1 for all.
    pub top_p: f32,
    /// Only tokens with at least this share of the most likely token's probability are drawn; 0 for all.
    pub min_p: f32,
    /// Positive logits of tokens in the prompt or generated are divided by it, negative ones multiplied (CTRL,
    /// arXiv:1909.05858, as in transformers); 1 for none.
    pub repetition_penalty: f32,
    /// Subtracted once from the logits of generated tokens.
    pub presence_penalty: f32,
    /// Subtracted from the logits of generated tokens, once per occurrence.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens; −∞ forbids one.
    pub logit_bias: Vec<(u32, f32)>,
    /// Same seed, same model and same logits give the same tokens, on one kind of device: where tokens are drawn on a
    /// GPU, the distribution is the same but the random numbers are others.
    pub seed: u64,
    /// Whether to compute log-probabilities.
    pub logprobs: bool,
}

impl SamplingParams {
    /// The most likely token, and nothing else.
    pub(crate) fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: false,
        }
    }
}

/// A request with all values settled. Made by [`GenerateOptions::resolve`].
#[derive(Debug, Clone)]
pub struct GenerationParams {
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Tokens to generate at most; `None` until the context is full.
    pub max_tokens: Option<usize>,
    /// Length of prompt and answer together at most; only where `max_tokens` was not asked for.
    pub max_length: Option<usize>,
    /// Texts that end generation; they are not part of the answer.
    pub stop: Vec<String>,
    /// Tokens that end generation.
    pub eos: Vec<u32>,
    /// Time that generation may take, prefill included.
    pub timeout: Option<Duration>,
    /// Ends generation when it becomes true.
    pub cancel: Option<Arc<AtomicBool>>,
}

impl GenerateOptions {
    /// Nothing asked for: the checkpoint's recommendation.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Tokens to generate at most (at least 1).
    #[must_use]
    pub fn max_tokens(mut self, n: usize) -> Self {
        self.max_tokens = Some(n);
        self
    }

    /// Divides the logits before drawing (0 or more); 0 takes the most likely token.
    #[must_use]
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.temperature = Some(temperature);
        self
    }

    /// Takes the most likely token, the first of equals: `temperature(0.0)`.
    #[must_use]
    pub fn greedy(self) -> Self {
        self.temperature(0.0)
    }

    /// Draws only from the `k` most likely tokens; 0 draws from all.
    #[must_use]
    pub fn top_k(mut self, k: usize) -> Self {
        self.top_k = Some(k);
        self
    }

    /// Draws only from the most likely tokens that together have probability `p` (0 < p ≤ 1).
    #[must_use]
    pub fn top_p(mut self, p: f32) -> Self {
        self.top_p = Some(p);
        self
    }

    /// Draws only from tokens with at least `p` times the most likely token's probability (0 ≤ p ≤ 1).
    #[must_use]
    pub fn min_p(mut self, p: f32) -> Self {
        self.min_p = Some(p);
        self
    }

    /// Makes tokens of prompt and answer less likely (above 1) or more (below); greater than 0.
    #[must_use]
    pub fn repetition_penalty(mut self, penalty: f32) -> Self {
        self.repetition_penalty = Some(penalty);
        self
    }

    /// Makes tokens of the answer less likely (above 0) or more, −2 to 2.
    #[must_use]
    pub fn presence_penalty(mut self, penalty: f32) -> Self {
        self.presence_penalty = Some(penalty);
        self
    }

    /// Makes tokens of the answer less likely with every occurrence (above 0) or more, −2 to 2.
    #[must_use]
    pub fn frequency_penalty(mut self, penalty: f32) -> Self {
        self.frequency_penalty = Some(penalty);
        self
    }

    /// Adds `bias` to the logit of `token`, a finite number or −∞ to forbid it; the last one for a token counts.
    #[must_use]
    pub fn logit_bias(mut self, token: u32, bias: f32) -> Self {
        self.logit_bias.retain(|(id, _)| *id != token);
        self.logit_bias.push((token, bias));
        self
    }

    /// Makes the drawing repeatable.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Ends generation where the answer contains `text`, which is left out. Can be given more than once.
    #[must_use]
    pub fn stop(mut self, text: impl Into<String>) -> Self {
        self.stop.push(text.into());
        self
    }

    /// Ends generation at these tokens instead of the checkpoint's.
    #[must_use]
    pub fn eos(mut self, tokens: impl Into<Vec<u32>>) -> Self {
        self.eos = Some(tokens.into());
        self
    }

    /// Whether to go on after end-of-sequence tokens.
    #[must_use]
    pub fn ignore_eos(mut self, ignore: bool) -> Self {
        self.ignore_eos = ignore;
        self
    }

    /// Whether to compute the log-probability of every token, under the model's own distribution: before penalties,
    /// bias, temperature and truncation.
    #[must_use]
    pub fn logprobs(mut self, logprobs: bool) -> Self {
        self.logprobs = logprobs;
        self
    }

    /// Ends generation after this time, prefill included.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Ends generation as soon as `flag` is true.
    #[must_use]
    pub fn cancel(mut self, flag: Arc<AtomicBool>) -> Self {
        self.cancel = Some(flag);
        self
    }

    /// Checks every value; `vocab` is the number of the model's logits.
    ///
    /// # Errors
    /// [`Error::Request`] naming the parameter, its value and what is accepted.
    pub fn validate(&self, vocab: usize) -> Result<()> {
        if self.max_tokens == Some(0) {
            return Err(Error::request("max_tokens", "is 0; accepted: 1 or more"));
        }
        check("temperature", self.temperature, |v| v >= 0.0 && v.is_finite(), "0 (greedy) or any larger number")?;
        check("top_p", self.top_p, |v| v > 0.0 && v <= 1.0, "greater than 0, up to 1 (off)")?;
        check("min_p", self.min_p, |v| (0.0..=1.0).contains(&v), "0 (off) to 1")?;
        let penalty = |v: f32| v > 0.0 && v.is_finite();
        check("repetition_penalty", self.repetition_penalty, penalty, "greater than 0 (1 is off)")?;
        let openai = |v| (-2.0..=2.0).contains(&v);
        check("presence_penalty", self.presence_penalty, openai, "-2 to 2 (0 is off)")?;
        check("frequency_penalty", self.frequency_penalty, openai, "-2 to 2 (0 is off)")?;
        for &(token, bias) in &self.logit_bias {
            if token as usize >= vocab {
                return Err(Error::request(
                    "logit_bias",
                    format!("token {token} does not exist; accepted: 0 to {}", vocab.saturating_sub(1)),
                ));
            }
            if bias.is_nan() || bias == f32::INFINITY {
                return Err(Error::request(
                    "logit_bias",
                    format!("is {bias} for token {token}; accepted: a finite number, or -inf to forbid the token"),
                ));
            }
        }
        if self.stop.len() > MAX_STOP_STRINGS {
            return Err(Error::request(
                "stop",
                format!("{} strings; accepted: up to {MAX_STOP_STRINGS}", self.stop.len()),
            ));
        }
        if let Some(bad) = self.stop.iter().find(|s| s.is_empty() || s.len() > MAX_STOP_BYTES) {
            return Err(Error::request(
                "stop",
                format!("a string of {} bytes; accepted: 1 to {MAX_STOP_BYTES} bytes", bad.len()),
            ));
        }
        if let Some(bad) = self.eos.iter().flatten().find(|&&id| id as usize >= vocab) {
            return Err(Error::request(
                "eos",
                format!("token {bad} does not exist; accepted: 0 to {}", vocab.saturating_sub(1)),
            ));
        }
        Ok(())
    }

    /// Settles every value: what was asked for, else what generation_config.json recommends, else the neutral value
    /// (no truncation, no penalty, temperature 1).
    ///
    /// - Tokens are drawn if a temperature above 0 is asked for; if none is, but top-k, top-p or min-p are; or if
    ///   nothing is asked for and the checkpoint says `do_sample: true`. Otherwise the most likely token is taken, as
    ///   transformers does, and a recommended temperature is not used. A recommended temperature of 0 is greedy too.
    /// - Without `max_tokens`, the checkpoint's `max_new_tokens` holds, or else its `max_length` (prompt and answer
    ///   together).
    /// - Asked-for `eos` tokens replace the checkpoint's; `ignore_eos` leaves none.
    /// - Without a seed, a new one is chosen; it is in the result.
    /// - Top-k is off unless asked for or recommended (transformers would assume 50).
    ///
    /// # Errors
    /// As [`Self::validate`].
    pub fn resolve(&self, defaults: &GenerationDefaults, vocab: usize) -> Result<GenerationParams> {
        self.validate(vocab)?;
        let truncates = self.top_k.is_some_and(|k| k > 0) || self.top_p.is_some() || self.min_p.is_some();
        let temperature = match self.temperature {
            Some(temperature) => temperature,
            None if truncates || defaults.do_sample => defaults.temperature.unwrap_or(1.0),
            None => 0.0,
        };
        let sampling = SamplingParams {
            temperature,
            top_k: self.top_k.or(defaults.top_k).unwrap_or(0),
            top_p: self.top_p.or(defaults.top_p).unwrap_or(1.0),
            min_p: self.min_p.or(defaults.min_p).unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            logit_bias: self.logit_bias.clone(),
            seed: self.seed.unwrap_or_else(random_seed),
            logprobs: self.logprobs,
        };
        let max_tokens = self.max_tokens.or(defaults.max_new_tokens);
        Ok(GenerationParams {
            sampling,
            max_tokens,
            max_length: if max_tokens.is_none() { defaults.max_length } else { None },
            stop: self.stop.clone(),
            eos: if self.ignore_eos { Vec::new() } else { self.eos.clone().unwrap_or_else(|| defaults.eos.clone()) },
            timeout: self.timeout,
            cancel: self.cancel.clone(),
        })
    }
}

fn check(name: &str, value: Option<f32>, accepts: impl Fn(f32) -> bool, range: &str) -> Result<()> {
    match value {
        Some(value) if !accepts(value) => Err(Error::request(name, format!("is {value}; accepted: {range}"))),
        _ => Ok(()),
    }
}

/// A seed that differs between calls. Kept below 2^53 so that it survives JSON readers that know only doubles.
fn random_seed() -> u64 {
    RandomState::new().hash_one(std::time::SystemTime::now()) >> 11
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refuses(options: GenerateOptions, parts: [&str; 2]) {
        let error = options.validate(100).unwrap_err();
        assert!(matches!(error, Error::Request { .. }));
        let text = error.to_string();
        assert!(parts.iter().all(|p| text.contains(p)), "{text}");
    }

    #[test]
    fn bad_values_are_named() {
        let o = GenerateOptions::new;
        refuses(o().max_tokens(0), ["max_tokens", "1 or more"]);
        refuses(o().temperature(f32::NAN), ["temperature", "NaN"]);
        refuses(o().temperature(-0.5), ["temperature", "-0.5"]);
        refuses(o().temperature(f32::INFINITY), ["temperature", "inf"]);
        refuses(o().top_p(0.0), ["top_p", "up to 1"]);
        refuses(o().top_p(1.01), ["top_p", "1.01"]);
        refuses(o().top_p(f32::NAN), ["top_p", "NaN"]);
        refuses(o().min_p(-0.1), ["min_p", "-0.1"]);
        refuses(o().min_p(f32::NAN), ["min_p", "NaN"]);
        refuses(o().repetition_penalty(0.0), ["repetition_penalty", "greater than 0"]);
        refuses(o().presence_penalty(2.5), ["presence_penalty", "2.5"]);
        refuses(o().frequency_penalty(f32::NAN), ["frequency_penalty", "NaN"]);
        refuses(o().logit_bias(100, 1.0), ["logit_bias", "0 to 99"]);
        refuses(o().logit_bias(1, f32::NAN), ["logit_bias", "NaN"]);
        refuses(o().logit_bias(1, f32::INFINITY), ["logit_bias", "inf"]);
        refuses(o().stop(""), ["stop", "0 bytes"]);
        refuses(o().stop("x".repeat(MAX_STOP_BYTES + 1)), ["stop", "4097"]);
        refuses((0..65).fold(o(), |o, i| o.stop(i.to_string())), ["stop", "65"]);
        refuses(o().eos([5, 100]), ["eos", "100"]);
        o().temperature(0.0).top_k(0).top_p(1.0).min_p(1.0).logit_bias(99, f32::NEG_INFINITY).validate(100).unwrap();
    }

    #[test]
    fn explicit_beats_recommended_beats_neutral() {
        let recommended = GenerationDefaults {
            eos: vec![7],
            do_sample: true,
            temperature: Some(0.6),
            top_p: Some(0.9),
            max_length: Some(50),
            ..GenerationDefaults::default()
        };
        let p = GenerateOptions::new().resolve(&recommended, 100).unwrap();
        assert_eq!((p.sampling.temperature, p.sampling.top_p, p.sampling.top_k), (0.6, 0.9, 0));
        assert_eq!((p.max_tokens, p.max_length, p.eos), (None, Some(50), vec![7]));
        let p = GenerateOptions::new().greedy().top_p(0.5).max_tokens(3).eos([1]).resolve(&recommended, 100).unwrap();
        assert_eq!((p.sampling.temperature, p.sampling.top_p), (0.0, 0.5));
        assert_eq!((p.max_tokens, p.max_length, p.eos), (Some(3), None, vec![1]));
        assert!(GenerateOptions::new().ignore_eos(true).resolve(&recommended, 100).unwrap().eos.is_empty());
        let neutral = GenerationDefaults { temperature: Some(0.6), ..GenerationDefaults::default() };
        let temperature = |o: GenerateOptions| o.resolve(&neutral, 100).unwrap().sampling.temperature;
        assert_eq!(temperature(GenerateOptions::new()), 0.0);
        assert_eq!(temperature(GenerateOptions::new().top_k(5)), 0.6);
        assert_eq!(temperature(GenerateOptions::new().temperature(0.8)), 0.8);
        let seeds = [(); 2].map(|()| GenerateOptions::new().resolve(&neutral, 100).unwrap().sampling.seed);
        assert_ne!(seeds[0], seeds[1]);
    }
}
