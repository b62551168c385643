//! What kernels take as parameters or read from memory: mirrors of the structs of `kernels/metal`, as C lays them out.

use bytemuck::{Pod, Zeroable};

/// Most weights that are stacked into one.
pub(super) const SEGMENTS: usize = 4;

macro_rules! params {
    ($($(#[$doc:meta])* $vis:vis struct $name:ident($size:literal) { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq)]
        $vis struct $name { $($(#[$field_doc])* pub $field: $type,)* }
        // SAFETY: numbers and arrays of numbers, for which zero is a value.
        unsafe impl Zeroable for $name {}
        // SAFETY: repr(C) of plain numbers; the sum of the fields' sizes is the struct's, asserted below, so nothing is padding.
        unsafe impl Pod for $name {}
        const _: () = assert!(size_of::<$name>() == $size && 0 $(+ size_of::<$type>())* == $size);
    )*};
}

params! {
    /// Multipliers of stacked weights: rows below `end[0]` take `value[0]`, below `end[1]` `value[1]`, … the rest `value[3]`.
    pub(super) struct Scales(28) {
        end: [i32; SEGMENTS - 1],
        value: [f32; SEGMENTS],
    }

    /// Packing a matrix.
    pub(super) struct Pack(20) {
        rows: i32,
        cols: i32,
        row_bytes: i32,
        row0: i32,
        row_map: i32,
    }

    /// A norm.
    pub(super) struct Norm(20) {
        rows: i32,
        k: i32,
        eps: f32,
        has_add: i32,
        has_weight: i32,
    }

    /// A gated activation alone.
    pub(super) struct Gated(12) {
        tokens: i32,
        n: i32,
        activation: i32,
    }

    /// Columns on their way into wider rows.
    pub(super) struct Place(16) {
        tokens: i32,
        n: i32,
        ld_to: i32,
        add: i32,
    }

    /// A quantised product.
    pub(super) struct Product(56) {
        scales: Scales,
        eps: f32,
        tokens: i32,
        n: i32,
        k: i32,
        ld_out: i32,
        activation: i32,
        has_norm: i32,
    }

    /// Attention over one layer's cache.
    pub(super) struct Attention(28) {
        tokens: i32,
        heads: i32,
        kv_heads: i32,
        head_dim: i32,
        max_positions: i32,
        splits: i32,
        scale: f32,
    }

    /// A dense product or an embedding.
    pub(super) struct Head(12) {
        tokens: i32,
        hidden: i32,
        vocab: i32,
    }

    /// Choosing tokens.
    pub(super) struct Choice(12) {
        vocab: i32,
        groups: i32,
        has_marks: i32,
    }

    /// Setting marks.
    pub(super) struct Marks(8) {
        count: i32,
        vocab: i32,
    }

    /// How to choose a token for one row of logits.
    pub struct MetalSampling(48) {
        /// Key of the random numbers.
        seed: u64,
        /// Counter of the random numbers; the device counts it up.
        draw: u64,
        /// Divides the logits; 0 takes the largest.
        temperature: f32,
        /// Smallest sum of probabilities to keep; 1 keeps all.
        top_p: f32,
        /// Smallest probability to keep, relative to the largest; 0 keeps all.
        min_p: f32,
        /// Logits of marked tokens are divided by it, or multiplied if they are negative; 1 is off.
        repetition: f32,
        /// Subtracted once from logits of tokens in the answer; 0 is off.
        presence: f32,
        /// Subtracted from logits of tokens in the answer, once for each time that they are there; 0 is off.
        frequency: f32,
        /// Tokens to keep; 0 keeps all.
        top_k: i32,
        /// Whose marks the penalties follow: a row of the sampler's; -1 for no penalties.
        slot: i32,
    }

    /// What the penalties know of a token, as it is now.
    pub struct MetalMark(12) {
        /// Row of the marks; -1 for nothing to do.
        slot: i32,
        /// The token.
        token: i32,
        /// Bit 31: it is in the prompt or the answer. Below: how often it is in the answer.
        mark: u32,
    }
}

impl MetalSampling {
    /// The largest logit, nothing else.
    pub const GREEDY: Self = Self {
        seed: 0,
        draw: 0,
        temperature: 0.0,
        top_p: 1.0,
        min_p: 0.0,
        repetition: 1.0,
        presence: 0.0,
        frequency: 0.0,
        top_k: 0,
        slot: -1,
    };
}

impl Default for MetalSampling {
    fn default() -> Self {
        Self::GREEDY
    }
}
