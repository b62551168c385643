//! What a program sets for itself.

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
