//! What the AVX-512 kernels share, whatever their packing: codes of two bits that stay in place in decode, and prefill's
//! product of tiles and panels.

use std::arch::x86_64::*;

/// The four fields of two bits in every byte.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn field_masks() -> [__m512i; 4] {
    let every = |byte: u8| _mm512_set1_epi8(byte as i8);
    [every(0x03), every(0x0c), every(0x30), every(0xc0)]
}

/// The sum of products with codes that stayed in field p of their bytes: those are multiples of 4^p, so dividing is exact.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn sum_fields(acc: [__m512i; 4]) -> __m512i {
    let low = _mm512_add_epi32(acc[0], _mm512_srai_epi32::<2>(acc[1]));
    let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(acc[2]), _mm512_srai_epi32::<6>(acc[3]));
    _mm512_add_epi32(low, high)
}

/// Defines `gemm::<T>`, prefill's product for T tokens, of a kernel whose lines hold `$words` words of four columns.
///
/// `$decoder` has `new()`; `decode(bytes)`, what a line's bytes hold, decoded once; and `codes(&mut decoded, p)`, the codes of
/// word p, one to a byte, asked for in order. A macro, as all of it needs the kernel's own features to be inlined.
macro_rules! gemm512 {
    ($features:literal, $words:expr, $decoder:ident) => {
        /// # Safety
        /// The kernel's features; `sums` is whole tiles of `[T][16]`, `tiles` holds as many tiles of `groups` lines, `panel`
        /// a line's words times `groups · T`.
        #[target_feature(enable = $features)]
        unsafe fn gemm<const T: usize>(tiles: *const u8, groups: usize, panel: *const i32, sums: &mut [i32]) {
            let tile_bytes = groups * LINE_BYTES;
            let mut tile = tiles;
            for pair in sums.chunks_mut(2 * T * TILE_ROWS) {
                if pair.len() == 2 * T * TILE_ROWS {
                    // SAFETY: two more tiles are there, as `pair` is whole; sizes as the caller vouches.
                    unsafe { pass::<T, 2>(tile, tile_bytes, groups, panel, pair) };
                } else {
                    // SAFETY: one more tile is there.
                    unsafe { pass::<T, 1>(tile, tile_bytes, groups, panel, pair) };
                }
                tile = tile.wrapping_add(2 * tile_bytes);
            }
        }

        /// R tiles times T tokens, accumulators in registers (2 · 12 of 32, which leaves 8 to the decoder).
        ///
        /// # Safety
        /// As [`gemm`], for R tiles.
        #[target_feature(enable = $features)]
        unsafe fn pass<const T: usize, const R: usize>(
            tiles: *const u8,
            tile_bytes: usize,
            groups: usize,
            panel: *const i32,
            sums: &mut [i32],
        ) {
            let decoder = $decoder::new();
            let zero = _mm512_setzero_si512();
            let mut acc = [[zero; T]; R];
            let (mut line, mut words) = (tiles, panel);
            for _ in 0..groups {
                // SAFETY: line g of each of the R tiles and the words of group g are inside the operands.
                unsafe {
                    let mut decoded = [decoder.decode(zero); R];
                    for r in 0..R {
                        decoded[r] = decoder.decode(_mm512_loadu_si512(line.add(r * tile_bytes).cast()));
                    }
                    for p in 0..$words {
                        let mut codes = [zero; R];
                        for r in 0..R {
                            codes[r] = decoder.codes(&mut decoded[r], p);
                        }
                        for t in 0..T {
                            let four = _mm512_set1_epi32(words.add(t).read());
                            for r in 0..R {
                                acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], codes[r], four);
                            }
                        }
                        words = words.add(T);
                    }
                    line = line.add(LINE_BYTES);
                }
            }
            for (sums, acc) in sums.chunks_exact_mut(TILE_ROWS).zip(acc.as_flattened()) {
                // SAFETY: the chunk has 16 elements.
                unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), *acc) };
            }
        }
    };
}
pub(super) use gemm512;
