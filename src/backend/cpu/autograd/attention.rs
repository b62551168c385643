//! Causal attention over whole sequences, forward and backward, by blocks of queries: memory grows with
//! `BLOCK · length`, and keys after a block's last query are never touched.
//!
//! The backward pass recomputes the probabilities (Dao et al., "FlashAttention", 2022, algorithm 4).

use super::super::isa::{Isa, per_isa};
use super::dot;
use super::gemm::{Matrix, matmul};
use crate::Result;
use crate::backend::attention::{AttentionShape, RopeTable};

/// Queries that are handled at a time.
const BLOCK: usize = 64;

/// Rotates queries and keys of `[length, heads + 2 · kv_heads, head_dim]` in place; `direction` −1 turns them back.
fn rotate(x: &mut [f32], shape: AttentionShape, rope: &RopeTable, direction: f32) {
    let half = shape.head_dim / 2;
    for (position, row) in x.chunks_exact_mut(shape.qkv_dim()).enumerate() {
        let (cos, sin) = rope.at(position);
        for head in row.chunks_exact_mut(shape.head_dim).take(shape.heads + shape.kv_heads) {
            let (low, high) = head.split_at_mut(half);
            rotate_head(Isa::best(), low, high, cos, sin, direction);
        }
    }
}

per_isa! {
    fn rotate_head(low: &mut [f32], high: &mut [f32], cos: &[f32], sin: &[f32], direction: f32) {
        for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (x, y, sin) = (*a, *b, sin * direction);
            *a = x * cos - y * sin;
            *b = y * cos + x * sin;
        }
    }
}

/// Rows `first..first + p.len() / keys` of scores become probabilities; what lies after a row's own position, zero.
fn causal_softmax(p: &mut [f32], keys: usize, first: usize) {
    for (i, row) in p.chunks_exact_mut(keys).enumerate() {
        let (seen, hidden) = row.split_at_mut(first + i + 1);
        let (_, sum) = super::softmax_parts(seen);
        super::scale_in_place(Isa::best(), seen, 1.0 / sum);
        hidden.fill(0.0);
    }
}

/// Where a head's parts stand in a row of queries, keys and values.
#[derive(Clone, Copy)]
struct Head {
    q: usize,
    k: usize,
    v: usize,
    out: usize,
}

fn heads(shape: AttentionShape) -> impl Iterator<Item = Head> {
    let dim = shape.head_dim;
    (0..shape.heads).map(move |h| {
        let kv = h / shape.group();
        Head { q: h * dim, k: (shape.heads + kv) * dim, v: (shape.heads + shape.kv_heads + kv) * dim, out: h * dim }
    })
}

fn blocks(length: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..length).step_by(BLOCK).map(move |begin| (begin, BLOCK.min(length - begin)))
}

/// Attention of every position over itself and those before it, in sequences of `length` that follow each other.
/// `qkv` is `[tokens, heads + 2 · kv_heads, head_dim]` before rotation, `out` `[tokens, heads, head_dim]`.
///
/// # Errors
/// [`crate::Error::Shape`] if slices and shape do not fit together.
pub fn attention(qkv: &[f32], shape: AttentionShape, rope: &RopeTable, length: usize, out: &mut [f32]) -> Result<()> {
    let (dim, width, out_width) = (shape.head_dim, shape.qkv_dim(), shape.heads * shape.head_dim);
    let mut scores = vec![0.0; BLOCK * length];
    let sequences = qkv.chunks_exact(length * width).zip(out.chunks_exact_mut(length * out_width));
    for (qkv, out) in sequences {
        let mut qkv = qkv.to_vec();
        rotate(&mut qkv, shape, rope, 1.0);
        for head in heads(shape) {
            for (begin, rows) in blocks(length) {
                let keys = begin + rows;
                let p = &mut scores[..rows * keys];
                let q = Matrix::new(&qkv[begin * width + head.q..], rows, dim, width)?;
                let k = Matrix::new(&qkv[head.k..], keys, dim, width)?;
                matmul(q, k.t(), shape.scale(), p, keys, false)?;
                causal_softmax(p, keys, begin);
                let v = Matrix::new(&qkv[head.v..], keys, dim, width)?;
                let out = &mut out[begin * out_width + head.out..];
                matmul(Matrix::new(p, rows, keys, keys)?, v, 1.0, out, out_width, false)?;
            }
        }
    }
    Ok(())
}

/// Gradient of [`attention`] at `qkv`, whose result was `out`.
///
/// # Errors
/// As [`attention`].
pub fn attention_backward(
    qkv: &[f32],
    shape: AttentionShape,
    rope: &RopeTable,
    length: usize,
    out: &[f32],
    dout: &[f32],
    dqkv: &mut [f32],
) -> Result<()> {
    let (dim, width, out_width) = (shape.head_dim, shape.qkv_dim(), shape.heads * shape.head_dim);
    let (mut scores, mut dscores) = (vec![0.0; BLOCK * length], vec![0.0; BLOCK * length]);
    let sequences = qkv.chunks_exact(length * width).zip(dqkv.chunks_exact_mut(length * width));
    let results = out.chunks_exact(length * out_width).zip(dout.chunks_exact(length * out_width));
    for ((qkv, dqkv), (out, dout)) in sequences.zip(results) {
        let mut qkv = qkv.to_vec();
        rotate(&mut qkv, shape, rope, 1.0);
        dqkv.fill(0.0);
        for head in heads(shape) {
            for (begin, rows) in blocks(length) {
                let keys = begin + rows;
                let (p, dp) = (&mut scores[..rows * keys], &mut dscores[..rows * keys]);
                let q = Matrix::new(&qkv[begin * width + head.q..], rows, dim, width)?;
                let k = Matrix::new(&qkv[head.k..], keys, dim, width)?;
                let v = Matrix::new(&qkv[head.v..], keys, dim, width)?;
                matmul(q, k.t(), shape.scale(), p, keys, false)?;
                causal_softmax(p, keys, begin);
                let at = begin * out_width + head.out;
                let dy = Matrix::new(&dout[at..], rows, dim, out_width)?;
                matmul(Matrix::new(p, rows, keys, keys)?.t(), dy, 1.0, &mut dqkv[head.v..], width, true)?;
                matmul(dy, v.t(), 1.0, dp, keys, false)?;
                let pairs = p.chunks_exact(keys).zip(dp.chunks_exact_mut(keys)).enumerate();
                for (i, (p, dp)) in pairs {
                    let row = at + i * out_width;
                    let (y, dy) = (&out[row..row + dim], &dout[row..row + dim]);
                    softmax_row_backward(Isa::best(), p, y, dy, shape.scale(), dp);
                }
                let ds = Matrix::new(dp, rows, keys, keys)?;
                matmul(ds, k, 1.0, &mut dqkv[begin * width + head.q..], width, true)?;
                matmul(ds.t(), q, 1.0, &mut dqkv[head.k..], width, true)?;
            }
        }
        rotate(dqkv, shape, rope, -1.0);
    }
    Ok(())
}

per_isa! {
    /// `dp` becomes the gradient of the scaled scores: `p · (dp − Σ y·dy) · scale`.
    fn softmax_row_backward(p: &[f32], y: &[f32], dy: &[f32], scale: f32, dp: &mut [f32]) {
        let pull = dot(y, dy);
        for (dp, p) in dp.iter_mut().zip(p) {
            *dp = p * (*dp - pull) * scale;
        }
    }
}
