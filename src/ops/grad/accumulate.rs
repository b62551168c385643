//! Sums of gradients, in place where that is possible.

use crate::backend::cpu::autograd;
use crate::ops::{contiguous, contiguous_mut};
use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor};

/// `sum + gradient`. On the CPU it is `sum` itself that changes, so nothing else may use it: gradients as
/// `Tensor::backward` returns them are.
///
/// # Errors
/// Of candle, if shapes or types differ.
pub fn accumulate(sum: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let plain = |t: &Tensor| t.device().is_cpu() && t.dtype() == DType::F32 && t.is_contiguous();
    if sum.shape() != gradient.shape() || !plain(sum) || !plain(gradient) {
        return sum + gradient;
    }
    sum.inplace_op2(gradient, &Accumulate)?;
    Ok(sum.clone())
}

struct Accumulate;

impl InplaceOp2 for Accumulate {
    fn name(&self) -> &'static str {
        "accumulate"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let CpuStorage::F32(sum) = s1 else { candle_core::bail!("a gradient that is not f32") };
        autograd::add(contiguous_mut(sum, l1)?, contiguous(s2, l2)?);
        Ok(())
    }
}
