//! Dropout whose mask is a function of a seed.

use super::{composed, f32_storage, require_f32, tensor_like, with_values};
use crate::backend::cpu::autograd;
use crate::ops::contiguous;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// Zeroes each value of f32 `x` with probability `p` and multiplies the others by `1 / (1 − p)`. The same seed gives the
/// same mask, on the CPU and on every other device.
///
/// # Errors
/// Of candle, if the type is not f32 or `p` is not in `[0, 1)`.
pub fn dropout(x: &Tensor, p: f32, seed: u64) -> Result<Tensor> {
    if !(0.0..1.0).contains(&p) {
        candle_core::bail!("dropout: {p} is not a probability below 1");
    }
    if p == 0.0 {
        return Ok(x.clone());
    }
    if !x.device().is_cpu() {
        return composed::dropout(x, p, seed);
    }
    require_f32("dropout", x)?;
    x.contiguous()?.apply_op1(Dropout { p, seed })
}

struct Dropout {
    p: f32,
    seed: u64,
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = contiguous::<f32>(s, l)?;
        let mut out = vec![0.0; x.len()];
        autograd::dropout(x, self.p, self.seed, &mut out);
        Ok((f32_storage(out), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let mut dx = vec![0.0; x.elem_count()];
        with_values([dy], |[dy]| {
            autograd::dropout(dy, self.p, self.seed, &mut dx);
            Ok(())
        })?;
        tensor_like(dx, x).map(Some)
    }
}
