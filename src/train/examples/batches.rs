//! Examples to batches.

use super::{Example, Examples};
use crate::train::decoder::Batch;
use crate::train::trainer::Data;
use crate::{Error, Result};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use std::sync::{Mutex, PoisonError};

/// Batches of examples: every epoch shuffles them, so each is trained on once an epoch. A batch is a function of the seed
/// and the step alone. Examples of a micro-batch are padded at the end to the longest of them, which no other position
/// sees under causal attention.
#[derive(Debug)]
pub struct ExampleBatches {
    train: Vec<Example>,
    sequences: usize,
    micro: usize,
    seed: u64,
    validation: Vec<Batch>,
    /// Order of the epoch last asked for.
    order: Mutex<(u64, Vec<u32>)>,
}

impl ExampleBatches {
    /// `sequences` examples a step, `micro` at a time.
    ///
    /// # Errors
    /// [`Error::Request`] without training examples, or for numbers out of range.
    pub fn new(examples: Examples, sequences: usize, micro: usize, seed: u64) -> Result<Self> {
        let Examples { train, validation, .. } = examples;
        if train.is_empty() || u32::try_from(train.len()).is_err() {
            return Err(Error::request("examples", format!("{} are no data to train on", train.len())));
        }
        if sequences == 0 || micro == 0 || micro > sequences {
            let reason =
                format!("{micro} at a time of {sequences} a step: at least 1, and no more than those of a step");
            return Err(Error::request("batch", reason));
        }
        let validation = batches(validation.iter().collect(), micro);
        Ok(Self { train, sequences, micro, seed, validation, order: Mutex::new((u64::MAX, Vec::new())) })
    }

    /// Training examples.
    pub fn examples(&self) -> &[Example] {
        &self.train
    }

    /// The `index`-th example of the run.
    fn example(&self, index: u64) -> Option<&Example> {
        let count = self.train.len() as u64;
        let epoch = index / count;
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        if order.0 != epoch {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(epoch);
            let mut list: Vec<u32> = (0..count as u32).collect();
            list.shuffle(&mut rng);
            *order = (epoch, list);
        }
        self.train.get(*order.1.get((index % count) as usize)? as usize)
    }
}

/// Batches of `micro` examples of about one length, so that little is padded.
fn batches(mut examples: Vec<&Example>, micro: usize) -> Vec<Batch> {
    examples.sort_by_key(|e| e.ids.len());
    let batch = |examples: &[&Example]| {
        let length = examples.iter().map(|e| e.ids.len().saturating_sub(1)).max().unwrap_or(0);
        let mut batch = Batch { length, tokens: Vec::new(), targets: Vec::new() };
        for e in examples {
            let end = batch.tokens.len() + length;
            let next = e.ids.iter().zip(&e.learnt).skip(1);
            batch.targets.extend(next.map(|(id, learnt)| learnt.then_some(*id)));
            batch.targets.resize(end, None);
            batch.tokens.extend(e.ids.iter().take(e.ids.len().saturating_sub(1)));
            batch.tokens.resize(end, 0);
        }
        batch
    };
    examples.chunks(micro).map(batch).collect()
}

impl Data for ExampleBatches {
    fn micro_batches(&self, step: u64) -> Result<Vec<Batch>> {
        let first = step * self.sequences as u64;
        let examples = (first..first + self.sequences as u64).filter_map(|index| self.example(index)).collect();
        Ok(batches(examples, self.micro))
    }

    fn validation(&self) -> &[Batch] {
        &self.validation
    }

    /// Not known: answers end with tokens that stand for no text.
    fn validation_bytes(&self) -> usize {
        0
    }

    fn epochs(&self, steps: u64) -> f64 {
        steps as f64 * self.sequences as f64 / self.train.len() as f64
    }
}
