//! Hints that memory will be needed soon. They change no result, and may point anywhere.

/// Bytes ahead of the read position that are asked for: decode is limited by outstanding memory requests, and without it one
/// core (Zen 4, virtual) read half as much.
const AHEAD: usize = 4096;

/// Defines `$name(p)`: asks for the cache line at `p`.
macro_rules! hint {
    ($(#[$doc:meta])* $name:ident, $x86:ident, $arm:literal) => {
        $(#[$doc])*
        #[inline(always)]
        pub(super) fn $name<T>(p: *const T) {
            #[cfg(target_arch = "x86_64")]
            {
                use std::arch::x86_64::{$x86, _mm_prefetch};
                // SAFETY: SSE is part of x86-64; a prefetch may point anywhere, and does nothing where it is not known.
                unsafe { _mm_prefetch::<$x86>(p.cast()) };
            }
            #[cfg(target_arch = "aarch64")]
            // SAFETY: `prfm` never faults, wherever it points; it changes no register and no memory.
            unsafe {
                std::arch::asm!(
                    concat!("prfm ", $arm, ", [{p}]"),
                    p = in(reg) p,
                    options(nostack, preserves_flags, readonly)
                );
            }
            #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
            let _ = p;
        }
    };
}

hint!(
    /// Asks for a cache line, to be read.
    to_read, _MM_HINT_T0, "pldl1keep"
);
hint!(
    /// Asks for a cache line, into the second level: what is at work in the first one stays there.
    to_level_2, _MM_HINT_T1, "pldl2keep"
);
hint!(
    /// Asks for a cache line, to be written.
    to_write, _MM_HINT_ET0, "pstl1keep"
);

/// Asks for what a reader in sequence, now at `p`, needs after a while: as many lines as a T has.
#[inline(always)]
pub(super) fn ahead<T>(p: *const T) {
    for line in (0..size_of::<T>()).step_by(64) {
        to_read(p.cast::<u8>().wrapping_add(AHEAD + line));
    }
}
