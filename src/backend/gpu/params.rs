//! What kernels of all GPUs take as parameters or read from memory: mirrors of structs of `kernels`, as C lays them out.

/// Most weights that are stacked into one.
pub(crate) const SEGMENTS: usize = 4;

/// Structs of numbers as C lays them out, without padding, of as many bytes as stand beside the name.
macro_rules! params {
    ($($(#[$doc:meta])* $vis:vis struct $name:ident($size:literal) { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq)]
        $vis struct $name { $($(#[$field_doc])* pub $field: $type,)* }
        // SAFETY: numbers and arrays of numbers, for which zero is a value.
        unsafe impl bytemuck::Zeroable for $name {}
        // SAFETY: repr(C) of plain numbers; the sum of the fields' sizes is the struct's, asserted below, so nothing is padding.
        unsafe impl bytemuck::Pod for $name {}
        const _: () = assert!(size_of::<$name>() == $size && 0 $(+ size_of::<$type>())* == $size);
    )*};
}
#[cfg_attr(not(feature = "metal"), allow(unused_imports))]
pub(crate) use params;

params! {
    /// Multipliers of stacked weights: rows below `end[0]` take `value[0]`, below `end[1]` `value[1]`, … the rest `value[3]`.
    pub(crate) struct Scales(28) {
        end: [i32; SEGMENTS - 1],
        value: [f32; SEGMENTS],
    }

    /// Packing a matrix.
    pub(crate) struct Pack(20) {
        rows: i32,
        cols: i32,
        row_bytes: i32,
        row0: i32,
        row_map: i32,
    }

    /// The sizes of a quantised product.
    pub(crate) struct Sizes(20) {
        tokens: i32,
        n: i32,
        k: i32,
        ld_out: i32,
        activation: i32,
    }

    /// The sizes of attention over one layer's cache.
    pub(crate) struct Attention(28) {
        tokens: i32,
        heads: i32,
        kv_heads: i32,
        head_dim: i32,
        max_positions: i32,
        splits: i32,
        scale: f32,
    }

    /// The sizes of a dense product or an embedding.
    pub(crate) struct Head(12) {
        tokens: i32,
        hidden: i32,
        vocab: i32,
    }

    /// How a token is drawn from one row of logits, in the GPU's memory.
    ///
    /// Steps, order and weights are those of the host's sampler: penalties, temperature, top-k, top-p of what top-k left, min-p
    /// relative to the best token, draw. Only the random numbers are others.
    pub struct SampleSettings(48) {
        /// Seed of the generator (Philox 4x32-10 of seed and draw).
        seed: u64,
        /// Number of the draw; each token drawn counts it up by one.
        draw: u64,
        /// Divides the logits; 0 takes the largest.
        temperature: f32,
        /// Smallest probability mass to keep; 1 keeps all.
        top_p: f32,
        /// Least probability relative to the largest; 0 keeps all.
        min_p: f32,
        /// Negative logits of tokens in the prompt or the answer are multiplied by it, others divided; 1 is off.
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
    pub struct MarkUpdate(12) {
        /// Row of the marks; -1 for nothing to do.
        slot: i32,
        /// The token.
        token: i32,
        /// Bit 31: it is in the prompt or the answer. Below: how often it is in the answer.
        mark: u32,
    }
}

impl SampleSettings {
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

    pub(super) fn has_penalties(&self) -> bool {
        self.slot >= 0 && (self.repetition != 1.0 || self.presence != 0.0 || self.frequency != 0.0)
    }

    /// Whether the largest logit is all that these settings ask for.
    pub(super) fn is_argmax(&self) -> bool {
        (self.temperature == 0.0 || self.top_k == 1) && !self.has_penalties()
    }
}

impl Default for SampleSettings {
    fn default() -> Self {
        Self::GREEDY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_logit_may_be_all() {
        let greedy = SampleSettings::default();
        assert!(greedy.is_argmax() && !greedy.has_penalties());
        let warm = SampleSettings { temperature: 0.7, ..greedy };
        assert!(!warm.is_argmax());
        assert!(SampleSettings { top_k: 1, ..warm }.is_argmax());
        let penalties = SampleSettings { presence: 0.5, slot: 0, ..greedy };
        assert!(!penalties.is_argmax() && penalties.has_penalties());
        assert!(!SampleSettings { slot: -1, ..penalties }.has_penalties(), "no slot, no penalties");
    }
}
