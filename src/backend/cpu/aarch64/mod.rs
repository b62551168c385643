//! Ternary kernels for aarch64, one file per instruction set.

mod neon;
mod neon_dotprod;

pub use neon::Neon;
pub use neon_dotprod::NeonDotprod;
