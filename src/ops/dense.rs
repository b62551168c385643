//! Products with dense weights, and embedding rows.

use super::{contiguous, no_gpu};
use crate::Result;
use crate::backend::{Backend, DenseWeight};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

/// `y = x Wᵀ` in f32 for f32 `x` `[tokens, cols]` and a weight in its stored type: f32 `[tokens, rows]`.
///
/// # Errors
/// Of candle, if shapes or types do not fit.
pub fn dense_linear(backend: &Backend, weight: &DenseWeight, x: &Tensor) -> Result<Tensor> {
    Ok(x.contiguous()?.apply_op1_no_bwd(&DenseLinear { backend, weight })?)
}

/// Rows `ids` (U32 `[tokens]`) of an embedding, widened: f32 `[tokens, cols]`.
///
/// # Errors
/// [`crate::Error::Request`] for an id outside the vocabulary; of candle, if `ids` is not U32.
pub fn embed(backend: &Backend, weight: &DenseWeight, ids: &Tensor) -> Result<Tensor> {
    Ok(ids.contiguous()?.apply_op1_no_bwd(&Embed { backend, weight })?)
}

struct DenseLinear<'a> {
    backend: &'a Backend,
    weight: &'a DenseWeight,
}

impl CustomOp1 for DenseLinear<'_> {
    fn name(&self) -> &'static str {
        "dense-linear"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let DenseWeight::Cpu(weight) = self.weight;
        let x = contiguous::<f32>(s, l)?;
        let tokens = x.len() / weight.cols();
        let mut out = vec![0.0; tokens * weight.rows()];
        self.backend.cpu().dense_linear(weight, x, &mut out)?;
        Ok((CpuStorage::F32(out), Shape::from((tokens, weight.rows()))))
    }

    no_gpu!((s, l));
}

struct Embed<'a> {
    backend: &'a Backend,
    weight: &'a DenseWeight,
}

impl CustomOp1 for Embed<'_> {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let DenseWeight::Cpu(weight) = self.weight;
        let ids = contiguous::<u32>(s, l)?;
        let mut out = vec![0.0; ids.len() * weight.cols()];
        self.backend.cpu().embed(weight, ids, &mut out)?;
        Ok((CpuStorage::F32(out), Shape::from((ids.len(), weight.cols()))))
    }

    no_gpu!((s, l));
}
