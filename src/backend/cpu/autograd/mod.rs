//! What training adds to the CPU: backward passes, quantisers that keep f32, the optimiser's update.
//!
//! Each function runs on the calling thread, since training runs one micro-batch a thread, and gives the same bits on
//! every vector width.

mod attention;
mod gemm;
mod mixed;
mod speed;

pub use attention::{attention, attention_backward};
pub use gemm::{Matrix, matmul};
pub use mixed::{Epilogue, Operand, has_bf16_products, matmul_bf16};
pub use speed::product_gflops;

use super::Gate;
use super::isa::{Isa, per_isa};
use super::lanes::{LANES, exp, round_small, sum_lanes};
use super::norm;
use crate::ternary::{ACTIVATION_MAX, MIN_ABSMAX};
use half::bf16;

/// `out = weight · x / sqrt(mean(x²) + eps)` for rows of `weight.len()` values.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let cols = weight.len().max(1);
    for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
        norm::rms_norm(Isa::best(), x, weight, eps, out);
    }
}

/// Gradients of [`rms_norm`]: writes `dx`, adds to `dweight`.
pub fn rms_norm_backward(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], dweight: &mut [f32]) {
    let cols = weight.len().max(1);
    let rows = x.chunks_exact(cols).zip(dy.chunks_exact(cols)).zip(dx.chunks_exact_mut(cols));
    for ((x, dy), dx) in rows {
        norm_row_backward(Isa::best(), x, weight, eps, dy, dx, dweight);
    }
}

per_isa! {
    fn norm_row_backward(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], dweight: &mut [f32]) {
        let r = norm::inverse_rms(x, eps);
        for ((dx, dy), w) in dx.iter_mut().zip(dy).zip(weight) {
            *dx = dy * w;
        }
        let mean = dot(x, dx) / x.len() as f32;
        let pull = mean * r * r * r;
        for (((dx, x), dy), dw) in dx.iter_mut().zip(x).zip(dy).zip(dweight) {
            *dx = *dx * r - x * pull;
            *dw += dy * (x * r);
        }
    }
}

/// Σ a·b in 16 partial sums.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0f32; LANES];
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            acc[i] += a[i] * b[i];
        }
    }
    for ((acc, a), b) in acc.iter_mut().zip(a_tail).zip(b_tail) {
        *acc += a * b;
    }
    sum_lanes(acc)
}

/// `x + λ (Q(x) − x)` for rows of `cols` values, where `Q` is absmax quantisation to 8 bits and back, exactly the
/// values of `ternary::quantize_activations`.
pub fn fake_quantize(x: &[f32], cols: usize, lambda: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(cols.max(1)).zip(out.chunks_exact_mut(cols.max(1))) {
        fake_quantize_row(Isa::best(), x, lambda, out);
    }
}

/// The absolute maximum of each row of `cols` values.
pub fn row_absmax(x: &[f32], cols: usize) -> Vec<f32> {
    let row = |x: &[f32]| {
        let mut max = 0.0;
        absmax_row(Isa::best(), x, &mut max);
        max
    };
    x.chunks_exact(cols.max(1)).map(row).collect()
}

per_isa! {
    fn absmax_row(x: &[f32], max: &mut f32) {
        *max = norm::absmax(x);
    }
}

per_isa! {
    fn fake_quantize_row(x: &[f32], lambda: f32, out: &mut [f32]) {
        let scale = ACTIVATION_MAX / norm::absmax(x).max(MIN_ABSMAX);
        for (out, x) in out.iter_mut().zip(x) {
            let v = x * scale;
            let v = if v > -ACTIVATION_MAX { v } else { -ACTIVATION_MAX };
            let q = round_small(if v < ACTIVATION_MAX { v } else { ACTIVATION_MAX }) / scale;
            // At λ = 1 exactly the quantised value.
            *out = q + (1.0 - lambda) * (x - q);
        }
    }
}

/// `w + λ (Q(w) − w)`, where `Q` is absmean quantisation to three values: `s` and its inverse as
/// `PackedTernary::quantize` computes them.
pub fn fake_ternary(w: &[f32], s: f32, lambda: f32, out: &mut [f32]) {
    fake_ternary_values(Isa::best(), w, s, 1.0 / s, lambda, out);
}

per_isa! {
    fn fake_ternary_values(w: &[f32], s: f32, multiplier: f32, lambda: f32, out: &mut [f32]) {
        for (out, w) in out.iter_mut().zip(w) {
            let v = w * s;
            let v = if v > -1.0 { v } else { -1.0 };
            let q = round_small(if v < 1.0 { v } else { 1.0 }) * multiplier;
            *out = q + (1.0 - lambda) * (w - q);
        }
    }
}

/// `out = act(gate) · up` for rows `[gate | up]` of `2 · cols` values.
pub fn gated(gate: Gate, gate_up: &[f32], cols: usize, out: &mut [f32]) {
    for (x, out) in gate_up.chunks_exact(2 * cols.max(1)).zip(out.chunks_exact_mut(cols.max(1))) {
        let (g, up) = x.split_at(cols);
        norm::gated(Isa::best(), gate, g, up, out);
    }
}

/// Gradient of [`gated`].
pub fn gated_backward(gate: Gate, gate_up: &[f32], cols: usize, dy: &[f32], dx: &mut [f32]) {
    let rows = gate_up.chunks_exact(2 * cols.max(1)).zip(dy.chunks_exact(cols.max(1)));
    for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(2 * cols.max(1))) {
        let ((g, up), (dg, dup)) = (x.split_at(cols), dx.split_at_mut(cols));
        gated_row_backward(Isa::best(), gate, g, up, dy, dg, dup);
    }
}

per_isa! {
    fn gated_row_backward(gate: Gate, g: &[f32], up: &[f32], dy: &[f32], dg: &mut [f32], dup: &mut [f32]) {
        let rows = g.iter().zip(up).zip(dy).zip(dg).zip(dup);
        match gate {
            Gate::Relu2 => {
                for ((((g, up), dy), dg), dup) in rows {
                    let r = if *g < 0.0 { 0.0 } else { *g };
                    *dg = 2.0 * r * up * dy;
                    *dup = r * r * dy;
                }
            }
            Gate::Silu => {
                for ((((g, up), dy), dg), dup) in rows {
                    let s = 1.0 / (1.0 + exp(-g));
                    *dg = dy * up * (s * (1.0 + g * (1.0 - s)));
                    *dup = g * s * dy;
                }
            }
        }
    }
}

/// Cross-entropy of one row of logits, in nats; the logits become their gradient, `softmax − one-hot`.
///
/// # Panics
/// If `target` is not below the number of logits.
pub fn cross_entropy(logits: &mut [f32], target: usize) -> f64 {
    let picked = logits[target];
    let (max, sum) = softmax_parts(logits);
    let loss = f64::from(max) + f64::from(sum).ln() - f64::from(picked);
    scale_in_place(Isa::best(), logits, 1.0 / sum);
    logits[target] -= 1.0;
    loss
}

/// Turns values into `exp(x − max)`; returns their maximum and the sum of the results.
fn softmax_parts(x: &mut [f32]) -> (f32, f32) {
    let (mut max, mut sum) = (0.0, 0.0);
    exp_row(Isa::best(), x, &mut max, &mut sum);
    (max, sum)
}

per_isa! {
    fn exp_row(x: &mut [f32], max: &mut f32, sum: &mut f32) {
        // NaN loses every comparison here and comes back through the sum.
        let m = x.iter().fold(f32::NEG_INFINITY, |m, v| if *v > m { *v } else { m });
        let mut acc = [0f32; LANES];
        let (chunks, tail) = x.as_chunks_mut::<LANES>();
        for c in chunks {
            for i in 0..LANES {
                c[i] = exp(c[i] - m);
                acc[i] += c[i];
            }
        }
        for (acc, v) in acc.iter_mut().zip(tail) {
            *v = exp(*v - m);
            *acc += *v;
        }
        (*max, *sum) = (m, sum_lanes(acc));
    }
}

per_isa! {
    fn scale_in_place(x: &mut [f32], factor: f32) {
        for v in x {
            *v *= factor;
        }
    }
}

/// The update of a moment of AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019):
/// `β · moment + (1 − β) · g` or `… · g²`.
#[derive(Debug, Clone, Copy)]
pub struct Moments {
    /// Decay of the moment.
    pub beta: f32,
    /// Factor on the gradient first: the inverse of the targets that it sums over, times what clipping leaves.
    pub factor: f32,
    /// Whether this is the second moment.
    pub squared: bool,
}

impl Moments {
    /// Updates a moment by a gradient.
    pub fn update(&self, moment: &mut [f32], g: &[f32]) {
        moment_values(Isa::best(), *self, moment, g);
    }
}

per_isa! {
    fn moment_values(p: Moments, moment: &mut [f32], g: &[f32]) {
        for (moment, g) in moment.iter_mut().zip(g) {
            let g = g * p.factor;
            let g = if p.squared { g * g } else { g };
            *moment = p.beta * *moment + (1.0 - p.beta) * g;
        }
    }
}

/// The update of a weight by its two moments.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// `1 / (1 − β₁ᵗ)`.
    pub correction1: f32,
    /// `1 / (1 − β₂ᵗ)`.
    pub correction2: f32,
}

impl AdamW {
    #[inline(always)]
    fn stepped(&self, w: f32, m: f32, v: f32) -> f32 {
        let direction = (m * self.correction1) / ((v * self.correction2).sqrt() + self.eps);
        w - self.lr * (direction + self.weight_decay * w)
    }

    /// Updates f32 weights.
    pub fn update(&self, w: &mut [f32], m: &[f32], v: &[f32]) {
        update_values(Isa::best(), *self, w, m, v);
    }

    /// Updates bf16 weights, rounding up or down at random so that the mean is exact: most updates are smaller than
    /// half a step of bf16. What is random is a function of `seed` and the position.
    pub fn update_bf16(&self, w: &mut [bf16], m: &[f32], v: &[f32], seed: u64) {
        for (i, ((w, m), v)) in w.iter_mut().zip(m).zip(v).enumerate() {
            *w = round_stochastically(self.stepped(w.to_f32(), *m, *v), seed, i);
        }
    }
}

/// One of the two bf16 next to `x`, the nearer one more likely, so that the mean is `x`: the noise of the `index`-th
/// value under `seed`. For finite values below the largest bf16 only.
#[inline(always)]
pub fn round_stochastically(x: f32, seed: u64, index: usize) -> bf16 {
    let noise = (mix(seed.wrapping_add(index as u64 + 1)) & 0xffff) as u32;
    bf16::from_bits((x.to_bits().wrapping_add(noise) >> 16) as u16)
}

/// A seed of its own for each combination of numbers, far from those of its neighbours.
pub fn seed_of(numbers: &[u64]) -> u64 {
    numbers.iter().fold(0, |seed, n| mix(seed ^ mix(n.wrapping_add(1))))
}

per_isa! {
    fn update_values(p: AdamW, w: &mut [f32], m: &[f32], v: &[f32]) {
        for ((w, m), v) in w.iter_mut().zip(m).zip(v) {
            *w = p.stepped(*w, *m, *v);
        }
    }
}

/// Σ g², in f64.
pub fn sum_of_squares(g: &[f32]) -> f64 {
    // Blocks in f32 vectors, their sums in f64.
    let block = |b: &[f32]| {
        let mut sum = 0.0;
        square_block(Isa::best(), b, &mut sum);
        f64::from(sum)
    };
    g.chunks(1024).map(block).sum()
}

per_isa! {
    fn square_block(g: &[f32], sum: &mut f32) {
        *sum = dot(g, g);
    }
}

/// `a += b`.
pub fn add(a: &mut [f32], b: &[f32]) {
    add_values(Isa::best(), a, b);
}

per_isa! {
    fn add_values(a: &mut [f32], b: &[f32]) {
        for (a, b) in a.iter_mut().zip(b) {
            *a += b;
        }
    }
}

/// splitmix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014) of a counter.
#[inline(always)]
fn mix(counter: u64) -> u64 {
    let z = counter.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Zeroes each value with probability `p`, multiplies the others by `1 / (1 − p)`. Which ones is a function of `seed`
/// and the position alone, so that the backward pass needs no mask.
pub fn dropout(x: &[f32], p: f32, seed: u64, out: &mut [f32]) {
    let (threshold, keep) = ((f64::from(p) * 65536.0) as u64, 1.0 / (1.0 - p));
    for (i, (x, out)) in x.chunks(4).zip(out.chunks_mut(4)).enumerate() {
        let bits = mix(seed.wrapping_add(i as u64 + 1));
        for (j, (x, out)) in x.iter().zip(out).enumerate() {
            *out = if bits >> (16 * j) & 0xffff < threshold { 0.0 } else { x * keep };
        }
    }
}
