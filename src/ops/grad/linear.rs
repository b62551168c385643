//! The linear layer with its gradients, plain and with the activation quantiser inside.

use super::{Precision, composed, f32_storage, require_f32, tensor_like, with_values};
use crate::backend::cpu::autograd::{self, Epilogue, Matrix, Operand, matmul, matmul_bf16};
use crate::ops::contiguous;
use crate::ternary::ACTIVATION_MAX;
use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor};

/// `x · wᵀ` of f32 `x` `[…, in]` and `w` `[out, in]`: `[…, out]`.
///
/// # Errors
/// Of candle, if shapes or types do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, precision: Precision) -> Result<Tensor> {
    apply(x, weight, None, precision)
}

/// `fake_quantize(x, λ) · wᵀ`: BitLinear's product, with `weight` `[out, in]` as [`super::fake_ternary`] gives it. The
/// gradient reaches `x` through the effective weight and the weight through the quantised activations (straight-through).
///
/// # Errors
/// Of candle, if shapes or types do not fit.
pub fn bit_linear(x: &Tensor, weight: &Tensor, lambda: f32, precision: Precision) -> Result<Tensor> {
    apply(x, weight, Some(lambda), precision)
}

fn apply(x: &Tensor, weight: &Tensor, lambda: Option<f32>, precision: Precision) -> Result<Tensor> {
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
    x.contiguous()?.apply_op2(&weight.contiguous()?, Linear { outputs, inputs, lambda, precision })
}

struct Linear {
    outputs: usize,
    inputs: usize,
    lambda: Option<f32>,
    precision: Precision,
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

/// Factors that make the rows of a quantised operand its integer codes, and their inverses. Rounding to bf16 then changes
/// nothing; rows that are not quantised keep bf16's relative precision.
struct RowFactors {
    factors: Vec<f32>,
    inverses: Vec<f32>,
}

impl RowFactors {
    /// So that each row's absolute maximum becomes `largest`; zero rows stay as they are.
    fn new(x: &[f32], cols: usize, largest: f32) -> Self {
        let inverses: Vec<f32> = autograd::row_absmax(x, cols)
            .into_iter()
            .map(|max| if max.is_normal() { max / largest } else { 1.0 })
            .collect();
        Self { factors: inverses.iter().map(|f| 1.0 / f).collect(), inverses }
    }
}

impl Linear {
    /// `y = x · wᵀ` of what is multiplied.
    fn forward(&self, x: &[f32], w: &[f32], tokens: usize, out: &mut [f32]) -> crate::Result<()> {
        let (n, k) = (self.outputs, self.inputs);
        let (a, b) = (Matrix::new(x, tokens, k, k)?, Matrix::new(w, n, k, k)?);
        if self.precision == Precision::F32 {
            return matmul(a, b.t(), 1.0, out, n, false);
        }
        let (x, w) = (RowFactors::new(x, k, ACTIVATION_MAX), RowFactors::new(w, k, 1.0));
        let epilogue = Epilogue { row_factors: Some(&x.inverses), col_factors: Some(&w.inverses), accumulate: false };
        matmul_bf16(Operand::new(a).rows(&x.factors), Operand::new(b).rows(&w.factors).t(), epilogue, out, n)
    }

    /// `dx = dy · w`.
    fn input_gradient(&self, dy: &[f32], w: &[f32], tokens: usize, dx: &mut [f32]) -> crate::Result<()> {
        let (n, k) = (self.outputs, self.inputs);
        let (a, b) = (Matrix::new(dy, tokens, n, n)?, Matrix::new(w, n, k, k)?);
        if self.precision == Precision::F32 {
            return matmul(a, b, 1.0, dx, k, false);
        }
        let w = RowFactors::new(w, k, 1.0);
        let (a, b) = (Operand::new(a).cols(&w.inverses), Operand::new(b).rows(&w.factors));
        matmul_bf16(a, b, Epilogue::default(), dx, k)
    }

    /// `dw = dyᵀ · x` of what was multiplied.
    fn weight_gradient(&self, dy: &[f32], x: &[f32], tokens: usize, dw: &mut [f32]) -> crate::Result<()> {
        let (n, k) = (self.outputs, self.inputs);
        let (a, b) = (Matrix::new(dy, tokens, n, n)?, Matrix::new(x, tokens, k, k)?);
        if self.precision == Precision::F32 {
            return matmul(a.t(), b, 1.0, dw, k, false);
        }
        let x = RowFactors::new(x, k, ACTIVATION_MAX);
        let (a, b) = (Operand::new(a).rows(&x.inverses).t(), Operand::new(b).rows(&x.factors));
        matmul_bf16(a, b, Epilogue::default(), dw, k)
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear-with-gradient"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (contiguous::<f32>(s1, l1)?, contiguous::<f32>(s2, l2)?);
        let tokens = x.len() / self.inputs;
        let mut out = vec![0.0; tokens * self.outputs];
        self.with_inputs(x, |x| Ok(self.forward(x, w, tokens, &mut out)?))?;
        let mut dims = l1.dims().to_vec();
        dims.iter_mut().next_back().into_iter().for_each(|last| *last = self.outputs);
        Ok((f32_storage(out), Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let tokens = x.elem_count() / self.inputs;
        with_values([x, weight, dy], |[xs, w, dy]| {
            let dx = match x.track_op() {
                false => None,
                true => {
                    let mut dx = vec![0.0; x.elem_count()];
                    self.input_gradient(dy, w, tokens, &mut dx)?;
                    Some(tensor_like(dx, x)?)
                }
            };
            let dw = match weight.track_op() {
                false => None,
                true => {
                    let mut dw = vec![0.0; weight.elem_count()];
                    self.with_inputs(xs, |xs| Ok(self.weight_gradient(dy, xs, tokens, &mut dw)?))?;
                    Some(tensor_like(dw, weight)?)
                }
            };
            Ok((dx, dw))
        })
    }
}
