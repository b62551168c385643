//! Perplexity and bits per byte of token ids, over a sliding window. Knows no text: see [`Score::bits_per_byte`].

use crate::backend::DenseType;
use crate::backend::attention::AttentionShape;
use crate::backend::cpu::Pool;
use crate::model::{Decoder, Logits, Sequence};
use crate::nn::KvCache;
use crate::{Error, Result};
use candle_core::{Storage, Tensor};

/// Most tokens that are given to the model at once: where the ternary GEMM is at its full speed.
const FORWARD_TOKENS: usize = 512;
/// Most bytes of logits that are held at once: 130 rows of a vocabulary of 128256.
const MAX_LOGITS_BYTES: usize = 64 << 20;
/// Most windows that are scored together.
pub const MAX_BATCH: usize = 1024;

/// How a text is cut, as transformers' guide "Perplexity of fixed-length models" does it (`max_length`, `stride`).
///
/// Window i holds the tokens from i · `stride` on, `context` of them, and the last window ends with the text. Of each
/// window the tokens that no earlier window held are scored, given those before them in the window, so that every
/// token is scored exactly once and, after the first window, given at least `context` − `stride` others. With
/// `stride` = `context` a window's first token would have nothing before it: the token before the window is read as
/// well there (transformers' loop leaves that token out of the score).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Tokens of a window, at most [`Decoder::context`].
    pub context: usize,
    /// Tokens from a window's begin to the next one's, 1 to `context`: smaller is slower, and gives more context.
    pub stride: usize,
    /// Windows that are scored together, 1 to [`MAX_BATCH`], each with its own KV slot. The score does not depend on it.
    pub batch: usize,
}

impl Windows {
    /// Windows of `context` tokens that overlap by half, as many at once as the kernels can make use of.
    pub fn new(context: usize) -> Self {
        Self { context, stride: (context / 2).max(1), batch: (FORWARD_TOKENS / context.max(1)).max(1) }
    }

    fn check(&self, decoder: &Decoder) -> Result<()> {
        let check = |what: &str, value: usize, most: usize, whose: &str| match (1..=most).contains(&value) {
            true => Ok(()),
            false => Err(Error::request(what, format!("{value} is not between 1 and {most}{whose}"))),
        };
        check("context", self.context, decoder.context(), ", the model's positions")?;
        check("stride", self.stride, self.context, ", the context")?;
        check("batch", self.batch, MAX_BATCH, "")
    }

    /// The windows of a sequence whose first `given` tokens (at least one) are not scored.
    fn cut<'a>(self, sequence: &'a [u32], given: usize) -> impl Iterator<Item = Window<'a>> {
        let (mut begin, mut scored) = (0, given);
        std::iter::from_fn(move || {
            while scored < sequence.len() {
                let (first, end) = (scored, (begin + self.context).min(sequence.len()));
                // Where windows do not overlap, a window's first token is predicted by the one before the window.
                let from = begin - usize::from(begin > 0 && self.stride == self.context);
                begin += self.stride;
                if end > first {
                    scored = end;
                    let (read, targets) = (&sequence[from..end - 1], &sequence[first..end]);
                    return Some(Window { read, targets, first, done: 0, nll: Vec::with_capacity(targets.len()) });
                }
            }
            None
        })
    }
}

/// What was scored, and how well it was predicted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Sum of the scored tokens' negative log-likelihoods, in nats.
    pub nll_nats: f64,
    /// Tokens that were scored.
    pub tokens: usize,
    /// Windows that they were scored in.
    pub windows: usize,
}

impl Score {
    /// e to the mean negative log-likelihood of a token.
    pub fn perplexity(&self) -> f64 {
        (self.nll_nats / self.tokens as f64).exp()
    }

    /// Bits per byte, where the scored tokens stand for `bytes` bytes of text: comparable between tokenizers.
    ///
    /// A first token that was not scored takes its bytes out of the count.
    pub fn bits_per_byte(&self, bytes: usize) -> f64 {
        self.nll_nats / std::f64::consts::LN_2 / bytes as f64
    }
}

/// Scores `tokens` after `prefix`, which is read and not scored: BOS, or whatever comes before. Without a prefix
/// the first of `tokens` cannot be predicted from anything: it is read only, and [`Score::tokens`] is one less.
///
/// BOS as a prefix belongs to the first window, as in transformers, where the tokenizer puts it there.
/// `progress` is called with the tokens scored so far. The log-softmax of the f32 logits and all sums are in f64,
/// and the sum goes from the first token to the last: the same bits for every batch size and number of threads.
///
/// # Errors
/// [`Error::Request`] for windows that make no sense or do not fit the model, for tokens outside the vocabulary, and
/// if nothing would be scored; [`Error::Logits`] naming the token whose logits are not finite.
pub fn score(
    decoder: &Decoder,
    kv_dtype: DenseType,
    prefix: &[u32],
    tokens: &[u32],
    windows: &Windows,
    progress: &mut dyn FnMut(usize),
) -> Result<Score> {
    windows.check(decoder)?;
    let config = decoder.config();
    let sequence = [prefix, tokens].concat();
    if let Some(id) = sequence.iter().find(|id| **id as usize >= config.vocab_size) {
        return Err(Error::request("token id", format!("{id} is outside the vocabulary of {}", config.vocab_size)));
    }
    let given = prefix.len().max(1);
    if sequence.len() <= given {
        let reason = "nothing can be scored; give at least one token and something before it";
        return Err(Error::request("tokens", format!("{}: {reason}", tokens.len())));
    }
    let slots = windows.cut(&sequence, given).take(windows.batch).count();
    let shape = AttentionShape::new(config.num_heads, config.num_kv_heads, config.head_dim)?;
    let capacity = windows.context.min(sequence.len());
    let cache = KvCache::new(decoder.backend(), shape, kv_dtype, config.num_layers, slots, capacity)?;
    let logit_rows = (MAX_LOGITS_BYTES / size_of::<f32>() / config.vocab_size).clamp(1, FORWARD_TOKENS);

    let mut score = Score { nll_nats: 0.0, tokens: 0, windows: 0 };
    let mut rest = windows.cut(&sequence, given);
    loop {
        let mut group: Vec<Window<'_>> = rest.by_ref().take(windows.batch).collect();
        if group.is_empty() {
            return Ok(score);
        }
        // What is only read needs no head but for one row of each piece.
        loop {
            let pieces = pieces(&group, FORWARD_TOKENS, logit_rows, Window::context);
            if pieces.is_empty() {
                break;
            }
            decoder.forward_with(&pieces, &cache, Logits::Last, |_| Ok(()))?;
            pieces.iter().for_each(|piece| group[piece.slot].done += piece.tokens.len());
        }
        let mut scored = score.tokens;
        loop {
            let pieces = pieces(&group, logit_rows, logit_rows, |window| window.read.len());
            if pieces.is_empty() {
                break;
            }
            let targets: Vec<u32> = pieces.iter().flat_map(|p| group[p.slot].next_targets(p.tokens.len())).collect();
            let pool = decoder.backend().cpu().pool();
            let read = |logits: &Tensor| negative_log_likelihoods(pool, logits, &targets);
            let nll = decoder.forward_with(&pieces, &cache, Logits::All, read)?;
            let mut nll = nll.as_slice();
            for piece in &pieces {
                let (own, others) = nll.split_at(piece.tokens.len());
                nll = others;
                let window = &mut group[piece.slot];
                if let Some(bad) = own.iter().position(|v| !v.is_finite()) {
                    let token = window.first + window.nll.len() + bad - prefix.len();
                    return Err(Error::Logits(format!("the logits that predict token {token} are not finite")));
                }
                window.nll.extend(own);
                window.done += own.len();
            }
            scored += targets.len();
            progress(scored);
        }
        for window in &group {
            window.nll.iter().for_each(|nll| score.nll_nats += nll);
            score.tokens += window.targets.len();
            score.windows += 1;
        }
    }
}

/// One window: the last rows of what it reads predict its targets.
struct Window<'a> {
    read: &'a [u32],
    targets: &'a [u32],
    /// Index of the first target in the sequence.
    first: usize,
    /// Tokens of `read` that the model was given.
    done: usize,
    /// Negative log-likelihoods of the first targets, in nats.
    nll: Vec<f64>,
}

impl Window<'_> {
    /// Tokens that predict nothing that is scored.
    fn context(&self) -> usize {
        self.read.len() - self.targets.len()
    }

    fn next_targets(&self, count: usize) -> impl Iterator<Item = u32> {
        self.targets[self.nll.len()..][..count].iter().copied()
    }
}

/// The next tokens of the windows that were not given all up to `end`: at most `tokens` together, of at most
/// `sequences` windows, shared evenly.
fn pieces<'a>(
    group: &[Window<'a>],
    tokens: usize,
    sequences: usize,
    end: impl Fn(&Window<'a>) -> usize,
) -> Vec<Sequence<'a>> {
    let open = group.iter().enumerate().filter(|(_, window)| window.done < end(window));
    let open: Vec<_> = open.take(sequences.min(tokens)).collect();
    let share = tokens / open.len().max(1);
    let piece = |(slot, window): (usize, &Window<'a>)| {
        let until = end(window).min(window.done + share);
        Sequence { slot, position: window.done, tokens: &window.read[window.done..until] }
    };
    open.into_iter().map(piece).collect()
}

/// −ln softmax(row)[target] of each row of f32 logits `[targets, vocab]`, in nats.
fn negative_log_likelihoods(pool: &Pool, logits: &Tensor, targets: &[u32]) -> Result<Vec<f64>> {
    let (_, vocab) = logits.dims2()?;
    let mut nll = vec![0.0; targets.len()];
    let mut fill = |logits: &[f32]| {
        pool.for_each_chunk(&mut nll, 1, |row, out| {
            let logits = &logits[row * vocab..][..vocab];
            out.fill(negative_log_likelihood(logits, targets[row] as usize));
        });
    };
    let (storage, layout) = logits.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(cpu), Some((start, end))) => fill(&cpu.as_slice::<f32>()?[start..end]),
        _ => {
            drop(storage);
            fill(&logits.flatten_all()?.to_vec1()?);
        }
    }
    Ok(nll)
}

/// Not finite if a logit is NaN or +∞, or the target's is −∞.
fn negative_log_likelihood(logits: &[f32], target: usize) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - max).exp()).sum();
    sum.ln() + (max - f64::from(logits[target]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_a_target_once_and_follows_what_is_read() {
        let sequence: Vec<u32> = (0..41).collect();
        for context in 1..=43 {
            for stride in 1..=context {
                for given in [1, 2, 7, 40] {
                    let windows = Windows { context, stride, batch: 1 };
                    let mut next = given as u32;
                    for (i, window) in windows.cut(&sequence, given).enumerate() {
                        assert!((1..=context).contains(&window.read.len()));
                        for (row, target) in (window.context()..).zip(window.targets) {
                            assert_eq!((*target, window.read[row]), (next, next - 1));
                            next += 1;
                        }
                        let least = if i == 0 { 0 } else { context - stride };
                        assert!(window.context() + 1 >= least, "context {context}, stride {stride}");
                        assert_eq!(window.first as u32, window.targets[0]);
                    }
                    assert_eq!(next, 41, "context {context}, stride {stride}, {given} given");
                }
            }
        }
    }

    #[test]
    fn a_forward_pass_is_bounded_and_shared_evenly() {
        let read: Vec<u32> = (0..100).collect();
        let window = |done| Window { read: &read, targets: &read[..60], first: 0, done, nll: vec![] };
        let group = [window(0), window(100), window(95), window(40)];
        let lengths = |tokens, sequences, end: fn(&Window<'_>) -> usize| {
            let pieces = pieces(&group, tokens, sequences, end);
            assert!(pieces.iter().all(|p| p.tokens[0] as usize == p.position && group[p.slot].done == p.position));
            pieces.iter().map(|p| (p.slot, p.tokens.len())).collect::<Vec<_>>()
        };
        let all = |w: &Window<'_>| w.read.len();
        assert_eq!(lengths(512, 512, all), [(0, 100), (2, 5), (3, 60)]);
        assert_eq!(lengths(31, 31, all), [(0, 10), (2, 5), (3, 10)]);
        assert_eq!(lengths(2, 2, all), [(0, 1), (2, 1)]);
        assert_eq!(lengths(512, 1, all), [(0, 100)]);
        assert_eq!(lengths(512, 512, |w| w.context()), [(0, 40)]);
    }

    #[test]
    fn the_log_softmax_survives_large_logits_and_shows_bad_ones() {
        let close = |got: f64, want: f64| assert!((got - want).abs() < 1e-12, "{got} {want}");
        close(negative_log_likelihood(&[0.0; 8], 3), 8f64.ln());
        close(negative_log_likelihood(&[1e30, 1e30], 1), 2f64.ln());
        close(negative_log_likelihood(&[-1e30, 0.0, f32::NEG_INFINITY], 1), 0.0);
        close(negative_log_likelihood(&[0.0, 3.0], 0), (1.0 + 3f64.exp()).ln());
        for (logits, target) in [([0.0, f32::NAN], 0), ([f32::INFINITY, 0.0], 1), ([0.0, f32::NEG_INFINITY], 1)] {
            assert!(!negative_log_likelihood(&logits, target).is_finite(), "{logits:?}");
        }
    }

    #[test]
    fn by_default_windows_overlap_by_half_and_small_ones_are_batched() {
        assert_eq!(Windows::new(4096), Windows { context: 4096, stride: 2048, batch: 1 });
        assert_eq!(Windows::new(128), Windows { context: 128, stride: 64, batch: 4 });
        assert_eq!(Windows::new(1), Windows { context: 1, stride: 1, batch: 512 });
    }
}
