//! Buffers of the operation in progress, which stay for the next one.

use super::kernel::Line;
use super::screened::ScreenScratch;
use std::cell::RefCell;

/// What the quantised linear and attention need between their steps.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// The quantised rows.
    pub rows: Vec<u8>,
    /// Their codes, as the prefill kernels take them.
    pub panel: Vec<Line>,
    /// Of attention.
    pub attention: super::attention::Shared,
    /// What the screened head knows of its rows.
    pub screen: ScreenScratch,
}

/// The first `len` elements of a buffer that grows to the largest operation; what they hold is left from earlier ones.
pub(super) fn grown<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}

/// A buffer of this thread, likewise.
pub(super) fn with_scratch(len: usize, f: impl FnOnce(&mut [f32])) {
    thread_local!(static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) });
    SCRATCH.with_borrow_mut(|s| f(grown(s, len)));
}
