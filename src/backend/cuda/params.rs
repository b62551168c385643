//! What kernels take by value or read from memory: mirrors of the structs of `kernels/cuda`, as C lays them out.
//!
//! Addresses are those of device memory, `u64` as the driver hands them out.

use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use std::mem::offset_of;

/// Most weights that are stacked into one.
pub(super) const SEGMENTS: usize = 4;

/// Multipliers of stacked weights: rows below `end[0]` take `value[0]`, below `end[1]` `value[1]`, … the rest `value[3]`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scales {
    pub end: [i32; SEGMENTS - 1],
    pub value: [f32; SEGMENTS],
}

/// A decode product (`gemv.cu`).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct GemvParams {
    pub weights: u64,
    pub x: u64,
    pub norm: u64,
    pub q: u64,
    pub sx: u64,
    pub qsum: u64,
    pub out: u64,
    pub scales: Scales,
    pub eps: f32,
    pub tokens: i32,
    pub n: i32,
    pub k: i32,
    pub ld_out: i32,
    pub activation: i32,
}

/// A prefill product (`gemm.cu`).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct GemmParams {
    pub weights: u64,
    pub q: u64,
    pub sx: u64,
    pub qsum: u64,
    pub out: u64,
    pub scales: Scales,
    pub tokens: i32,
    pub n: i32,
    pub k: i32,
    pub ld_out: i32,
    pub activation: i32,
}

/// Attention over one layer's cache (`kv.cuh`).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct AttentionParams {
    pub qkv: u64,
    pub cos: u64,
    pub sin: u64,
    pub positions: u64,
    pub slots: u64,
    pub k_cache: u64,
    pub v_cache: u64,
    pub out: u64,
    pub partial: u64,
    pub arrived: u64,
    pub tokens: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub head_dim: i32,
    pub max_positions: i32,
    pub splits: i32,
    pub scale: f32,
}

/// Attention of whole prompts.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct PrefillParams {
    pub attention: AttentionParams,
    pub starts: u64,
    pub sequences: i32,
}

/// A dense product of up to 8 tokens (`head.cu`).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct HeadParams {
    pub weights: u64,
    pub scales: u64,
    pub x: u64,
    pub logits: u64,
    pub tokens: i32,
    pub hidden: i32,
    pub vocab: i32,
}

/// How a token is drawn from one row of logits, in device memory so that a captured graph can be replayed with others.
///
/// Steps, order and weights are those of the host's sampler: penalties, temperature, top-k, top-p of what top-k left, min-p
/// relative to the best token, draw. Only the random numbers are others.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleSettings {
    /// Seed of the generator (Philox 4x32-10 of seed and draw).
    pub seed: u64,
    /// Number of the draw; each token drawn counts it up by one.
    pub draw: u64,
    /// Divides the logits; 0 takes the largest.
    pub temperature: f32,
    /// Smallest probability mass to keep; 1 keeps all.
    pub top_p: f32,
    /// Least probability relative to the largest; 0 keeps all.
    pub min_p: f32,
    /// Negative logits of tokens in the prompt or the answer are multiplied by it, others divided; 1 is off.
    pub repetition: f32,
    /// Subtracted once from logits of tokens in the answer; 0 is off.
    pub presence: f32,
    /// Subtracted from logits of tokens in the answer, once for each time that they are there; 0 is off.
    pub frequency: f32,
    /// Tokens to keep; 0 keeps all.
    pub top_k: i32,
    /// Whose marks the penalties follow: a row of the sampler's; -1 for no penalties.
    pub slot: i32,
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
}

impl Default for SampleSettings {
    fn default() -> Self {
        Self::GREEDY
    }
}

/// What the penalties know of a token, as it is now.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MarkUpdate {
    /// Row of the marks; -1 for nothing to do.
    pub slot: i32,
    /// The token.
    pub token: i32,
    /// Bit 31: it is in the prompt or the answer. Below: how often it is in the answer.
    pub mark: u32,
}

macro_rules! device_repr {
    ($($name:ident)*) => {$(
        // SAFETY: repr(C) of plain numbers, laid out as the kernels' struct of this name: sizes and offsets are asserted.
        unsafe impl DeviceRepr for $name {}
    )*};
}
device_repr! { Scales GemvParams GemmParams AttentionParams PrefillParams HeadParams SampleSettings MarkUpdate }

// SAFETY: a struct of numbers for which zero is a value.
unsafe impl ValidAsZeroBits for SampleSettings {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for MarkUpdate {}

// The same numbers are asserted in the kernels' sources.
const _: () = {
    assert!(size_of::<Scales>() == 28 && offset_of!(Scales, value) == 12);
    assert!(size_of::<GemvParams>() == 112);
    assert!(offset_of!(GemvParams, x) == 8 && offset_of!(GemvParams, norm) == 16 && offset_of!(GemvParams, q) == 24);
    assert!(
        offset_of!(GemvParams, sx) == 32 && offset_of!(GemvParams, qsum) == 40 && offset_of!(GemvParams, out) == 48
    );
    assert!(offset_of!(GemvParams, scales) == 56 && offset_of!(GemvParams, eps) == 84);
    assert!(offset_of!(GemvParams, tokens) == 88 && offset_of!(GemvParams, n) == 92 && offset_of!(GemvParams, k) == 96);
    assert!(offset_of!(GemvParams, ld_out) == 100 && offset_of!(GemvParams, activation) == 104);
    assert!(size_of::<GemmParams>() == 88);
    assert!(offset_of!(GemmParams, out) == 32 && offset_of!(GemmParams, scales) == 40);
    assert!(offset_of!(GemmParams, tokens) == 68 && offset_of!(GemmParams, n) == 72 && offset_of!(GemmParams, k) == 76);
    assert!(offset_of!(GemmParams, ld_out) == 80 && offset_of!(GemmParams, activation) == 84);
    assert!(size_of::<AttentionParams>() == 112);
    assert!(offset_of!(AttentionParams, positions) == 24 && offset_of!(AttentionParams, slots) == 32);
    assert!(offset_of!(AttentionParams, k_cache) == 40 && offset_of!(AttentionParams, out) == 56);
    assert!(offset_of!(AttentionParams, partial) == 64 && offset_of!(AttentionParams, arrived) == 72);
    assert!(offset_of!(AttentionParams, tokens) == 80 && offset_of!(AttentionParams, head_dim) == 92);
    assert!(offset_of!(AttentionParams, splits) == 100 && offset_of!(AttentionParams, scale) == 104);
    assert!(size_of::<PrefillParams>() == 128);
    assert!(offset_of!(PrefillParams, starts) == 112 && offset_of!(PrefillParams, sequences) == 120);
    assert!(
        size_of::<HeadParams>() == 48 && offset_of!(HeadParams, tokens) == 32 && offset_of!(HeadParams, vocab) == 40
    );
    assert!(size_of::<SampleSettings>() == 48);
    assert!(offset_of!(SampleSettings, temperature) == 16 && offset_of!(SampleSettings, min_p) == 24);
    assert!(offset_of!(SampleSettings, frequency) == 36 && offset_of!(SampleSettings, top_k) == 40);
    assert!(offset_of!(SampleSettings, slot) == 44);
    assert!(size_of::<MarkUpdate>() == 12 && offset_of!(MarkUpdate, mark) == 8);
};
