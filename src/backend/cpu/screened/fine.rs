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
    let mut sums = [0; 2];
    both(isa, bits, high, low, &mut sums);
    256 * i64::from(sums[0]) + i64::from(sums[1])
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
