//! The linear layer with its gradients, plain and with the activation quantiser inside.

use super::{composed, f32_storage, require_f32, tensor_like, with_values};
use crate::backend::cpu::autograd::{self, Matrix, matmul};
use crate::ops::contiguous;
use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor};

/// `x · wᵀ` of f32 `x` `[…, in]` and `w` `[out, in]`: `[…, out]`.
///
/// # Errors
/// Of candle, if shapes or types do not fit.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    apply(x, weight, None)
}

/// `fake_quantize(x, λ) · wᵀ`: BitLinear's product, with `weight` `[out, in]` as [`super::fake_ternary`] gives it. The
/// gradient reaches `x` through the effective weight and the weight through the quantised activations (straight-through).
///
/// # Errors
/// Of candle, if shapes or types do not fit.
pub fn bit_linear(x: &Tensor, weight: &Tensor, lambda: f32) -> Result<Tensor> {
    apply(x, weight, Some(lambda))
}

fn apply(x: &Tensor, weight: &Tensor, lambda: Option<f32>) -> Result<Tensor> {
    if !x.device().is_cpu() {
        let x = lambda.map_or_else(|| Ok(x.clone()), |lambda| composed::fake_quantize(x, lambda))?;
        return composed::linear(&x, weight);
    }
    require_f32("linear", x)?;
    require_f32("linear", weight)?;
    let (outputs, inputs) = weight.dims2()?;
    if x.dim(D::Minus1)? != inputs || x.elem_count() == 0 {
        candle_core::bail!("linear: input {:?} for a weight {:?}", x.dims(), weight.dims());
    }
    x.contiguous()?.apply_op2(&weight.contiguous()?, Linear { outputs, inputs, lambda })
}

struct Linear {
    outputs: usize,
    inputs: usize,
    lambda: Option<f32>,
}

impl Linear {
    /// Calls `f` with what is multiplied: `x`, or its quantised values. Those are computed again in the backward pass,
    /// which costs less than keeping them.
    fn with_inputs<R>(&self, x: &[f32], f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
        match self.lambda {
            None | Some(0.0) => f(x),
            Some(lambda) => {
                let mut q = vec![0.0; x.len()];
                autograd::fake_quantize(x, self.inputs, lambda, &mut q);
                f(&q)
            }
        }
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear-with-gradient"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (contiguous::<f32>(s1, l1)?, contiguous::<f32>(s2, l2)?);
        let (n, k) = (self.outputs, self.inputs);
        let tokens = x.len() / k;
        let mut out = vec![0.0; tokens * n];
        self.with_inputs(x, |x| {
            Ok(matmul(Matrix::new(x, tokens, k, k)?, Matrix::new(w, n, k, k)?.t(), 1.0, &mut out, n, false)?)
        })?;
        let mut dims = l1.dims().to_vec();
        dims.iter_mut().next_back().into_iter().for_each(|last| *last = n);
        Ok((f32_storage(out), Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (n, k) = (self.outputs, self.inputs);
        let tokens = x.elem_count() / k;
        with_values(dy, |dy| {
            let dy = Matrix::new(dy, tokens, n, n)?;
            let dx = match needs_gradient(x) {
                false => None,
                true => with_values(weight, |w| {
                    let mut dx = vec![0.0; tokens * k];
                    matmul(dy, Matrix::new(w, n, k, k)?, 1.0, &mut dx, k, false)?;
                    tensor_like(dx, x).map(Some)
                })?,
            };
            let dw = match needs_gradient(weight) {
                false => None,
                true => with_values(x, |xs| {
                    let mut dw = vec![0.0; n * k];
                    self.with_inputs(xs, |xs| {
                        Ok(matmul(dy.t(), Matrix::new(xs, tokens, k, k)?, 1.0, &mut dw, k, false)?)
                    })?;
                    tensor_like(dw, weight).map(Some)
                })?,
            };
            Ok((dx, dw))
        })
    }
}

/// Whether candle will ask for this tensor's gradient.
fn needs_gradient(tensor: &Tensor) -> bool {
    tensor.track_op()
}
