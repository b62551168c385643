//! Memory that the CPU and the GPU share, and parts of it that kernels are given.

use super::driver::{Binding, Memory, Owned};
use super::{Metal, failure};
use crate::Result;
use crate::backend::gpu::{self, shape};
use bytemuck::Pod;
use std::marker::PhantomData;
use std::ops::{Bound, RangeBounds};
use std::sync::atomic::Ordering;

/// Memory for `len` values of a type.
pub struct MetalBuffer<T> {
    memory: Owned,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Pod> MetalBuffer<T> {
    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it.
    pub fn as_slice(&self) -> MetalSlice<'_, T> {
        MetalSlice { memory: self.memory.memory(), offset: 0, len: self.len, of: PhantomData }
    }

    /// A part of it; outside of it there is nothing.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> MetalSlice<'_, T> {
        self.as_slice().slice(range)
    }
}

impl<T: Pod> gpu::Memory for MetalBuffer<T> {
    fn len(&self) -> usize {
        self.len
    }

    fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

impl<T> std::fmt::Debug for MetalBuffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MetalBuffer({} × {})", self.len, std::any::type_name::<T>())
    }
}

/// Values in memory of a GPU: a part of a candle tensor's, or of ours. Kernels write through it as well as read, so what is
/// given to one as an output must be no part of an input.
pub struct MetalSlice<'a, T = f32> {
    memory: Memory<'a>,
    /// Bytes.
    offset: usize,
    len: usize,
    of: PhantomData<T>,
}

impl<T> Clone for MetalSlice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for MetalSlice<'_, T> {}

impl<'a> MetalSlice<'a> {
    /// Values `start` to `end` of a candle tensor's memory, which has as many.
    #[cfg(target_os = "macos")]
    pub(crate) fn of(memory: &'a candle_metal_kernels::metal::Buffer, start: usize, end: usize) -> Self {
        Self { memory, offset: start * size_of::<f32>(), len: end.saturating_sub(start), of: PhantomData }
    }

    /// A CPU tensor's memory, which is the emulator's.
    #[cfg(not(target_os = "macos"))]
    pub(crate) fn emulated(values: &'a [f32]) -> Self {
        Self { memory: Memory::of(values), offset: 0, len: values.len(), of: PhantomData }
    }

    /// A CPU tensor's memory, written to.
    #[cfg(not(target_os = "macos"))]
    pub(crate) fn emulated_mut(values: &'a mut [f32]) -> Self {
        let len = values.len();
        Self { memory: Memory::of_mut(values), offset: 0, len, of: PhantomData }
    }
}

impl<'a, T: Pod> MetalSlice<'a, T> {
    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part; what the range has outside of it is not there.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Self {
        let start = match range.start_bound() {
            Bound::Included(n) => *n,
            Bound::Excluded(n) => n.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(n) => n.saturating_add(1),
            Bound::Excluded(n) => *n,
            Bound::Unbounded => self.len,
        };
        let start = start.min(self.len);
        let len = end.clamp(start, self.len) - start;
        Self { offset: self.offset + start * size_of::<T>(), len, ..*self }
    }

    /// For a kernel that reads it.
    pub(super) fn input(&self) -> Binding<'a> {
        Binding { memory: self.memory, offset: self.offset, written: false }
    }

    /// For a kernel that writes it, or reads and writes it.
    pub(super) fn output(&self) -> Binding<'a> {
        Binding { written: true, ..self.input() }
    }

    /// Whether it begins where kernels can load 16 bytes at a time; memory itself does.
    pub(super) fn is_aligned(&self) -> bool {
        self.offset.is_multiple_of(16)
    }
}

impl Metal {
    /// Zeroed memory for `len` values; `what` names it in errors.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if the GPU's recommended working set has no room for it.
    pub fn zeroed<T: Pod>(&self, len: usize, what: &str) -> Result<MetalBuffer<T>> {
        // Metal refuses empty buffers.
        let len = len.max(1);
        let (allocated, chip) = (self.gpu.allocated(), &self.chip);
        let short = |bytes| failure::out_of_memory(what, bytes, allocated, chip.working_set, chip.ordinal);
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| short(usize::MAX))?;
        if bytes > chip.largest_buffer {
            let reason = format!(
                "the largest buffer of {} has {}; use a smaller model or context, or --device cpu",
                chip.name,
                failure::size(chip.largest_buffer)
            );
            return Err(failure::unavailable(format!("{} of memory for {what}", failure::size(bytes)), reason));
        }
        if allocated.saturating_add(bytes) > chip.working_set {
            return Err(short(bytes));
        }
        let memory = self.gpu.zeroed(bytes).ok_or_else(|| short(bytes))?;
        Ok(MetalBuffer { memory, len, of: PhantomData })
    }

    /// A copy of `values` in memory of its own.
    ///
    /// # Errors
    /// As [`Metal::zeroed`].
    pub fn upload<T: Pod>(&self, values: &[T], what: &str) -> Result<MetalBuffer<T>> {
        let mut memory = self.zeroed(values.len(), what)?;
        // No kernel knows this memory yet.
        copy(values, &mut memory, 0);
        Ok(memory)
    }

    /// Copies `values` over those from `at` on. Waits for kernels that may still use the memory.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if they do not fit, [`crate::Error::Device`] for what went wrong on the device.
    pub fn copy_in<T: Pod>(&self, values: &[T], to: &mut MetalBuffer<T>, at: usize) -> Result<()> {
        if at.checked_add(values.len()).is_none_or(|end| end > to.len) {
            let reason = format!("{} values at {at} of {}", values.len(), to.len);
            return Err(shape("upload", reason));
        }
        self.settle()?;
        copy(values, to, at);
        Ok(())
    }

    /// A copy of the first `len` values; waits for all kernels.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if there are fewer, [`crate::Error::Device`] for what went wrong on the device.
    pub fn download<T: Pod>(&self, from: &MetalBuffer<T>, len: usize) -> Result<Vec<T>> {
        if len > from.len {
            return Err(shape("download", format!("{len} values of {}", from.len)));
        }
        self.synchronize()?;
        let mut values = vec![T::zeroed(); len];
        let bytes = bytemuck::cast_slice_mut::<T, u8>(&mut values);
        // SAFETY: the memory holds `from.len` ≥ `len` values of T, which is plain data; kernels have ended and no other copy
        // runs, as those take `&mut`.
        unsafe { std::ptr::copy_nonoverlapping(from.memory.contents().as_ptr(), bytes.as_mut_ptr(), bytes.len()) };
        Ok(values)
    }

    /// Waits for kernels, if there may be any on their way.
    pub(super) fn settle(&self) -> Result<()> {
        if self.busy.load(Ordering::Relaxed) { self.synchronize() } else { Ok(()) }
    }
}

/// Copies to memory that no kernel uses meanwhile and that is as long.
fn copy<T: Pod>(values: &[T], to: &mut MetalBuffer<T>, at: usize) {
    debug_assert!(at + values.len() <= to.len);
    let bytes = bytemuck::cast_slice::<T, u8>(values);
    // SAFETY: callers checked that the memory has room for the values behind `at`; it is ours alone (`&mut`) and no kernel's.
    unsafe {
        let to = to.memory.contents().add(at * size_of::<T>());
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len());
    }
}

/// Writing without waiting: for memory that no kernel on its way uses, which only its keeper can know.
impl<T: Pod> MetalBuffer<T> {
    /// Replaces the first values.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if there are more than fit.
    pub(super) fn write(&mut self, values: &[T]) -> Result<()> {
        if values.len() > self.len {
            return Err(shape("upload", format!("{} values into {}", values.len(), self.len)));
        }
        copy(values, self, 0);
        Ok(())
    }

    /// Zeroes a part.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for a part that is not there.
    pub(super) fn clear(&mut self, range: std::ops::Range<usize>) -> Result<()> {
        if range.start > range.end || range.end > self.len {
            return Err(shape("clear", format!("{range:?} of {}", self.len)));
        }
        let bytes = range.len() * size_of::<T>();
        // SAFETY: the range is inside the memory, which is ours alone (`&mut`) and by the caller's word no kernel's; zero is
        // a value of plain data.
        unsafe { self.memory.contents().add(range.start * size_of::<T>()).write_bytes(0, bytes) };
        Ok(())
    }
}

impl MetalBuffer<u8> {
    /// Calls `fill` with the bytes of memory that no kernel has been given yet.
    pub(super) fn fill(&mut self, fill: impl FnOnce(&mut [u8])) {
        // SAFETY: the memory has that many bytes, zeroed when it was made; it is borrowed for the call, and by the caller's
        // word no kernel uses it.
        fill(unsafe { std::slice::from_raw_parts_mut(self.memory.contents().as_ptr(), self.len) });
    }

    pub(super) fn owned(&self) -> &Owned {
        &self.memory
    }
}
