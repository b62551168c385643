//! What attention needs to know, on every device.

use crate::{Error, Result};

/// Heads of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head h reads KV head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Largest supported head.
    pub const MAX_HEAD_DIM: usize = 256;
    /// Most query heads that share a KV head.
    pub const MAX_GROUP: usize = 16;

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Shape`] for zero, an odd head, heads that do not divide, or numbers over the limits.
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Result<Self> {
        let shape = Self { heads, kv_heads, head_dim };
        let fits = heads > 0
            && kv_heads > 0
            && heads.is_multiple_of(kv_heads)
            && heads / kv_heads <= Self::MAX_GROUP
            && (2..=Self::MAX_HEAD_DIM).contains(&head_dim)
            && head_dim.is_multiple_of(2);
        fits.then_some(shape).ok_or_else(|| Error::Shape {
            op: "attention",
            reason: format!(
                "{shape:?}: heads must be a multiple of kv_heads (at most {} times), head_dim even and at most {}",
                Self::MAX_GROUP,
                Self::MAX_HEAD_DIM
            ),
        })
    }

    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Elements of a token's stacked query, key and value.
    pub fn qkv_dim(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Softmax scale, `head_dim^-0.5`.
    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// Where a token of a batch stands: which sequence's KV slot, which position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowPosition {
    /// KV slot of the sequence.
    pub slot: usize,
    /// Position in the sequence, from 0.
    pub position: usize,
}

/// Cosines and sines of the rotary embedding (rotate-half form), `[positions][head_dim / 2]`, as transformers
/// computes them: frequencies and angles in f32.
#[derive(Debug)]
pub struct RopeTable {
    half_dim: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Angles `position · theta^(−2i / head_dim)`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if memory is short.
    pub fn new(positions: usize, head_dim: usize, theta: f64) -> Result<Self> {
        let half_dim = head_dim / 2;
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        let size = positions.saturating_mul(half_dim);
        if cos.try_reserve_exact(size).and_then(|()| sin.try_reserve_exact(size)).is_err() {
            return Err(Error::Unavailable {
                what: format!("memory for the rotary embedding of {positions} positions"),
                reason: "the system refused the allocation; use a smaller context".into(),
            });
        }
        let frequency = |i: usize| {
            let exponent = 2.0 * i as f32 / head_dim as f32;
            1.0 / (theta.powf(f64::from(exponent)) as f32)
        };
        let frequencies: Vec<f32> = (0..half_dim).map(frequency).collect();
        for angle in (0..positions).flat_map(|p| frequencies.iter().map(move |f| f64::from(p as f32 * f))) {
            cos.push(angle.cos() as f32);
            sin.push(angle.sin() as f32);
        }
        Ok(Self { half_dim, cos, sin })
    }

    /// Positions in the table.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half_dim.max(1)
    }

    /// Half the rotated elements of a head.
    pub fn half_dim(&self) -> usize {
        self.half_dim
    }

    /// Cosines and sines of one position.
    ///
    /// # Panics
    /// If the position is not in the table.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half_dim..(position + 1) * self.half_dim;
        (&self.cos[range.clone()], &self.sin[range])
    }

    /// All cosines and all sines, for devices that keep their own copy.
    pub fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }
}
