//! The lower two bits of one row at a time: a run of 64 bytes holds 256 columns, byte `j` those of columns `j`, `64 + j`,
//! `128 + j` and `192 + j` from the low bits up. Columns beyond the matrix hold zeros.

use crate::backend::cpu::isa::{Isa, per_isa};

/// Codes of a byte.
pub(super) const CODES: usize = 4;
const RUN: usize = 64;

/// Bytes of a row.
pub(super) fn row_bytes(cols: usize) -> usize {
    cols.div_ceil(RUN * CODES) * RUN
}

per_isa! {
    /// Writes a row; `codes` have eight bits, and as many columns as the row has room for.
    pub(super) fn put(bits: &mut [u8], codes: &[u8]) {
        for (run, codes) in bits.as_chunks_mut::<RUN>().0.iter_mut().zip(codes.as_chunks::<{ RUN * CODES }>().0) {
            for j in 0..RUN {
                let two = |place: usize| (codes[place * RUN + j] & 3) << (2 * place);
                run[j] = two(0) | two(1) | two(2) | two(3);
            }
        }
    }
}

/// `Σ c · (256 · high + low)` of a row.
pub(super) fn dot(isa: Isa, bits: &[u8], high: &[i8], low: &[i8]) -> i64 {
    let [high, low] = planes(isa, bits, high, low);
    256 * i64::from(high) + i64::from(low)
}

fn planes(isa: Isa, bits: &[u8], high: &[i8], low: &[i8]) -> [i32; 2] {
    #[cfg(target_arch = "aarch64")]
    if isa.has_dotprod() {
        // SAFETY: the line above found the features.
        return unsafe { dotprod::planes(bits, high, low) };
    }
    let mut sums = [0; 2];
    both(isa, bits, high, low, &mut sums);
    sums
}

per_isa! {
    fn both(bits: &[u8], high: &[i8], low: &[i8], sums: &mut [i32; 2]) {
        let inputs = high.as_chunks::<{ RUN * CODES }>().0.iter().zip(low.as_chunks::<{ RUN * CODES }>().0);
        let (mut a, mut b) = ([0i32; 16], [0i32; 16]);
        for (run, (high, low)) in bits.as_chunks::<RUN>().0.iter().zip(inputs) {
            for place in 0..CODES {
                for part in 0..RUN / 16 {
                    for i in 0..16 {
                        let code = i32::from(run[16 * part + i] >> (2 * place) & 3);
                        let column = RUN * place + 16 * part + i;
                        a[i] += code * i32::from(high[column]);
                        b[i] += code * i32::from(low[column]);
                    }
                }
            }
        }
        *sums = [a.iter().sum(), b.iter().sum()];
    }
}

#[cfg(target_arch = "aarch64")]
mod dotprod {
    use super::{CODES, RUN};
    use crate::backend::cpu::aarch64::dot_columns;
    use std::arch::aarch64::*;

    /// Per 64 columns: 1 load, 3 AND, 1 shift, 8 loads of inputs and 8 dot products. Codes stay where they are in a byte, one
    /// sum for each place, which is divided at the end: exact, they are multiples. `sdot` reads codes as signed, so that
    /// place 3 is shifted down.
    ///
    /// # Safety
    /// NEON and dotprod.
    #[target_feature(enable = "neon,dotprod")]
    pub(super) unsafe fn planes(bits: &[u8], high: &[i8], low: &[i8]) -> [i32; 2] {
        let masks = [3, 3 << 2, 3 << 4].map(|m| vdupq_n_u8(m));
        let mut all = [[vdupq_n_s32(0); CODES]; 2];
        let inputs = high.as_chunks::<{ RUN * CODES }>().0.iter().zip(low.as_chunks::<{ RUN * CODES }>().0);
        for (run, (high, low)) in bits.as_chunks::<RUN>().0.iter().zip(inputs) {
            for part in (0..RUN).step_by(16) {
                // SAFETY: 16 bytes from each multiple of 16 on are inside the arrays.
                unsafe {
                    let w = vld1q_u8(run.as_ptr().add(part));
                    let codes =
                        [vandq_u8(w, masks[0]), vandq_u8(w, masks[1]), vandq_u8(w, masks[2]), vshrq_n_u8::<6>(w)];
                    for (x, sums) in [high, low].iter().zip(&mut all) {
                        for (place, sum) in sums.iter_mut().enumerate() {
                            let x = vld1q_s8(x.as_ptr().add(RUN * place + part));
                            *sum = dot_columns(*sum, codes[place], x);
                        }
                    }
                }
            }
        }
        all.map(|s| {
            let low = vaddq_s32(s[0], vshrq_n_s32::<2>(s[1]));
            vaddvq_s32(vaddq_s32(low, vaddq_s32(vshrq_n_s32::<4>(s[2]), s[3])))
        })
    }
}
