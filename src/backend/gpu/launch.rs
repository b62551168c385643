//! Which kernel runs how.

use super::shape;
use crate::Result;

/// Most blocks of a grid in its second and third dimension.
pub(crate) const MAX_GRID_YZ: usize = 65_535;

/// A launch of a kernel, but for what it is given.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Blocks (Metal's threadgroups).
    pub grid: (usize, usize, usize),
    /// Threads of a block.
    pub threads: usize,
    /// Bytes of shared memory of a block (Metal's threadgroup memory), beside what the kernel declares itself.
    pub shared: usize,
    /// Bytes of device memory that it moves, for the profile.
    pub bytes: usize,
}

impl Launch {
    /// A launch without shared memory.
    pub(crate) fn new(kernel: &'static str, grid: (usize, usize, usize), threads: usize) -> Self {
        Self { kernel, grid, threads, shared: 0, bytes: 0 }
    }

    /// With shared memory.
    pub(crate) fn shared(self, shared: usize) -> Self {
        Self { shared, ..self }
    }

    /// With the bytes that it moves.
    pub(crate) fn bytes(self, bytes: usize) -> Self {
        Self { bytes, ..self }
    }

    /// The grid; refuses what no GPU can run, or this one with up to `most` bytes of shared memory in a block.
    pub(crate) fn checked(&self, most: usize) -> Result<[u32; 3]> {
        let Self { kernel, grid: (x, y, z), threads, shared, .. } = *self;
        let fits = (1..=i32::MAX as usize).contains(&x)
            && (1..=MAX_GRID_YZ).contains(&y)
            && (1..=MAX_GRID_YZ).contains(&z)
            && (32..=1024).contains(&threads)
            && threads.is_multiple_of(32)
            // Metal's unit; kernels keep vectors of as many bytes there.
            && shared.is_multiple_of(16)
            && shared <= most;
        if !fits {
            let reason = format!(
                "{kernel}: no GPU runs a grid of {x} × {y} × {z} with blocks of {threads} threads and {shared} bytes of \
                 shared memory (here at most {most})"
            );
            return Err(shape("launch", reason));
        }
        Ok([x as u32, y as u32, z as u32])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_launches_are_refused_by_name() {
        let good = Launch::new("k", (7, 2, 3), 256).shared(48 << 10);
        assert_eq!(good.checked(64 << 10).unwrap(), [7, 2, 3]);
        for bad in [
            Launch { grid: (0, 1, 1), ..good },
            Launch { grid: (1, 65_536, 1), ..good },
            Launch { grid: (1, 1, 65_536), ..good },
            Launch { grid: (1 << 31, 1, 1), ..good },
            Launch { threads: 1056, ..good },
            Launch { threads: 33, ..good },
            Launch { shared: (64 << 10) + 16, ..good },
            Launch { shared: 8, ..good },
        ] {
            let message = bad.checked(64 << 10).unwrap_err().to_string();
            assert!(message.contains("k: "), "{message}");
        }
    }
}
