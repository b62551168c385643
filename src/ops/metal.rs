//! Operands on an Apple GPU, or on the emulator that stands in for one.

use crate::backend::metal::MetalSlice;
#[cfg(not(target_os = "macos"))]
use candle_core::{CpuStorage, Storage};
#[cfg(target_os = "macos")]
use candle_core::{DType, MetalStorage, Storage};
use candle_core::{Layout, Result, Tensor};

/// The elements of a contiguous f32 operand.
#[cfg(target_os = "macos")]
pub(super) fn operand<'a>(storage: &'a MetalStorage, layout: &Layout) -> Result<MetalSlice<'a>> {
    use candle_core::backend::BackendStorage;
    match layout.contiguous_offsets() {
        Some((start, end)) if storage.dtype() == DType::F32 => Ok(MetalSlice::of(storage.buffer(), start, end)),
        _ => candle_core::bail!("operand with shape {:?} is not contiguous f32", layout.shape()),
    }
}

/// The elements of a contiguous f32 operand.
#[cfg(not(target_os = "macos"))]
pub(super) fn emulated<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<MetalSlice<'a>> {
    super::contiguous(storage, layout).map(MetalSlice::emulated)
}

/// The elements of an output.
#[cfg(not(target_os = "macos"))]
pub(super) fn emulated_output<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<MetalSlice<'a>> {
    super::output(storage, layout).map(MetalSlice::emulated_mut)
}

/// Calls `read` with the logits where they lie.
pub(crate) fn logits<R>(logits: &Tensor, read: impl FnOnce(MetalSlice<'_>) -> crate::Result<R>) -> crate::Result<R> {
    let (storage, layout) = logits.storage_and_layout();
    match &*storage {
        #[cfg(target_os = "macos")]
        Storage::Metal(storage) => read(operand(storage, layout)?),
        #[cfg(not(target_os = "macos"))]
        Storage::Cpu(storage) => read(emulated(storage, layout)?),
        _ => Err(super::shape_error("sample", "the logits lie on another device than the GPU".into())),
    }
}
