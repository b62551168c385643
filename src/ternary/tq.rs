//! TQ2_0 and TQ1_0, the ternary types of llama.cpp (`ggml-quants.c`): blocks of 256 values of a row with a scale `d`
//! each, an f16.
//!
//! - TQ2_0: `qs[64]`, `d`. Value `n` in byte `32·(n / 128) + n % 32`, bits `2·((n % 128) / 32)` and up.
//! - TQ1_0: `qs[48]`, `qh[4]`, `d`. A byte is a fraction of 256 whose base-3 digits are the codes: digit `t` of byte `b`
//!   is `((b · 3ᵗ mod 256) · 3) / 256`. Values 0–159 in bytes 0–31 (`t = n / 32`), 160–239 in bytes 32–47
//!   (`t = (n − 160) / 16`), 240–255 in `qh` (`t = (n − 240) / 4`).
//!
//! A block of zeros has `d = 0`; all others of a b1.58 weight have one and the same.

use super::planes::{self, Order};
use super::{PackedTernary, Scale, transpose4x4};
use crate::{Error, Result};
use half::f16;

/// Values of a block.
const BLOCK: usize = 256;
/// Bytes of a block's canonical codes.
const CODES: usize = BLOCK / 4;
/// Bytes of `d`.
const D: usize = 2;
/// Bytes of a TQ2_0 block.
const TQ2_BYTES: usize = CODES + D;
/// Bytes of a TQ1_0 block.
const TQ1_BYTES: usize = 48 + 4 + D;
/// Four zero weights.
const ZEROS: u8 = 0x55;

/// The five digits of every byte, two bits each, the first in the low ones.
static DIGITS: [u16; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut rest, mut t) = (byte as u16, 0);
        while t < 5 {
            table[byte] |= ((rest * 3) >> 8) << (2 * t);
            rest = (rest * 3) & 255;
            t += 1;
        }
        byte += 1;
    }
    table
};

/// The byte of five digits: the base-3 number `q`, first digit most significant, as `⌈q · 256 / 243⌉`.
fn byte_of(digits: [u8; 5]) -> u8 {
    let q = digits.iter().fold(0u16, |q, d| 3 * q + u16::from(*d));
    ((q * 256).div_ceil(243)) as u8
}

impl PackedTernary {
    /// Decodes TQ2_0, `rows · cols / 256` blocks. A matrix of zeros alone has scale 1.
    ///
    /// # Errors
    /// [`Error::Shape`] for columns that are not a multiple of 256, a wrong length, a `d` that is no positive number or
    /// blocks that disagree; [`Error::InvalidCode`] for a code 3.
    pub fn from_tq2_0(rows: usize, cols: usize, bytes: &[u8]) -> Result<Self> {
        decode::<TQ2_BYTES>("TQ2_0", rows, cols, bytes, |block, out| {
            for (run, out) in block.chunks_exact(32).zip(out.chunks_exact_mut(32)) {
                planes::to_canonical(run, Order::LowFirst, out);
            }
        })
    }

    /// Encodes TQ2_0 with `d` for every block that is not zero: the multiplier, where an f16 holds it, or 1 where a
    /// file keeps the scale elsewhere.
    ///
    /// # Errors
    /// [`Error::Shape`] for columns that are not a multiple of 256.
    pub fn to_tq2_0(&self, d: f16) -> Result<Vec<u8>> {
        encode::<TQ2_BYTES>("TQ2_0", self, d, |canonical, block| {
            for (canonical, run) in canonical.chunks_exact(32).zip(block.chunks_exact_mut(32)) {
                planes::from_canonical(canonical, Order::LowFirst, run);
            }
        })
    }

    /// Decodes TQ1_0; as [`PackedTernary::from_tq2_0`].
    ///
    /// # Errors
    /// The same, without [`Error::InvalidCode`]: every byte is five digits.
    pub fn from_tq1_0(rows: usize, cols: usize, bytes: &[u8]) -> Result<Self> {
        decode::<TQ1_BYTES>("TQ1_0", rows, cols, bytes, |block, out| {
            for (bytes, out) in tq1_runs(block, out) {
                let quarter = bytes.len() / 4;
                for (q, four) in bytes.as_chunks::<4>().0.iter().enumerate() {
                    let digits = four.map(|b| DIGITS[usize::from(b)]);
                    let first = transpose4x4(u32::from_le_bytes(digits.map(|d| d as u8))).to_le_bytes();
                    let fifth = (0..4).fold(0, |byte, i| byte | ((digits[i] >> 8) as u8) << (2 * i));
                    let all = first.into_iter().chain([fifth]);
                    // Of the last four bytes, only four digits are values.
                    all.enumerate().for_each(|(t, byte)| {
                        if let Some(out) = out.get_mut(t * quarter + q) {
                            *out = byte;
                        }
                    });
                }
            }
        })
    }

    /// Encodes TQ1_0; as [`PackedTernary::to_tq2_0`].
    ///
    /// # Errors
    /// The same.
    pub fn to_tq1_0(&self, d: f16) -> Result<Vec<u8>> {
        encode::<TQ1_BYTES>("TQ1_0", self, d, |canonical, block| {
            let (mut canonical, mut block) = (canonical, block);
            for (len, digits) in [(32, 5), (16, 5), (4, 4)] {
                let (bytes, rest) = block.split_at_mut(len);
                let (values, others) = canonical.split_at(len / 4 * digits);
                let quarter = len / 4;
                for (at, byte) in bytes.iter_mut().enumerate() {
                    let (q, shift) = (at / 4, 2 * (at % 4));
                    let digit = |t: usize| values.get(t * quarter + q).map_or(0, |v| v >> shift & 3);
                    *byte = byte_of(std::array::from_fn(digit));
                }
                (block, canonical) = (rest, others);
            }
        })
    }
}

/// The three runs of a TQ1_0 block's bytes, with the canonical bytes of their values.
fn tq1_runs<'a>(block: &'a [u8], out: &'a mut [u8]) -> [(&'a [u8], &'a mut [u8]); 3] {
    let (first, rest) = block.split_at(32);
    let (second, third) = rest.split_at(16);
    let (out1, rest) = out.split_at_mut(40);
    let (out2, out3) = rest.split_at_mut(20);
    [(first, out1), (second, out2), (third, out3)]
}

fn check(op: &'static str, rows: usize, cols: usize) -> Result<usize> {
    match rows.checked_mul(cols).filter(|n| *n > 0 && cols.is_multiple_of(BLOCK)) {
        Some(count) => Ok(count / BLOCK),
        None => {
            Err(Error::Shape { op, reason: format!("{cols} columns of {rows} rows are not a multiple of {BLOCK}") })
        }
    }
}

fn decode<const BYTES: usize>(
    op: &'static str,
    rows: usize,
    cols: usize,
    bytes: &[u8],
    codes_of: impl Fn(&[u8], &mut [u8]),
) -> Result<PackedTernary> {
    let error = |reason| Err(Error::Shape { op, reason });
    let blocks = check(op, rows, cols)?;
    if Some(bytes.len()) != blocks.checked_mul(BYTES) {
        return error(format!("{rows}×{cols} needs {blocks} blocks of {BYTES} bytes, got {} bytes", bytes.len()));
    }
    let mut codes = vec![ZEROS; blocks * CODES];
    let mut scale: Option<(usize, f16)> = None;
    let (all, _) = bytes.as_chunks::<BYTES>();
    for (at, (block, out)) in all.iter().zip(codes.chunks_exact_mut(CODES)).enumerate() {
        let (codes, d) = block.split_at(BYTES - D);
        let d = d.first_chunk().map_or(f16::NAN, |b| f16::from_le_bytes(*b));
        if d == f16::ZERO {
            continue;
        }
        match scale {
            None if d.is_finite() && d > f16::ZERO => scale = Some((at, d)),
            Some((_, first)) if first == d => {}
            None => return error(format!("block {at} has scale {d}: it must be positive and finite")),
            Some((first, value)) => {
                return error(format!(
                    "block {first} has scale {value}, block {at} {d}: a b1.58 weight has one scale, so this was quantised \
                     from another kind of model"
                ));
            }
        }
        codes_of(codes, out);
    }
    PackedTernary::new(rows, cols, codes, Scale::Multiply(scale.map_or(1.0, |(_, d)| d.to_f32())))
}

fn encode<const BYTES: usize>(
    op: &'static str,
    packed: &PackedTernary,
    d: f16,
    put_codes: impl Fn(&[u8], &mut [u8]),
) -> Result<Vec<u8>> {
    let blocks = check(op, packed.rows(), packed.cols())?;
    let mut out = vec![0; blocks * BYTES];
    for (canonical, block) in packed.codes().chunks_exact(CODES).zip(out.chunks_exact_mut(BYTES)) {
        let (codes, tail) = block.split_at_mut(BYTES - D);
        put_codes(canonical, codes);
        let d = if canonical.iter().all(|b| *b == ZEROS) { f16::ZERO } else { d };
        tail.copy_from_slice(&d.to_le_bytes());
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn weights(count: usize, seed: u64) -> Vec<i8> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % 3
        };
        (0..count).map(|_| next() as i8 - 1).collect()
    }

    /// A digit by the formula.
    fn digit(byte: u8, t: u32) -> i8 {
        let rest = (u32::from(byte) * 3u32.pow(t)) & 255;
        ((rest * 3) >> 8) as i8 - 1
    }

    /// A weight of a TQ1_0 block by the formula.
    fn tq1(block: &[u8], n: usize) -> i8 {
        match n {
            0..160 => digit(block[n % 32], n as u32 / 32),
            160..240 => digit(block[32 + (n - 160) % 16], (n as u32 - 160) / 16),
            _ => digit(block[48 + (n - 240) % 4], (n as u32 - 240) / 4),
        }
    }

    proptest! {
        #[test]
        fn tq2_0_follows_the_formula_both_ways(rows in 1usize..4, blocks in 1usize..4, seed: u64) {
            let cols = 256 * blocks;
            let w = weights(rows * cols, seed);
            let p = PackedTernary::from_weights(rows, cols, &w, Scale::Multiply(0.25)).unwrap();
            let bytes = p.to_tq2_0(f16::from_f32(0.25)).unwrap();
            for (i, w) in w.iter().enumerate() {
                let (block, n) = (&bytes[i / 256 * 66..], i % 256);
                let code = block[32 * (n / 128) + n % 32] >> (2 * (n % 128 / 32)) & 3;
                prop_assert_eq!(code as i8 - 1, *w);
                prop_assert_eq!(&block[64..66], &f16::from_f32(0.25).to_le_bytes());
            }
            prop_assert_eq!(PackedTernary::from_tq2_0(rows, cols, &bytes).unwrap(), p);
        }

        #[test]
        fn tq1_0_follows_the_formula_both_ways(rows in 1usize..4, blocks in 1usize..4, seed: u64) {
            let cols = 256 * blocks;
            let w = weights(rows * cols, seed);
            let p = PackedTernary::from_weights(rows, cols, &w, Scale::Multiply(0.5)).unwrap();
            let bytes = p.to_tq1_0(f16::from_f32(0.5)).unwrap();
            for (i, w) in w.iter().enumerate() {
                prop_assert_eq!(tq1(&bytes[i / 256 * 54..], i % 256), *w);
            }
            prop_assert_eq!(PackedTernary::from_tq1_0(rows, cols, &bytes).unwrap(), p);
        }

        #[test]
        fn any_bytes_decode_by_the_formula(seed: u64) {
            let mut block = [0u8; 54];
            let mut state = seed;
            for byte in &mut block[..52] {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (state >> 56) as u8;
            }
            block[52..].copy_from_slice(&f16::ONE.to_le_bytes());
            let p = PackedTernary::from_tq1_0(1, 256, &block).unwrap();
            for n in 0..256 {
                prop_assert_eq!(p.weight(0, n), tq1(&block, n));
            }
        }
    }

    #[test]
    fn five_digits_survive_their_byte() {
        for q in 0..243u16 {
            let digits = [q / 81, q / 27 % 3, q / 9 % 3, q / 3 % 3, q % 3].map(|d| d as u8);
            let byte = byte_of(digits);
            let back: [u8; 5] = std::array::from_fn(|t| (DIGITS[usize::from(byte)] >> (2 * t) & 3) as u8);
            assert_eq!(back, digits, "{q}");
            assert!((0..5).all(|t| digit(byte, t as u32) == digits[t] as i8 - 1));
        }
    }

    #[test]
    fn blocks_of_zeros_say_nothing_about_the_scale() {
        let mut w = vec![0; 3 * 256];
        w[256 + 5] = -1;
        let p = PackedTernary::from_weights(3, 256, &w, Scale::Multiply(2.0)).unwrap();
        let d = f16::from_f32(2.0);
        let (two, one) = (p.to_tq2_0(d).unwrap(), p.to_tq1_0(d).unwrap());
        assert_eq!(
            (&two[64..66], &two[66 + 64..][..2], &one[52..54]),
            (&[0; 2][..], &d.to_le_bytes()[..], &[0; 2][..])
        );
        assert_eq!(PackedTernary::from_tq2_0(3, 256, &two).unwrap(), p);
        assert_eq!(PackedTernary::from_tq1_0(3, 256, &one).unwrap(), p);
        let dead = PackedTernary::from_tq2_0(1, 256, &[0; 66]).unwrap();
        assert_eq!((dead.histogram(), dead.scale()), ([0, 256, 0], Scale::Multiply(1.0)));
    }

    #[test]
    fn what_is_not_b158_is_refused() {
        let p = PackedTernary::from_weights(2, 256, &weights(512, 1), Scale::Multiply(1.0)).unwrap();
        let mut bytes = p.to_tq2_0(f16::ONE).unwrap();
        let fails = |b: &[u8]| PackedTernary::from_tq2_0(2, 256, b).unwrap_err();
        assert!(fails(&bytes[1..]).to_string().contains("2 blocks of 66 bytes, got 131"));
        bytes[66 + 64..].copy_from_slice(&f16::from_f32(1.5).to_le_bytes());
        assert!(fails(&bytes).to_string().contains("block 0 has scale 1, block 1 1.5"));
        for d in [f16::NAN, f16::INFINITY, f16::NEG_ONE] {
            bytes[64..66].copy_from_slice(&d.to_le_bytes());
            assert!(fails(&bytes).to_string().contains("positive"), "{d}");
        }
        let mut three = p.to_tq2_0(f16::ONE).unwrap();
        three[66 + 33] |= 0b1100;
        // Byte 33 of the second row, second bit pair: value 128 + 1 + 32.
        assert!(matches!(fails(&three), Error::InvalidCode { row: 1, col: 161 }));
        assert!(PackedTernary::from_tq1_0(1, 100, &[]).is_err() && PackedTernary::from_tq2_0(0, 256, &[]).is_err());
        let odd = PackedTernary::from_weights(1, 100, &[0; 100], Scale::Multiply(1.0)).unwrap();
        assert!(odd.to_tq1_0(f16::ONE).is_err());
    }
}
