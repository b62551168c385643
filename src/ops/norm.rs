//! RMSNorm and gated activations in f32, for what stands before a weight that is not ternary.

use super::{contiguous, no_gpu};
use crate::Result;
use crate::backend::Backend;
use crate::backend::cpu::Gate;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor};

/// `weight · x / sqrt(mean(x²) + eps)` for each token of f32 `x` `[…, cols]`.
///
/// # Errors
/// Of candle, if shapes or types do not fit.
pub fn rms_norm(backend: &Backend, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    Ok(x.contiguous()?.apply_op2_no_bwd(weight, &RmsNorm { backend, eps })?)
}

/// `act(gate) · up` of f32 `[…, gate | up]`: f32 `[…, cols]`.
///
/// # Errors
/// Of candle, if shapes or types do not fit.
pub fn gated(backend: &Backend, gate: Gate, gate_up: &Tensor) -> Result<Tensor> {
    Ok(gate_up.contiguous()?.apply_op1_no_bwd(&Gated { backend, gate })?)
}

struct RmsNorm<'a> {
    backend: &'a Backend,
    eps: f32,
}

impl CustomOp2 for RmsNorm<'_> {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = contiguous::<f32>(s1, l1)?;
        let mut out = vec![0.0; x.len()];
        self.backend.cpu().rms_norm(x, contiguous(s2, l2)?, self.eps, &mut out)?;
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    no_gpu!((s1, l1), (s2, l2));
}

struct Gated<'a> {
    backend: &'a Backend,
    gate: Gate,
}

impl CustomOp1 for Gated<'_> {
    fn name(&self) -> &'static str {
        "gated-activation"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = contiguous::<f32>(s, l)?;
        let mut dims = l.dims().to_vec();
        let cols = match dims.last_mut() {
            Some(last) => {
                *last /= 2;
                *last
            }
            None => candle_core::bail!("gated activation of a scalar"),
        };
        let mut out = vec![0.0; x.len() / 2];
        self.backend.cpu().gated(self.gate, x, cols, &mut out)?;
        Ok((CpuStorage::F32(out), Shape::from(dims)))
    }

    no_gpu!((s, l));
}
