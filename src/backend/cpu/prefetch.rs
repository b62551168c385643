//! Hints that memory will be needed soon. They change no result, and may point anywhere.

/// Asks for the cache line at `p`, to be written.
#[inline(always)]
pub(super) fn to_write<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        // SAFETY: SSE is part of x86-64; the instruction does nothing where it is not known.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(p.cast()) };
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint without effects on registers or memory.
    unsafe {
        std::arch::asm!("prfm pstl1keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = p;
}
