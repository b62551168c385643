//! A run from scratch in a directory: text and recipe in, a checkpoint of masters out.
//!
//! The directory holds `recipe.toml`, the tokenizer, `metrics.jsonl` (one object a step or validation), `curve.svg` (drawn
//! from it after each validation), `state.safetensors` (to resume from) and `masters/`, a checkpoint of the best parameters
//! so far by validation.

use super::corpus::{Corpus, Stream, read_documents, tokenize, windows};
use super::decoder::{Batch, Decoder};
use super::directory::RunDirectory;
pub use super::directory::{CURVE, MASTERS, METRICS, STATE, Summary};
use super::export::write_masters;
use super::parameters::{Masters, Parameters};
use super::recipe::Recipe;
use super::tokenizer::{END_OF_TEXT, train_bpe, write_tokenizer};
use super::trainer::{Event, Trainer, total_loss};
use crate::backend::host;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::write::{check_target, write_text};
use crate::evaluate::Score;
use crate::model::config::ModelConfig;
use crate::text::Tokenizer;
use crate::{Error, Result};
use candle_core::Device;
use std::ops::ControlFlow;
use std::path::Path;

/// The settings' file.
pub const RECIPE: &str = "recipe.toml";

/// A prepared run.
#[derive(Debug)]
pub struct Scratch {
    recipe: Recipe,
    dir: RunDirectory,
    tokenizer: Tokenizer,
    config: ModelConfig,
    decoder: Decoder,
    stream: Stream,
}

/// How well a text that played no part in training is predicted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeldOut {
    /// The score of its tokens, all but the first.
    pub score: Score,
    /// Bytes that they stand for.
    pub bytes: usize,
}

impl HeldOut {
    /// Bits a byte.
    pub fn bits_per_byte(&self) -> f64 {
        self.score.bits_per_byte(self.bytes)
    }
}

impl Scratch {
    /// Prepares a run in a directory that holds none: reads the text, learns the tokenizer, writes the recipe.
    ///
    /// # Errors
    /// [`Error::Request`] for a directory that holds a run or settings out of range; those of [`Corpus::read`] and
    /// [`train_bpe`].
    pub fn start(text: &Path, dir: &Path, recipe: &Recipe) -> Result<Self> {
        recipe.check()?;
        if dir.join(RECIPE).exists() {
            let reason = format!("{} holds a run; resume it, or name another directory", dir.display());
            return Err(Error::request("output directory", reason));
        }
        // A run whose recipe was removed, a model, or files of somebody else's that would be replaced.
        if let Some(name) = [METRICS, MASTERS].into_iter().find(|name| dir.join(name).exists()) {
            let reason = format!("{} already holds {name}; choose another directory", dir.display());
            return Err(Error::request("output directory", reason));
        }
        check_target(dir)?;
        let corpus = Corpus::read(text, recipe.batches.validation)?;
        let tokenizer = train_bpe(&corpus.train, recipe.model.vocab)?;
        let run = Self::prepare(|| RunDirectory::create(dir), *recipe, tokenizer, &corpus)?;
        write_tokenizer(&run.tokenizer, dir)?;
        write_text(&dir.join(RECIPE), &recipe.to_toml()?)?;
        Ok(run)
    }

    /// Prepares to go on with a run, from its last saved state or, if there is none yet, from the start.
    ///
    /// # Errors
    /// As [`Self::start`], and if the directory holds no run.
    pub fn resume(text: &Path, dir: &Path) -> Result<Self> {
        let recipe = Recipe::read(&dir.join(RECIPE))?;
        recipe.check()?;
        let locked = RunDirectory::reopen(dir)?;
        let corpus = Corpus::read(text, recipe.batches.validation)?;
        Self::prepare(|| Ok(locked), recipe, Tokenizer::from_dir(dir)?, &corpus)
    }

    /// `dir` is asked for last, when all else is known to be right.
    fn prepare(
        dir: impl FnOnce() -> Result<RunDirectory>,
        recipe: Recipe,
        tokenizer: Tokenizer,
        corpus: &Corpus,
    ) -> Result<Self> {
        let end = tokenizer.token_to_id(END_OF_TEXT).unwrap_or(0);
        let config = recipe.model.config(end)?;
        let separator = corpus.separate.then_some(end);
        let train = tokenize(&tokenizer, &corpus.train, separator)?;
        let validation = tokenize(&tokenizer, &corpus.validation, separator)?;
        // The first token is not predicted. Byte-level tokens are spelt with one character a byte.
        let first = validation.first().and_then(|id| tokenizer.id_to_token(*id)).map_or(0, |t| t.chars().count());
        let bytes = corpus.validation.iter().map(String::len).sum::<usize>().saturating_sub(first);
        let (b, m) = (recipe.batches, recipe.model);
        let seed = recipe.optimization.seed;
        let stream = Stream::new(train, m.context, b.sequences, b.micro, seed, &validation, bytes)?;
        let decoder = Decoder::new(&config)?.with_precision(recipe.optimization.precision);
        Ok(Self { recipe, dir: dir()?, tokenizer, config, decoder, stream })
    }

    /// The settings.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The batches.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Trains to the end of the recipe or until `observe` breaks; everything that is written is written whole.
    ///
    /// # Errors
    /// Those of [`Trainer::resume`] and [`Trainer::run`]; [`Error::Unavailable`] if this machine has too little memory.
    pub fn run(
        &self,
        device: &Device,
        threads: usize,
        observe: &mut dyn FnMut(Event<'_>) -> Result<ControlFlow<()>>,
    ) -> Result<Summary> {
        let o = self.recipe.optimization;
        if device.is_cpu() {
            self.check_memory(threads)?;
        }
        let parameters = Parameters::random(&self.config, self.recipe.model.masters, device, o.seed)?;
        let trainer = Trainer::new(&self.decoder, &self.stream, parameters, o, threads)?;
        self.dir.run(trainer, &|parameters| self.export(parameters), observe)
    }

    /// Scores a text that played no part in training with the best masters of this run, in sliding windows of the model's
    /// context, half of it apart, by the training pass: the way to compare a dense twin, which inference refuses.
    ///
    /// # Errors
    /// Those of [`read_documents`], and if there are no masters yet.
    pub fn evaluate(&self, text: &Path, device: &Device, threads: usize) -> Result<HeldOut> {
        let documents = read_documents(text)?;
        let separator = (documents.len() > 1).then(|| self.config.eos_tokens.first().copied()).flatten();
        let ids = tokenize(&self.tokenizer, &documents, separator)?;
        let (length, micro) = (self.recipe.model.context, self.recipe.batches.micro);
        let batches = windows(&ids, length, length / 2, micro);
        let tokens = batches.iter().map(Batch::counted).sum();
        if tokens == 0 {
            return Err(Error::file(text, "too short: there is no token to predict"));
        }
        let bytes = self.tokenizer.decode(&ids[1..], true)?.len();
        let checkpoint = Checkpoint::open(&self.dir.path().join(MASTERS))?;
        let parameters = Parameters::from_checkpoint(&self.config, Masters::F32, device, &checkpoint)?;
        let lambda = self.recipe.optimization.final_lambda();
        let nll_nats = total_loss(&self.decoder, &parameters, lambda, &batches, threads)?;
        let windows = batches.iter().map(|b| b.tokens.len() / b.length).sum();
        Ok(HeldOut { score: Score { nll_nats, tokens, windows }, bytes })
    }

    /// Parameters, moments, effective weights, and gradients of every thread: what a run needs beside activations.
    fn check_memory(&self, threads: usize) -> Result<()> {
        let value = self.recipe.model.masters.dtype().size_in_bytes() as u64 + 3 * 4;
        let needed = self.config.parameters().saturating_mul(value + 4 * (threads as u64 + 1));
        match host::available_bytes() {
            Some(available) if needed > available => Err(Error::Unavailable {
                what: format!("{:.1} GB of memory for {} parameters", needed as f64 / 1e9, self.config.parameters()),
                reason: format!("{:.1} GB are free; train a smaller model or on fewer threads", available as f64 / 1e9),
            }),
            _ => Ok(()),
        }
    }

    /// Writes a checkpoint of masters, so that it is the old one or the new one at any time.
    fn export(&self, parameters: &Parameters) -> Result<()> {
        let dir = self.dir.path().join(MASTERS);
        std::fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        write_tokenizer(&self.tokenizer, &dir)?;
        let generation = serde_json::json!({
            "do_sample": true,
            "temperature": 0.8,
            "top_p": 0.95,
            "eos_token_id": self.config.eos_tokens.first(),
        });
        write_text(&dir.join("generation_config.json"), &format!("{generation:#}\n"))?;
        write_masters(&dir, &self.config, parameters, self.recipe.optimization.quantize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_leaves_its_log_its_curve_and_its_masters() {
        let dir = tempfile::tempdir().unwrap();
        let (text, out) = (dir.path().join("text.txt"), dir.path().join("run"));
        std::fs::write(&text, "Now fades the lamp, and yonder hill puts on a crown.\n".repeat(800)).unwrap();
        let mut recipe = Recipe::default();
        let (m, b, o) = (&mut recipe.model, &mut recipe.batches, &mut recipe.optimization);
        (m.hidden, m.intermediate, m.layers, m.heads, m.kv_heads, m.vocab, m.context) =
            (32, 48, 1, 2, Some(2), 257, 16);
        (b.sequences, b.micro, b.validation) = (2, 1, 0.1);
        (o.steps, o.warmup, o.eval_every, o.save_every) = (4, 1, 2, 2);
        let curve = out.join(CURVE);
        let mut seen = Vec::new();
        let run = Scratch::start(&text, &out, &recipe).unwrap();
        run.run(&Device::Cpu, 1, &mut |event| {
            if let Event::Validated(_) = event {
                seen.push(std::fs::read_to_string(&curve).unwrap());
            }
            Ok(ControlFlow::Continue(()))
        })
        .unwrap();
        assert_eq!(seen.len(), 2);
        assert!(seen[0] != seen[1] && seen[1].contains("bits per byte at last"));
        for name in [RECIPE, METRICS, STATE, CURVE, MASTERS] {
            assert!(out.join(name).exists(), "{name}");
        }
    }
}
