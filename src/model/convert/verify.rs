//! Whether two checkpoints are the same model.

use super::progress::{Phase, Tracker};
use super::{Model, linears};
use crate::checkpoint::{Checkpoint, ModelFiles, TensorView};
use crate::ternary::PackedTernary;
use crate::{Error, Result};
use std::collections::HashSet;

/// Bytes that are compared at a time.
const CHUNK: usize = 4 << 20;

/// What two checkpoints have in common; see [`verify`].
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Verified {
    /// Ternary matrices, with the same codes.
    pub matrices: usize,
    /// Other tensors, the same bytes.
    pub tensors: usize,
    /// Matrices whose multiplier differs, because the other form cannot express it.
    pub inexact_scales: usize,
    /// The largest of these differences, relative; below 2⁻²².
    pub largest_difference: f64,
}

/// Reads two checkpoints and compares them as models: the configurations apart from how weights are stored, every code,
/// every multiplier, and the bytes of all other tensors. Masters on both sides have to be the same bytes too: there is
/// more in them than codes.
///
/// Multipliers may differ by two units in the last place, which is counted; a scale that multiplies only zeros is not
/// compared. Where nothing is counted, both give the same logits bit for bit.
///
/// # Errors
/// As [`Checkpoint::open`] and loading; [`Error::Tensor`] or [`Error::Config`] for the first difference, naming `target`'s
/// file.
pub fn verify(source: impl Into<ModelFiles>, target: impl Into<ModelFiles>) -> Result<Verified> {
    let source = Model::open(source)?;
    compare(&source, &Model::open(target)?, &Tracker::new(&mut |_| std::ops::ControlFlow::Continue(())))
}

/// [`verify`] of open checkpoints.
pub(super) fn compare(source: &Model, target: &Model, tracker: &Tracker) -> Result<Verified> {
    let total = target.checkpoint.tensors().map(|t| t.range.len() as u64).sum();
    tracker.begin(Phase::Verifying, total)?;
    same_config(source, target)?;
    let mut verified = Verified::default();
    let mut ternary = HashSet::new();
    let (from, to) = (source.weights()?, target.weights()?);
    for (layer, which, name) in linears(&source.config) {
        let (Some(want), Some(got)) = (from.ternary(layer, which)?, to.ternary(layer, which)?) else { continue };
        let weight = target.checkpoint.require(&format!("{name}.weight"))?;
        same_codes(&weight, &want, &got)?;
        let (m, n) = (want.scale().multiplier(), got.scale().multiplier());
        let [minus, _, plus] = want.histogram();
        if m != n && minus + plus > 0 {
            if !close(n, m) {
                return Err(weight.error(format!("is scaled by {n}, in the source by {m}: this is not the same model")));
            }
            verified.inexact_scales += 1;
            verified.largest_difference = verified.largest_difference.max(difference(n, m));
        }
        verified.matrices += 1;
        let stored = ["weight", "weight_scale"].map(|part| format!("{name}.{part}"));
        if !source.has_codes(&name)? && !target.has_codes(&name)? {
            same_bytes(&source.checkpoint.require(&stored[0])?, &weight, tracker)?;
        } else {
            let sizes = stored.iter().filter_map(|part| target.checkpoint.tensor(part)).map(|t| t.bytes().len() as u64);
            tracker.advance(sizes.sum())?;
        }
        ternary.extend(stored);
    }
    let others =
        |c: &Checkpoint| -> Vec<String> { c.names().filter(|n| !ternary.contains(*n)).map(str::to_owned).collect() };
    for name in others(&source.checkpoint) {
        let (want, got) = (source.checkpoint.require(&name)?, target.checkpoint.require(&name)?);
        same_bytes(&want, &got, tracker)?;
        verified.tensors += 1;
    }
    match others(&target.checkpoint).into_iter().find(|name| !source.checkpoint.contains(name)) {
        Some(name) => Err(target.checkpoint.require(&name)?.error("is not in the source: this is not the same model")),
        None => Ok(verified),
    }
}

/// Whether two multipliers are the same for every practical purpose, although not the same bits.
pub(super) fn close(a: f32, b: f32) -> bool {
    difference(a, b) < 1.0 / f64::from(1 << 22)
}

fn difference(a: f32, b: f32) -> f64 {
    (f64::from(a) / f64::from(b) - 1.0).abs()
}

/// Configurations are the same apart from how ternary weights are stored.
fn same_config(source: &Model, target: &Model) -> Result<()> {
    let mut config = target.config.clone();
    config.quantization.mode = source.config.quantization.mode;
    config.quantization.scale_style = source.config.quantization.scale_style;
    if config == source.config {
        return Ok(());
    }
    let (path, _) = target.checkpoint.config();
    Err(Error::file(path, format!("describes another model than {}", source.checkpoint.config().0.display())))
}

fn same_codes(weight: &TensorView, want: &PackedTernary, got: &PackedTernary) -> Result<()> {
    if want.codes() == got.codes() {
        return Ok(());
    }
    let place = (0..want.rows()).flat_map(|r| (0..want.cols()).map(move |c| (r, c)));
    let (r, c) = place.into_iter().find(|(r, c)| want.weight(*r, *c) != got.weight(*r, *c)).unwrap_or_default();
    let (found, expected) = (got.weight(r, c), want.weight(r, c));
    Err(weight.error(format!("row {r}, column {c} is {found}, in the source {expected}: this is not the same model")))
}

fn same_bytes(want: &TensorView, got: &TensorView, tracker: &Tracker) -> Result<()> {
    if (want.info.dtype, &want.info.shape) != (got.info.dtype, &got.info.shape) {
        let (a, b) = (got.info, want.info);
        let reason = format!("{} {:?}, in the source {} {:?}", a.dtype, a.shape, b.dtype, b.shape);
        return Err(got.error(reason));
    }
    let (mut at, pieces) = (0, want.bytes().chunks(CHUNK).zip(got.bytes().chunks(CHUNK)));
    for (a, b) in pieces {
        if a != b {
            let at = at + a.iter().zip(b).position(|(a, b)| a != b).unwrap_or_default();
            return Err(got.error(format!("byte {at} differs from the source's: this is not the same model")));
        }
        // At once, so that nothing large is resident, let alone twice.
        for view in [want, got] {
            let start = view.info.range.start + at;
            view.file.release(start..start + a.len());
        }
        at += a.len();
        tracker.advance(a.len() as u64)?;
    }
    Ok(())
}
