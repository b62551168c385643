//! The angles of the rotary embedding where kernels read them.

use super::any::{on_any, on_cpu, on_gpu};
use super::attention::RopeTable;
#[cfg(feature = "cuda")]
use super::cuda::CudaRope;
#[cfg(feature = "metal")]
use super::metal::MetalRope;

/// The angles of the rotary embedding on a device.
#[derive(Debug)]
#[non_exhaustive]
pub enum Rope {
    /// In this machine's memory.
    Cpu(RopeTable),
    /// In an NVIDIA GPU's memory.
    #[cfg(feature = "cuda")]
    Cuda(CudaRope),
    /// In an Apple GPU's memory.
    #[cfg(feature = "metal")]
    Metal(MetalRope),
}

impl Rope {
    /// Positions that there are angles for.
    pub fn positions(&self) -> usize {
        on_any!(self, table => table.positions())
    }

    /// Half the rotated elements of a head.
    pub fn half_dim(&self) -> usize {
        on_any!(self, table => table.half_dim())
    }

    on_cpu!("rotary angles", RopeTable);
    on_gpu!("rotary angles", CudaRope, MetalRope);
}
