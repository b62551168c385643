//! Straight-through quantisers (BitNet b1.58, arXiv 2402.17764; Bengio et al., arXiv 1308.3432): the forward pass sees
//! quantised values, the backward pass the identity.

use super::{composed, f32_storage, require_f32};
use crate::backend::cpu::autograd;
use crate::ops::contiguous;
use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result, Shape, Tensor};
use half::bf16;

/// `x + λ (Q(x) − x)` for each token of f32 `x` `[…, cols]`, where `Q` quantises to 8 bits by the absolute maximum and
/// back. The gradient passes unchanged.
///
/// # Errors
/// Of candle, if the type is not f32.
pub fn fake_quantize(x: &Tensor, lambda: f32) -> Result<Tensor> {
    if lambda == 0.0 {
        return Ok(x.clone());
    }
    if !x.device().is_cpu() {
        return composed::fake_quantize(x, lambda);
    }
    require_f32("activation quantiser", x)?;
    x.contiguous()?.apply_op1(Activations { lambda, cols: x.dim(D::Minus1)? })
}

/// `w + λ (Q(w) − w)` of a master weight `[out, in]`, f32 or bf16, as f32: `Q` quantises the weight's bf16 values to
/// three by their absolute mean, so that a checkpoint of bf16 masters holds exactly the codes that were trained. The
/// gradient passes unchanged, in the master's type.
///
/// # Errors
/// Of candle, for other types.
pub fn fake_ternary(master: &Tensor, lambda: f32) -> Result<Tensor> {
    if !master.device().is_cpu() {
        return composed::fake_ternary(master, lambda);
    }
    master.contiguous()?.apply_op1(Weights { lambda })
}

struct Activations {
    lambda: f32,
    cols: usize,
}

impl CustomOp1 for Activations {
    fn name(&self) -> &'static str {
        "fake-quantize"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = contiguous::<f32>(s, l)?;
        let mut out = vec![0.0; x.len()];
        autograd::fake_quantize(x, self.cols, self.lambda, &mut out);
        Ok((f32_storage(out), l.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(dy.clone()))
    }
}

struct Weights {
    lambda: f32,
}

impl CustomOp1 for Weights {
    fn name(&self) -> &'static str {
        "fake-ternary"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let rounded: Vec<f32> = match s {
            CpuStorage::BF16(_) => contiguous::<bf16>(s, l)?.iter().map(|w| w.to_f32()).collect(),
            CpuStorage::F32(_) => contiguous::<f32>(s, l)?.iter().map(|w| bf16::from_f32(*w).to_f32()).collect(),
            _ => candle_core::bail!("fake-ternary: masters are f32 or bf16"),
        };
        // A dense model's weights exactly, and not to within the rounding of the mixture.
        if self.lambda == 0.0 {
            return Ok((f32_storage(rounded), l.shape().clone()));
        }
        let scale = crate::ternary::absmean_scale(&rounded);
        let mut out = vec![0.0; rounded.len()];
        autograd::fake_ternary(&rounded, scale, self.lambda, &mut out);
        Ok((f32_storage(out), l.shape().clone()))
    }

    fn bwd(&self, master: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        match master.dtype() {
            DType::F32 => Ok(Some(dy.clone())),
            dtype => dy.to_dtype(dtype).map(Some),
        }
    }
}
