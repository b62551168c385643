//! What the host's operating system can do for us: map files, huge pages, memory figures, core counts.

use crate::{Error, Result};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A file mapped read-only into memory: one of its own, or a part of the program, which the system maps as well.
///
/// The bytes are the file's as long as nobody truncates or rewrites it in place; writers of this crate replace
/// files by renaming, which leaves an existing mapping whole (SECURITY.md).
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Map,
}

#[derive(Debug)]
enum Map {
    File(memmap2::Mmap),
    Program(&'static [u8]),
}

impl MappedFile {
    /// Maps a regular file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened or mapped, [`Error::File`] if it is empty or not a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let meta = file.metadata().map_err(|e| Error::io(path, e))?;
        if !meta.is_file() {
            return Err(Error::file(path, "not a regular file"));
        }
        if meta.len() == 0 {
            return Err(Error::file(path, "the file is empty"));
        }
        // SAFETY: the mapping is private and read-only, and lives as long as `self`. A truncation by another
        // process is outside what can be checked; SECURITY.md says so.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        Ok(Self { path: path.to_owned(), map: Map::File(map) })
    }

    /// A file that was compiled into the program; `path` names it in errors.
    pub fn embedded(path: impl Into<PathBuf>, bytes: &'static [u8]) -> Self {
        Self { path: path.into(), map: Map::Program(bytes) }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.map {
            Map::File(map) => map,
            Map::Program(bytes) => bytes,
        }
    }

    /// Tells the system that `range` has been read and is not needed in memory any more.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Map::File(map) = &self.map {
            let page = 4096;
            let (start, end) = (range.start.next_multiple_of(page), range.end / page * page);
            if start < end && end <= map.len() {
                // SAFETY: the mapping is read-only and file-backed, so dropped pages read the same again; the
                // range is whole pages inside the mapping, checked above.
                let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

const HUGE_PAGE: usize = 2 << 20;

/// Zero-initialised memory aligned to a cache line, resident only where it has been written.
pub struct AlignedBuffer {
    map: memmap2::MmapMut,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// Allocates `len` zero bytes on huge pages where the system gives them: for what is written whole and read in a
    /// stream. A tail of less than half a page of 2 MiB stays on small pages, so that little resident is wasted.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the system refuses the memory.
    pub fn huge(len: usize) -> Result<Self> {
        let pages = len / HUGE_PAGE + usize::from(len % HUGE_PAGE >= HUGE_PAGE / 2);
        if pages == 0 {
            return Self::zeroed(len);
        }
        // Room for the last page to be whole.
        let buffer = Self { len, ..Self::zeroed(len.max(pages * HUGE_PAGE))? };
        #[cfg(target_os = "linux")]
        {
            // Advice only: without huge pages everything works, slower.
            let _ = buffer.map.advise_range(memmap2::Advice::HugePage, buffer.start, pages * HUGE_PAGE);
        }
        Ok(buffer)
    }

    /// Allocates `len` zero bytes on small pages: for what is written here and there, like a KV cache.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the system refuses the memory.
    pub fn zeroed(len: usize) -> Result<Self> {
        let slack = if len >= HUGE_PAGE { HUGE_PAGE } else { 64 };
        let map = len.checked_add(slack).and_then(|n| memmap2::MmapMut::map_anon(n).ok());
        let Some(map) = map else {
            return Err(Error::Unavailable {
                what: format!("{len} bytes of memory"),
                reason: "the system refused the allocation; use a smaller model or context".into(),
            });
        };
        let start = map.as_ptr().align_offset(slack);
        Ok(Self { map, start, len })
    }
}

impl std::ops::Deref for AlignedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.map[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.start..self.start + self.len]
    }
}

impl std::fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuffer({} bytes)", self.len)
    }
}

/// Bytes of this process that are in physical memory now, where the system tells.
pub fn resident_bytes() -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        status_kib("/proc/self/status", "VmRSS:")
    }
    #[cfg(target_os = "macos")]
    {
        // The peak; macOS has no file that tells the present value.
        // SAFETY: `rusage` is plain data that the call fills in; a failure is checked.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a live, writable `rusage`.
        (unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) } == 0).then_some(usage.ru_maxrss as u64)
    }
    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    None
}

/// Bytes of physical memory that a new allocation could get without swapping, where the system tells.
pub fn available_bytes() -> Option<u64> {
    status_kib("/proc/meminfo", "MemAvailable:")
}

/// Bytes of physical memory of this machine, where the system tells.
pub fn total_bytes() -> Option<u64> {
    #[cfg(target_os = "macos")]
    return sysctl_number(c"hw.memsize");
    #[cfg(not(target_os = "macos"))]
    status_kib("/proc/meminfo", "MemTotal:")
}

/// A `Key:  123 kB` line of a proc file, in bytes.
fn status_kib(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(key))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// Threads to use where nobody says how many: [`Topology::threads`] of this machine, which are its physical cores, as far as
/// this process may use them.
///
/// [`Topology::threads`]: super::topology::Topology::threads
pub fn physical_cores() -> usize {
    super::topology::Topology::here().threads()
}

/// What macOS tells under a name, as bytes.
#[cfg(target_os = "macos")]
fn sysctl(name: &std::ffi::CStr) -> Option<Vec<u8>> {
    let mut value = vec![0u8; 256];
    let mut len = value.len();
    // SAFETY: the name is a C string, the buffer as long as `len` says, and nothing is set.
    let code =
        unsafe { libc::sysctlbyname(name.as_ptr(), value.as_mut_ptr().cast(), &mut len, std::ptr::null_mut(), 0) };
    value.truncate(len);
    (code == 0).then_some(value)
}

/// A number of 4 or 8 bytes that macOS tells.
#[cfg(target_os = "macos")]
pub(super) fn sysctl_number(name: &std::ffi::CStr) -> Option<u64> {
    let value = sysctl(name)?;
    match value.len() {
        4 => Some(u32::from_ne_bytes(value.try_into().ok()?).into()),
        8 => Some(u64::from_ne_bytes(value.try_into().ok()?)),
        _ => None,
    }
}

/// The processor's name, where the system tells.
pub fn cpu_name() -> Option<String> {
    #[cfg(target_os = "macos")]
    return Some(String::from_utf8(sysctl(c"machdep.cpu.brand_string")?).ok()?.trim_end_matches('\0').to_owned());
    #[cfg(not(target_os = "macos"))]
    cpu_name_of_linux()
}

/// The model in Linux's list of processors.
#[cfg(not(target_os = "macos"))]
fn cpu_name_of_linux() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Prepares a process for training, which keeps every core busy with threads of its own and allocates the same large
/// tensors in every step: candle's own operations stay on the thread that calls them, and freed memory is kept. Must come
/// first in a program, before candle is used and before there is a second thread; otherwise candle keeps its pool, which
/// costs time only, and the answer is false.
pub fn prepare_for_training() -> bool {
    keep_freed_memory();
    keep_candle_on_the_calling_thread()
}

/// Makes candle's own operations run on the thread that calls them: its pool would make threads wait for each other.
/// `CANDLE_NUM_THREADS=1` in the environment does the same.
fn keep_candle_on_the_calling_thread() -> bool {
    const NAME: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(NAME).is_some() {
        return true;
    }
    let alone = cfg!(windows) || std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1);
    if alone {
        // SAFETY: no other thread exists that could read the environment meanwhile: the system lists one thread, the
        // caller. On Windows changing the environment is always safe.
        unsafe { std::env::set_var(NAME, "1") };
    }
    alone
}

/// Keeps freed memory for the next allocation instead of handing it back to the system, where the allocator can (glibc);
/// otherwise a tenth of the time goes into having the same pages cleared again.
fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (option, value) in [
        (libc::M_MMAP_THRESHOLD, 1 << 30),
        (libc::M_TRIM_THRESHOLD, i32::MAX),
        (libc::M_TOP_PAD, 64 << 20),
        (libc::M_ARENA_MAX, 1),
    ] {
        // SAFETY: mallopt only changes the allocator's settings; it takes the allocator's own lock.
        unsafe { libc::mallopt(option, value) };
    }
}
