//! BitLinear alone, for anybody's candle model.

use crate::backend::{Arrangement, Backend, TernaryWeight};
use crate::ops::Output;
use crate::ternary::PackedTernary;
use crate::{Result, ops};
use candle_core::{D, DType, Device, Module, Tensor};
use std::sync::Arc;

/// A ternary linear layer with 8-bit activations: `y = W · quantise(x)`, no bias.
///
/// `x` may have any leading dimensions and be f32, bf16 or f16; the result has the type of `x`. Inference only:
/// no gradient flows through it.
///
/// ```
/// use candle_bitnet::{nn::BitLinear, ternary::PackedTernary};
/// use candle_core::{Device, Module, Tensor};
///
/// let device = Device::Cpu;
/// let weight = Tensor::randn(0f32, 0.02, (64, 128), &device)?;
/// let layer = BitLinear::new(PackedTernary::quantize(&weight)?, &device)?;
/// let y = layer.forward(&Tensor::randn(0f32, 1.0, (2, 5, 128), &device)?)?;
/// assert_eq!(y.dims(), [2, 5, 64]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct BitLinear {
    backend: Backend,
    weight: Arc<TernaryWeight>,
}

impl BitLinear {
    /// Packs `weight` for the kernel of `device`.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] for a device without kernels in this build; as [`Backend::pack`].
    pub fn new(weight: PackedTernary, device: &Device) -> Result<Self> {
        Self::with_backend(weight, &Backend::for_device(device)?)
    }

    /// Packs `weight` for a backend whose kernel and threads were chosen before.
    ///
    /// # Errors
    /// As [`Backend::pack`].
    pub fn with_backend(weight: PackedTernary, backend: &Backend) -> Result<Self> {
        let weight = Arc::new(backend.pack(&[weight], Arrangement::Stacked)?);
        Ok(Self { backend: backend.clone(), weight })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.weight.rows()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.weight.cols()
    }
}

impl Module for BitLinear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut dims = x.dims().to_vec();
        let Some(last) = dims.last_mut().filter(|d| **d == self.cols()) else {
            candle_core::bail!("BitLinear: input {:?}, expected {} features last", x.dims(), self.cols());
        };
        *last = self.rows();
        if x.elem_count() == 0 {
            return Tensor::zeros(dims, x.dtype(), x.device());
        }
        let flat = x.to_dtype(DType::F32)?.reshape(((), x.dim(D::Minus1)?))?;
        let out = Tensor::zeros((flat.dim(0)?, self.rows()), DType::F32, x.device())?;
        ops::norm_linear(&self.backend, &self.weight, &flat, None, Output::replace(&out))?;
        out.reshape(dims)?.to_dtype(x.dtype())
    }
}
