//! Ternary weights in tiles, packed by the device.

use super::launch::Launch;
use super::params::{Pack, SEGMENTS, Scales};
use super::{Memory, int, plan, shape};
use crate::Result;
use crate::backend::Arrangement;
use crate::backend::cpu::{MAX_COLS, Segment};
use crate::ternary::PackedTernary;

const OP: &str = "pack";

/// One to four ternary matrices over the same input, in the tiles of `kernels/README.md`.
#[derive(Debug)]
pub struct Ternary<M> {
    arrangement: Arrangement,
    rows: usize,
    cols: usize,
    segments: Vec<Segment>,
    scales: Scales,
    data: M,
}

impl<M> Ternary<M> {
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

    pub(in crate::backend) fn scales(&self) -> Scales {
        self.scales
    }

    pub(in crate::backend) fn data(&self) -> &M {
        &self.data
    }
}

impl<M: Memory> Ternary<M> {
    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }
}

/// Weights on their way into tiles.
pub(crate) struct Packing {
    /// The tiles' bytes; codes of padding are 0.
    pub bytes: usize,
    /// For the kernel, once for each weight.
    pub matrices: Vec<Pack>,
    packed: Ternary<()>,
}

impl Packing {
    /// Where everything goes.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if there is no weight or more than four, their columns differ or exceed 132104, or gate and up
    /// are not two of one shape.
    pub(in crate::backend) fn new(weights: &[PackedTernary], arrangement: Arrangement) -> Result<Self> {
        let (rows, cols) = check(weights, arrangement)?;
        let gated = arrangement == Arrangement::GateUp;
        let n = if gated { rows / 2 } else { rows };
        let (mut segments, mut matrices, mut first_row) = (Vec::new(), Vec::new(), 0);
        for (i, w) in weights.iter().enumerate() {
            let row0 = if gated { 0 } else { first_row };
            let number = |v: usize| int(OP, "rows or columns", v);
            matrices.push(Pack {
                rows: number(w.rows())?,
                cols: number(cols)?,
                row_bytes: number(w.row_bytes())?,
                row0: number(row0)?,
                row_map: if gated { 1 + i as i32 } else { 0 },
            });
            segments.push(Segment { rows: w.rows(), scale: w.scale(), first_row, first_tile: row0 / 16 });
            first_row += w.rows();
        }
        let scales = scales(&segments)?;
        let packed = Ternary { arrangement, rows, cols, segments, scales, data: () };
        Ok(Self { bytes: plan::packed_bytes(n, cols, gated), matrices, packed })
    }

    /// The weights, packed into `data`.
    pub(in crate::backend) fn into<M>(self, data: M) -> Ternary<M> {
        let Ternary { arrangement, rows, cols, segments, scales, data: () } = self.packed;
        Ternary { arrangement, rows, cols, segments, scales, data }
    }
}

/// The launch that packs a matrix.
pub(crate) fn launch(weight: &PackedTernary) -> Launch {
    let words = weight.rows() * plan::k_tiles(weight.cols()) * 16;
    Launch::new("bitnet_pack", (words.div_ceil(plan::THREADS), 1, 1), plan::THREADS).bytes(2 * weight.codes().len())
}

/// Rows and columns of all weights together.
fn check(weights: &[PackedTernary], arrangement: Arrangement) -> Result<(usize, usize)> {
    let Some(first) = weights.first() else {
        return Err(shape(OP, "no weight to pack".into()));
    };
    let cols = first.cols();
    if let Some(other) = weights.iter().find(|w| w.cols() != cols) {
        return Err(shape(OP, format!("weights of {cols} and {} columns cannot share an input", other.cols())));
    }
    if cols > MAX_COLS {
        return Err(shape(OP, format!("{cols} columns exceed {MAX_COLS}, where accumulators stop being exact")));
    }
    if weights.len() > SEGMENTS {
        return Err(shape(OP, format!("{} weights exceed the {SEGMENTS} that kernels stack", weights.len())));
    }
    arrangement.check(weights)?;
    let total = weights.iter().try_fold(0usize, |sum, w| sum.checked_add(w.rows())).unwrap_or(usize::MAX);
    int(OP, "rows", total)?;
    Ok((total, cols))
}

/// Multipliers by row.
fn scales(segments: &[Segment]) -> Result<Scales> {
    let mut scales = Scales { end: [i32::MAX; SEGMENTS - 1], value: [1.0; SEGMENTS] };
    for (i, s) in segments.iter().enumerate() {
        scales.value[i] = s.scale.multiplier();
        if i + 1 < segments.len() {
            scales.end[i] = int(OP, "rows", s.first_row + s.rows)?;
        }
    }
    Ok(scales)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use crate::ternary::Scale;

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
    fn weights_lie_below_each_other_or_interleaved() {
        let at = |arrangement, rows: &[usize]| {
            let packing = Packing::new(&weights(rows, 300), arrangement).unwrap();
            let rows = packing.matrices.iter().map(|p| (p.row0, p.row_map)).collect::<Vec<_>>();
            (packing.bytes, rows, packing.into(0u8).segments.iter().map(|s| s.first_row).collect::<Vec<_>>())
        };
        assert_eq!(at(Arrangement::Stacked, &[16, 3]), (2 * 2 * 1024, vec![(0, 0), (16, 0)], vec![0, 16]));
        assert_eq!(at(Arrangement::GateUp, &[9, 9]), (2 * 2 * 1024, vec![(0, 1), (0, 2)], vec![0, 9]));
        assert_eq!(launch(&weights(&[40], 300)[0]).grid, (5, 1, 1));
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
