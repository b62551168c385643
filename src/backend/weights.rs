//! What a model keeps on a device: weights and caches.

#[cfg(any(feature = "cuda", feature = "metal"))]
use super::any::elsewhere;
use super::any::{on_any, on_cpu, on_gpu};
use super::cpu::{CpuDense, CpuKv, CpuLowRank, CpuTernary, Segment};
#[cfg(feature = "cuda")]
use super::cuda::{CudaDense, CudaKv, CudaLowRank, CudaTernary};
use super::dense_type::DenseType;
use super::layout::{Arrangement, LayoutId};
#[cfg(feature = "metal")]
use super::metal::{MetalDense, MetalKv, MetalLowRank, MetalTernary};
use crate::Result;

/// Ternary weights packed for a device's kernel.
#[derive(Debug)]
#[non_exhaustive]
pub enum TernaryWeight {
    /// For this CPU.
    Cpu(CpuTernary),
    /// For this NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda(CudaTernary),
    /// For this Apple GPU.
    #[cfg(feature = "metal")]
    Metal(MetalTernary),
}

impl TernaryWeight {
    on_cpu!("weight", CpuTernary);
    on_gpu!("weight", CudaTernary, MetalTernary);

    /// Output features of all stacked weights.
    pub fn rows(&self) -> usize {
        on_any!(self, w => w.rows())
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        on_any!(self, w => w.cols())
    }

    /// The stacked weights.
    pub fn segments(&self) -> &[Segment] {
        on_any!(self, w => w.segments())
    }

    /// Bytes that a decode step reads.
    pub fn bytes(&self) -> usize {
        on_any!(self, w => w.bytes())
    }

    /// The packed bytes, where this machine's memory holds them.
    pub fn host_bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Cpu(w) => Some(w.data()),
            #[cfg(any(feature = "cuda", feature = "metal"))]
            _ => None,
        }
    }

    /// What the weights were packed for.
    pub fn arrangement(&self) -> Arrangement {
        on_any!(self, w => w.arrangement())
    }

    /// The layout that the weights were packed for.
    pub fn layout(&self) -> LayoutId {
        match self {
            Self::Cpu(w) => w.layout(),
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => LayoutId::CudaTiles,
            #[cfg(feature = "metal")]
            Self::Metal(_) => LayoutId::MetalTiles,
        }
    }
}

/// A dense matrix on a device.
#[derive(Debug)]
#[non_exhaustive]
pub enum DenseWeight {
    /// In this machine's memory.
    Cpu(CpuDense),
    /// In an NVIDIA GPU's memory.
    #[cfg(feature = "cuda")]
    Cuda(CudaDense),
    /// In an Apple GPU's memory.
    #[cfg(feature = "metal")]
    Metal(MetalDense),
}

impl DenseWeight {
    on_cpu!("dense weight", CpuDense);
    on_gpu!("dense weight", CudaDense, MetalDense);

    /// Output features, or embedding entries.
    pub fn rows(&self) -> usize {
        on_any!(self, w => w.rows())
    }

    /// Input features, or embedding width.
    pub fn cols(&self) -> usize {
        on_any!(self, w => w.cols())
    }

    /// Stored type.
    pub fn dtype(&self) -> DenseType {
        on_any!(self, w => w.dtype())
    }

    /// Stored bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Cpu(w) => w.bytes().len(),
            #[cfg(feature = "cuda")]
            Self::Cuda(w) => w.bytes(),
            #[cfg(feature = "metal")]
            Self::Metal(w) => w.bytes(),
        }
    }

    /// The values, where this machine's memory holds them.
    pub fn host_bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Cpu(w) => Some(w.bytes()),
            #[cfg(any(feature = "cuda", feature = "metal"))]
            _ => None,
        }
    }
}

/// A low-rank update on a device.
#[derive(Debug)]
#[non_exhaustive]
pub enum LowRankWeight {
    /// In this machine's memory.
    Cpu(CpuLowRank),
    /// In an NVIDIA GPU's memory.
    #[cfg(feature = "cuda")]
    Cuda(CudaLowRank),
    /// In an Apple GPU's memory.
    #[cfg(feature = "metal")]
    Metal(MetalLowRank),
}

impl LowRankWeight {
    on_cpu!("low-rank update", CpuLowRank);
    on_gpu!("low-rank update", CudaLowRank, MetalLowRank);

    /// Inner dimension.
    pub fn rank(&self) -> usize {
        on_any!(self, w => w.rank())
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        on_any!(self, w => w.rows())
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        on_any!(self, w => w.cols())
    }

    /// Stored bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Cpu(w) => w.data().iter().map(|d| d.len()).sum(),
            #[cfg(feature = "cuda")]
            Self::Cuda(w) => w.bytes(),
            #[cfg(feature = "metal")]
            Self::Metal(w) => w.bytes(),
        }
    }

    /// The stored bytes of both matrices, where this machine's memory holds them.
    pub fn host_bytes(&self) -> Option<[&[u8]; 2]> {
        match self {
            Self::Cpu(w) => Some(w.data()),
            #[cfg(any(feature = "cuda", feature = "metal"))]
            _ => None,
        }
    }
}

/// One layer's keys and values on a device.
#[derive(Debug)]
#[non_exhaustive]
pub enum KvLayer {
    /// In this machine's memory.
    Cpu(CpuKv),
    /// In an NVIDIA GPU's memory.
    #[cfg(feature = "cuda")]
    Cuda(CudaKv),
    /// In an Apple GPU's memory.
    #[cfg(feature = "metal")]
    Metal(MetalKv),
}

impl KvLayer {
    /// The cache in this machine's memory.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if it lies elsewhere.
    pub(crate) fn cpu_mut(&mut self) -> Result<&mut CpuKv> {
        match self {
            Self::Cpu(kv) => Ok(kv),
            #[cfg(any(feature = "cuda", feature = "metal"))]
            _ => Err(elsewhere("KV cache", "the CPU")),
        }
    }

    /// The cache on an NVIDIA GPU.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if it lies elsewhere.
    #[cfg(feature = "cuda")]
    pub(crate) fn cuda_mut(&mut self) -> Result<&mut CudaKv> {
        match self {
            Self::Cuda(kv) => Ok(kv),
            _ => Err(elsewhere("KV cache", "the GPU")),
        }
    }

    /// The cache on an Apple GPU.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if it lies elsewhere.
    #[cfg(feature = "metal")]
    pub(crate) fn metal_mut(&mut self) -> Result<&mut MetalKv> {
        match self {
            Self::Metal(kv) => Ok(kv),
            _ => Err(elsewhere("KV cache", "the GPU")),
        }
    }
}
