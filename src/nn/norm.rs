//! RMSNorm.

use crate::backend::Backend;
use crate::{Result, ops};
use candle_core::{Device, Tensor};

/// `weight · x / sqrt(mean(x²) + eps)` over the last dimension, in f32.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// A norm with `weight` `[cols]`.
    ///
    /// # Errors
    /// Of candle, if the device refuses the memory.
    pub fn new(weight: Vec<f32>, eps: f32, device: &Device) -> Result<Self> {
        let len = weight.len();
        Ok(Self { weight: Tensor::from_vec(weight, len, device)?, eps })
    }

    /// The weight, f32 `[cols]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The epsilon under the root.
    pub fn eps(&self) -> f32 {
        self.eps
    }

    /// Normalises f32 `x` `[tokens, cols]` into `out`, of the same shape.
    ///
    /// # Errors
    /// As [`ops::rms_norm`].
    pub fn forward(&self, backend: &Backend, x: &Tensor, out: &Tensor) -> Result<()> {
        ops::rms_norm(backend, x, &self.weight, self.eps, out)
    }

    /// The same in a tensor of its own, for layers that need the normalised input more than once.
    pub(super) fn normalised(&self, backend: &Backend, x: &Tensor) -> Result<Tensor> {
        let out = x.zeros_like()?;
        self.forward(backend, x, &out)?;
        Ok(out)
    }

    /// Weight and epsilon, as operations take them.
    pub(super) fn parts(&self) -> (&Tensor, f32) {
        (&self.weight, self.eps)
    }
}
