//! The few calls that reach a GPU: finding one, memory, launches, waiting.
//!
//! On macOS they are Metal's, through candle's device, so that its own operations and ours are ordered by one tracker of
//! hazards. Elsewhere they are the emulator's (`kernels/README.md`), which runs the same kernels on the CPU: its device
//! memory is this machine's, so candle's tensors on it are those of the CPU. Nothing above this folder knows which it is.

#[cfg(target_os = "macos")]
mod apple;
#[cfg(not(target_os = "macos"))]
mod emulated;

#[cfg(target_os = "macos")]
pub(super) use apple::{Gpu, Memory, Owned, found, open};
#[cfg(not(target_os = "macos"))]
pub(super) use emulated::{Gpu, Memory, Owned, found, open};

/// Memory that a kernel is given at the index of its place in the list.
#[derive(Clone, Copy)]
pub(super) struct Binding<'a> {
    pub memory: Memory<'a>,
    /// Bytes from the memory's start.
    pub offset: usize,
    /// Whether the kernel writes there; later kernels that are given the memory then wait for it. The emulator's do anyway.
    #[cfg_attr(not(target_os = "macos"), allow(dead_code))]
    pub written: bool,
}

/// A kernel's name and the library that it is in, by its number in [`super::kernels`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Kernel {
    pub name: &'static str,
    pub library: usize,
}

/// All that a launch takes.
pub(super) struct Dispatch<'a> {
    pub kernel: Kernel,
    pub bindings: &'a [Binding<'a>],
    /// Bytes of the parameters, which come after the bindings.
    pub params: &'a [u8],
    /// Bytes of threadgroup memory; 0 for none.
    pub threadgroup: usize,
    /// Threadgroups.
    pub grid: [usize; 3],
    /// Threads of a threadgroup.
    pub threads: usize,
}
