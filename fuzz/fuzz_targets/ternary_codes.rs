//! Packed weights: what is accepted has three values and one usable scale, and writes the same codes again.
#![no_main]

use candle_bitnet::ternary::{I2sLayout, PackedTernary, Scale};
use half::f16;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((&[layout, rows, cols, extra], data)) = bytes.split_first_chunk::<4>() else { return };
    let (rows, small) = (usize::from(rows % 9), usize::from(cols));
    let blocks = 256 * usize::from(cols % 3) + usize::from(extra % 2);
    // As many bytes as the layout needs, or nearly so.
    let exact = |needed: usize| {
        let needed = if extra == 0xff { needed.saturating_sub(1) } else { needed };
        data.iter().copied().chain(std::iter::repeat(0x55)).take(needed).collect::<Vec<u8>>()
    };
    let i2s = |layout| {
        let mut bytes = exact(rows * small / 4 + 32);
        // The scale comes from the front, where it is found.
        if let (Some(scale), [.., _]) = (data.get(..4), &bytes[..]) {
            let at = (rows * small / 4).min(bytes.len().saturating_sub(4));
            bytes[at..at + 4].copy_from_slice(scale);
        }
        PackedTernary::from_i2s(rows, small, &bytes, layout).map(|packed| {
            let again = PackedTernary::from_i2s(rows, small, &packed.to_i2s(layout).unwrap(), layout).unwrap();
            assert_eq!(again.codes(), packed.codes());
            packed
        })
    };
    let tq = |bytes: usize| exact(rows * (blocks / 256) * bytes);
    let packed = match layout % 6 {
        0 => i2s(I2sLayout::Blocks128),
        1 => i2s(I2sLayout::Blocks64),
        2 => i2s(I2sLayout::Rows4),
        3 => PackedTernary::from_tq2_0(rows, blocks, &tq(66)).inspect(|p| {
            let again = PackedTernary::from_tq2_0(rows, blocks, &p.to_tq2_0(f16::ONE).unwrap()).unwrap();
            assert_eq!(again.codes(), p.codes());
        }),
        4 => PackedTernary::from_tq1_0(rows, blocks, &tq(54)).inspect(|p| {
            let again = PackedTernary::from_tq1_0(rows, blocks, &p.to_tq1_0(f16::ONE).unwrap()).unwrap();
            assert_eq!(again.codes(), p.codes());
        }),
        _ => PackedTernary::from_hf(rows, small, &exact(rows * small), Scale::Multiply(1.0)).inspect(|p| {
            assert_eq!(p.to_hf().unwrap(), exact(rows * small));
        }),
    };
    if let Ok(packed) = packed {
        assert!(packed.scale().multiplier().is_normal() && packed.scale().multiplier() > 0.0);
        assert_eq!(packed.histogram().iter().sum::<usize>(), packed.rows() * packed.cols());
        assert!((0..packed.rows()).all(|r| (0..packed.cols()).all(|c| (-1..=1).contains(&packed.weight(r, c)))));
    }
});
