//! Memory that operations use between two kernels: kept, and grown where a call needs more.
//!
//! Whoever launches kernels over it holds the lock until the last of them is launched; the stream does the rest.

use super::{Cuda, failure};
use crate::Result;
use crate::backend::gpu::Kept;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr, ValidAsZeroBits};
use std::sync::atomic::Ordering;

/// All kept memory of a [`Cuda`].
#[derive(Default)]
pub(super) struct Scratch {
    /// int8 codes of activations, rows padded to whole tiles.
    pub codes: Buffer<i8>,
    /// Their scales.
    pub scales: Buffer<f32>,
    /// Their sums.
    pub sums: Buffer<i32>,
    /// Partial results of split attention.
    pub partial: Buffer<f32>,
    /// Blocks of split attention that have arrived; zero between launches.
    pub arrived: Buffer<u32>,
    /// A dense product's result on its way into wider rows.
    pub columns: Buffer<f32>,
    /// The inner vectors of low-rank updates.
    pub inner: Buffer<f32>,
    /// Row numbers from the host.
    pub rows: Buffer<i32>,
}

/// Memory that grows.
pub(super) type Buffer<T> = Kept<CudaSlice<T>>;

impl<T: DeviceRepr + ValidAsZeroBits> Buffer<T> {
    /// The memory, `len` elements or more; zeroed when it grows, with nothing kept.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if memory is short, or must not move because a graph is being captured.
    pub(super) fn at_least(&mut self, cuda: &Cuda, len: usize, what: &str) -> Result<&mut CudaSlice<T>> {
        // Kernels that still use the old memory come before its release in the stream.
        let before = || {
            if cuda.capturing.load(Ordering::Relaxed) {
                return Err(failure::unavailable(what, "it would have to grow while a graph is being captured"));
            }
            cuda.generation.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        self.grown(len, what, before, |len| cuda.zeroed(len, what))
    }

    /// The address of `len` elements or more; see [`Buffer::at_least`].
    pub(super) fn address(&mut self, cuda: &Cuda, len: usize, what: &str) -> Result<u64> {
        let memory = self.at_least(cuda, len, what)?;
        Ok(cuda.write(memory))
    }
}
