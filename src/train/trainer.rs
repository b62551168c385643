//! The training loop: batches to gradients on all threads, gradients to steps, steps to metrics and saved states.
//!
//! A step's result is a function of the seed and the saved state alone: micro-batches run on any thread, but their
//! gradients are added in order, so the same bits come out whatever the number of threads, interrupted or not.

use super::decoder::{Batch, Decoder, Prepared, Regularization};
use super::optimizer::{AdamW, AdamWOptions};
use super::parameters::Parameters;
use super::schedule::Schedule;
use super::state::{self, Progress};
use crate::ops::grad::{self, Precision};
use crate::{Error, Result};
use candle_core::{Tensor, backprop::GradStore};
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Consecutive steps without a finite loss after which a run is given up.
pub const MAX_BAD_STEPS: u64 = 10;

/// Most steps of a run.
pub const MAX_STEPS: u64 = 1_000_000_000;

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

/// How a run goes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Optimization {
    /// Steps of the whole run.
    pub steps: u64,
    /// Peak of the learning rate.
    pub lr: f64,
    /// Steps over which it rises linearly from zero.
    pub warmup: u64,
    /// How it develops afterwards.
    pub schedule: Schedule,
    /// Decoupled weight decay of the ternary layers' masters.
    pub weight_decay: f64,
    /// AdamW's decay of the first moment.
    pub beta1: f64,
    /// AdamW's decay of the second moment.
    pub beta2: f64,
    /// AdamW's epsilon.
    pub eps: f64,
    /// Largest norm of the mean gradient.
    pub clip: f64,
    /// What the operands of matrix products are rounded to.
    pub precision: Precision,
    /// Dropout of the embedding and of what each layer adds to the residual stream.
    pub dropout: f32,
    /// Steps over which the quantisers are mixed in linearly; 0: from the start.
    pub lambda_warmup: u64,
    /// Whether to quantise at all; false trains a dense model of the same shape.
    pub quantize: bool,
    /// Steps from one validation to the next; 0: only at the end.
    pub eval_every: u64,
    /// Steps from one saved state to the next; 0: only at the end.
    pub save_every: u64,
    /// Validations without improvement after which the run stops; 0: never.
    pub patience: u64,
    /// Seed of everything random.
    pub seed: u64,
}

impl Default for Optimization {
    fn default() -> Self {
        let adamw = AdamWOptions::default();
        Self {
            steps: 1000,
            lr: 2e-3,
            warmup: 100,
            schedule: Schedule::TwoStage,
            weight_decay: 0.1,
            beta1: adamw.beta1,
            beta2: adamw.beta2,
            eps: adamw.eps,
            clip: adamw.clip,
            precision: Precision::F32,
            dropout: 0.0,
            lambda_warmup: 0,
            quantize: true,
            eval_every: 100,
            save_every: 100,
            patience: 0,
            seed: 0,
        }
    }
}

impl Optimization {
    /// # Errors
    /// [`Error::Request`] naming the setting that makes no sense.
    pub fn check(&self) -> Result<()> {
        let bad = |name: &str, value: &dyn std::fmt::Display, expected: &str| {
            Err(Error::request(name, format!("{value} is out of range: {expected}")))
        };
        let positive = |x: f64| x.is_finite() && x > 0.0;
        match self {
            s if !(1..=MAX_STEPS).contains(&s.steps) => bad("steps", &s.steps, "1 to 1000000000"),
            s if s.warmup > s.steps => bad("warmup", &s.warmup, "at most the number of steps"),
            s if !positive(s.lr) || s.lr > 10.0 => bad("lr", &s.lr, "above 0, at most 10"),
            s if !(0.0..=10.0).contains(&s.weight_decay) => bad("weight_decay", &s.weight_decay, "0 to 10"),
            s if !(0.0..1.0).contains(&s.beta1) => bad("beta1", &s.beta1, "0 to below 1"),
            s if !(0.0..1.0).contains(&s.beta2) => bad("beta2", &s.beta2, "0 to below 1"),
            s if !positive(s.eps) => bad("eps", &s.eps, "above 0"),
            s if !positive(s.clip) => bad("clip", &s.clip, "above 0"),
            s if !(0.0..1.0).contains(&s.dropout) => bad("dropout", &s.dropout, "0 to below 1"),
            // What is validated and exported is fully quantised, so the run must get there.
            s if s.lambda_warmup > s.steps => bad("lambda_warmup", &s.lambda_warmup, "at most the number of steps"),
            _ => Ok(()),
        }
    }

    fn adamw(&self) -> AdamWOptions {
        AdamWOptions { beta1: self.beta1, beta2: self.beta2, eps: self.eps, clip: self.clip }
    }

    /// The part by which the quantisers are mixed in when all is done: what a model is judged by.
    pub fn final_lambda(&self) -> f32 {
        if self.quantize { 1.0 } else { 0.0 }
    }

    /// The part by which the quantisers are mixed in at a step.
    pub fn lambda(&self, step: u64) -> f32 {
        match (self.quantize, self.lambda_warmup) {
            (false, _) => 0.0,
            (true, warmup) if step >= warmup => 1.0,
            (true, warmup) => (step as f64 / warmup as f64) as f32,
        }
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

/// A loss and its gradients.
type Sums = (f64, Vec<Tensor>);

/// Runs `work` for each index on `threads` threads and adds the results in the order of the indices.
fn in_order(threads: usize, count: usize, work: impl Fn(usize) -> Result<Sums> + Sync) -> Result<Option<Sums>> {
    struct Shared {
        next: usize,
        turn: usize,
        sums: Option<Sums>,
        error: Option<Error>,
    }
    let shared = Mutex::new(Shared { next: 0, turn: 0, sums: None, error: None });
    let turned = Condvar::new();
    let lock = || shared.lock().unwrap_or_else(PoisonError::into_inner);
    let add = |sums: &mut Option<Sums>, (loss, gradients): Sums| -> Result<()> {
        let Some((total, all)) = sums else {
            *sums = Some((loss, gradients));
            return Ok(());
        };
        *total += loss;
        for (sum, gradient) in all.iter_mut().zip(gradients) {
            *sum = grad::accumulate(sum, &gradient)?;
        }
        Ok(())
    };
    /// A worker that unwinds would leave the others waiting for its turn.
    struct OnPanic<'a>(&'a Mutex<Shared>, &'a Condvar);
    impl Drop for OnPanic<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                shared.error.get_or_insert_with(|| Error::Training("a worker panicked".into()));
                self.1.notify_all();
            }
        }
    }
    let worker = || {
        let _guard = OnPanic(&shared, &turned);
        loop {
            let index = {
                let mut s = lock();
                if s.error.is_some() || s.next == count {
                    return;
                }
                s.next += 1;
                s.next - 1
            };
            let result = work(index);
            let mut s = lock();
            while s.turn != index && s.error.is_none() {
                s = turned.wait(s).unwrap_or_else(PoisonError::into_inner);
            }
            if s.error.is_none() {
                let mut sums = s.sums.take();
                match result.and_then(|r| add(&mut sums, r)) {
                    Ok(()) => s.sums = sums,
                    Err(e) => s.error = Some(e),
                }
                s.turn += 1;
            }
            turned.notify_all();
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(count) {
            scope.spawn(worker);
        }
        worker();
    });
    let s = shared.into_inner().unwrap_or_else(PoisonError::into_inner);
    match s.error {
        Some(e) => Err(e),
        None => Ok(s.sums),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    #[test]
    fn results_are_added_in_order_and_failures_end_the_wait() {
        let delayed = |i: usize| {
            std::thread::sleep(Duration::from_millis(8 - i as u64));
            // Sums that depend on their order.
            let value = [1e8f32, 1.0, -1e8, 1.0, 3.0, 1e8, 0.5][i];
            Ok((f64::from(value), vec![Tensor::new(value, &candle_core::Device::Cpu)?]))
        };
        let sum = |threads| {
            let (loss, tensors) = in_order(threads, 7, delayed).unwrap().unwrap();
            (loss, tensors[0].to_scalar::<f32>().unwrap())
        };
        let one = sum(1);
        assert_eq!((sum(2), sum(3), sum(9)), (one, one, one));
        assert!(in_order(3, 0, delayed).unwrap().is_none());
        for threads in 1..5 {
            let failing = |i| if i == 2 { Err(Error::Training("two".into())) } else { delayed(i) };
            assert_eq!(in_order(threads, 7, failing).unwrap_err().to_string(), "training: two");
            let panicking = |i| if i == 2 { panic!("two") } else { delayed(i) };
            assert!(catch_unwind(AssertUnwindSafe(|| in_order(threads, 7, panicking).map(drop))).is_err());
        }
    }
}
