//! Operations with gradients, for training: the decoder's operations on f32 tensors, with straight-through quantisers.
//!
//! On a CPU each is one custom op whose `bwd` is written by hand; on other devices it is composed of candle's own
//! operations ([`composed`]), whose gradients candle derives. Tests hold one against the other.
//!
//! The `frozen_*` operations, [`low_rank`] and [`adapted_linear`] are for adapters: their forward pass runs inference's own
//! kernels on the stored weights, bit for bit, and only their input (and the adapter) has a gradient. They run on the CPU.

mod accumulate;
mod adapted;
mod attention;
pub mod composed;
mod dropout;
mod frozen;
mod frozen_attention;
mod frozen_head;
mod gated;
mod linear;
mod loss;
mod low_rank;
mod norm;
mod quantize;

pub use accumulate::accumulate;
pub use adapted::{Update, adapted_linear};
pub use attention::attention;
pub use dropout::dropout;
pub use frozen::{FrozenWeight, frozen_linear};
pub use frozen_attention::frozen_attention;
pub use frozen_head::frozen_cross_entropy;
pub use gated::gated;
pub use linear::{bit_linear, linear};
pub use loss::cross_entropy;
pub use low_rank::low_rank;
pub use norm::rms_norm;
pub use quantize::{fake_quantize, fake_ternary};

use super::contiguous;
use crate::backend::cpu::autograd;
use candle_core::{CpuStorage, DType, Result, Storage, Tensor};

/// What the operands of matrix products are rounded to on the CPU; sums are f32. Other devices compute in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Nothing.
    #[default]
    F32,
    /// bf16, scaled so that quantised operands are not rounded at all (mixed precision). Attention stays f32.
    BF16,
}

impl Precision {
    /// What is fastest here: bf16 if this CPU multiplies it.
    pub fn fastest() -> Self {
        if autograd::has_bf16_products() { Self::BF16 } else { Self::F32 }
    }
}

/// Calls `f` with the elements of f32 tensors on the CPU.
fn with_values<const N: usize, R>(tensors: [&Tensor; N], f: impl FnOnce([&[f32]; N]) -> Result<R>) -> Result<R> {
    let tensors = tensors.into_iter().map(Tensor::contiguous).collect::<Result<Vec<_>>>()?;
    let held: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let mut values: [&[f32]; N] = [&[]; N];
    for (values, (storage, layout)) in values.iter_mut().zip(&held) {
        *values = match &**storage {
            Storage::Cpu(cpu) => contiguous(cpu, layout)?,
            _ => candle_core::bail!("a gradient on another device than the CPU"),
        };
    }
    f(values)
}

/// A CPU tensor of the shape of `like`.
fn tensor_like(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, like.shape(), like.device())
}

/// What no op of this room does: it is only applied to tensors on the CPU.
fn f32_storage(values: Vec<f32>) -> CpuStorage {
    CpuStorage::F32(values)
}

fn require_f32(name: &str, tensor: &Tensor) -> Result<()> {
    match tensor.dtype() {
        DType::F32 => Ok(()),
        other => candle_core::bail!("{name}: {other:?} where f32 is expected"),
    }
}
