//! The decoder's operations as candle in-place ops: the same call on every device, routed by storage.
//!
//! Each writes into a tensor that its caller made, so that a forward pass allocates nothing. A function checks its operands,
//! then applies one in-place op whose `cpu_fwd` calls [`crate::backend::cpu::Cpu`], `cuda_fwd` `crate::backend::cuda::Cuda` and
//! `metal_fwd` `crate::backend::metal::Metal`; weights live in the op, borrowed. All tensors are contiguous f32 `[tokens, columns]`, and an
//! output shares no storage with an input.

mod attention;
mod dense;
pub mod grad;
mod head;
mod linear;
mod low_rank;
#[cfg(feature = "metal")]
mod metal;
mod norm;
mod output;
mod rows;

pub use attention::{AttentionInput, attention};
pub use dense::dense_linear;
pub use head::{HeadReads, int8_linear, screened_linear};
pub use linear::{gated_linear, norm_linear};
pub use low_rank::low_rank;
pub use norm::{gated, rms_norm};
pub use output::Output;
pub use rows::{embed, select_rows};

#[cfg(feature = "metal")]
pub(crate) use metal::logits as metal_logits;

use crate::Error;
#[cfg(feature = "cuda")]
use crate::backend::cuda::{CudaView, CudaViewMut};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, DType, Layout, Result, Tensor, WithDType};

/// The elements of a contiguous CPU operand.
pub(crate) fn contiguous<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let values = storage.as_slice::<T>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => candle_core::bail!("operand with shape {:?} is not contiguous", layout.shape()),
    }
}

/// The elements that an in-place op may write.
pub(crate) fn contiguous_mut<'a, T: WithDType>(values: &'a mut [T], layout: &Layout) -> Result<&'a mut [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&mut values[start..end]),
        None => candle_core::bail!("operand with shape {:?} is not contiguous", layout.shape()),
    }
}

/// The elements of an op's output.
fn output<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match storage {
        CpuStorage::F32(values) => contiguous_mut(values, layout),
        _ => candle_core::bail!("output with shape {:?} is not f32", layout.shape()),
    }
}

/// The elements of a contiguous f32 operand on a GPU.
#[cfg(feature = "cuda")]
pub(crate) fn gpu<'a>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, f32>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<f32>()?.slice(start..end)),
        None => candle_core::bail!("operand with shape {:?} is not contiguous", layout.shape()),
    }
}

/// The elements of an op's output on a GPU.
#[cfg(feature = "cuda")]
fn gpu_output<'a>(storage: &'a mut CudaStorage, layout: &Layout) -> Result<CudaViewMut<'a, f32>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice_mut::<f32>()?.slice_mut(start..end)),
        None => candle_core::bail!("output with shape {:?} is not contiguous", layout.shape()),
    }
}

/// Within a `cpu_fwd`: ends it with the operation's `metal` where the CPU's memory is that of an emulated Metal device.
macro_rules! or_emulated_metal {
    ($op:ident, $out:ident $lo:ident $(, $x:ident $lx:ident)*) => {
        #[cfg(all(feature = "metal", not(target_os = "macos")))]
        if $op.backend.metal().is_ok() {
            let inputs = ($($crate::ops::metal::emulated($x, $lx)?,)*);
            return $op.metal($crate::ops::metal::emulated_output($out, $lo)?, inputs);
        }
    };
}

/// The `metal_fwd` of an operation with so many inputs: its `metal`.
macro_rules! metal_fwd {
    ($($x:ident $lx:ident),*) => {
        #[cfg(all(feature = "metal", target_os = "macos"))]
        fn metal_fwd(
            &self,
            out: &mut candle_core::MetalStorage,
            lo: &candle_core::Layout,
            $($x: &candle_core::MetalStorage, $lx: &candle_core::Layout,)*
        ) -> candle_core::Result<()> {
            self.metal($crate::ops::metal::operand(out, lo)?, ($($crate::ops::metal::operand($x, $lx)?,)*))
        }
    };
}

use {metal_fwd, or_emulated_metal};

fn shape_error(op: &'static str, reason: String) -> Error {
    Error::Shape { op, reason }
}

/// Rows and columns of an operand that is as all of them are.
fn matrix(op: &'static str, name: &str, tensor: &Tensor) -> crate::Result<(usize, usize)> {
    match tensor.dims() {
        [rows, cols] if tensor.dtype() == DType::F32 && tensor.is_contiguous() && *rows > 0 && *cols > 0 => {
            Ok((*rows, *cols))
        }
        dims => {
            let (dtype, order) = (tensor.dtype(), if tensor.is_contiguous() { "" } else { ", not contiguous" });
            let reason = format!("{name} is {dtype:?} {dims:?}{order}; contiguous f32 [tokens, columns] is needed");
            Err(shape_error(op, reason))
        }
    }
}

/// Refuses an operand of another shape than `[rows, cols]`.
fn expect(op: &'static str, name: &str, tensor: &Tensor, rows: usize, cols: usize) -> crate::Result<()> {
    match matrix(op, name, tensor)? {
        found if found == (rows, cols) => Ok(()),
        found => Err(shape_error(op, format!("{name} is [{}, {}]; [{rows}, {cols}] is needed", found.0, found.1))),
    }
}

/// Refuses a norm's weight that is no f32 `[cols]`.
fn expect_norm(op: &'static str, weight: &Tensor, cols: usize) -> crate::Result<()> {
    if weight.dims() == [cols] && weight.dtype() == DType::F32 && weight.is_contiguous() {
        return Ok(());
    }
    Err(shape_error(op, format!("norm is {:?} {:?}; f32 [{cols}] is needed", weight.dtype(), weight.dims())))
}
