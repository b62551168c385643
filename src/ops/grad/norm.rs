//! RMSNorm with its gradients.

use super::{composed, f32_storage, require_f32, tensor_like, with_values};
use crate::backend::cpu::autograd;
use crate::ops::contiguous;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

/// `weight · x / sqrt(mean(x²) + eps)` over the last dimension of f32 `x`.
///
/// # Errors
/// Of candle, if shapes or types do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::rms_norm(x, weight, eps);
    }
    require_f32("rms-norm", x)?;
    if weight.dims() != [x.dim(candle_core::D::Minus1)?] {
        candle_core::bail!("rms-norm: weight {:?} for {:?}", weight.dims(), x.dims());
    }
    x.contiguous()?.apply_op2(weight, RmsNorm { eps })
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm-with-gradient"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = contiguous::<f32>(s1, l1)?;
        let mut out = vec![0.0; x.len()];
        autograd::rms_norm(x, contiguous(s2, l2)?, self.eps, &mut out);
        Ok((f32_storage(out), l1.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut dx, mut dweight) = (vec![0.0; x.elem_count()], vec![0.0; weight.elem_count()]);
        with_values([x, weight, dy], |[x, weight, dy]| {
            autograd::rms_norm_backward(x, weight, self.eps, dy, &mut dx, &mut dweight);
            Ok(())
        })?;
        Ok((Some(tensor_like(dx, x)?), Some(tensor_like(dweight, weight)?)))
    }
}
