//! Activation quantisation, alone or fused with what comes before it.

use super::{contiguous, no_gpu};
use crate::Result;
use crate::backend::Backend;
use crate::backend::activation::{QuantizedRows, row_stride};
use crate::backend::cpu::Gate;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor};

/// Quantised activations on a device: U8 `[tokens, row_stride(cols)]` in the format of [`crate::backend::activation`].
#[derive(Debug, Clone)]
pub struct Quantized {
    rows: Tensor,
    cols: usize,
}

impl Quantized {
    /// The rows as stored.
    pub fn tensor(&self) -> &Tensor {
        &self.rows
    }

    /// Activations of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The activations that the codes stand for, `q / s_x`, f32 `[tokens, cols]` on the CPU.
    ///
    /// # Errors
    /// Of candle, if the rows cannot be copied to the host.
    pub fn dequantize(&self) -> Result<Tensor> {
        let bytes = self.rows.flatten_all()?.to_vec1::<u8>()?;
        let rows = QuantizedRows::new(&bytes, self.cols)?;
        let row = |t: usize| rows.codes(t)[..self.cols].iter().map(move |q| f32::from(*q) / rows.scale(t));
        let values: Vec<f32> = (0..rows.rows()).flat_map(row).collect();
        Ok(Tensor::from_vec(values, (rows.rows(), self.cols), &candle_core::Device::Cpu)?)
    }
}

/// Quantises each token of f32 `x` `[…, cols]`.
///
/// # Errors
/// Of candle, if `x` is not f32 or lies on another device than the backend's.
pub fn quantize(backend: &Backend, x: &Tensor) -> Result<Quantized> {
    let cols = x.dim(candle_core::D::Minus1)?;
    let op = Quantize { backend, cols, gate: None };
    Ok(Quantized { rows: x.contiguous()?.apply_op1_no_bwd(&op)?, cols })
}

/// RMSNorm with f32 `weight` `[cols]`, then quantisation, of each token of f32 `x` `[…, cols]`.
///
/// # Errors
/// Of candle, if shapes or types do not fit.
pub fn norm_quantize(backend: &Backend, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Quantized> {
    let cols = weight.elem_count();
    let op = NormQuantize { backend, cols, gate: None, eps };
    Ok(Quantized { rows: x.contiguous()?.apply_op2_no_bwd(weight, &op)?, cols })
}

/// The gated activation of f32 `[…, gate | up]` (2 · cols), RMSNorm if `norm` (weight, epsilon) is given, then
/// quantisation.
///
/// # Errors
/// Of candle, if shapes or types do not fit.
pub fn gated_quantize(
    backend: &Backend,
    gate: Gate,
    gate_up: &Tensor,
    norm: Option<(&Tensor, f32)>,
) -> Result<Quantized> {
    let cols = gate_up.dim(candle_core::D::Minus1)? / 2;
    let x = gate_up.contiguous()?;
    let rows = match norm {
        None => x.apply_op1_no_bwd(&Quantize { backend, cols, gate: Some(gate) })?,
        Some((weight, eps)) => x.apply_op2_no_bwd(weight, &NormQuantize { backend, cols, gate: Some(gate), eps })?,
    };
    Ok(Quantized { rows, cols })
}

/// Runs the fused quantiser on the CPU.
fn run(
    backend: &Backend,
    cols: usize,
    gate: Option<Gate>,
    x: &[f32],
    norm: Option<(&[f32], f32)>,
) -> candle_core::Result<(CpuStorage, Shape)> {
    let width = if gate.is_some() { 2 * cols } else { cols };
    let tokens = x.len() / width.max(1);
    let stride = row_stride(cols);
    let mut out = vec![0; tokens * stride];
    match gate {
        None => backend.cpu().quantize(x, cols, norm, &mut out)?,
        Some(gate) => backend.cpu().gated_quantize(gate, x, cols, norm, &mut out)?,
    }
    Ok((CpuStorage::U8(out), Shape::from((tokens, stride))))
}

struct Quantize<'a> {
    backend: &'a Backend,
    cols: usize,
    gate: Option<Gate>,
}

impl CustomOp1 for Quantize<'_> {
    fn name(&self) -> &'static str {
        "quantize"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        run(self.backend, self.cols, self.gate, contiguous(s, l)?, None)
    }

    no_gpu!((s, l));
}

struct NormQuantize<'a> {
    backend: &'a Backend,
    cols: usize,
    gate: Option<Gate>,
    eps: f32,
}

impl CustomOp2 for NormQuantize<'_> {
    fn name(&self) -> &'static str {
        "norm-quantize"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let norm = Some((contiguous(s2, l2)?, self.eps));
        run(self.backend, self.cols, self.gate, contiguous(s1, l1)?, norm)
    }

    no_gpu!((s1, l1), (s2, l2));
}
