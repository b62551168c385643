//! The training loop: batches to gradients on all threads, gradients to steps, steps to metrics and saved states.
//!
//! A step's result is a function of the seed and the saved state alone: micro-batches run on any thread, but their
//! gradients are added in order, so the same bits come out whatever the number of threads, interrupted or not.

use super::decoder::{Batch, Decoder, Prepared, Regularization};
use super::in_order::in_order;
use super::optimization::Optimization;
use super::optimizer::AdamW;
use super::parameters::Parameters;
use super::state::{self, Progress};
use crate::{Error, Result};
use candle_core::{Tensor, backprop::GradStore};
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

/// Consecutive steps without a finite loss after which a run is given up.
pub const MAX_BAD_STEPS: u64 = 10;

/// What a run trains: parameters to a loss with gradients.
pub trait Trainable: Sync {
    /// The weights as the forward pass sees them.
    type Prepared<'a>: Sync
    where
        Self: 'a;

    /// Computes them, once a step.
    ///
    /// # Errors
    /// If a parameter is missing.
    fn prepare<'a>(&'a self, parameters: &Parameters, lambda: f32) -> Result<Self::Prepared<'a>>;

    /// The loss of a batch, summed over its targets.
    ///
    /// # Errors
    /// If the batch does not fit the model.
    fn loss(prepared: &Self::Prepared<'_>, batch: &Batch, regularization: Regularization) -> Result<Tensor>;

    /// Gradients in a fixed order.
    ///
    /// # Errors
    /// Of candle.
    fn gradients(prepared: &Self::Prepared<'_>, store: GradStore) -> Result<Vec<Tensor>>;

    /// Such gradients, by parameter.
    ///
    /// # Errors
    /// Of candle.
    fn by_parameter(
        prepared: &Self::Prepared<'_>,
        gradients: &[Tensor],
        parameters: &Parameters,
    ) -> Result<Vec<Tensor>>;

    /// The same weights for scoring alone. The default keeps them as they are; without a variable among them nothing is
    /// computed or kept for gradients.
    fn frozen<'a>(prepared: Self::Prepared<'a>) -> Self::Prepared<'a>
    where
        Self: 'a,
    {
        prepared
    }
}

impl Trainable for Decoder {
    type Prepared<'a> = Prepared<'a>;

    fn prepare<'a>(&'a self, parameters: &Parameters, lambda: f32) -> Result<Prepared<'a>> {
        Decoder::prepare(self, parameters, lambda)
    }

    fn loss(prepared: &Prepared<'_>, batch: &Batch, regularization: Regularization) -> Result<Tensor> {
        prepared.loss(batch, regularization)
    }

    fn gradients(prepared: &Prepared<'_>, store: GradStore) -> Result<Vec<Tensor>> {
        prepared.gradients(store)
    }

    fn by_parameter(prepared: &Prepared<'_>, gradients: &[Tensor], parameters: &Parameters) -> Result<Vec<Tensor>> {
        prepared.by_parameter(gradients, parameters)
    }

    fn frozen<'a>(prepared: Prepared<'a>) -> Prepared<'a>
    where
        Self: 'a,
    {
        prepared.frozen()
    }
}

/// Where batches come from.
pub trait Data: Sync {
    /// The micro-batches of a step, a function of the step alone.
    ///
    /// # Errors
    /// If there are none.
    fn micro_batches(&self, step: u64) -> Result<Vec<Batch>>;

    /// The batches that validate; none if nothing was set apart.
    fn validation(&self) -> &[Batch];

    /// Bytes of text that the validation batches' targets stand for; 0 if that is not known.
    fn validation_bytes(&self) -> usize;

    /// How often `steps` steps see every example.
    fn epochs(&self, steps: u64) -> f64;

    /// A number that changes with the data, kept in the state so that a run is not continued with other data. `None`
    /// leaves that unchecked.
    fn fingerprint(&self) -> Option<u64> {
        None
    }
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepMetrics {
    /// Steps done, this one included.
    pub step: u64,
    /// Mean cross-entropy of its targets, nats.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Norm of the mean gradient before clipping.
    pub gradient_norm: f64,
    /// Targets seen since the run began.
    pub tokens: u64,
    /// Tokens of this step a second.
    pub tokens_per_second: f64,
}

/// What a validation found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Steps done.
    pub step: u64,
    /// Mean cross-entropy, nats a token.
    pub loss: f64,
    /// Bits a byte of text, where the bytes are known.
    pub bits_per_byte: Option<f64>,
    /// Whether it is the best so far.
    pub best: bool,
}

/// What happens during a run.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// A step was taken.
    Step(&'a StepMetrics),
    /// A step was skipped, because its loss or gradient was not finite.
    Skipped {
        /// Its number, from 1.
        step: u64,
        /// Its loss.
        loss: f64,
    },
    /// The validation texts were scored.
    Validated(&'a Validation),
    /// The state is on disk.
    Saved {
        /// Steps that it holds.
        step: u64,
    },
    /// The parameters are the best so far by validation. They go on changing in place: keep a [`Parameters::copied`].
    Best(&'a Parameters),
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps were taken.
    Finished,
    /// Validation did not improve any more.
    Stopped,
    /// The observer asked to stop; the state is saved.
    Interrupted,
}

/// A training run: model, data, optimiser and progress.
pub struct Trainer<'a, M: Trainable, D: Data> {
    model: &'a M,
    data: &'a D,
    optimization: Optimization,
    threads: usize,
    parameters: Parameters,
    optimizer: AdamW,
    progress: Progress,
}

impl<'a, M: Trainable, D: Data> Trainer<'a, M, D> {
    /// A run from its first step. The parameters are copied: training updates its own in place.
    ///
    /// # Errors
    /// [`Error::Request`] for settings out of range.
    pub fn new(
        model: &'a M,
        data: &'a D,
        parameters: Parameters,
        optimization: Optimization,
        threads: usize,
    ) -> Result<Self> {
        optimization.check()?;
        let parameters = parameters.copied()?;
        let optimizer = AdamW::new(&parameters, optimization.adamw())?;
        let progress = Progress { data: data.fingerprint(), ..Progress::default() };
        Ok(Self { model, data, optimization, threads: threads.max(1), parameters, optimizer, progress })
    }

    /// Continues from a saved state.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::File`] or [`Error::Tensor`] for a state that is missing, damaged or of another model;
    /// [`Error::Request`] if it was trained on other data.
    pub fn resume(mut self, path: &Path) -> Result<Self> {
        let (parameters, moments, mut progress) = state::load(path, &self.parameters)?;
        if let (Some(saved), Some(given)) = (progress.data, self.progress.data)
            && saved != given
        {
            let reason = format!(
                "not what {} was trained on: it was changed, or is another one; give the same data, or begin a new run \
                 in another directory",
                path.display()
            );
            return Err(Error::request("training data", reason));
        }
        progress.data = self.progress.data;
        self.optimizer = AdamW::resume(&parameters, self.optimization.adamw(), moments, progress.updates)?;
        self.parameters = parameters;
        self.progress = progress;
        Ok(self)
    }

    /// The parameters.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// How far the run is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Writes the state to a file, replacing the one before; complete or not at all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: &Path) -> Result<()> {
        state::save(path, &self.parameters, self.optimizer.moments(), &self.progress)
    }

    /// Runs to the last step, or until `observe` breaks. The state goes to `path` as the settings say and at the end. A
    /// run whose patience was exhausted before takes no further step.
    ///
    /// # Errors
    /// [`Error::Training`] if the loss stays NaN or infinite; [`Error::Io`] if the state cannot be written; those of the
    /// data.
    pub fn run(
        &mut self,
        path: Option<&Path>,
        observe: &mut dyn FnMut(Event<'_>) -> Result<ControlFlow<()>>,
    ) -> Result<Outcome> {
        let settings = self.optimization;
        let due = |every: u64, step: u64| step == settings.steps || (every > 0 && step.is_multiple_of(every));
        let exhausted = |p: &Progress| settings.patience > 0 && p.since_best >= settings.patience;
        if exhausted(&self.progress) && self.progress.step < settings.steps {
            return Ok(Outcome::Stopped);
        }
        let mut outcome = Outcome::Finished;
        while self.progress.step < settings.steps {
            let step = self.progress.step;
            let metrics = self.step(step)?;
            self.progress.step = step + 1;
            let mut flow = match metrics {
                Some(metrics) => observe(Event::Step(&metrics))?,
                None => observe(Event::Skipped { step: step + 1, loss: self.progress.last_loss })?,
            };
            if due(settings.eval_every, step + 1)
                && let Some(validation) = self.validate()?
            {
                if validation.best {
                    self.progress.best = Some(validation);
                    self.progress.since_best = 0;
                    if observe(Event::Best(&self.parameters))?.is_break() {
                        flow = ControlFlow::Break(());
                    }
                } else {
                    self.progress.since_best += 1;
                }
                if observe(Event::Validated(&validation))?.is_break() {
                    flow = ControlFlow::Break(());
                }
            }
            let exhausted = exhausted(&self.progress);
            let mut stop = flow.is_break() || exhausted;
            if let Some(path) = path
                && (stop || due(settings.save_every, step + 1))
            {
                self.save(path)?;
                stop |= observe(Event::Saved { step: step + 1 })?.is_break();
            }
            if stop && self.progress.step < settings.steps {
                outcome = if exhausted { Outcome::Stopped } else { Outcome::Interrupted };
                break;
            }
        }
        Ok(outcome)
    }

    /// One optimiser step; `None` if its loss or gradient was not finite and nothing was changed.
    fn step(&mut self, step: u64) -> Result<Option<StepMetrics>> {
        let begun = Instant::now();
        let s = self.optimization;
        let batches = self.data.micro_batches(step)?;
        let count: usize = batches.iter().map(Batch::counted).sum();
        let prepared = self.model.prepare(&self.parameters, s.lambda(step))?;
        let seeds = |i: usize| Regularization {
            dropout: s.dropout,
            seed: (s.seed ^ (step << 16) ^ i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        };
        let sums = in_order(self.threads, batches.len(), |i| {
            let loss = M::loss(&prepared, &batches[i], seeds(i))?;
            let value = f64::from(loss.to_scalar::<f32>()?);
            Ok((value, M::gradients(&prepared, loss.backward()?)?))
        })?;
        let Some((loss, gradients)) = sums else {
            return Err(Error::request("batch", "a step without examples"));
        };
        let gradients = M::by_parameter(&prepared, &gradients, &self.parameters)?;
        let loss = loss / count.max(1) as f64;
        let (lr, weight_decay) = s.schedule.at(step, s.steps, s.warmup, s.lr, s.weight_decay);
        let norm = match loss.is_finite() && count > 0 {
            true => self.optimizer.step(&mut self.parameters, &gradients, count, lr, weight_decay, s.seed)?,
            false => f64::NAN,
        };
        self.progress.last_loss = loss;
        if !norm.is_finite() {
            self.progress.skipped += 1;
            self.progress.bad_in_a_row += 1;
            if self.progress.bad_in_a_row >= MAX_BAD_STEPS {
                return Err(Error::Training(format!(
                    "no finite loss in {MAX_BAD_STEPS} steps in a row (step {}, loss {loss}); continue from the saved \
                     state with a smaller learning rate or a longer warm-up, and check the text",
                    step + 1
                )));
            }
            return Ok(None);
        }
        self.progress.bad_in_a_row = 0;
        self.progress.updates = self.optimizer.steps();
        self.progress.tokens += count as u64;
        let elapsed = begun.elapsed().max(Duration::from_nanos(1));
        self.progress.seconds += elapsed.as_secs_f64();
        Ok(Some(StepMetrics {
            step: step + 1,
            loss,
            lr,
            gradient_norm: norm,
            tokens: self.progress.tokens,
            tokens_per_second: count as f64 / elapsed.as_secs_f64(),
        }))
    }

    /// Scores the validation batches, quantised as inference is; `None` if there are none.
    ///
    /// # Errors
    /// Of candle.
    pub fn validate(&self) -> Result<Option<Validation>> {
        let batches = self.data.validation();
        let count: usize = batches.iter().map(Batch::counted).sum();
        if count == 0 {
            return Ok(None);
        }
        let lambda = self.optimization.final_lambda();
        let nats = total_loss(self.model, &self.parameters, lambda, batches, self.threads)?;
        let bytes = self.data.validation_bytes();
        let loss = nats / count as f64;
        Ok(Some(Validation {
            step: self.progress.step,
            loss,
            bits_per_byte: (bytes > 0).then(|| nats / std::f64::consts::LN_2 / bytes as f64),
            best: loss.is_finite() && self.progress.best.is_none_or(|best| loss < best.loss),
        }))
    }
}

/// The cross-entropy of all targets of these batches, nats, without dropout and gradients' use.
///
/// # Errors
/// If a batch does not fit the model.
pub fn total_loss<M: Trainable>(
    model: &M,
    parameters: &Parameters,
    lambda: f32,
    batches: &[Batch],
    threads: usize,
) -> Result<f64> {
    let prepared = M::frozen(model.prepare(parameters, lambda)?);
    let sums = in_order(threads, batches.len(), |i| {
        let loss = M::loss(&prepared, &batches[i], Regularization::default())?;
        Ok((f64::from(loss.to_scalar::<f32>()?), Vec::new()))
    })?;
    Ok(sums.map_or(f64::NAN, |(loss, _)| loss))
}
