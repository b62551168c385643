//! What kernels take by value or read from memory: mirrors of the structs of `kernels/cuda`, as C lays them out.
//!
//! Addresses are those of device memory, `u64` as the driver hands them out.

use crate::backend::gpu::params::{Attention, Head, Scales, Sizes};
use crate::backend::gpu::{MarkUpdate, SampleSettings};
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use std::mem::offset_of;

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
    pub sizes: Sizes,
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
    pub sizes: Sizes,
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
    pub sizes: Attention,
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
    pub sizes: Head,
}

macro_rules! device_repr {
    ($($name:ident)*) => {$(
        // SAFETY: repr(C) of plain numbers, laid out as the kernels' struct of this name: sizes and offsets are asserted.
        unsafe impl DeviceRepr for $name {}
    )*};
}
device_repr! { GemvParams GemmParams AttentionParams PrefillParams HeadParams SampleSettings MarkUpdate }

// SAFETY: a struct of numbers for which zero is a value.
unsafe impl ValidAsZeroBits for SampleSettings {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for MarkUpdate {}

// The same numbers are asserted in the kernels' sources.
const _: () = {
    assert!(offset_of!(Scales, value) == 12);
    assert!(size_of::<GemvParams>() == 112);
    assert!(offset_of!(GemvParams, x) == 8 && offset_of!(GemvParams, norm) == 16 && offset_of!(GemvParams, q) == 24);
    assert!(
        offset_of!(GemvParams, sx) == 32 && offset_of!(GemvParams, qsum) == 40 && offset_of!(GemvParams, out) == 48
    );
    assert!(offset_of!(GemvParams, scales) == 56 && offset_of!(GemvParams, eps) == 84);
    assert!(offset_of!(GemvParams, sizes.tokens) == 88 && offset_of!(GemvParams, sizes.activation) == 104);
    assert!(size_of::<GemmParams>() == 88);
    assert!(offset_of!(GemmParams, out) == 32 && offset_of!(GemmParams, scales) == 40);
    assert!(offset_of!(GemmParams, sizes.tokens) == 68 && offset_of!(GemmParams, sizes.activation) == 84);
    assert!(size_of::<AttentionParams>() == 112);
    assert!(offset_of!(AttentionParams, positions) == 24 && offset_of!(AttentionParams, slots) == 32);
    assert!(offset_of!(AttentionParams, k_cache) == 40 && offset_of!(AttentionParams, out) == 56);
    assert!(offset_of!(AttentionParams, partial) == 64 && offset_of!(AttentionParams, arrived) == 72);
    assert!(offset_of!(AttentionParams, sizes.tokens) == 80 && offset_of!(AttentionParams, sizes.head_dim) == 92);
    assert!(offset_of!(AttentionParams, sizes.splits) == 100 && offset_of!(AttentionParams, sizes.scale) == 104);
    assert!(size_of::<PrefillParams>() == 128);
    assert!(offset_of!(PrefillParams, starts) == 112 && offset_of!(PrefillParams, sequences) == 120);
    assert!(size_of::<HeadParams>() == 48);
    assert!(offset_of!(HeadParams, sizes.tokens) == 32 && offset_of!(HeadParams, sizes.vocab) == 40);
    assert!(offset_of!(SampleSettings, temperature) == 16 && offset_of!(SampleSettings, min_p) == 24);
    assert!(offset_of!(SampleSettings, frequency) == 36 && offset_of!(SampleSettings, top_k) == 40);
    assert!(offset_of!(SampleSettings, slot) == 44);
    assert!(offset_of!(MarkUpdate, mark) == 8);
};
