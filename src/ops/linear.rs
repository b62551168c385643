//! The quantised linear.

use super::{Quantized, contiguous, no_gpu};
use crate::Result;
use crate::backend::activation::{QuantizedRows, row_stride};
use crate::backend::{Backend, TernaryWeight};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor};

/// `y[t] = W q[t] / s_x[t]`, scaled per stacked weight, plus f32 `residual` `[tokens, rows]` if given: f32
/// `[tokens, rows]`. Integer accumulators, bit-equal on every kernel.
///
/// # Errors
/// [`crate::Error::Layout`] for a weight packed for another kernel; of candle, if shapes do not fit.
pub fn linear(backend: &Backend, weight: &TernaryWeight, x: &Quantized, residual: Option<&Tensor>) -> Result<Tensor> {
    if x.cols() != weight.cols() {
        return Err(crate::Error::Shape {
            op: "quantized linear",
            reason: format!("weight has {} input features, the activations {}", weight.cols(), x.cols()),
        });
    }
    let op = Linear { backend, weight };
    Ok(match residual {
        None => x.tensor().apply_op1_no_bwd(&op)?,
        Some(residual) => x.tensor().apply_op2_no_bwd(&residual.contiguous()?, &op)?,
    })
}

struct Linear<'a> {
    backend: &'a Backend,
    weight: &'a TernaryWeight,
}

impl Linear<'_> {
    fn run(&self, rows: &[u8], residual: Option<&[f32]>) -> candle_core::Result<(CpuStorage, Shape)> {
        let TernaryWeight::Cpu(weight) = self.weight;
        let x = QuantizedRows::new(rows, weight.cols())?;
        let tokens = rows.len() / row_stride(weight.cols());
        let mut out = vec![0.0; tokens * weight.rows()];
        self.backend.cpu().linear(weight, &x, residual, &mut out)?;
        Ok((CpuStorage::F32(out), Shape::from((tokens, weight.rows()))))
    }
}

impl CustomOp1 for Linear<'_> {
    fn name(&self) -> &'static str {
        "quantized-linear"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.run(contiguous(s, l)?, None)
    }

    no_gpu!((s, l));
}

impl CustomOp2 for Linear<'_> {
    fn name(&self) -> &'static str {
        "quantized-linear-residual"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.run(contiguous(s1, l1)?, Some(contiguous(s2, l2)?))
    }

    no_gpu!((s1, l1), (s2, l2));
}
