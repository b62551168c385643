//! What is known of a GPU, and the least that the kernels need.

use super::failure;
use super::kernels::MAX_THREADGROUP_MEMORY;
use crate::Result;

/// A GPU as Metal describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetalChip {
    /// Marketing name.
    pub name: String,
    /// Architecture, as `applegpu_g13g`; its last letter tells the size: p, g, s (Max), d (Ultra).
    pub architecture: String,
    /// Metal's number of this GPU.
    pub ordinal: usize,
    /// Whether it multiplies matrices in simdgroups: Apple7, M1 and later.
    pub has_simdgroup_matrix: bool,
    /// Whether it shares memory with the CPU.
    pub unified_memory: bool,
    /// Most bytes of threadgroup memory that a threadgroup can have.
    pub threadgroup_memory: usize,
    /// Bytes of the largest buffer.
    pub largest_buffer: usize,
    /// Bytes of memory that it should be given at most, by all processes.
    pub working_set: usize,
}

impl MetalChip {
    /// Refuses a GPU that the kernels do not run on.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`], with the reason.
    pub fn usable(&self) -> Result<()> {
        let lacks = match () {
            () if !self.has_simdgroup_matrix || !self.unified_memory => {
                "the kernels need an Apple GPU of the M1 or later".into()
            }
            () if self.threadgroup_memory < MAX_THREADGROUP_MEMORY => {
                let has = self.threadgroup_memory;
                format!("the kernels need {MAX_THREADGROUP_MEMORY} bytes of threadgroup memory, and it has {has}")
            }
            () => return Ok(()),
        };
        Err(failure::unavailable(format!("{} (GPU {})", self.name, self.ordinal), format!("{lacks}; use --device cpu")))
    }

    /// Cores, about: Metal does not tell how many there are, only which size of chip it is.
    pub(super) fn cores(&self) -> usize {
        match self.architecture.chars().last() {
            Some('p') => 6,
            Some('s') => 32,
            Some('d') => 64,
            // M1 to M4, 7 to 10; the Pro, 14 to 20.
            _ => 12,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn m1() -> MetalChip {
        MetalChip {
            name: "Apple M1".into(),
            architecture: "applegpu_g13g".into(),
            ordinal: 0,
            has_simdgroup_matrix: true,
            unified_memory: true,
            threadgroup_memory: 32 << 10,
            largest_buffer: 4 << 30,
            working_set: 5 << 30,
        }
    }

    #[test]
    fn other_gpus_are_refused_by_name() {
        m1().usable().unwrap();
        let amd = MetalChip { name: "AMD Radeon".into(), has_simdgroup_matrix: false, unified_memory: false, ..m1() };
        let message = amd.usable().unwrap_err().to_string();
        assert!(
            message.contains("AMD Radeon") && message.contains("M1") && message.contains("--device cpu"),
            "{message}"
        );
        assert!(MetalChip { threadgroup_memory: 16 << 10, ..m1() }.usable().is_err());
        let cores = |architecture: &str| MetalChip { architecture: architecture.into(), ..m1() }.cores();
        assert_eq!(["applegpu_g14s", "applegpu_g14d", "applegpu_g16g", "?"].map(cores), [32, 64, 12, 12]);
    }
}
