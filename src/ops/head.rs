//! Products with output heads in other forms than the stored one, on the CPU.

use super::{contiguous, expect, matrix, output, shape_error};
use crate::Result;
use crate::backend::cpu::{CpuInt8, CpuScreened, OutputColumns};
use crate::backend::{Backend, DenseWeight};
use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};
use std::cell::Cell;

/// What products with an output head read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HeadReads {
    /// Passes, of one input or several.
    pub passes: usize,
    /// Stored bytes, in whichever form.
    pub bytes: usize,
    /// Inputs that a screen decided for.
    pub screened: usize,
    /// Rows of which a screen read its other bits.
    pub refined: usize,
    /// Rows that were computed from the stored weights because a screen could not rule them out.
    pub rescored: usize,
}

impl HeadReads {
    /// These and others.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            passes: self.passes + other.passes,
            bytes: self.bytes + other.bytes,
            screened: self.screened + other.screened,
            refined: self.refined + other.refined,
            rescored: self.rescored + other.rescored,
        }
    }

    /// A count's mean over the inputs that were screened, if there were any.
    #[must_use]
    pub fn screened_mean(self, count: usize) -> Option<f64> {
        (self.screened > 0).then(|| count as f64 / self.screened as f64)
    }

    /// What came since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            passes: self.passes - earlier.passes,
            bytes: self.bytes - earlier.bytes,
            screened: self.screened - earlier.screened,
            refined: self.refined - earlier.refined,
            rescored: self.rescored - earlier.rescored,
        }
    }
}

/// Logits of f32 `x` `[inputs, cols]` by a screened `head`: replaces `out` `[inputs, rows]` by exactly the head's logits in
/// the rows that can be among an input's `k` largest, and by −∞ in the others. An input that cannot be bounded takes the
/// whole head.
///
/// # Errors
/// [`crate::Error::Shape`] for operands that do not fit or lie elsewhere than in this machine's memory; of candle, if `out`
/// shares its storage with `x`.
pub fn screened_linear(
    backend: &Backend,
    screened: &CpuScreened,
    head: &DenseWeight,
    x: &Tensor,
    k: usize,
    out: &Tensor,
) -> Result<HeadReads> {
    const NAME: &str = ScreenedLinear::SCREEN;
    let (inputs, cols) = matrix(NAME, "input", x)?;
    if [screened.cols(), head.cols()] != [cols; 2] || screened.rows() != head.rows() {
        return Err(shape_error(
            NAME,
            format!("input [{inputs}, {cols}] for a head [{}, {}]", head.rows(), head.cols()),
        ));
    }
    expect(NAME, "output", out, inputs, head.rows())?;
    let read = Cell::new(HeadReads::default());
    out.inplace_op2(x, &ScreenedLinear { backend, screened, head, k, read: &read })?;
    Ok(read.get())
}

struct ScreenedLinear<'a> {
    backend: &'a Backend,
    screened: &'a CpuScreened,
    head: &'a DenseWeight,
    k: usize,
    read: &'a Cell<HeadReads>,
}

impl ScreenedLinear<'_> {
    const SCREEN: &'static str = "screen-head";
    const RESCORE: &'static str = "rescore-head";

    /// One input of a pass.
    fn one(&self, x: &[f32], out: &mut [f32]) -> Result<HeadReads> {
        let Self { backend, screened, head, .. } = self;
        let weight = Some((head.rows(), head.cols()));
        let mut screen = backend.timed(Self::SCREEN, || (weight, screened.bytes()));
        let mut rescore = None;
        let scanned = || {
            drop(screen.take());
            rescore = backend.timed(Self::RESCORE, || (weight, 0));
        };
        match backend.cpu().screened_linear(screened, head.cpu()?, x, self.k, out, scanned)? {
            Some(read) => {
                let rows = read.refined * screened.fine_row_bytes() + read.rescored * head.bytes() / head.rows();
                rescore.iter_mut().for_each(|timer| timer.add_bytes(rows));
                let bytes = screened.bytes() + rows;
                Ok(HeadReads { passes: 0, bytes, screened: 1, refined: read.refined, rescored: read.rescored })
            }
            None => {
                backend.cpu().dense_linear(head.cpu()?, x, OutputColumns::whole(out, head.rows()))?;
                Ok(HeadReads { bytes: head.bytes(), ..HeadReads::default() })
            }
        }
    }
}

impl InplaceOp2 for ScreenedLinear<'_> {
    fn name(&self) -> &'static str {
        Self::SCREEN
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, lo: &Layout, x: &CpuStorage, lx: &Layout) -> candle_core::Result<()> {
        let (out, x) = (output(out, lo)?, contiguous::<f32>(x, lx)?);
        let mut all = HeadReads { passes: 1, ..HeadReads::default() };
        for (out, x) in out.chunks_exact_mut(self.head.rows()).zip(x.chunks_exact(self.head.cols())) {
            all = all.and(self.one(x, out)?);
        }
        self.read.set(all);
        Ok(())
    }
}

/// Logits of f32 `x` `[inputs, cols]` by a head of eight bits: replaces `out` `[inputs, rows]`.
///
/// # Errors
/// [`crate::Error::Shape`] for operands that do not fit or lie elsewhere than in this machine's memory; of candle, if `out`
/// shares its storage with `x`.
pub fn int8_linear(backend: &Backend, head: &CpuInt8, x: &Tensor, out: &Tensor) -> Result<HeadReads> {
    const NAME: &str = Int8Linear::NAME;
    let (inputs, cols) = matrix(NAME, "input", x)?;
    if cols != head.cols() {
        return Err(shape_error(
            NAME,
            format!("input [{inputs}, {cols}] for a head [{}, {}]", head.rows(), head.cols()),
        ));
    }
    expect(NAME, "output", out, inputs, head.rows())?;
    out.inplace_op2(x, &Int8Linear { backend, head })?;
    Ok(HeadReads { passes: 1, bytes: head.bytes(), ..HeadReads::default() })
}

struct Int8Linear<'a> {
    backend: &'a Backend,
    head: &'a CpuInt8,
}

impl Int8Linear<'_> {
    const NAME: &'static str = "int8-head";
}

impl InplaceOp2 for Int8Linear<'_> {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, lo: &Layout, x: &CpuStorage, lx: &Layout) -> candle_core::Result<()> {
        let about = || (Some((self.head.rows(), self.head.cols())), self.head.bytes());
        let _timer = self.backend.timed(Self::NAME, about);
        let columns = OutputColumns::whole(output(out, lo)?, self.head.rows());
        Ok(self.backend.cpu().int8_linear(self.head, contiguous(x, lx)?, columns)?)
    }
}
