//! The trainable BitLinear, alone, for anybody's candle model.

use crate::Result;
use crate::ops::grad::{self, Precision};
use crate::ternary::PackedTernary;
use candle_core::{Module, Tensor, Var};

/// A linear layer that computes as BitNet b1.58 does (ternary weights by absmean, 8-bit activations by absmax) and trains
/// its master weight by straight-through gradients. With λ below 1 both quantisers are mixed in only by that part.
///
/// ```
/// use candle_bitnet::train::BitLinear;
/// use candle_core::{Device, Module, Tensor, Var};
///
/// let master = Var::randn(0f32, 0.1, (64, 128), &Device::Cpu)?;
/// let layer = BitLinear::new(master.clone());
/// let x = Tensor::randn(0f32, 1.0, (4, 128), &Device::Cpu)?;
/// let gradients = layer.forward(&x)?.sqr()?.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&master).map(Tensor::dims), Some(&[64, 128][..]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct BitLinear {
    master: Var,
    lambda: f32,
}

impl BitLinear {
    /// A layer with this master weight `[out, in]`, f32 or bf16, fully quantised (λ = 1).
    pub fn new(master: Var) -> Self {
        Self { master, lambda: 1.0 }
    }

    /// Mixes the quantisers in by `lambda`, from 0 (a plain linear layer) to 1.
    #[must_use]
    pub fn with_lambda(self, lambda: f32) -> Self {
        Self { lambda: lambda.clamp(0.0, 1.0), ..self }
    }

    /// The master weight.
    pub fn master(&self) -> &Var {
        &self.master
    }

    /// The weight as inference packs it.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if the master holds NaN or infinite values.
    pub fn packed(&self) -> Result<PackedTernary> {
        PackedTernary::quantize(&self.master.to_dtype(candle_core::DType::BF16)?)
    }
}

impl Module for BitLinear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let weight = grad::fake_ternary(&self.master, self.lambda)?;
        grad::bit_linear(x, &weight, self.lambda, Precision::F32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn lambda_goes_from_a_plain_linear_layer_to_a_quantised_one() {
        let master = Var::randn(0f32, 0.1, (8, 32), &Device::Cpu).unwrap();
        let x = Tensor::randn(0f32, 1.0, (3, 32), &Device::Cpu).unwrap();
        // The values that a bf16 checkpoint would hold are what is trained.
        let stored = master.to_dtype(candle_core::DType::BF16).unwrap().to_dtype(candle_core::DType::F32).unwrap();
        let plain = x.matmul(&stored.t().unwrap()).unwrap();
        let distance = |lambda: f32| {
            let y = BitLinear::new(master.clone()).with_lambda(lambda).forward(&x).unwrap();
            (y - &plain).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()
        };
        assert!(distance(0.0) < 1e-8 && distance(-1.0) < 1e-8, "{}", distance(0.0));
        assert!(distance(0.5) > 1e-4 && distance(1.0) > distance(0.5));
        assert_eq!(distance(1.0), distance(7.0));
    }
}
