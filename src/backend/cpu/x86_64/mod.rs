//! Ternary kernels for x86-64, one file per instruction set.

mod amx;
mod avx2;
mod avx512;
pub(super) mod avx512_bf16;
mod avx512_vbmi;
mod avx512_vnni;
mod avx_vnni;
mod pairs;

pub use amx::AmxInt8;
pub use avx_vnni::AvxVnni;
pub use avx2::Avx2;
pub use avx512_vbmi::Avx512Vbmi;
pub use avx512_vnni::Avx512Vnni;

#[cfg(all(test, target_os = "linux"))]
pub(super) use amx::Trapped;
#[cfg(test)]
pub(super) use amx::{Amx, Model};
#[cfg(test)]
pub(super) use avx_vnni::EvexVnni;

/// Runs `$pass::<N>` for the run-time token count `$tokens`, an integer from 1 to 12.
macro_rules! for_tokens {
    ($tokens:expr, [$($n:literal)*], $pass:ident $args:tt) => {
        match $tokens {
            // SAFETY: the caller's contract, stated where the macro is used.
            $($n => unsafe { $pass::<$n> $args },)*
            _ => unreachable!("checked by check_gemm"),
        }
    };
}
use for_tokens;

/// Defines `gemm::<T>`, up to 12 tokens in passes of at most 4, so that 2 · 4 accumulators fit 16 registers. `pass::<N, T>` of
/// the kernel multiplies one tile with N of T tokens.
macro_rules! gemm_by_fours {
    ($features:literal) => {
        /// # Safety
        /// The kernel's features; `sums` is whole tiles of `[T][16]`, `tiles` holds as many tiles of `groups` lines, `panel`
        /// `4 · groups · T` words.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn gemm<const T: usize>(
            tiles: *const u8,
            groups: usize,
            panel: *const i32,
            sums: &mut [i32],
        ) {
            let mut tile = tiles;
            for sums in sums.chunks_exact_mut(T * TILE_ROWS) {
                for first in (0..T).step_by(4) {
                    let sums = &mut sums[first * TILE_ROWS..];
                    // SAFETY: one tile and tokens `first …` of its T are inside the operands.
                    unsafe {
                        let panel = panel.add(first);
                        match T - first {
                            1 => pass::<1, T>(tile, groups, panel, sums),
                            2 => pass::<2, T>(tile, groups, panel, sums),
                            3 => pass::<3, T>(tile, groups, panel, sums),
                            _ => pass::<4, T>(tile, groups, panel, sums),
                        }
                    }
                }
                tile = tile.wrapping_add(groups * LINE_BYTES);
            }
        }
    };
}
use gemm_by_fours;
