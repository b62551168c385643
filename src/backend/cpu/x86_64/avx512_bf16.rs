//! Products of bf16 pairs in f32 by `vdpbf16ps` (Zen 4, Sapphire Rapids and later), for training's dense passes.
//!
//! Both operands are packed into panels of [`ROWS`] or [`COLS`] lines: a panel holds, for each pair of steps along the
//! contraction, one u32 a line (even step in the low half). The kernel keeps 14 × 32 sums in 28 registers; a pair of
//! steps is 2 loads, 14 broadcasts and 28 dots.

use std::arch::x86_64::*;

/// Rows of a tile: what a left panel interleaves.
pub const ROWS: usize = 14;
/// Columns of a tile: what a right panel interleaves.
pub const COLS: usize = 32;

/// Proof that this CPU has AVX-512 F, BW and BF16.
#[derive(Debug, Clone, Copy)]
pub struct Avx512Bf16(());

impl Avx512Bf16 {
    /// The proof, if it has them.
    pub fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16");
        has.then_some(Self(()))
    }

    /// `tile = a · b` of two panels of `pairs` pairs.
    ///
    /// # Panics
    /// If a panel is too short.
    pub fn tile(self, a: &[u32], b: &[u32], pairs: usize, tile: &mut [[f32; COLS]; ROWS]) {
        assert!(a.len() >= ROWS * pairs && b.len() >= COLS * pairs, "panels of {pairs} pairs");
        // SAFETY: `new` found the features; the panels' lengths were just checked.
        unsafe { multiply(a.as_ptr(), b.as_ptr(), pairs, tile) }
    }

    /// Rounds `row · factor` to bf16 in pairs and writes them `stride` apart, from `out[0]` on. An odd last value is
    /// paired with zero.
    ///
    /// # Panics
    /// If `out` is too short.
    pub fn spread(self, row: &[f32], factor: f32, stride: usize, out: &mut [u32]) {
        assert!(row.is_empty() || (row.len().div_ceil(2) - 1) * stride < out.len(), "a panel of {} steps", row.len());
        // SAFETY: `new` found the features; the last store's index was just checked.
        unsafe { spread(row, factor, stride, out) }
    }

    /// Rounds `a · factors.0` and `b · factors.1`, each times `lines` if given, to bf16 and pairs them, `a` in the low
    /// halves.
    pub fn interleave(self, a: &[f32], b: &[f32], factors: (f32, f32), lines: Option<&[f32]>, out: &mut [u32]) {
        // SAFETY: `new` found the features.
        unsafe { interleave(a, b, factors, lines, out) }
    }
}

/// # Safety
/// AVX-512 F, BW and BF16; `a` holds `14 · pairs` values, `b` `32 · pairs`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn multiply(a: *const u32, b: *const u32, pairs: usize, tile: &mut [[f32; COLS]; ROWS]) {
    let bits = |v: __m512i| -> __m512bh {
        // SAFETY: both are 64 bytes without invalid values.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(v) }
    };
    let mut acc = [[_mm512_setzero_ps(); 2]; ROWS];
    for p in 0..pairs {
        // SAFETY: p < pairs, so all of these lie inside the panels that the caller vouches for.
        unsafe {
            let b = b.add(COLS * p);
            let (b0, b1) = (bits(_mm512_loadu_si512(b.cast())), bits(_mm512_loadu_si512(b.add(16).cast())));
            let a = a.add(ROWS * p);
            for (i, acc) in acc.iter_mut().enumerate() {
                let a = bits(_mm512_set1_epi32(*a.add(i) as i32));
                acc[0] = _mm512_dpbf16_ps(acc[0], a, b0);
                acc[1] = _mm512_dpbf16_ps(acc[1], a, b1);
            }
        }
    }
    for (row, acc) in tile.iter_mut().zip(acc) {
        // SAFETY: a row holds 32 values.
        unsafe {
            _mm512_storeu_ps(row.as_mut_ptr(), acc[0]);
            _mm512_storeu_ps(row.as_mut_ptr().add(16), acc[1]);
        }
    }
}

/// # Safety
/// AVX-512 F, BW and BF16; `out` reaches to `(ceil(row.len() / 2) − 1) · stride`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn spread(row: &[f32], factor: f32, stride: usize, out: &mut [u32]) {
    let factor = _mm512_set1_ps(factor);
    let mut out = out.as_mut_ptr();
    for chunk in row.chunks(32) {
        let mut padded = [0f32; 32];
        let source = match chunk.len() {
            32 => chunk.as_ptr(),
            n => {
                padded[..n].copy_from_slice(chunk);
                padded.as_ptr()
            }
        };
        let mut pairs = [0u32; 16];
        // SAFETY: `source` points at 32 values, `pairs` holds 64 bytes; the stores stay below the caller's bound, as
        // there are ceil(row.len() / 2) of them.
        unsafe {
            let low = _mm512_mul_ps(_mm512_loadu_ps(source), factor);
            let high = _mm512_mul_ps(_mm512_loadu_ps(source.add(16)), factor);
            let rounded = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(pairs.as_mut_ptr().cast(), rounded);
            for pair in &pairs[..chunk.len().div_ceil(2)] {
                *out = *pair;
                out = out.wrapping_add(stride);
            }
        }
    }
}

/// # Safety
/// AVX-512 F, BW and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn interleave(a: &[f32], b: &[f32], factors: (f32, f32), lines: Option<&[f32]>, out: &mut [u32]) {
    // To nearest, halves to even, as `vcvtneps2bf16` rounds; the compiler makes vectors of it.
    let round = |x: f32| {
        let bits = x.to_bits();
        bits.wrapping_add(0x7fff + (bits >> 16 & 1))
    };
    let pair = |a: f32, b: f32| round(a) >> 16 | round(b) & 0xffff_0000;
    match lines {
        None => {
            for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                *out = pair(a * factors.0, b * factors.1);
            }
        }
        Some(lines) => {
            for (((out, a), b), line) in out.iter_mut().zip(a).zip(b).zip(lines) {
                *out = pair(a * factors.0 * line, b * factors.1 * line);
            }
        }
    }
}
