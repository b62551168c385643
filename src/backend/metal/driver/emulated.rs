//! An emulated Metal for tests where there is none: the kernels of `kernels/metal`, compiled for this CPU into the library that
//! `BITNET_METAL_EMULATOR` names, run by name over this machine's memory. Launches run to their end.
//!
//! `BITNET_EMULATED_MEMORY`: bytes of the recommended working set; `BITNET_EMULATED_FAULT`: which launch of a process fails;
//! `BITNET_EMULATED_DEVICES=0`: no GPU.

use super::super::chip::MetalChip;
use super::super::failure;
use super::{Binding, Dispatch, Kernel};
use crate::Result;
use crate::backend::host::AlignedBuffer;
use candle_core::{Device, MetalDevice};
use std::ffi::{CString, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Where the library is.
const LIBRARY: &str = "BITNET_METAL_EMULATOR";

/// Bytes of the emulated memory that are taken.
static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

/// Memory of this machine, candle's or ours.
#[derive(Clone, Copy)]
pub(in super::super) struct Memory<'a> {
    start: NonNull<u8>,
    bytes: usize,
    of: PhantomData<&'a [u8]>,
}

impl<'a> Memory<'a> {
    /// The memory of a CPU tensor.
    pub(in super::super) fn of<T>(values: &'a [T]) -> Self {
        Self { start: NonNull::from(values).cast(), bytes: size_of_val(values), of: PhantomData }
    }

    /// The memory of a CPU tensor that is written.
    pub(in super::super) fn of_mut<T>(values: &'a mut [T]) -> Self {
        Self { start: NonNull::from(&mut *values).cast(), bytes: size_of_val(values), of: PhantomData }
    }
}

/// Memory of our own.
pub(in super::super) struct Owned {
    start: NonNull<u8>,
    bytes: usize,
    _buffer: AlignedBuffer,
}

// SAFETY: the memory is reached through `start` alone, by kernels, one at a time, and by copies of values without pointers.
unsafe impl Send for Owned {}
// SAFETY: as above.
unsafe impl Sync for Owned {}

impl Owned {
    pub(in super::super) fn memory(&self) -> Memory<'_> {
        Memory { start: self.start, bytes: self.bytes, of: PhantomData }
    }

    /// Where the CPU sees it.
    pub(in super::super) fn contents(&self) -> NonNull<u8> {
        self.start
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        ALLOCATED.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Runs a kernel by its name (`kernels/README.md`).
type Launch = unsafe extern "C" fn(
    *const c_char,
    *const *mut c_void,
    *const usize,
    u32,
    *const u32,
    *const u32,
    *const u32,
) -> c_int;

/// Whether there is a kernel of a name.
type Has = unsafe extern "C" fn(*const c_char) -> c_int;

/// The emulator's two functions.
#[derive(Clone, Copy)]
struct Library {
    launch: Launch,
    has: Has,
}

/// The library, loaded once and for good.
fn library() -> Result<Library> {
    static LOADED: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
    let load = || {
        let path = std::env::var_os(LIBRARY).ok_or_else(|| {
            format!(
                "Metal is there on macOS only; elsewhere this build runs it on the emulator that {LIBRARY} names \
                 (kernels/README.md); use --device cpu"
            )
        })?;
        load(Path::new(&path))
    };
    LOADED.get_or_init(load).clone().map_err(|reason| failure::unavailable("Metal", reason))
}

#[cfg(target_os = "linux")]
fn load(path: &Path) -> std::result::Result<Library, String> {
    use std::os::unix::ffi::OsStrExt;
    let bad = |reason: &str| format!("{LIBRARY} names {}, {reason}", path.display());
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| bad("which is no path"))?;
    // SAFETY: the name is a C string; what the library runs when it is loaded is the emulator's own set-up.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        return Err(bad("which cannot be loaded"));
    }
    // SAFETY: the handle is of a loaded library, which is never unloaded, and the name a C string.
    let find = |name: &std::ffi::CStr| NonNull::new(unsafe { libc::dlsym(library, name.as_ptr()) });
    match (find(c"bitnet_metal_launch"), find(c"bitnet_metal_has")) {
        // SAFETY: functions of these names have these types, by the emulator's interface.
        (Some(launch), Some(has)) => unsafe {
            Ok(Library {
                launch: std::mem::transmute::<NonNull<c_void>, Launch>(launch),
                has: std::mem::transmute::<NonNull<c_void>, Has>(has),
            })
        },
        _ => Err(bad("which is no Metal emulator")),
    }
}

#[cfg(not(target_os = "linux"))]
fn load(path: &Path) -> std::result::Result<Library, String> {
    Err(format!("{} cannot be loaded: the Metal emulator runs on Linux", path.display()))
}

/// The emulated GPU.
pub(in super::super) struct Gpu {
    library: Library,
    launches: AtomicUsize,
    /// The launch that fails.
    fault: Option<usize>,
}

impl Gpu {
    /// What runs kernels.
    pub(in super::super) fn new(_: &MetalDevice) -> Result<Self> {
        Ok(Self { library: library()?, launches: AtomicUsize::new(0), fault: setting("BITNET_EMULATED_FAULT") })
    }

    /// The chip that is emulated.
    pub(in super::super) fn chip(&self) -> MetalChip {
        chip()
    }

    /// Bytes of memory that this process has on the device.
    pub(in super::super) fn allocated(&self) -> usize {
        ALLOCATED.load(Ordering::Relaxed)
    }

    /// Zeroed memory; none if the system refuses.
    pub(in super::super) fn zeroed(&self, bytes: usize) -> Option<Owned> {
        let mut buffer = AlignedBuffer::zeroed(bytes).ok()?;
        ALLOCATED.fetch_add(bytes, Ordering::Relaxed);
        Some(Owned { start: NonNull::from(&mut *buffer).cast(), bytes, _buffer: buffer })
    }

    /// Finds a kernel.
    pub(in super::super) fn prepare(&self, kernel: Kernel) -> Result<()> {
        let name = CString::new(kernel.name).unwrap_or_default();
        // SAFETY: the argument is a C string.
        match unsafe { (self.library.has)(name.as_ptr()) } {
            0 => Err(failure::device(format!("kernel {}", kernel.name), "the emulator has none of this name")),
            _ => Ok(()),
        }
    }

    /// Runs a launch.
    ///
    /// # Safety
    /// The bindings are the kernel's, and as large as its parameters and grid make it.
    pub(in super::super) unsafe fn dispatch(&self, d: &Dispatch<'_>) -> Result<()> {
        let failed = |reason: &str| failure::device(format!("kernel {}", d.kernel.name), reason);
        if self.fault.is_some_and(|fault| self.launches.fetch_add(1, Ordering::Relaxed) + 1 == fault) {
            return Err(failed("BITNET_EMULATED_FAULT said so"));
        }
        let mut params = d.params.to_vec();
        let (mut buffers, mut sizes) = (Vec::new(), Vec::new());
        for Binding { memory, offset, .. } in d.bindings {
            let Some(rest) = memory.bytes.checked_sub(*offset) else { return Err(failed("an offset past the end")) };
            // SAFETY: the offset is inside the memory or at its end.
            buffers.push(unsafe { memory.start.add(*offset) }.as_ptr().cast::<c_void>());
            sizes.push(rest);
        }
        sizes.push(params.len());
        buffers.push(params.as_mut_ptr().cast());
        let name = CString::new(d.kernel.name).unwrap_or_default();
        let number = |v: usize| u32::try_from(v).unwrap_or(u32::MAX);
        let (threadgroup, grid, threads) = ([number(d.threadgroup)], d.grid.map(number), [number(d.threads), 1, 1]);
        // SAFETY: the lists are as long as the count says; the caller vouches for what the bindings hold, and the launch has
        // ended when the call returns.
        let code = unsafe {
            let (buffers, sizes, count) = (buffers.as_ptr(), sizes.as_ptr(), number(sizes.len()));
            (self.library.launch)(
                name.as_ptr(),
                buffers,
                sizes,
                count,
                threadgroup.as_ptr(),
                grid.as_ptr(),
                threads.as_ptr(),
            )
        };
        match code {
            0 => Ok(()),
            1 => Err(failed("the emulator has none of this name")),
            2 => Err(failed("a grid or number of threads that the kernel cannot have")),
            3 => Err(failed("another number of buffers than the kernel has")),
            4 => Err(failed("parameters of another size than the kernel's")),
            5 => Err(failed("a missing or misaligned buffer")),
            6 => Err(failed("more threadgroup memory than there is, or none where the kernel has some")),
            code => Err(failed(&format!("the emulator said {code}"))),
        }
    }

    /// Runs a launch: seconds that it took.
    ///
    /// # Safety
    /// As [`Gpu::dispatch`].
    pub(in super::super) unsafe fn dispatch_timed(&self, d: &Dispatch<'_>) -> Result<f64> {
        let start = Instant::now();
        // SAFETY: the caller's.
        unsafe { self.dispatch(d) }?;
        Ok(start.elapsed().as_secs_f64().max(1e-9))
    }

    /// Copies the first `bytes` from one memory to another: seconds that it took.
    pub(in super::super) fn copy_timed(&self, from: &Owned, to: &Owned, bytes: usize) -> Result<f64> {
        let start = Instant::now();
        let bytes = bytes.min(from.bytes).min(to.bytes);
        // SAFETY: both have that many bytes, and they are different allocations or the copy does nothing.
        unsafe { std::ptr::copy(from.start.as_ptr(), to.start.as_ptr(), bytes) };
        Ok(start.elapsed().as_secs_f64().max(1e-9))
    }

    /// Launches have ended when they return.
    pub(in super::super) fn wait(&self) -> Result<()> {
        Ok(())
    }
}

fn setting(name: &str) -> Option<usize> {
    std::env::var(name).ok()?.parse().ok()
}

fn chip() -> MetalChip {
    MetalChip {
        name: "Metal emulator".into(),
        architecture: "emulator".into(),
        ordinal: 0,
        has_simdgroup_matrix: true,
        unified_memory: true,
        threadgroup_memory: 32 << 10,
        largest_buffer: 4 << 30,
        working_set: setting("BITNET_EMULATED_MEMORY").unwrap_or(8 << 30),
    }
}

/// The emulated GPU, if there is an emulator.
pub(in super::super) fn found() -> Result<Vec<MetalChip>> {
    let devices = setting("BITNET_EMULATED_DEVICES").unwrap_or(1).min(1);
    library().map(|_| vec![chip(); devices])
}

/// A candle device that stands for the emulated GPU; its tensors are the CPU's.
pub(in super::super) fn open(_: usize) -> Result<Device> {
    library().map(|_| Device::Metal(MetalDevice))
}
