//! Memory that operations use between two kernels: kept, and grown where a call needs more.
//!
//! Whoever launches kernels over it holds the lock until the last of them is launched; the tracking of hazards does the rest.

use super::{Metal, MetalBuffer, MetalSlice};
use crate::Result;
use crate::backend::gpu::Kept;
use bytemuck::Pod;

/// All kept memory of a [`Metal`].
#[derive(Default)]
pub(super) struct Scratch {
    /// Codes of activations as halves, rows padded to whole tiles.
    pub codes: Buffer<u16>,
    /// Their scales and sums.
    pub stats: Buffer<f32>,
    /// Partial results of split attention.
    pub partial: Buffer<f32>,
    /// A dense product's result on its way into wider rows.
    pub columns: Buffer<f32>,
    /// The inner vectors of low-rank updates.
    pub inner: Buffer<f32>,
    /// A matrix on its way into packed tiles.
    pub canonical: Buffer<u8>,
}

/// Memory that grows.
pub(super) type Buffer<T> = Kept<MetalBuffer<T>>;

impl<T: Pod> Buffer<T> {
    /// The memory, `len` elements or more, with nothing kept when it grows.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if memory is short.
    pub(super) fn at_least(&mut self, metal: &Metal, len: usize, what: &str) -> Result<&mut MetalBuffer<T>> {
        // Kernels that still use the old memory must end before it goes.
        self.grown(len, what, || metal.settle(), |len| metal.zeroed(len, what))
    }

    /// The first `len` elements; see [`Buffer::at_least`].
    pub(super) fn first(&mut self, metal: &Metal, len: usize, what: &str) -> Result<MetalSlice<'_, T>> {
        Ok(self.at_least(metal, len, what)?.slice(..len))
    }
}
