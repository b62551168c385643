//! What the system tells of this machine and process.

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
/// [`Topology::threads`]: crate::backend::topology::Topology::threads
pub fn physical_cores() -> usize {
    crate::backend::topology::Topology::here().threads()
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
pub(in crate::backend) fn sysctl_number(name: &std::ffi::CStr) -> Option<u64> {
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
