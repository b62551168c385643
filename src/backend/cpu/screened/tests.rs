//! The screened head against the whole one, bit for bit, on heads that are made to be hard.

use super::*;
use crate::backend::cpu::OutputColumns;
use crate::backend::cpu::dense::dense_linear;
use proptest::prelude::*;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 11
    }

    /// From −1 to 1.
    fn unit(&mut self) -> f32 {
        (self.next() % 2_000_001) as f32 / 1e6 - 1.0
    }

    fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.unit()).sum::<f32>() / 1.4
    }
}

fn head(dtype: DenseType, rows: usize, cols: usize, value: impl Fn(usize, usize) -> f32) -> CpuDense {
    CpuDense::owned(dtype, rows, cols, |bytes| {
        for (i, b) in bytes.chunks_exact_mut(dtype.size()).enumerate() {
            let v = value(i / cols, i % cols);
            match dtype {
                DenseType::F32 => b.copy_from_slice(&v.to_le_bytes()),
                DenseType::F16 => b.copy_from_slice(&f16::from_f32(v).to_le_bytes()),
                DenseType::BF16 => b.copy_from_slice(&bf16::from_f32(v).to_le_bytes()),
            }
        }
    })
    .unwrap()
}

/// The whole head's logits.
fn whole(isa: Isa, pool: &Pool, head: &CpuDense, x: &[f32]) -> Vec<f32> {
    let mut logits = vec![0.0; head.rows()];
    dense_linear(isa, pool, head, x, OutputColumns::whole(&mut logits, head.rows())).unwrap();
    logits
}

/// Compares with the whole head under both bounds, on every vector width and with one thread and two; returns how many rows
/// were computed under the certain one.
fn check(head: &CpuDense, x: &[f32], k: usize) -> Screening {
    check_bound(head, x, k, Bound::Probable(FAILURE));
    check_bound(head, x, k, Bound::Certain)
}

fn check_bound(head: &CpuDense, x: &[f32], k: usize, bound: Bound) -> Screening {
    let mut scratch = ScreenScratch::default();
    let mut first = None;
    for (isa, threads) in Isa::available().into_iter().map(|isa| (isa, 2)).chain([(Isa::best(), 1)]) {
        let pool = Pool::new(threads);
        let screened = CpuScreened::seeded(isa, &pool, head, bound, [7; 32]).unwrap().unwrap();
        let whole = whole(isa, &pool, head, x);
        let mut out = vec![f32::NAN; head.rows()];
        let mut scanned = false;
        let screening = screened.top(isa, &pool, head, x, k, &mut scratch, &mut out, || scanned = true).unwrap();
        assert!(scanned);
        let mut sorted = whole.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let least = sorted[k.min(sorted.len()) - 1];
        let mut computed = 0;
        for (row, (got, want)) in out.iter().zip(&whole).enumerate() {
            if *got == f32::NEG_INFINITY {
                assert!(*want < least, "{isa:?}: row {row} of {want} is among the {k} largest, from {least} on");
            } else {
                assert_eq!(got.to_bits(), want.to_bits(), "{isa:?}: row {row}");
                computed += 1;
            }
        }
        assert_eq!((screening.rows, screening.rescored), (head.rows(), computed));
        assert!(screening.refined >= computed || bound != Bound::Certain);
        // Integer sums do not depend on the width, so neither does what they decide.
        assert_eq!(first.get_or_insert(screening), &screening);
    }
    first.unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]
    #[test]
    fn the_largest_logits_are_those_of_the_whole_head(
        rows in 1usize..700, cols in 1usize..400, k in 1usize..65, seed: u64, kind in 0usize..3, outlier in 0f32..200.0,
    ) {
        let mut random = Random(seed);
        let values: Vec<f32> = (0..rows * cols).map(|_| random.normal() * 0.03).collect();
        let mut x: Vec<f32> = (0..cols).map(|_| random.normal()).collect();
        x[0] *= outlier;
        let dtype = [DenseType::BF16, DenseType::F16, DenseType::F32][kind];
        check(&head(dtype, rows, cols, |r, c| values[r * cols + c]), &x, k);
    }

    #[test]
    fn near_duplicates_cannot_be_told_apart_and_are_all_computed(
        rows in 2usize..300, cols in 1usize..300, k in 1usize..9, seed: u64, step in 0usize..3,
    ) {
        let mut random = Random(seed);
        let base: Vec<f32> = (0..cols).map(|_| random.normal()).collect();
        let x: Vec<f32> = (0..cols).map(|_| random.normal()).collect();
        // All rows the same, or different in one of f32's or bf16's last places.
        let ulp = [0.0, 1.2e-7, 0.004][step];
        let h = head(DenseType::F32, rows, cols, |r, c| base[c] * (1.0 + ulp * ((r * 31 + c) % 5) as f32));
        check(&h, &x, k);
    }
}

#[test]
fn heads_that_are_hard_to_bound() {
    let mut random = Random(7);
    let (rows, cols) = (2000, 320);
    let values: Vec<f32> = (0..rows * cols).map(|_| random.normal() * 0.02).collect();
    let x: Vec<f32> = (0..cols).map(|_| random.normal()).collect();
    let at = |r: usize, c: usize| values[r * cols + c];
    for k in [1, 2, 10, 64] {
        let all = check(&head(DenseType::BF16, rows, cols, |_, c| at(0, c)), &x, k);
        assert_eq!(all.rescored, rows, "equal rows have equal logits");
        let zero = check(&head(DenseType::BF16, rows, cols, |_, _| 0.0), &x, k);
        assert_eq!(zero.rescored, rows);
        check(&head(DenseType::BF16, rows, cols, |r, c| if r == 1234 { 1e4 * at(r, c) } else { at(r, c) }), &x, k);
        check(&head(DenseType::BF16, rows, cols, |r, c| if c == 5 { 1e3 * at(r, c) } else { at(r, c) }), &x, k);
        check(&head(DenseType::BF16, rows, cols, |r, c| if r % 3 == 0 { 0.0 } else { at(r, c) }), &x, k);
        check(&head(DenseType::F32, rows, cols, |r, c| 1e30 * at(r, c)), &x, k);
        check(&head(DenseType::F32, rows, cols, |r, c| 1e-30 * at(r, c)), &x, k);
        // Products below the smallest f32.
        let tiny: Vec<f32> = x.iter().map(|v| 1e-12 * v).collect();
        check(&head(DenseType::F32, rows, cols, |r, c| 1e-30 * at(r, c)), &tiny, k);
        check(&head(DenseType::BF16, rows, cols, at), &vec![0.0; cols], k);
    }
    check(&head(DenseType::BF16, 1, 1, |_, _| -3.0), &[2.0], 64);
}

#[test]
fn few_rows_of_a_random_head_are_computed() {
    let mut random = Random(3);
    let (rows, cols) = (20_000, 640);
    let values: Vec<f32> = (0..rows * cols).map(|_| random.normal() * 0.02).collect();
    let x: Vec<f32> = (0..cols).map(|_| random.normal()).collect();
    let h = head(DenseType::BF16, rows, cols, |r, c| values[r * cols + c]);
    let one = check(&h, &x, 1);
    assert!(one.rescored < 20 && one.refined < rows / 50, "{one:?}");
    let many = check(&h, &x, 64);
    assert!(many.rescored >= 64 && many.rescored < 200, "{many:?}");
    for (k, most) in [(1, rows / 10), (64, rows / 4)] {
        let probable = check_bound(&h, &x, k, Bound::Probable(FAILURE));
        assert!(probable.refined == 0 && probable.rescored < most, "{k}: {probable:?}");
    }
}

/// With a large probability of failure, rows are left out about as rarely as the bound says, and are indeed left out.
#[test]
fn the_probable_bound_fails_as_rarely_as_it_says() {
    let mut random = Random(11);
    let (rows, cols, pool) = (64, 64, Pool::new(1));
    let (mut below, mut wrong, mut trials) = ([0usize; 2], [0usize; 2], [0usize; 2]);
    for (which, failure) in [0.5, 0.05].into_iter().enumerate() {
        for _ in 0..120 {
            // Where random rounding errs most: halfway between two codes, with inputs of one size.
            let scale = 0.5f32;
            let values: Vec<f32> =
                (0..rows * cols).map(|_| (random.next() % 14) as f32 * scale - 6.5 * scale - 0.25).collect();
            let x: Vec<f32> = (0..cols).map(|_| if random.next().is_multiple_of(2) { 1.0 } else { -1.0 }).collect();
            let h = head(DenseType::F32, rows, cols, |r, c| if c == 0 { 7.5 * scale } else { values[r * cols + c] });
            let isa = Isa::best();
            let mut seed = [0; 32];
            seed[..8].copy_from_slice(&random.next().to_le_bytes());
            let screened = CpuScreened::seeded(isa, &pool, &h, Bound::Probable(failure), seed).unwrap().unwrap();
            let (mut scratch, mut out) = (ScreenScratch::default(), vec![0.0; rows]);
            screened.top(isa, &pool, &h, &x, 1, &mut scratch, &mut out, || ()).unwrap();
            let whole = whole(isa, &pool, &h, &x);
            below[which] += whole.iter().zip(&scratch.upper).filter(|(v, upper)| f64::from(**v) > **upper).count();
            let best = (0..rows).max_by(|a, b| whole[*a].total_cmp(&whole[*b])).unwrap();
            wrong[which] += usize::from(out[best] != whole[best]);
            trials[which] += 1;
        }
    }
    let share = |count: usize, of: usize| count as f64 / of as f64;
    let [half, few] = [0, 1].map(|i| (share(below[i], trials[i] * rows), share(wrong[i], trials[i])));
    // Hoeffding's bound is not sharp, but of the right size: errors of two values are nearly normal here, with a deviation of
    // half of what he allows for.
    assert!(half.0 <= 0.5 && half.0 > 0.05, "{half:?}");
    assert!(few.0 <= 0.05 && few.0 > 0.0005, "{few:?}");
    assert!(half.1 <= 0.5 && few.1 <= 0.05, "{half:?} {few:?}");
}

#[test]
fn random_numbers_are_new_each_time() {
    let mut random = Random(5);
    let values: Vec<f32> = (0..40 * 50).map(|_| random.normal()).collect();
    let h = head(DenseType::BF16, 40, 50, |r, c| values[r * 50 + c]);
    let pool = Pool::new(1);
    let planes = || {
        let screened = CpuScreened::new(Isa::best(), &pool, &h, Bound::Probable(FAILURE)).unwrap().unwrap();
        screened.data().to_vec()
    };
    assert_ne!(planes(), planes());
}

#[test]
fn what_cannot_be_bounded_is_left_to_the_whole_head() {
    let (pool, isa) = (Pool::new(1), Isa::best());
    for bound in [Bound::Certain, Bound::Probable(FAILURE)] {
        for bad in [f32::NAN, f32::INFINITY, 1e-39] {
            let h = head(DenseType::F32, 20, 5, |r, _| if r == 17 { bad } else { 1.0 });
            assert!(CpuScreened::new(isa, &pool, &h, bound).unwrap().is_none(), "{bad}");
        }
        let mut scratch = ScreenScratch::default();
        let mut out = vec![1.0; 20];
        let h = head(DenseType::BF16, 20, 5, |r, c| (r + c) as f32);
        let screened = CpuScreened::new(isa, &pool, &h, bound).unwrap().unwrap();
        for bad in [f32::NAN, f32::NEG_INFINITY, 1e38] {
            let x = [1.0, bad, 0.0, 0.0, 0.0];
            assert!(screened.top(isa, &pool, &h, &x, 1, &mut scratch, &mut out, || ()).is_none());
        }
        assert!(out.iter().all(|v| *v == 1.0));
        let bits = if bound == Bound::Certain { 6 } else { 4 };
        assert!(screened.bytes() >= 20 * 5 * bits / 8);
        assert_eq!(screened.resident_bytes() > screened.bytes(), bound == Bound::Certain);
        assert_eq!(screened.bound(), bound);
        // Logits that are too large for f32 in the whole head.
        let h = head(DenseType::F32, 20, 5, |_, c| if c == 0 { 1e30 } else { -1e30 });
        let screened = CpuScreened::new(isa, &pool, &h, bound).unwrap().unwrap();
        assert!(screened.top(isa, &pool, &h, &[1e20; 5], 1, &mut scratch, &mut out, || ()).is_none());
    }
}

/// Rows and columns that do not fill tiles and blocks, written and read back.
#[test]
fn codes_are_where_the_kernels_read_them() {
    let mut random = Random(9);
    for (rows, cols) in [(1, 1), (15, 17), (16, 256), (17, 300), (40, 33)] {
        let values: Vec<f32> = (0..rows * cols).map(|_| random.normal()).collect();
        let h = head(DenseType::F32, rows, cols, |r, c| values[r * cols + c]);
        for isa in Isa::available() {
            let screened = CpuScreened::new(isa, &Pool::new(2), &h, Bound::Certain).unwrap().unwrap();
            let blocks = cols.div_ceil(BLOCK_COLS);
            let padded = fine::row_bytes(cols) * fine::CODES;
            // One column at a time.
            for column in 0..cols {
                let mut high = vec![0i8; padded];
                let low = vec![0i8; padded];
                high[column] = 1;
                let mut dots = vec![0; rows.next_multiple_of(TILE_ROWS)];
                coarse::dots(isa, Bits::Six, &screened.coarse, blocks, [&high, &low], &mut dots);
                for row in 0..rows {
                    let bits = &screened.fine[row * screened.fine_row_bytes()..][..screened.fine_row_bytes()];
                    let code = (4 * dots[row] + fine::dot(isa, bits, &high, &low)) / 256 - OFFSET;
                    let v = values[row * cols + column];
                    let error = (f64::from(v) - code as f64 * f64::from(screened.about[row].scale)).abs();
                    assert!(error <= 0.501 * f64::from(screened.about[row].scale), "{row} {column}: {v} as {code}");
                }
            }
        }
    }
}
