use super::*;
use proptest::prelude::*;

fn matrix(dtype: DenseType, rows: usize, cols: usize, seed: u64) -> CpuDense {
    let value = |i: usize| ((i as u64).wrapping_mul(seed | 1) >> 40) as f32 / 8e6 - 1.0;
    CpuDense::owned(dtype, rows, cols, |bytes| {
        for (i, b) in bytes.chunks_exact_mut(dtype.size()).enumerate() {
            match dtype {
                DenseType::F32 => b.copy_from_slice(&value(i).to_le_bytes()),
                DenseType::F16 => b.copy_from_slice(&f16::from_f32(value(i)).to_le_bytes()),
                DenseType::BF16 => b.copy_from_slice(&bf16::from_f32(value(i)).to_le_bytes()),
            }
        }
    })
    .unwrap()
}

proptest! {
    #[test]
    fn equals_a_double_precision_product_and_itself_in_any_batch(
        rows in 1usize..90, cols in 1usize..80, tokens in 1usize..7, seed: u64,
    ) {
        let pool = Pool::new(2);
        let x: Vec<f32> = (0..tokens * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 20.0).collect();
        for dtype in [DenseType::F32, DenseType::F16, DenseType::BF16] {
            let m = matrix(dtype, rows, cols, seed);
            let mut wide = vec![0.0; rows * cols];
            wide.chunks_exact_mut(cols).enumerate().for_each(|(r, out)| m.row(r, out));
            let mut first = None;
            for isa in Isa::available() {
                let mut out = vec![0.0; tokens * rows];
                dense_linear(isa, &pool, &m, &x, OutputColumns::whole(&mut out, rows)).unwrap();
                for t in 0..tokens {
                    let mut alone = vec![0.0; rows];
                    let columns = OutputColumns::whole(&mut alone, rows);
                    dense_linear(isa, &pool, &m, &x[t * cols..][..cols], columns).unwrap();
                    prop_assert_eq!(&alone[..], &out[t * rows..][..rows]);
                    for r in 0..rows {
                        let terms = (0..cols).map(|k| f64::from(wide[r * cols + k]) * f64::from(x[t * cols + k]));
                        let size: f64 = terms.clone().map(f64::abs).sum();
                        let want: f64 = terms.sum();
                        prop_assert!((f64::from(out[t * rows + r]) - want).abs() <= 1e-5 * size + 1e-30);
                    }
                }
                prop_assert_eq!(first.get_or_insert(out.clone()), &out);
            }
        }
    }
}

/// Values whose sums round, of all magnitudes and signs, zeros of both signs among them.
fn value(i: usize, seed: u64) -> f32 {
    let h = (i as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
    match h % 17 {
        0 => 0.0,
        1 => -0.0,
        2 => (h % 1000) as f32 * 1e-40,
        _ => (h % 4001) as f32 / 2000.0 - 1.0,
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Every token of every batch has the bits that it has alone, by the arithmetic of one row.
#[test]
fn batches_of_any_size_have_the_bits_of_single_tokens() {
    let pool = Pool::new(2);
    let shapes = [(1, 1), (2, 63), (3, 64), (5, 65), (33, 200), (37, 127), (70, 320), (130, 15), (4, 2600)];
    for dtype in [DenseType::F32, DenseType::F16, DenseType::BF16] {
        for (rows, cols) in shapes {
            let m = matrix(dtype, rows, cols, 0x1234_5678_9abc);
            let x: Vec<f32> = (0..33 * cols).map(|i| value(i, 77)).collect();
            let mut wide = vec![0.0; cols];
            let mut alone = vec![0.0; 33 * rows];
            for (x, alone) in x.chunks_exact(cols).zip(alone.chunks_exact_mut(rows)) {
                for (r, alone) in alone.iter_mut().enumerate() {
                    m.row(r, &mut wide);
                    *alone = in_order(&wide, x);
                }
            }
            for isa in Isa::available() {
                for tokens in 1..=33 {
                    let mut out = vec![f32::NAN; tokens * rows];
                    dense_linear(isa, &pool, &m, &x[..tokens * cols], OutputColumns::whole(&mut out, rows)).unwrap();
                    assert!(bits(&out) == bits(&alone[..tokens * rows]), "{dtype:?} {rows} {cols} {tokens} {isa:?}");
                }
            }
        }
    }
}

/// The order of a product's additions, element by element.
fn in_order(w: &[f32], x: &[f32]) -> f32 {
    let mut sums = [0f32; 64];
    for (k, (w, x)) in w.iter().zip(x).enumerate() {
        sums[k % 64] += w * x;
    }
    let lanes = std::array::from_fn(|i| (sums[i] + sums[16 + i]) + (sums[32 + i] + sums[48 + i]));
    sum_lanes(lanes)
}

/// More tokens than stay in the second-level cache, and than are laid out at a time.
#[test]
fn many_tokens_are_cut_without_effect() {
    let pool = Pool::new(2);
    for (rows, cols, tokens) in [(9, 40, 1200), (3, 3000, 100), (2, 20_000, 110)] {
        let m = matrix(DenseType::BF16, rows, cols, 99);
        let x: Vec<f32> = (0..tokens * cols).map(|i| value(i, 5)).collect();
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; tokens * rows];
            dense_linear(isa, &pool, &m, &x, OutputColumns::whole(&mut out, rows)).unwrap();
            for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact(rows)).step_by(13) {
                let mut alone = vec![0.0; rows];
                dense_linear(isa, &pool, &m, x, OutputColumns::whole(&mut alone, rows)).unwrap();
                assert_eq!(bits(&alone), bits(out));
            }
        }
    }
}

/// Columns of wider rows, replaced and added to; what lies beside them stays.
#[test]
fn products_go_to_columns() {
    let (pool, rows, cols, width, first) = (Pool::new(2), 37, 70, 50, 6);
    let m = matrix(DenseType::BF16, rows, cols, 3);
    for isa in Isa::available() {
        for tokens in [1, 2, 3, 7, 20] {
            let x: Vec<f32> = (0..tokens * cols).map(|i| value(i, 9)).collect();
            let mut whole = vec![0.0; tokens * rows];
            dense_linear(isa, &pool, &m, &x, OutputColumns::whole(&mut whole, rows)).unwrap();
            for add in [false, true] {
                let before: Vec<f32> = (0..tokens * width).map(|i| value(i, 11) + 3.0).collect();
                let mut values = before.clone();
                dense_linear(isa, &pool, &m, &x, OutputColumns { values: &mut values, width, first, add }).unwrap();
                for (at, (value, before)) in values.iter().zip(before).enumerate() {
                    let (t, column) = (at / width, at % width);
                    let product = column.checked_sub(first).filter(|r| *r < rows).map(|r| whole[t * rows + r]);
                    let want = match product {
                        Some(v) if add => before + v,
                        Some(v) => v,
                        None => before,
                    };
                    assert_eq!(value.to_bits(), want.to_bits());
                }
            }
        }
    }
}
