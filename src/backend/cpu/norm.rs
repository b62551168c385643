//! RMSNorm, the gated activations, and their fusion with the activation quantiser.

use super::isa::per_isa;
use super::lanes::{LANES, exp, round_to_int, sum_lanes};
use crate::backend::activation::{padded_cols, write_trailer};
use crate::ternary::{ACTIVATION_MAX, MIN_ABSMAX};

/// A gated activation of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// `relu(gate)² · up` (BitNet b1.58 2B-4T).
    Relu2,
    /// `silu(gate) · up` (Llama).
    Silu,
}

/// `1 / sqrt(mean(x²) + eps)`, in one fixed order of sums.
#[inline(always)]
pub(super) fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut acc = [0f32; LANES];
    for c in chunks {
        for i in 0..LANES {
            acc[i] += c[i] * c[i];
        }
    }
    for (a, v) in acc.iter_mut().zip(tail) {
        *a += v * v;
    }
    1.0 / (sum_lanes(acc) / x.len() as f32 + eps).sqrt()
}

#[inline(always)]
pub(super) fn absmax(x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut acc = [0f32; LANES];
    for c in chunks {
        for i in 0..LANES {
            let v = c[i].abs();
            acc[i] = if v > acc[i] { v } else { acc[i] };
        }
    }
    for (a, v) in acc.iter_mut().zip(tail) {
        *a = a.max(v.abs());
    }
    acc.iter().fold(0.0, |m, v| if *v > m { *v } else { m })
}

/// The quantiser of `ternary::quantize_activations`, into a row of the common format.
#[inline(always)]
fn quantize_row(x: &[f32], row: &mut [u8]) {
    let padded = padded_cols(x.len());
    let (codes, trailer) = row.split_at_mut(padded);
    let scale = ACTIVATION_MAX / absmax(x).max(MIN_ABSMAX);
    let mut sum = 0i32;
    for (q, x) in codes.iter_mut().zip(x) {
        // By comparisons that NaN fails, so that it becomes a code like any other: the residual stream still holds it,
        // and the sampler reports it.
        let v = x * scale;
        let v = if v > -ACTIVATION_MAX { v } else { -ACTIVATION_MAX };
        let v = round_to_int(if v < ACTIVATION_MAX { v } else { ACTIVATION_MAX });
        sum += v;
        *q = v as u8;
    }
    codes[x.len()..].fill(0);
    write_trailer(trailer, scale, sum);
}

per_isa! {
    /// `out = weight · (x / rms(x))`.
    pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let r = inverse_rms(x, eps);
        for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
            *o = w * (x * r);
        }
    }
}

per_isa! {
    /// Quantises `x` into a row of the common format.
    pub(super) fn quantize(x: &[f32], row: &mut [u8]) {
        quantize_row(x, row);
    }
}

per_isa! {
    /// RMSNorm, then quantise; `scratch` is as long as `x`.
    pub(super) fn norm_quantize(x: &[f32], weight: &[f32], eps: f32, scratch: &mut [f32], row: &mut [u8]) {
        let r = inverse_rms(x, eps);
        for ((o, x), w) in scratch.iter_mut().zip(x).zip(weight) {
            *o = w * (x * r);
        }
        quantize_row(scratch, row);
    }
}

/// `out = act(gate) · up`.
#[inline(always)]
pub(super) fn gate_row(gate: Gate, g: &[f32], up: &[f32], out: &mut [f32]) {
    match gate {
        Gate::Relu2 => {
            for ((o, g), u) in out.iter_mut().zip(g).zip(up) {
                // NaN stays NaN.
                let r = if *g < 0.0 { 0.0 } else { *g };
                *o = r * r * u;
            }
        }
        Gate::Silu => {
            for ((o, g), u) in out.iter_mut().zip(g).zip(up) {
                *o = g / (1.0 + exp(-g)) * u;
            }
        }
    }
}

per_isa! {
    /// As [`gate_row`].
    pub(super) fn gated(gate: Gate, g: &[f32], up: &[f32], out: &mut [f32]) {
        gate_row(gate, g, up, out);
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::*;
    use crate::backend::activation::{QuantizedRows, row_stride};
    use crate::ternary::quantize_activations;
    use proptest::prelude::*;

    fn values(n: usize) -> impl Strategy<Value = Vec<f32>> {
        let value = prop_oneof![4 => -3f32..3f32, 1 => -1e4f32..1e4f32, 1 => Just(0f32), 1 => -1e-6f32..1e-6f32];
        prop::collection::vec(value, n)
    }

    proptest! {
        #[test]
        fn every_width_quantises_as_the_definition(x in (1usize..200).prop_flat_map(values)) {
            let mut want = vec![0; x.len()];
            let (scale, sum) = quantize_activations(&x, &mut want);
            for isa in Isa::available() {
                let mut row = vec![9; row_stride(x.len())];
                quantize(isa, &x, &mut row);
                let rows = QuantizedRows::new(&row, x.len()).unwrap();
                prop_assert_eq!(&rows.codes(0)[..x.len()], &want[..]);
                prop_assert!(rows.codes(0)[x.len()..].iter().all(|q| *q == 0));
                prop_assert_eq!((rows.scale(0), rows.sum(0)), (scale, sum));
            }
        }

        #[test]
        fn norms_are_right_and_the_same_in_every_width(x in (1usize..200).prop_flat_map(values)) {
            let weight: Vec<f32> = (0..x.len()).map(|i| 0.5 + (i % 7) as f32).collect();
            let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / x.len() as f64;
            let mut first = None;
            for isa in Isa::available() {
                let mut out = vec![0.0; x.len()];
                rms_norm(isa, &x, &weight, 1e-5, &mut out);
                for ((o, x), w) in out.iter().zip(&x).zip(&weight) {
                    let want = f64::from(*w) * f64::from(*x) / (mean + 1e-5).sqrt();
                    prop_assert!((f64::from(*o) - want).abs() <= 1e-6 * want.abs() + 1e-30, "{} {}", o, want);
                }
                let (mut scratch, mut row) = (vec![0.0; x.len()], vec![0; row_stride(x.len())]);
                norm_quantize(isa, &x, &weight, 1e-5, &mut scratch, &mut row);
                let mut direct = vec![0; row.len()];
                quantize(isa, &out, &mut direct);
                prop_assert_eq!(&row, &direct);
                prop_assert_eq!(first.get_or_insert(row.clone()), &row);
            }
        }

        #[test]
        fn gates_follow_their_formulas(g in values(37), up in values(37)) {
            for gate in [Gate::Relu2, Gate::Silu] {
                let mut first = None;
                for isa in Isa::available() {
                    let mut out = vec![0.0; 37];
                    gated(isa, gate, &g, &up, &mut out);
                    for i in 0..37 {
                        let (g, u) = (f64::from(g[i]), f64::from(up[i]));
                        let want = match gate {
                            Gate::Relu2 => g.max(0.0).powi(2) * u,
                            Gate::Silu => g / (1.0 + (-g).exp()) * u,
                        };
                        prop_assert!((f64::from(out[i]) - want).abs() <= 1e-6 * want.abs() + 1e-30);
                    }
                    let bits: Vec<u32> = out.iter().map(|v| v.to_bits()).collect();
                    prop_assert_eq!(first.get_or_insert(bits.clone()), &bits);
                }
            }
        }
    }
}
