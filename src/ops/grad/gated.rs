//! Gated activations with their gradient.

use super::{composed, f32_storage, require_f32, tensor_like, with_values};
use crate::backend::cpu::{Gate, autograd};
use crate::ops::contiguous;
use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};

/// `act(gate) · up` of f32 `[…, gate | up]`: f32 `[…, cols]`.
///
/// # Errors
/// Of candle, if the last dimension is odd or the type is not f32.
pub fn gated(gate: Gate, gate_up: &Tensor) -> Result<Tensor> {
    if !gate_up.device().is_cpu() {
        return composed::gated(gate, gate_up);
    }
    require_f32("gated activation", gate_up)?;
    let width = gate_up.dim(D::Minus1)?;
    if !width.is_multiple_of(2) {
        candle_core::bail!("gated activation: {width} is odd");
    }
    gate_up.contiguous()?.apply_op1(Gated { gate, cols: width / 2 })
}

struct Gated {
    gate: Gate,
    cols: usize,
}

impl CustomOp1 for Gated {
    fn name(&self) -> &'static str {
        "gated-activation-with-gradient"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = contiguous::<f32>(s, l)?;
        let mut out = vec![0.0; x.len() / 2];
        autograd::gated(self.gate, x, self.cols, &mut out);
        let mut dims = l.dims().to_vec();
        dims.iter_mut().next_back().into_iter().for_each(|last| *last = self.cols);
        Ok((f32_storage(out), Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let mut dx = vec![0.0; x.elem_count()];
        with_values([x, dy], |[x, dy]| {
            autograd::gated_backward(self.gate, x, self.cols, dy, &mut dx);
            Ok(())
        })?;
        tensor_like(dx, x).map(Some)
    }
}
