//! Launching a kernel.

use super::Metal;
use super::driver::{Binding, Dispatch};
use super::kernels::{self, MAX_THREADGROUP_MEMORY};
use crate::Result;
use crate::backend::gpu::Launch;
use bytemuck::Pod;
use std::sync::atomic::Ordering;

impl Metal {
    /// Launches a kernel after those before it.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for a grid or threadgroup that cannot be, [`crate::Error::Device`] with the kernel's name for
    /// what Metal refuses.
    ///
    /// # Safety
    /// `bindings` are the kernel's, in number, order and type, `params` are its parameters, and the memory of each binding
    /// is as large as parameters and grid make it.
    pub(super) unsafe fn launch(&self, launch: Launch, bindings: &[Binding<'_>], params: &impl Pod) -> Result<()> {
        let grid = launch.checked(MAX_THREADGROUP_MEMORY)?.map(|n| n as usize);
        let Launch { threads, shared: threadgroup, .. } = launch;
        let kernel = kernels::kernel(launch.kernel)?;
        let dispatch = Dispatch { kernel, bindings, params: bytemuck::bytes_of(params), threadgroup, grid, threads };
        if self.profile.is_on() {
            // SAFETY: the caller's.
            let seconds = unsafe { self.gpu.dispatch_timed(&dispatch) }?;
            self.profile.add(launch.kernel, launch.bytes, seconds);
            return Ok(());
        }
        // SAFETY: the caller's.
        unsafe { self.gpu.dispatch(&dispatch) }?;
        self.busy.store(true, Ordering::Relaxed);
        Ok(())
    }
}
