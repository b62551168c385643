//! Supervised examples: JSONL to conversations, conversations to tokens with a mark on those that are learnt, and those to
//! batches.
//!
//! A line is `{"messages": [{"role", "content"}, …]}`, `{"instruction", "output"}` (with `input` or `context`, if there is
//! one, after the instruction), `{"input", "output"}` or `{"text"}`; the first of these forms whose keys are there counts,
//! and other keys are ignored. Anything else is an error that names the line.

mod batches;
mod encode;
mod lines;

pub use batches::ExampleBatches;
pub use encode::{Example, PromptFormat};
pub use lines::{MAX_MESSAGES, Sample, read_samples};

use super::corpus::{FNV_BASIS, fnv};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Which tokens of a conversation are learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOn {
    /// Those of the assistant, up to the end of each turn. Of a `{"text"}` line: all.
    #[default]
    Assistant,
    /// All.
    All,
}

/// How lines become examples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExampleOptions {
    /// Which tokens are learnt.
    pub train_on: TrainOn,
    /// Longest example, in positions.
    pub context: usize,
    /// Whether longer ones are cut at the end instead of left out.
    pub truncate: bool,
    /// Lines that are used at most, from the first; 0: all.
    pub max_samples: usize,
    /// Part of the examples that is set apart for validation, where there is no file of its own for that.
    pub validation: f64,
}

impl Default for ExampleOptions {
    fn default() -> Self {
        let (train_on, validation) = (TrainOn::Assistant, 0.05);
        Self { train_on, context: crate::DEFAULT_CONTEXT, truncate: false, max_samples: 0, validation }
    }
}

/// What became of the lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct ExampleCounts {
    /// Lines read.
    pub lines: usize,
    /// Examples made of them.
    pub used: usize,
    /// Left out because they are longer than the context.
    pub too_long: usize,
    /// Left out because there is nothing to learn in them: an empty answer or text.
    pub empty: usize,
    /// Cut to the context; they are among those used.
    pub truncated: usize,
}

/// Examples to train on and examples to validate with.
#[derive(Debug, Clone, Default)]
pub struct Examples {
    /// Training examples, in the order of the file.
    pub train: Vec<Example>,
    /// Validation examples.
    pub validation: Vec<Example>,
    /// What became of the lines of all files.
    pub counts: ExampleCounts,
}

impl Examples {
    /// Reads and encodes a file, and the validation file if there is one; otherwise every n-th example is set apart.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::File`], naming the line, for a file that is empty or holds anything but examples, and if
    /// none is left to train on; [`Error::Request`] for options out of range.
    pub fn read(
        data: &Path,
        validation: Option<&Path>,
        format: &PromptFormat,
        options: &ExampleOptions,
    ) -> Result<Self> {
        if !(0.0..=0.5).contains(&options.validation) {
            let reason = format!("{} is out of range: 0 to 0.5", options.validation);
            return Err(Error::request("validation", reason));
        }
        if options.context < 2 {
            return Err(Error::request("context", format!("{} positions hold no example", options.context)));
        }
        let mut all = Self::default();
        let encoded = all.encode(data, format, options)?;
        match validation {
            Some(path) => {
                all.train = encoded;
                all.validation = all.encode(path, format, &ExampleOptions { max_samples: 0, ..*options })?;
            }
            None => {
                for (i, example) in encoded.into_iter().enumerate() {
                    // The count of validation examples grows by one wherever share · i passes an integer.
                    let share = options.validation;
                    let list = match ((i + 1) as f64 * share).floor() > (i as f64 * share).floor() {
                        true => &mut all.validation,
                        false => &mut all.train,
                    };
                    list.push(example);
                }
            }
        }
        Ok(all)
    }

    fn encode(&mut self, path: &Path, format: &PromptFormat, options: &ExampleOptions) -> Result<Vec<Example>> {
        let mut samples = read_samples(path)?;
        if options.max_samples > 0 {
            samples.truncate(options.max_samples);
        }
        let counts = &mut self.counts;
        let before = *counts;
        counts.lines += samples.len();
        let mut list = Vec::with_capacity(samples.len());
        for (line, sample) in samples {
            let bad = |e: Error| match e {
                Error::Text { what, reason } => Error::file(path, format!("line {line}: {what}: {reason}")),
                e => e,
            };
            let Some(mut example) = format.example(&sample, options.train_on).map_err(bad)? else {
                counts.empty += 1;
                continue;
            };
            example.line = line;
            // The last token is only predicted, so it needs no position.
            if example.ids.len() > options.context + 1 {
                if !options.truncate || !example.truncate(options.context + 1) {
                    counts.too_long += 1;
                    continue;
                }
                counts.truncated += 1;
            }
            list.push(example);
        }
        counts.used += list.len();
        if list.is_empty() {
            let (long, empty) = (counts.too_long - before.too_long, counts.empty - before.empty);
            let reason = format!(
                "no example is left of {} lines: {long} longer than {} positions, {empty} without anything to learn",
                counts.lines - before.lines,
                options.context
            );
            return Err(Error::file(path, reason));
        }
        Ok(list)
    }

    /// A number that changes with any token of any example, to recognise the data by.
    pub fn fingerprint(&self) -> u64 {
        let one = |hash: u64, e: &Example| {
            let tokens = e.ids.iter().zip(&e.learnt).map(|(id, learnt)| u64::from(*id) << 1 | u64::from(*learnt));
            tokens.fold(fnv(hash, e.ids.len() as u64), fnv)
        };
        let start = fnv(FNV_BASIS, self.train.len() as u64);
        self.train.iter().chain(&self.validation).fold(start, one)
    }
}
