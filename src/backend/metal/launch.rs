//! Launching a kernel.

use super::gpu::{Binding, Dispatch};
use super::kernels::{self, MAX_THREADGROUP_MEMORY};
use super::{Metal, shape};
use crate::Result;
use bytemuck::Pod;
use std::sync::atomic::Ordering;

/// Most threadgroups of a grid in its second and third dimension.
pub(super) const MAX_GRID_YZ: usize = 65_535;

/// Which kernel runs how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Launch {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Threadgroups.
    pub grid: (usize, usize, usize),
    /// Threads of a threadgroup.
    pub threads: usize,
    /// Bytes of threadgroup memory.
    pub threadgroup: usize,
    /// Bytes of device memory that it moves, for the profile.
    pub bytes: usize,
}

impl Launch {
    /// A launch without threadgroup memory.
    pub(super) fn new(kernel: &'static str, grid: (usize, usize, usize), threads: usize) -> Self {
        Self { kernel, grid, threads, threadgroup: 0, bytes: 0 }
    }

    /// With threadgroup memory.
    pub(super) fn threadgroup(self, threadgroup: usize) -> Self {
        Self { threadgroup, ..self }
    }

    /// With the bytes that it moves.
    pub(super) fn bytes(self, bytes: usize) -> Self {
        Self { bytes, ..self }
    }

    /// The grid; refuses what no GPU can run.
    fn checked(&self) -> Result<[usize; 3]> {
        let Self { kernel, grid: (x, y, z), threads, threadgroup, .. } = *self;
        let fits = (1..=i32::MAX as usize).contains(&x)
            && (1..=MAX_GRID_YZ).contains(&y)
            && (1..=MAX_GRID_YZ).contains(&z)
            && (32..=1024).contains(&threads)
            && threads.is_multiple_of(32)
            && threadgroup.is_multiple_of(16)
            && threadgroup <= MAX_THREADGROUP_MEMORY;
        if !fits {
            let reason = format!(
                "{kernel}: no GPU runs a grid of {x} × {y} × {z} with {threads} threads and {threadgroup} bytes of memory \
                 in a threadgroup (at most {MAX_THREADGROUP_MEMORY})"
            );
            return Err(shape("launch", reason));
        }
        Ok([x, y, z])
    }
}

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
        let grid = launch.checked()?;
        let Launch { threads, threadgroup, .. } = launch;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_launches_are_refused_by_name() {
        let good = Launch::new("k", (7, 2, 3), 256).threadgroup(32 << 10);
        assert_eq!(good.checked().unwrap(), [7, 2, 3]);
        for bad in [
            Launch { grid: (0, 1, 1), ..good },
            Launch { grid: (1, 65_536, 1), ..good },
            Launch { grid: (1, 1, 65_536), ..good },
            Launch { grid: (1 << 31, 1, 1), ..good },
            Launch { threads: 1056, ..good },
            Launch { threads: 33, ..good },
            Launch { threadgroup: (32 << 10) + 16, ..good },
            Launch { threadgroup: 8, ..good },
        ] {
            let message = bad.checked().unwrap_err().to_string();
            assert!(message.contains("k: "), "{message}");
        }
    }
}
