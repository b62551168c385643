//! The choice of the device, made once, at load.

use super::attention::{AttentionShape, RopeTable};
use super::batch::{Batch, HostBatch};
use super::cpu::{Cpu, CpuDense, CpuKv, CpuLowRank, CpuOptions};
#[cfg(feature = "cuda")]
use super::cuda::{self, Cuda, CudaBatch, CudaDense, CudaKv, CudaLowRank, CudaRope};
use super::dense_type::DenseType;
use super::found::auto_device;
use super::host::MappedFile;
use super::layout::Arrangement;
#[cfg(feature = "metal")]
use super::metal::{self, Metal, MetalBatch, MetalDense, MetalKv, MetalLowRank, MetalRope};
use super::profile::OpProfile;
use super::rope::Rope;
use super::steps::Steps;
use super::weights::{DenseWeight, KvLayer, LowRankWeight, TernaryWeight};
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

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => write!(f, "auto"),
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
            Self::Metal(n) => write!(f, "metal:{n}"),
        }
    }
}

/// The candle device for a choice; [`DeviceChoice::Auto`] is what [`auto_device`] says.
///
/// # Errors
/// [`Error::Unavailable`] if the device was asked for by name and is not built in or not present.
pub fn select_device(choice: DeviceChoice) -> Result<Device> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto => select_device(auto_device().0),
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(ordinal) => cuda::open(ordinal),
        #[cfg(not(feature = "cuda"))]
        DeviceChoice::Cuda(_) => Err(not_built("cuda", CUDA_REMEDY)),
        #[cfg(feature = "metal")]
        DeviceChoice::Metal(ordinal) => metal::open(ordinal),
        #[cfg(not(feature = "metal"))]
        DeviceChoice::Metal(_) => Err(not_built("metal", METAL_REMEDY)),
    }
}

/// What to do about a build without kernels for NVIDIA GPUs.
#[cfg(not(feature = "cuda"))]
pub(super) const CUDA_REMEDY: &str = "build with --features cuda, or ";

/// What to do about a build without kernels for Apple GPUs.
#[cfg(not(feature = "metal"))]
pub(super) const METAL_REMEDY: &str = "on macOS, build with --features metal; ";

/// The error for a device that this build has no kernels for.
#[cfg(not(all(feature = "cuda", feature = "metal")))]
pub(super) fn not_built(device: &'static str, remedy: &str) -> Error {
    Error::Unavailable {
        what: format!("device {device}"),
        reason: format!("this build has no kernels for it; {remedy}use --device cpu or --device auto"),
    }
}

/// A device with its kernels: packs weights for them and runs operations on them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Backend {
    device: Device,
    cpu: Arc<Cpu>,
    #[cfg(feature = "cuda")]
    cuda: Option<Arc<Cuda>>,
    #[cfg(feature = "metal")]
    metal: Option<Arc<Metal>>,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    graphs: bool,
    /// Times of the CPU's operations.
    pub(super) ops: Arc<OpProfile>,
}

impl Backend {
    /// The backend of a candle device, with kernel and threads of the CPU as `options` say.
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
        let backend = Self {
            device: device.clone(),
            cpu,
            #[cfg(feature = "cuda")]
            cuda: None,
            #[cfg(feature = "metal")]
            metal: None,
            graphs: true,
            ops: Arc::default(),
        };
        match device {
            Device::Cpu => Ok(backend),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self { cuda: Some(Cuda::shared(device)?), ..backend }),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => Err(not_built("cuda", CUDA_REMEDY)),
            #[cfg(feature = "metal")]
            Device::Metal(device) => {
                let metal = Some(Metal::shared(device)?);
                // The emulator's memory is this machine's, so its tensors are the CPU's.
                #[cfg(not(target_os = "macos"))]
                let backend = Self { device: Device::Cpu, ..backend };
                Ok(Self { metal, ..backend })
            }
            #[cfg(not(feature = "metal"))]
            Device::Metal(_) => Err(not_built("metal", METAL_REMEDY)),
        }
    }

    /// Whether decode steps are recorded and replayed where the device can; true unless said otherwise.
    pub fn with_graphs(self, graphs: bool) -> Self {
        Self { graphs, ..self }
    }

    /// The GPU.
    ///
    /// # Errors
    /// [`Error::Unavailable`] on another device.
    #[cfg(feature = "cuda")]
    pub fn cuda(&self) -> Result<&Arc<Cuda>> {
        self.cuda.as_ref().ok_or_else(|| Error::Unavailable {
            what: "a CUDA operation".into(),
            reason: "this model was loaded onto another device".into(),
        })
    }

    /// The Apple GPU.
    ///
    /// # Errors
    /// [`Error::Unavailable`] on another device.
    #[cfg(feature = "metal")]
    pub fn metal(&self) -> Result<&Arc<Metal>> {
        self.metal.as_ref().ok_or_else(|| Error::Unavailable {
            what: "a Metal operation".into(),
            reason: "this model was loaded onto another device".into(),
        })
    }

    /// Whether operations run on the CPU.
    pub fn is_cpu(&self) -> bool {
        #[cfg(feature = "metal")]
        if self.metal.is_some() {
            return false;
        }
        self.device.is_cpu()
    }

    /// The device as reports name it: `cpu`, or a GPU's number and name.
    pub fn device_name(&self) -> String {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return format!("cuda:{} ({})", cuda.chip().ordinal, cuda.chip().name);
        }
        #[cfg(feature = "metal")]
        if let Some(metal) = &self.metal {
            return format!("metal:{} ({})", metal.chip().ordinal, metal.chip().name);
        }
        "cpu".into()
    }

    /// The ternary kernel as reports name it: the CPU's, or the GPU's compute capability or architecture.
    pub fn kernel_name(&self) -> String {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            let (major, minor) = cuda.chip().compute;
            return format!("sm_{major}{minor}");
        }
        #[cfg(feature = "metal")]
        if let Some(metal) = &self.metal {
            return metal.chip().architecture.clone();
        }
        self.cpu.kernel().name().into()
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
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return cuda.pack(weights, arrangement).map(TernaryWeight::Cuda);
        }
        #[cfg(feature = "metal")]
        if let Some(metal) = &self.metal {
            return metal.pack(weights, arrangement).map(TernaryWeight::Metal);
        }
        self.cpu.pack(weights, arrangement).map(TernaryWeight::Cpu)
    }

    /// An empty batch for up to `capacity` tokens.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if memory is short.
    pub fn batch(&self, capacity: usize) -> Result<Batch> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return CudaBatch::new(cuda, capacity).map(Batch::Cuda);
        }
        #[cfg(feature = "metal")]
        if let Some(metal) = &self.metal {
            return MetalBatch::new(metal, capacity).map(Batch::Metal);
        }
        HostBatch::new(capacity).map(Batch::Cpu)
    }

    /// The angles of the rotary embedding where this device's kernels read them.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if memory is short.
    pub fn rope(&self, table: RopeTable) -> Result<Rope> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return CudaRope::new(cuda, &table).map(Rope::Cuda);
        }
        #[cfg(feature = "metal")]
        if let Some(metal) = &self.metal {
            return MetalRope::new(metal, &table).map(Rope::Metal);
        }
        Ok(Rope::Cpu(table))
    }

    /// A dense matrix in a mapped file, which stays there on the CPU and is copied to a GPU.
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
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return CudaDense::mapped(cuda, dtype, rows, cols, &file, range).map(DenseWeight::Cuda);
        }
        #[cfg(feature = "metal")]
        if let Some(metal) = &self.metal {
            return MetalDense::mapped(metal, dtype, rows, cols, &file, range).map(DenseWeight::Metal);
        }
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
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return CudaDense::filled(cuda, dtype, rows, cols, fill).map(DenseWeight::Cuda);
        }
        #[cfg(feature = "metal")]
        if let Some(metal) = &self.metal {
            return MetalDense::filled(metal, dtype, rows, cols, fill).map(DenseWeight::Metal);
        }
        CpuDense::owned(dtype, rows, cols, fill).map(DenseWeight::Cpu)
    }

    /// A low-rank update `scaling · B · A`, from row-major A `[rank, cols]` and B `[rows, rank]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `a` or `b` is no such matrix, [`Error::Unavailable`] if memory is short.
    pub fn low_rank(&self, rank: usize, a: &[f32], b: &[f32], scaling: f32) -> Result<LowRankWeight> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return CudaLowRank::pack(cuda, rank, a, b, scaling).map(LowRankWeight::Cuda);
        }
        #[cfg(feature = "metal")]
        if let Some(metal) = &self.metal {
            return MetalLowRank::pack(metal, rank, a, b, scaling).map(LowRankWeight::Metal);
        }
        CpuLowRank::pack(rank, a, b, scaling).map(LowRankWeight::Cpu)
    }

    /// Keys and values of one layer.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if memory is short.
    pub fn kv_layer(&self, dtype: DenseType, shape: AttentionShape, slots: usize, positions: usize) -> Result<KvLayer> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return CudaKv::new(cuda, dtype, shape, slots, positions).map(KvLayer::Cuda);
        }
        #[cfg(feature = "metal")]
        if let Some(metal) = &self.metal {
            return MetalKv::new(metal, dtype, shape, slots, positions).map(KvLayer::Metal);
        }
        CpuKv::new(dtype, shape, slots, positions).map(KvLayer::Cpu)
    }

    /// Decode steps of one model: none recorded yet.
    pub fn steps(&self) -> Steps {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return Steps::Cuda(cuda::Graphs::new(self.graphs), Arc::clone(cuda));
        }
        Steps::Plain
    }
}
