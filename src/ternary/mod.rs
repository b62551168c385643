//! The number format: ternary weights at 2 bits each and 8-bit activations, and nothing else.
//!
//! A weight matrix is a [`PackedTernary`]: codes {0, 1, 2} for the weights {−1, 0, 1}, one [`Scale`] for the
//! whole matrix. Codecs turn checkpoint layouts into this canonical form and back; backends repack it for the
//! kernel that will read it.

mod activation;
mod hf;
mod i2s;
mod packed;
mod planes;
mod tq;

pub use activation::{ACTIVATION_MAX, MIN_ABSMAX, quantize_activations, round_half_even};
pub use i2s::I2sLayout;
pub use packed::{CODES_PER_BYTE, PackedTernary, Scale, absmean_scale};

/// Transposes the 4×4 matrix of 2-bit elements held in `x` (byte = row, bit pair = column).
///
/// Both directions between "four rows share a byte" and "four columns share a byte" are this one involution.
#[inline(always)]
pub(crate) fn transpose4x4(x: u32) -> u32 {
    let t = (x ^ (x >> 6)) & 0x00cc_00cc;
    let x = x ^ t ^ (t << 6);
    let t = (x ^ (x >> 12)) & 0x0000_f0f0;
    x ^ t ^ (t << 12)
}
