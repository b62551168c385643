//! The decoder's operations as candle custom ops: the same call on every device, routed by storage.
//!
//! Each function checks and prepares its tensors, then applies one custom op whose `cpu_fwd` calls
//! [`crate::backend::cpu::Cpu`]. Weights live in the op, borrowed, so that a call allocates nothing but its
//! output. Rows are tokens: any leading dimensions are flattened.

mod attention;
mod dense;
pub mod grad;
mod linear;
mod low_rank;
mod norm;
mod quantize;

pub use attention::{AttentionInput, attention, rope};
pub use dense::{dense_linear, embed};
pub use linear::linear;
pub use low_rank::low_rank;
pub use norm::{gated, rms_norm};
pub use quantize::{Quantized, gated_quantize, norm_quantize, quantize};

use crate::backend::not_built;
use candle_core::{CpuStorage, Layout, Result, WithDType};

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

/// What `cuda_fwd` and `metal_fwd` answer in a build without kernels for them.
fn unsupported<T>(device: &'static str) -> Result<T> {
    Err(not_built(device).into())
}

/// The device methods of an op that this build has no GPU kernels for.
macro_rules! no_gpu {
    ($(($s:ident, $l:ident)),+) => {
        fn cuda_fwd(
            &self,
            $($s: &candle_core::CudaStorage, $l: &candle_core::Layout),+
        ) -> candle_core::Result<(candle_core::CudaStorage, candle_core::Shape)> {
            let _ = ($($s, $l),+);
            $crate::ops::unsupported("cuda")
        }

        fn metal_fwd(
            &self,
            $($s: &candle_core::MetalStorage, $l: &candle_core::Layout),+
        ) -> candle_core::Result<(candle_core::MetalStorage, candle_core::Shape)> {
            let _ = ($($s, $l),+);
            $crate::ops::unsupported("metal")
        }
    };
}
use no_gpu;
