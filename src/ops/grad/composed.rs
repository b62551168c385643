//! The same operations composed of candle's own, with the gradients that candle derives: what runs on devices other than
//! the CPU, and what the custom ops are tested against.

use crate::backend::attention::{AttentionShape, RopeTable};
use crate::backend::cpu::{Gate, autograd};
use crate::ternary::{ACTIVATION_MAX, MIN_ABSMAX};
use candle_core::{D, DType, Device, Result, Tensor};
use std::sync::Arc;

/// As [`super::rms_norm`].
///
/// # Errors
/// Of candle.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)?.broadcast_mul(weight)
}

/// As [`super::linear`].
///
/// # Errors
/// Of candle.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    let (outputs, inputs) = weight.dims2()?;
    dims.iter_mut().next_back().into_iter().for_each(|last| *last = outputs);
    x.reshape(((), inputs))?.matmul(&weight.t()?)?.reshape(dims)
}

/// As [`super::gated`].
///
/// # Errors
/// Of candle.
pub fn gated(gate: Gate, gate_up: &Tensor) -> Result<Tensor> {
    let cols = gate_up.dim(D::Minus1)? / 2;
    let (g, up) = (gate_up.narrow(D::Minus1, 0, cols)?, gate_up.narrow(D::Minus1, cols, cols)?);
    match gate {
        Gate::Relu2 => g.relu()?.sqr()?.mul(&up),
        Gate::Silu => g.contiguous()?.silu()?.mul(&up),
    }
}

/// Rounds half to even; candle's own `round` takes halves away from zero.
fn round_half_even(x: &Tensor) -> Result<Tensor> {
    const ROUND: f64 = 12_582_912.0;
    (x + ROUND)? - ROUND
}

/// `plain + λ (quantized − plain)` with the gradient of `x`, of which `plain` holds the values.
fn straight_through(x: &Tensor, plain: &Tensor, quantized: &Tensor, lambda: f32) -> Result<Tensor> {
    // (x − x) + …, so that the values are exactly those of the ends at λ = 0 and 1.
    let values = match lambda {
        0.0 => plain.clone(),
        1.0 => quantized.clone(),
        _ => (quantized + ((plain - quantized)? * f64::from(1.0 - lambda))?)?,
    };
    (x - x.detach())? + values
}

/// As [`super::fake_quantize`].
///
/// # Errors
/// Of candle.
pub fn fake_quantize(x: &Tensor, lambda: f32) -> Result<Tensor> {
    let plain = x.detach();
    let absmax = plain.abs()?.max_keepdim(D::Minus1)?.maximum(f64::from(MIN_ABSMAX))?;
    let scale = (absmax.ones_like()? * f64::from(ACTIVATION_MAX))?.div(&absmax)?;
    let limit = f64::from(ACTIVATION_MAX);
    let q = round_half_even(&plain.broadcast_mul(&scale)?.clamp(-limit, limit)?)?.broadcast_div(&scale)?;
    straight_through(x, &plain, &q, lambda)
}

/// As [`super::fake_ternary`].
///
/// # Errors
/// Of candle.
pub fn fake_ternary(master: &Tensor, lambda: f32) -> Result<Tensor> {
    let x = master.to_dtype(DType::F32)?;
    let rounded = x.detach().to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
    let magnitudes = rounded.abs()?;
    // The mean that loading takes is exact to f32; Metal has no f64, so a value at the edge between two codes can fall
    // to the other side there.
    let mean = match x.device() {
        Device::Metal(_) => magnitudes.mean_all()?.to_scalar::<f32>()?,
        _ => (magnitudes.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()? / x.elem_count() as f64) as f32,
    };
    let s = 1.0 / mean.max(1e-5);
    let q = (round_half_even(&(&rounded * f64::from(s))?.clamp(-1.0, 1.0)?)? * f64::from(1.0 / s))?;
    straight_through(&x, &rounded, &q, lambda)
}

/// As [`super::dropout`].
///
/// # Errors
/// Of candle.
pub fn dropout(x: &Tensor, p: f32, seed: u64) -> Result<Tensor> {
    let mut mask = vec![0.0; x.elem_count()];
    autograd::dropout(&vec![1.0; x.elem_count()], p, seed, &mut mask);
    x.mul(&Tensor::from_vec(mask, x.shape(), x.device())?)
}

/// As [`super::attention`].
///
/// # Errors
/// Of candle.
pub fn attention(qkv: &Tensor, shape: AttentionShape, rope: &Arc<RopeTable>) -> Result<Tensor> {
    let (sequences, length, _) = qkv.dims3()?;
    let (dim, half, device) = (shape.head_dim, shape.head_dim / 2, qkv.device());
    let (cos, sin) = rope.tables();
    let table = |t: &[f32]| Tensor::from_slice(&t[..length * half], (1, length, 1, half), device);
    let (cos, sin) = (table(cos)?, table(sin)?);
    let part = |first: usize, heads: usize| {
        qkv.narrow(2, first * dim, heads * dim)?.contiguous()?.reshape((sequences, length, heads, dim))
    };
    let rotate = |x: Tensor| -> Result<Tensor> {
        let (a, b) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
        let low = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let high = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::cat(&[low, high], 3)?.transpose(1, 2)?.contiguous()
    };
    // Query heads of a group share their KV head.
    let shared = |x: Tensor| -> Result<Tensor> {
        let group = shape.group();
        let grown = x.unsqueeze(2)?.broadcast_as((sequences, shape.kv_heads, group, length, dim))?;
        grown.contiguous()?.reshape((sequences, shape.heads, length, dim))
    };
    let q = rotate(part(0, shape.heads)?)?;
    let k = shared(rotate(part(shape.heads, shape.kv_heads)?)?)?;
    let v = shared(part(shape.heads + shape.kv_heads, shape.kv_heads)?.transpose(1, 2)?.contiguous()?)?;
    let mask: Vec<f32> =
        (0..length * length).map(|i| if i % length > i / length { f32::NEG_INFINITY } else { 0.0 }).collect();
    let mask = Tensor::from_vec(mask, (length, length), device)?;
    let scores = (q.matmul(&k.t()?)? * f64::from(shape.scale()))?.broadcast_add(&mask)?;
    let scores = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let p = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?;
    p.matmul(&v)?.transpose(1, 2)?.contiguous()?.reshape((sequences, length, shape.heads * dim))
}

/// As [`super::cross_entropy`].
///
/// # Errors
/// Of candle.
pub fn cross_entropy(hidden: &Tensor, head: &Tensor, targets: &[Option<u32>]) -> Result<Tensor> {
    let logits = linear(hidden, head)?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let ids: Vec<u32> = targets.iter().map(|t| t.unwrap_or(0)).collect();
    let counts: Vec<f32> = targets.iter().map(|t| if t.is_some() { 1.0 } else { 0.0 }).collect();
    let (rows, device) = (targets.len(), hidden.device());
    let picked = shifted.gather(&Tensor::from_vec(ids, (rows, 1), device)?, 1)?;
    ((log_sum - picked)? * Tensor::from_vec(counts, (rows, 1), device)?)?.sum_all()
}
