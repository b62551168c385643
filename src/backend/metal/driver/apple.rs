//! Metal on macOS.
//!
//! Kernels are encoded into candle's command buffer. Its encoder is a concurrent one with untracked memory: what keeps
//! kernels in order is candle's record of the buffers that were bound as inputs and outputs, so everything is bound through
//! that.

use super::super::chip::MetalChip;
use super::super::{failure, kernels};
use super::{Binding, Dispatch, Kernel};
use crate::Result;
use candle_core::{Device, MetalDevice};
use candle_metal_kernels::metal::{
    Buffer, CommandQueue, ComputeCommandEncoder, ComputePipeline, Device as Raw, Library,
};
use objc2::available;
use objc2_metal::{
    MTLBlitCommandEncoder, MTLCommandBuffer, MTLCommandEncoder, MTLCommandQueue, MTLCompileOptions,
    MTLComputeCommandEncoder, MTLComputePipelineState, MTLDevice, MTLGPUFamily, MTLMathFloatingPointFunctions,
    MTLMathMode, MTLResourceOptions, MTLSize,
};
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Memory that the CPU and the GPU both see; candle's tracker, not Metal's, orders what touches it.
const SHARED: MTLResourceOptions =
    MTLResourceOptions(MTLResourceOptions::StorageModeShared.0 | MTLResourceOptions::HazardTrackingModeUntracked.0);

/// Bytes from which on memory is kept resident; less is made so by the command buffers that use it.
const RESIDENT: usize = 1 << 20;

/// Kernels that candle puts into one command buffer: more than a decode step of any known model has, so that a token is
/// one command buffer.
const KERNELS_PER_COMMAND_BUFFER: &str = "512";

/// Memory of Metal, candle's or ours.
pub(in super::super) type Memory<'a> = &'a Buffer;

/// Memory of our own.
pub(in super::super) struct Owned {
    buffer: Buffer,
    device: MetalDevice,
}

impl Owned {
    pub(in super::super) fn memory(&self) -> Memory<'_> {
        &self.buffer
    }

    /// Where the CPU sees it.
    pub(in super::super) fn contents(&self) -> NonNull<u8> {
        // Shared memory has an address; a dangling one would only be met with a length of 0.
        NonNull::new(self.buffer.contents()).unwrap_or(NonNull::dangling())
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if self.buffer.length() >= RESIDENT {
            // A kernel that is on its way may still use it: its command buffer keeps the buffer alive, but not resident.
            let _ = self.device.wait_until_completed();
            self.device.unregister_buffers([&self.buffer]);
        }
    }
}

/// A candle device with its libraries and pipelines.
pub(in super::super) struct Gpu {
    device: MetalDevice,
    libraries: [OnceLock<Library>; kernels::LIBRARIES.len()],
    pipelines: Mutex<HashMap<&'static str, ComputePipeline>>,
    /// For launches that are timed.
    queue: OnceLock<CommandQueue>,
}

impl Gpu {
    /// What runs kernels on a candle device; no library is compiled yet.
    pub(in super::super) fn new(device: &MetalDevice) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            libraries: [const { OnceLock::new() }; kernels::LIBRARIES.len()],
            pipelines: Mutex::default(),
            queue: OnceLock::new(),
        })
    }

    /// The chip behind the device.
    pub(in super::super) fn chip(&self) -> MetalChip {
        let raw = self.device.metal_device();
        let ordinal = Raw::all().iter().position(|d| d.registry_id() == raw.registry_id()).unwrap_or(0);
        chip(raw, ordinal)
    }

    /// Bytes of memory that this process has on the device.
    pub(in super::super) fn allocated(&self) -> usize {
        self.device.metal_device().current_allocated_size()
    }

    /// Zeroed memory; none if the system refuses.
    pub(in super::super) fn zeroed(&self, bytes: usize) -> Option<Owned> {
        // The system clears pages that it hands to a process, and Metal takes its memory from the system.
        let buffer = self.device.metal_device().new_buffer(bytes, SHARED).ok()?;
        if bytes >= RESIDENT {
            self.device.register_buffers([&buffer]);
        }
        Some(Owned { buffer, device: self.device.clone() })
    }

    /// Compiles a kernel, unless that has been done.
    pub(in super::super) fn prepare(&self, kernel: Kernel) -> Result<()> {
        self.pipeline(kernel).map(drop)
    }

    fn library(&self, number: usize) -> Result<&Library> {
        if let Some(library) = self.libraries[number].get() {
            return Ok(library);
        }
        let options = MTLCompileOptions::new();
        // candle's own kernels are compiled with fast math; the results of these are specified to the bit.
        options.setMathMode(MTLMathMode::Safe);
        options.setMathFloatingPointFunctions(MTLMathFloatingPointFunctions::Precise);
        let source = kernels::source(number);
        let library = self.device.metal_device().new_library_with_source(&source, Some(&options));
        let what = || format!("the kernels of {}.metal", kernels::LIBRARIES[number].name);
        let library = library.map_err(|e| failure::device(what(), e.to_string()))?;
        Ok(self.libraries[number].get_or_init(|| library))
    }

    fn pipeline(&self, kernel: Kernel) -> Result<ComputePipeline> {
        let mut pipelines = self.pipelines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = pipelines.get(kernel.name) {
            return Ok(pipeline.clone());
        }
        let failed = |e: candle_metal_kernels::MetalKernelError| {
            failure::device(format!("kernel {}", kernel.name), e.to_string())
        };
        let function = self.library(kernel.library)?.get_function(kernel.name, None).map_err(failed)?;
        let pipeline =
            self.device.metal_device().new_compute_pipeline_state_with_function(&function).map_err(failed)?;
        let width = pipeline.as_ref().threadExecutionWidth();
        if width != kernels::SIMD_WIDTH {
            let reason = format!("its simdgroups have {width} threads here, the kernels need {}", kernels::SIMD_WIDTH);
            return Err(failure::device(format!("kernel {}", kernel.name), reason));
        }
        pipelines.insert(kernel.name, pipeline.clone());
        Ok(pipeline)
    }

    /// Refuses more threads than the compiler found registers for.
    fn pipeline_for(&self, d: &Dispatch<'_>) -> Result<ComputePipeline> {
        let pipeline = self.pipeline(d.kernel)?;
        let most = pipeline.max_total_threads_per_threadgroup();
        if d.threads > most {
            let reason = format!("{} threads of a threadgroup; this GPU runs at most {most}", d.threads);
            return Err(failure::device(format!("kernel {}", d.kernel.name), reason));
        }
        Ok(pipeline)
    }

    /// Encodes a launch.
    ///
    /// # Safety
    /// The bindings are the kernel's, and as large as its parameters and grid make it.
    pub(in super::super) unsafe fn dispatch(&self, d: &Dispatch<'_>) -> Result<()> {
        let pipeline = self.pipeline_for(d)?;
        let failed = |e: candle_core::Error| failure::device(format!("kernel {}", d.kernel.name), e.to_string());
        let guard = self.device.command_encoder().map_err(failed)?;
        let encoder: &ComputeCommandEncoder = guard.as_ref();
        encoder.set_compute_pipeline_state(&pipeline);
        for (index, Binding { memory, offset, written }) in d.bindings.iter().enumerate() {
            match written {
                true => encoder.set_output_buffer(index, Some(*memory), *offset),
                false => encoder.set_input_buffer(index, Some(*memory), *offset),
            }
        }
        encoder.set_bytes_directly(d.bindings.len(), d.params.len(), d.params.as_ptr().cast());
        if d.threadgroup > 0 {
            encoder.set_threadgroup_memory_length(0, d.threadgroup);
        }
        encoder.dispatch_thread_groups(size(d.grid), size([d.threads, 1, 1]));
        Ok(())
    }

    /// Runs a launch by itself: seconds that the GPU took.
    ///
    /// # Safety
    /// As [`Gpu::dispatch`].
    pub(in super::super) unsafe fn dispatch_timed(&self, d: &Dispatch<'_>) -> Result<f64> {
        let pipeline = self.pipeline_for(d)?;
        self.wait()?;
        let what = format!("timing kernel {}", d.kernel.name);
        let commands = self.commands(&what)?;
        let Some(encoder) = commands.computeCommandEncoder() else {
            return Err(failure::device(what, "Metal gave no encoder"));
        };
        encoder.setComputePipelineState(pipeline.as_ref());
        for (index, binding) in d.bindings.iter().enumerate() {
            // SAFETY: the buffer is of this device and kept by the command buffer, the index is one that kernels have.
            unsafe { encoder.setBuffer_offset_atIndex(Some(binding.memory.as_ref()), binding.offset, index) };
        }
        let params = NonNull::from(d.params).cast::<c_void>();
        // SAFETY: the bytes are copied by the call.
        unsafe { encoder.setBytes_length_atIndex(params, d.params.len(), d.bindings.len()) };
        if d.threadgroup > 0 {
            // SAFETY: a length that the launch was checked for.
            unsafe { encoder.setThreadgroupMemoryLength_atIndex(d.threadgroup, 0) };
        }
        encoder.dispatchThreadgroups_threadsPerThreadgroup(size(d.grid), size([d.threads, 1, 1]));
        encoder.endEncoding();
        finished(&commands, what)
    }

    /// Copies the first `bytes` from one memory to another: seconds that the GPU took.
    pub(in super::super) fn copy_timed(&self, from: &Owned, to: &Owned, bytes: usize) -> Result<f64> {
        self.wait()?;
        let what = "measuring bandwidth".to_owned();
        let commands = self.commands(&what)?;
        let Some(encoder) = commands.blitCommandEncoder() else {
            return Err(failure::device(what, "Metal gave no encoder"));
        };
        let (from, to) = (from.buffer.as_ref(), to.buffer.as_ref());
        // SAFETY: both are buffers of this device, made with at least as many bytes by the caller.
        unsafe { encoder.copyFromBuffer_sourceOffset_toBuffer_destinationOffset_size(from, 0, to, 0, bytes) };
        encoder.endEncoding();
        finished(&commands, what)
    }

    /// A command buffer of a queue of our own: candle does not tell the times of its.
    fn commands(
        &self,
        what: &str,
    ) -> Result<objc2::rc::Retained<objc2::runtime::ProtocolObject<dyn MTLCommandBuffer>>> {
        let none = || failure::device(what.to_owned(), "Metal gave no command buffer");
        let queue = match self.queue.get() {
            Some(queue) => queue,
            None => {
                let queue = self.device.metal_device().new_command_queue().map_err(|_| none())?;
                self.queue.get_or_init(|| queue)
            }
        };
        queue.commandBuffer().ok_or_else(none)
    }

    /// Waits until everything encoded has run.
    pub(in super::super) fn wait(&self) -> Result<()> {
        self.device.wait_until_completed().map_err(|e| failure::device("waiting for the GPU", e.to_string()))
    }
}

// SAFETY: Metal's devices, queues, libraries and pipelines may be used from any thread; the maps are behind locks. candle
// vouches for its own types in the same way.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

fn size([width, height, depth]: [usize; 3]) -> MTLSize {
    MTLSize { width, height, depth }
}

/// Runs a command buffer to its end: seconds that the GPU took.
fn finished(commands: &objc2::runtime::ProtocolObject<dyn MTLCommandBuffer>, what: String) -> Result<f64> {
    commands.commit();
    commands.waitUntilCompleted();
    match commands.error() {
        Some(e) => Err(failure::device(what, e.to_string())),
        None => Ok((commands.GPUEndTime() - commands.GPUStartTime()).max(1e-9)),
    }
}

/// What Metal tells of a GPU.
fn chip(raw: &Raw, ordinal: usize) -> MetalChip {
    let device = raw.as_ref();
    MetalChip {
        name: device.name().to_string(),
        architecture: raw.architecture_name(),
        ordinal,
        has_simdgroup_matrix: device.supportsFamily(MTLGPUFamily::Apple7),
        unified_memory: device.hasUnifiedMemory(),
        threadgroup_memory: device.maxThreadgroupMemoryLength(),
        largest_buffer: device.maxBufferLength(),
        working_set: raw.recommended_max_working_set_size(),
    }
}

/// The GPUs of this Mac, in Metal's order.
pub(in super::super) fn found() -> Result<Vec<MetalChip>> {
    if !available!(macos = 15.0) {
        let reason = "candle's Metal backend needs macOS 15 or later; update macOS or use --device cpu";
        return Err(failure::unavailable("Metal", reason));
    }
    Ok(Raw::all().iter().enumerate().map(|(ordinal, raw)| chip(raw, ordinal)).collect())
}

/// A candle device of the GPU with this number in [`found`]'s list.
pub(in super::super) fn open(ordinal: usize) -> Result<Device> {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        const NAME: &str = "CANDLE_METAL_COMPUTE_PER_BUFFER";
        if std::env::var_os(NAME).is_none() {
            // SAFETY: macOS's getenv and setenv lock the environment and never free what they handed out, and std's own
            // functions have a lock besides.
            unsafe { std::env::set_var(NAME, KERNELS_PER_COMMAND_BUFFER) };
        }
    });
    Device::new_metal(ordinal).map_err(|e| failure::unavailable(format!("GPU {ordinal}"), e.to_string()))
}
