//! Products with output heads in other forms than the stored one, on the CPU.

use super::{contiguous, expect, matrix, output, shape_error};
use crate::Result;
use crate::backend::cpu::{CpuInt8, CpuScreened, OutputColumns};
use crate::backend::{Backend, DenseWeight};
use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};
use std::cell::Cell;

/// What a product with an output head read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HeadRead {
    /// Stored bytes of the head, in whichever form.
    pub bytes: usize,
    /// Inputs that a screen decided for; the others took the whole head.
    pub screened: usize,
    /// Rows of which a screen read its other bits.
    pub refined: usize,
    /// Rows that were computed from the stored weights because a screen could not rule them out.
    pub rescored: usize,
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
) -> Result<HeadRead> {
    const NAME: &str = ScreenedLinear::SCREEN;
    let (inputs, cols) = matrix(NAME, "input", x)?;
    if (screened.rows(), screened.cols(), head.rows(), head.cols()) != (head.rows(), cols, screened.rows(), cols) {
        return Err(shape_error(
            NAME,
            format!("input [{inputs}, {cols}] for a head [{}, {}]", head.rows(), head.cols()),
        ));
    }
    expect(NAME, "output", out, inputs, head.rows())?;
    let read = Cell::new(HeadRead::default());
    out.inplace_op2(x, &ScreenedLinear { backend, screened, head, k, read: &read })?;
    Ok(read.get())
}

struct ScreenedLinear<'a> {
    backend: &'a Backend,
    screened: &'a CpuScreened,
    head: &'a DenseWeight,
    k: usize,
    read: &'a Cell<HeadRead>,
}

impl ScreenedLinear<'_> {
    const SCREEN: &'static str = "screen-head";
    const RESCORE: &'static str = "rescore-head";

    fn one(&self, x: &[f32], out: &mut [f32]) -> Result<HeadRead> {
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
                Ok(HeadRead { bytes, screened: 1, refined: read.refined, rescored: read.rescored })
            }
            None => {
                backend.cpu().dense_linear(head.cpu()?, x, OutputColumns::whole(out, head.rows()))?;
                Ok(HeadRead { bytes: head.bytes(), ..HeadRead::default() })
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
        let mut all = HeadRead::default();
        for (out, x) in out.chunks_exact_mut(self.head.rows()).zip(x.chunks_exact(self.head.cols())) {
            let read = self.one(x, out)?;
            all.bytes += read.bytes;
            all.screened += read.screened;
            all.refined += read.refined;
            all.rescored += read.rescored;
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
pub fn int8_linear(backend: &Backend, head: &CpuInt8, x: &Tensor, out: &Tensor) -> Result<HeadRead> {
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
    Ok(HeadRead { bytes: head.bytes(), ..HeadRead::default() })
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
