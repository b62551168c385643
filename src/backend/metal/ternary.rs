//! Ternary weights in the memory of the CPU and the GPU, packed by the GPU, and the check that its products are right.

use super::launch::Launch;
use super::params::{Pack, SEGMENTS, Scales};
use super::{Metal, MetalBuffer, int, plan, shape};
use crate::backend::Arrangement;
use crate::backend::cpu::{MAX_COLS, Segment};
use crate::ternary::{PackedTernary, Scale};
use crate::{Error, Result};

/// One to four ternary matrices over the same input, in the tiles of `kernels/README.md`.
#[derive(Debug)]
pub struct MetalTernary {
    arrangement: Arrangement,
    rows: usize,
    cols: usize,
    segments: Vec<Segment>,
    scales: Scales,
    data: MetalBuffer<u8>,
}

impl MetalTernary {
    /// Packs the canonical codes of `weights` where they stay, one matrix at a time, on the device. Waits for it.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is none or more than four, their columns differ or exceed 132104, or gate and up are
    /// not two of one shape; [`Error::Unavailable`] if memory is short.
    pub fn pack(metal: &Metal, weights: &[PackedTernary], arrangement: Arrangement) -> Result<Self> {
        const OP: &str = "pack";
        let (rows, cols) = check(weights, arrangement)?;
        let gated = arrangement == Arrangement::GateUp;
        let n = if gated { rows / 2 } else { rows };
        // Codes of padding are 0.
        let data = metal.zeroed::<u8>(plan::packed_bytes(n, cols, gated), "packed weights")?;
        let (mut segments, mut first_row) = (Vec::with_capacity(weights.len()), 0);
        let scratch = &mut *metal.scratch();
        for (i, w) in weights.iter().enumerate() {
            let row0 = if gated { 0 } else { first_row };
            let staged = scratch.canonical.at_least(metal, w.codes().len(), "weights to pack")?;
            metal.copy_in(w.codes(), staged, 0)?;
            let number = |v: usize| int(OP, "rows or columns", v);
            let params = Pack {
                rows: number(w.rows())?,
                cols: number(cols)?,
                row_bytes: number(w.row_bytes())?,
                row0: number(row0)?,
                row_map: if gated { 1 + i as i32 } else { 0 },
            };
            let words = w.rows() * plan::k_tiles(cols) * 16;
            let launch = Launch::new("bitnet_pack", (words.div_ceil(plan::THREADS), 1, 1), plan::THREADS)
                .bytes(2 * w.codes().len());
            let bindings = [staged.slice(..w.codes().len()).input(), data.as_slice().output()];
            // SAFETY: the bindings and parameters of bitnet_pack: rows · row_bytes bytes of codes, and the tiles of all
            // rows, of which this matrix's were counted above.
            unsafe { metal.launch(launch, &bindings, &params) }?;
            segments.push(Segment { rows: w.rows(), scale: w.scale(), first_row, first_tile: row0 / 16 });
            first_row += w.rows();
        }
        metal.synchronize()?;
        let scales = scales(&segments)?;
        Ok(Self { arrangement, rows, cols, segments, scales, data })
    }

    /// How the weights lie.
    pub fn arrangement(&self) -> Arrangement {
        self.arrangement
    }

    /// Output features of all weights; gate and up both count.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The weights.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }

    pub(super) fn scales(&self) -> Scales {
        self.scales
    }

    pub(super) fn data(&self) -> &MetalBuffer<u8> {
        &self.data
    }
}

/// Rows and columns of all weights together.
fn check(weights: &[PackedTernary], arrangement: Arrangement) -> Result<(usize, usize)> {
    let Some(first) = weights.first() else {
        return Err(shape("pack", "no weight to pack".into()));
    };
    let cols = first.cols();
    if let Some(other) = weights.iter().find(|w| w.cols() != cols) {
        return Err(shape("pack", format!("weights of {cols} and {} columns cannot share an input", other.cols())));
    }
    if cols > MAX_COLS {
        return Err(shape("pack", format!("{cols} columns exceed {MAX_COLS}, where accumulators stop being exact")));
    }
    if weights.len() > SEGMENTS {
        return Err(shape("pack", format!("{} weights exceed the {SEGMENTS} that kernels stack", weights.len())));
    }
    arrangement.check(weights)?;
    let total = weights.iter().try_fold(0usize, |sum, w| sum.checked_add(w.rows())).unwrap_or(usize::MAX);
    int("pack", "rows", total)?;
    Ok((total, cols))
}

/// Multipliers by row.
fn scales(segments: &[Segment]) -> Result<Scales> {
    let mut scales = Scales { end: [i32::MAX; SEGMENTS - 1], value: [1.0; SEGMENTS] };
    for (i, s) in segments.iter().enumerate() {
        scales.value[i] = s.scale.multiplier();
        if i + 1 < segments.len() {
            scales.end[i] = int("pack", "rows", s.first_row + s.rows)?;
        }
    }
    Ok(scales)
}

impl Metal {
    /// Packs weights that share their input; see [`MetalTernary::pack`].
    ///
    /// # Errors
    /// As [`MetalTernary::pack`].
    pub fn pack(&self, weights: &[PackedTernary], arrangement: Arrangement) -> Result<MetalTernary> {
        MetalTernary::pack(self, weights, arrangement)
    }

    /// Runs small products, by the decode and by the prefill kernel, and compares every sum with the reference.
    pub(super) fn self_check(&self) -> Result<()> {
        // Two and a half row tiles, one and a bit column tiles; more tokens than a decode product takes.
        const ROWS: usize = 40;
        const COLS: usize = 300;
        const TOKENS: usize = plan::DECODE_TOKENS + 3;
        let mut state = 0x9e37_79b9u32;
        let mut next = |n: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % n
        };
        let weights: Vec<i8> = (0..ROWS * COLS).map(|_| next(3) as i8 - 1).collect();
        // Whole numbers with 127 as the largest are their own codes, with a scale of 1: results are the sums themselves.
        let value = |i: usize, v: u32| if i.is_multiple_of(COLS) { 127.0 } else { v as f32 - 127.0 };
        let x: Vec<f32> = (0..TOKENS * COLS).map(|i| value(i, next(255))).collect();
        let packed = PackedTernary::from_weights(ROWS, COLS, &weights, Scale::Multiply(1.0))?;
        let packed = self.pack(&[packed], Arrangement::Stacked)?;
        let input = self.upload(&x, "the self-check")?;
        let output = self.zeroed::<f32>(TOKENS * ROWS, "the self-check")?;
        for (kernel, tokens) in [("bitnet_gemv_norm_4", 3), ("bitnet_gemm", TOKENS)] {
            let (x_slice, out) = (input.slice(..tokens * COLS), output.slice(..tokens * ROWS));
            self.norm_linear(&packed, x_slice, None, out, 0, ROWS, false)?;
            for (i, got) in self.download(&output, tokens * ROWS)?.iter().enumerate() {
                let (row, x) = (&weights[i % ROWS * COLS..][..COLS], &x[i / ROWS * COLS..][..COLS]);
                let want: f32 = row.iter().zip(x).map(|(w, x)| f32::from(*w) * x).sum();
                if *got != want {
                    let reason =
                        format!("{COLS} columns, token {}, row {}: {got} instead of {want}", i / ROWS, i % ROWS);
                    return Err(Error::SelfCheck { kernel, reason });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(rows: &[usize], cols: usize) -> Vec<PackedTernary> {
        let one = |(i, rows): (usize, &usize)| {
            PackedTernary::from_weights(*rows, cols, &vec![1; rows * cols], Scale::Divide(1.0 + i as f32)).unwrap()
        };
        rows.iter().enumerate().map(one).collect()
    }

    #[test]
    fn weights_that_do_not_go_together_are_refused() {
        assert_eq!(check(&weights(&[3, 2, 2], 5), Arrangement::Stacked).unwrap(), (7, 5));
        assert_eq!(check(&weights(&[3, 3], 5), Arrangement::GateUp).unwrap(), (6, 5));
        let mixed = [weights(&[3], 5), weights(&[3], 6)].concat();
        for (bad, arrangement) in [
            (vec![], Arrangement::Stacked),
            (mixed, Arrangement::Stacked),
            (weights(&[1; 5], 4), Arrangement::Stacked),
            (weights(&[1], MAX_COLS + 1), Arrangement::Stacked),
            (weights(&[3, 4], 5), Arrangement::GateUp),
            (weights(&[3], 5), Arrangement::GateUp),
        ] {
            assert!(matches!(check(&bad, arrangement), Err(Error::Shape { op: "pack", .. })));
        }
    }

    #[test]
    fn scales_are_multipliers_by_row() {
        let segment = |rows, first_row, scale| Segment { rows, scale, first_row, first_tile: 0 };
        let three = [
            segment(8, 0, Scale::Divide(4.0)),
            segment(2, 8, Scale::Multiply(3.0)),
            segment(2, 10, Scale::Multiply(5.0)),
        ];
        let s = scales(&three).unwrap();
        assert_eq!((s.end, s.value), ([8, 10, i32::MAX], [0.25, 3.0, 5.0, 1.0]));
        assert_eq!(scales(&three[..1]).unwrap().end, [i32::MAX; 3]);
    }
}
