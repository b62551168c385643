//! The choice of the device, made once, at load.

use super::attention::{AttentionShape, RopeTable};
use super::batch::{Batch, HostBatch};
use super::cpu::{Cpu, CpuDense, CpuKv, CpuLowRank, CpuOptions, CpuTernary, Segment};
use super::dense_type::DenseType;
use super::host::MappedFile;
use super::layout::{Arrangement, LayoutId};
use super::rope::Rope;
use crate::ternary::PackedTernary;
use crate::{Error, Result};
use candle_core::Device;
use std::ops::Range;
use std::sync::Arc;

/// Where to run, as `--device` takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The fastest device that is built in and present.
    #[default]
    Auto,
    /// This CPU.
    Cpu,
    /// An NVIDIA GPU by its ordinal.
    Cuda(usize),
    /// An Apple GPU by its ordinal.
    Metal(usize),
}

impl std::str::FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let bad = || Error::request("--device", format!("'{s}' is not one of auto, cpu, cuda, cuda:N, metal, metal:N"));
        let (kind, ordinal) = s.split_once(':').map_or((s, Ok(0)), |(kind, n)| (kind, n.parse()));
        match (kind, ordinal) {
            ("auto", _) if kind == s => Ok(Self::Auto),
            ("cpu", _) if kind == s => Ok(Self::Cpu),
            ("cuda", Ok(n)) => Ok(Self::Cuda(n)),
            ("metal", Ok(n)) => Ok(Self::Metal(n)),
            _ => Err(bad()),
        }
    }
}

/// The candle device for a choice.
///
/// # Errors
/// [`Error::Unavailable`] if the device was asked for by name and is not built in or not present.
pub fn select_device(choice: DeviceChoice) -> Result<Device> {
    match choice {
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Cuda(_) => Err(not_built("cuda")),
        DeviceChoice::Metal(_) => Err(not_built("metal")),
    }
}

/// The error for a device that this build has no kernels for.
fn not_built(device: &'static str) -> Error {
    Error::Unavailable {
        what: format!("device {device}"),
        reason: "this build has no kernels for it; use --device cpu or --device auto".into(),
    }
}

/// A device with its kernels: packs weights for them and runs operations on them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Backend {
    device: Device,
    cpu: Arc<Cpu>,
}

impl Backend {
    /// The backend of a candle device, with kernel and threads as `options` say.
    ///
    /// # Errors
    /// [`Error::Unavailable`] for a device or kernel that is not there, [`Error::Request`] for a bad thread count.
    pub fn new(device: &Device, options: CpuOptions) -> Result<Self> {
        let cpu = Arc::new(Cpu::new(options)?);
        Self::with_cpu(device, cpu)
    }

    /// The backend of a candle device with everything decided from this machine; threads are shared by all
    /// backends made this way.
    ///
    /// # Errors
    /// As [`Backend::new`].
    pub fn for_device(device: &Device) -> Result<Self> {
        Self::with_cpu(device, Cpu::shared()?)
    }

    fn with_cpu(device: &Device, cpu: Arc<Cpu>) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self { device: device.clone(), cpu }),
            Device::Cuda(_) => Err(not_built("cuda")),
            Device::Metal(_) => Err(not_built("metal")),
        }
    }

    /// The candle device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The host's CPU backend, which also serves what happens before weights reach the device.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// Packs weights that share their input for this device's kernel.
    ///
    /// # Errors
    /// [`Error::Shape`] for weights that cannot be arranged so, [`Error::SelfCheck`] if the kernel is wrong here.
    pub fn pack(&self, weights: &[PackedTernary], arrangement: Arrangement) -> Result<TernaryWeight> {
        self.cpu.pack(weights, arrangement).map(TernaryWeight::Cpu)
    }

    /// An empty batch for up to `capacity` tokens.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if memory is short.
    pub fn batch(&self, capacity: usize) -> Result<Batch> {
        HostBatch::new(capacity).map(Batch::Cpu)
    }

    /// The angles of the rotary embedding where this device's kernels read them.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if memory is short.
    pub fn rope(&self, table: RopeTable) -> Result<Rope> {
        Ok(Rope::Cpu(table))
    }

    /// A dense matrix in a mapped file, which stays there on the CPU.
    ///
    /// # Errors
    /// [`Error::Shape`] if the range does not hold the matrix.
    pub fn dense_mapped(
        &self,
        dtype: DenseType,
        rows: usize,
        cols: usize,
        file: Arc<MappedFile>,
        range: Range<usize>,
    ) -> Result<DenseWeight> {
        CpuDense::mapped(dtype, rows, cols, file, range).map(DenseWeight::Cpu)
    }

    /// A dense matrix filled by `fill` (row-major, little-endian).
    ///
    /// # Errors
    /// [`Error::Unavailable`] if memory is short.
    pub fn dense_filled(
        &self,
        dtype: DenseType,
        rows: usize,
        cols: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<DenseWeight> {
        CpuDense::owned(dtype, rows, cols, fill).map(DenseWeight::Cpu)
    }

    /// A low-rank update `scaling · B · A`, from row-major A `[rank, cols]` and B `[rows, rank]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `a` or `b` is no such matrix, [`Error::Unavailable`] if memory is short.
    pub fn low_rank(&self, rank: usize, a: &[f32], b: &[f32], scaling: f32) -> Result<LowRankWeight> {
        CpuLowRank::pack(rank, a, b, scaling).map(LowRankWeight::Cpu)
    }

    /// Keys and values of one layer.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if memory is short.
    pub fn kv_layer(&self, dtype: DenseType, shape: AttentionShape, slots: usize, positions: usize) -> Result<KvLayer> {
        CpuKv::new(dtype, shape, slots, positions).map(KvLayer::Cpu)
    }
}

/// Ternary weights packed for a device's kernel.
#[derive(Debug)]
#[non_exhaustive]
pub enum TernaryWeight {
    /// For this CPU.
    Cpu(CpuTernary),
}

impl TernaryWeight {
    /// Output features of all stacked weights.
    pub fn rows(&self) -> usize {
        match self {
            Self::Cpu(w) => w.rows(),
        }
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        match self {
            Self::Cpu(w) => w.cols(),
        }
    }

    /// The stacked weights.
    pub fn segments(&self) -> &[Segment] {
        match self {
            Self::Cpu(w) => w.segments(),
        }
    }

    /// Bytes that a decode step reads.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Cpu(w) => w.bytes(),
        }
    }

    /// The packed bytes, where this machine's memory holds them.
    pub fn host_bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Cpu(w) => Some(w.data()),
        }
    }

    /// What the weights were packed for.
    pub fn arrangement(&self) -> Arrangement {
        match self {
            Self::Cpu(w) => w.arrangement(),
        }
    }

    /// The layout that the weights were packed for.
    pub fn layout(&self) -> LayoutId {
        match self {
            Self::Cpu(w) => w.layout(),
        }
    }
}

/// A dense matrix on a device.
#[derive(Debug)]
#[non_exhaustive]
pub enum DenseWeight {
    /// In this machine's memory.
    Cpu(CpuDense),
}

impl DenseWeight {
    /// Output features, or embedding entries.
    pub fn rows(&self) -> usize {
        match self {
            Self::Cpu(w) => w.rows(),
        }
    }

    /// Input features, or embedding width.
    pub fn cols(&self) -> usize {
        match self {
            Self::Cpu(w) => w.cols(),
        }
    }

    /// Stored type.
    pub fn dtype(&self) -> DenseType {
        match self {
            Self::Cpu(w) => w.dtype(),
        }
    }

    /// Stored bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Cpu(w) => w.bytes().len(),
        }
    }

    /// The values, where this machine's memory holds them.
    pub fn host_bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Cpu(w) => Some(w.bytes()),
        }
    }
}

/// A low-rank update on a device.
#[derive(Debug)]
#[non_exhaustive]
pub enum LowRankWeight {
    /// In this machine's memory.
    Cpu(CpuLowRank),
}

impl LowRankWeight {
    /// Inner dimension.
    pub fn rank(&self) -> usize {
        match self {
            Self::Cpu(w) => w.rank(),
        }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        match self {
            Self::Cpu(w) => w.rows(),
        }
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        match self {
            Self::Cpu(w) => w.cols(),
        }
    }

    /// Stored bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Cpu(w) => w.data().iter().map(|d| d.len()).sum(),
        }
    }

    /// The stored bytes of both matrices, where this machine's memory holds them.
    pub fn host_bytes(&self) -> Option<[&[u8]; 2]> {
        match self {
            Self::Cpu(w) => Some(w.data()),
        }
    }
}

/// One layer's keys and values on a device.
#[derive(Debug)]
#[non_exhaustive]
pub enum KvLayer {
    /// In this machine's memory.
    Cpu(CpuKv),
}
