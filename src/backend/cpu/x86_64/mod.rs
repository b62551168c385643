//! Ternary kernels for x86-64, one file per instruction set.

mod amx;
mod avx2;
mod avx256;
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
pub(super) use avx_vnni::{Avx2ForVnni, EvexVnni};

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
