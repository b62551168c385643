//! The settings of a run: steps, learning rate, regularisation, quantisation.

use super::optimizer::AdamWOptions;
use super::schedule::Schedule;
use crate::ops::grad::Precision;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Most steps of a run.
pub const MAX_STEPS: u64 = 1_000_000_000;

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

    pub(super) fn adamw(&self) -> AdamWOptions {
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
