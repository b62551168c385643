//! Memory that operations use between two kernels: kept, and grown where a call needs more.
//!
//! Whoever launches kernels over it holds the lock until the last of them is launched; the tracking of hazards does the rest.

use super::{Metal, MetalBuffer, MetalSlice, failure};
use crate::Result;
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
pub(super) struct Buffer<T>(Option<MetalBuffer<T>>);

impl<T> Default for Buffer<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Pod> Buffer<T> {
    /// The memory, `len` elements or more, with nothing kept when it grows.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if memory is short.
    pub(super) fn at_least(&mut self, metal: &Metal, len: usize, what: &str) -> Result<&mut MetalBuffer<T>> {
        if self.0.as_ref().is_none_or(|m| m.len() < len) {
            // The old memory first, after the kernels that still use it.
            metal.settle()?;
            self.0 = None;
            self.0 = Some(metal.zeroed(grown(len), what)?);
        }
        self.0.as_mut().ok_or_else(|| failure::unavailable(what, "it was not allocated"))
    }

    /// The first `len` elements; see [`Buffer::at_least`].
    pub(super) fn first(&mut self, metal: &Metal, len: usize, what: &str) -> Result<MetalSlice<'_, T>> {
        Ok(self.at_least(metal, len, what)?.slice(..len))
    }
}

/// A little more than is needed, so that growing prompts do not move it every time.
fn grown(len: usize) -> usize {
    len.saturating_add(len / 4).max(1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn growth_is_bounded() {
        assert_eq!(super::grown(0), 1024);
        assert_eq!(super::grown(4000), 5000);
        assert_eq!(super::grown(usize::MAX), usize::MAX);
    }
}
