//! Whether two checkpoints are the same model.

use super::Model;
use super::progress::{Phase, Tracker};
use super::values::{pieces, place};
use crate::backend::DenseType;
use crate::checkpoint::{ModelFiles, StoredType, TensorView};
use crate::model::config::{Family, Mode};
use crate::ternary::PackedTernary;
use crate::{Error, Result};
use std::borrow::Cow;
use std::collections::HashSet;

/// What two checkpoints have in common; see [`verify`].
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Verified {
    /// Ternary matrices, with the same codes.
    pub matrices: usize,
    /// Other tensors, with the same values, or those that another type makes of them.
    pub tensors: usize,
    /// Matrices whose multiplier differs, because the other form cannot express it.
    pub inexact_scales: usize,
    /// The largest of these differences, relative: below 2⁻²², and for dense values half a unit in the last place of their
    /// type.
    pub largest_difference: f64,
    /// Other tensors whose type does not hold all of the source's values.
    pub rounded_tensors: usize,
    /// The largest of their errors: the root of the mean squared difference, relative to the values'.
    pub largest_error: f64,
}

/// Reads two checkpoints and compares them as models: the configurations apart from how weights are stored, every code,
/// every multiplier, and all other tensors: the same bytes, or if `target` has them in another type, what this crate makes
/// of the source's values in that type. Masters on both sides have to be the same bytes too: there is more in them than
/// codes.
///
/// Multipliers may differ by two units in the last place (in dense values by their rounding), which is counted; a scale
/// that multiplies only zeros is not compared. Where nothing is counted, both give the same logits bit for bit.
///
/// # Errors
/// As [`crate::checkpoint::Checkpoint::open`] and loading; [`Error::Tensor`] or [`Error::Config`] for the first difference,
/// naming `target`'s file.
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
    for (layer, which, name) in source.linears() {
        let (Some(want), Some(got)) = (from.ternary(layer, which)?, to.ternary(layer, which)?) else { continue };
        let weight = target.checkpoint.require(&format!("{name}.weight"))?;
        same_codes(&weight, &want, &got)?;
        let (m, n) = (want.scale().multiplier(), got.scale().multiplier());
        let [minus, _, plus] = want.histogram();
        if m != n && minus + plus > 0 {
            if difference(n, m) > tolerance(target, &weight) {
                return Err(weight.error(format!("is scaled by {n}, in the source by {m}: this is not the same model")));
            }
            verified.inexact_scales += 1;
            verified.largest_difference = verified.largest_difference.max(difference(n, m));
        }
        verified.matrices += 1;
        let stored = ["weight", "weight_scale"].map(|part| format!("{name}.{part}"));
        if !source.has_codes(&name)? && !target.has_codes(&name)? {
            same_values(&source.checkpoint.require(&stored[0])?, &weight, &mut verified, tracker)?;
        } else {
            let sizes = stored.iter().filter_map(|part| target.checkpoint.tensor(part)).map(|t| t.bytes().len() as u64);
            tracker.advance(sizes.sum())?;
        }
        ternary.extend(stored);
    }
    let others = |model: &Model| -> Vec<String> {
        model.checkpoint.names().filter(|n| !ternary.contains(*n)).map(str::to_owned).collect()
    };
    let mut expected = HashSet::new();
    for name in others(source) {
        let same = [name.clone(), source.name_in_gguf(&name)].into_iter().find(|name| target.checkpoint.contains(name));
        if same.is_none() && !source.needs(&name) {
            continue;
        }
        let got = target.checkpoint.require(same.as_ref().unwrap_or(&name))?;
        same_values(&source.checkpoint.require(&name)?, &got, &mut verified, tracker)?;
        verified.tensors += 1;
        expected.extend(same);
    }
    match others(target).into_iter().find(|name| !expected.contains(name)) {
        Some(name) => Err(target.checkpoint.require(&name)?.error("is not in the source: this is not the same model")),
        None => Ok(verified),
    }
}

/// How much multipliers may differ, relative: the rounding of dense values, otherwise two units in the last place.
fn tolerance(target: &Model, weight: &TensorView) -> f64 {
    match (target.config.quantization.mode, weight.info.dtype) {
        (Mode::Dequantized, StoredType::BF16) => 1.0 / f64::from(1 << 8),
        (Mode::Dequantized, StoredType::F16) => 1.0 / f64::from(1 << 11),
        _ => 1.0 / f64::from(1 << 22),
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
    if source.extras().is_none() && target.extras().is_none() {
        // What is left of it says nothing then.
        config.quantization = source.config.quantization.clone();
    }
    if target.checkpoint.is_gguf() {
        // As GGUF files have it: the first reproduction under another name, and what ends a text from all files together.
        if (source.config.family, config.family) == (Family::FirstReproduction, Family::BitNet) {
            config.family = source.config.family;
        }
        if source.config.eos_tokens.iter().all(|id| config.eos_tokens.contains(id)) {
            config.eos_tokens.clone_from(&source.config.eos_tokens);
        }
        if source.config.bos_token.is_none() {
            config.bos_token = None;
        }
    }
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

/// The same values, or those that the target's type makes of them; counts what is rounded.
fn same_values(want: &TensorView, got: &TensorView, verified: &mut Verified, tracker: &Tracker) -> Result<()> {
    if want.info.shape != got.info.shape {
        let reason = format!("shape {:?}, in the source {:?}", got.info.shape, want.info.shape);
        return Err(got.error(reason));
    }
    let same_type = want.info.dtype == got.info.dtype;
    // Wider types hold all values; of the others it shows.
    let exact = same_type || got.info.dtype == StoredType::F32 && DenseType::from_stored(want.info.dtype).is_some();
    let (mut error, mut power) = (0.0, 0.0);
    for rows in pieces(want) {
        let (from, to) = (place(want, &rows), place(got, &rows));
        let expected = match same_type {
            true => Cow::Borrowed(want.file.bytes().get(from.clone()).unwrap_or_default()),
            false => Cow::Owned(want.recode(rows.clone(), got.info.dtype)?),
        };
        let found = got.file.bytes().get(to.clone()).unwrap_or_default();
        if *expected != *found {
            let differs = expected.iter().zip(found).position(|(a, b)| a != b).unwrap_or_default();
            let at = to.start - got.info.range.start + differs;
            let what = if same_type {
                "the source's".to_owned()
            } else {
                format!("what the source's values are as {}", got.info.dtype)
            };
            return Err(got.error(format!("byte {at} differs from {what}: this is not the same model")));
        }
        if !exact {
            for (a, b) in want.widened(rows.clone())?.into_iter().zip(got.widened(rows)?) {
                error += (f64::from(a) - f64::from(b)).powi(2);
                power += f64::from(a).powi(2);
            }
        }
        let bytes = to.len() as u64;
        // At once, so that nothing large is resident, let alone twice.
        want.file.release(from);
        got.file.release(to);
        tracker.advance(bytes)?;
    }
    if error > 0.0 {
        verified.rounded_tensors += 1;
        verified.largest_error = verified.largest_error.max((error / power).sqrt());
    }
    Ok(())
}
