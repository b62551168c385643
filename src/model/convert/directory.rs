//! Writes the forms that are directories of safetensors.

use super::plan::{Matrix, Plan, Store};
use super::progress::{Phase, Tracker};
use super::staging::{Companions, Staging};
use super::{Form, Model, Summary, config, values, verify};
use crate::Result;
use crate::backend::DenseType;
use crate::checkpoint::StoredType;
use crate::checkpoint::write::{DEFAULT_SHARD_BYTES, Entry, write_checkpoint, write_text};
use crate::model::CheckpointWeights;
use crate::ternary::{CODES_PER_BYTE, PackedTernary};
use half::bf16;
use std::io;
use std::path::Path;

pub(super) fn convert(model: &Model, plan: &Plan, form: Form, target: &Path, tracker: &Tracker) -> Result<Summary> {
    let source = model.checkpoint.source();
    let config = config::rewrite(model, form)?;
    let companions = Companions::of(source)?;
    let staging = Staging::new(target)?;
    let bytes = write(model, plan, staging.dir(), tracker)?;
    for name in &companions.copied {
        staging.copy(source, name)?;
    }
    write_text(&staging.dir().join("config.json"), &config)?;
    let verified = verify::compare(model, &Model::open(staging.dir())?, tracker)?;
    let is_f32 = |m: &&Matrix| matches!(&m.store, Store::Masters(r) if r.dtype == DenseType::F32);
    let f32_masters = plan.matrices.iter().filter(is_f32).count();
    let files = staging.commit()?;
    Ok(Summary { form, files, bytes, f32_masters, verified, copied: companions.copied, left: companions.left })
}

/// Writes all tensors; returns their bytes.
fn write(model: &Model, plan: &Plan, dir: &Path, tracker: &Tracker) -> Result<u64> {
    let weights = &model.weights()?;
    let mut entries = Vec::new();
    for matrix in &plan.matrices {
        let weight = format!("{}.weight", matrix.name);
        let shape = [matrix.rows, matrix.cols];
        match &matrix.store {
            Store::Packed(scale) => {
                let (dtype, bytes) = scale_bytes(scale.stored());
                entries.push(Entry::from_bytes(format!("{}.weight_scale", matrix.name), dtype, [1], bytes));
                let shape = [matrix.rows / CODES_PER_BYTE, matrix.cols];
                entries.push(Entry::new(&weight, StoredType::U8, shape, move |out| {
                    let packed = read(weights, matrix, tracker)?;
                    values::put(out, &tracker.keep(packed.to_hf())?, tracker)
                }));
            }
            Store::Masters(recipe) => {
                entries.push(Entry::new(&weight, recipe.dtype.stored(), shape, move |out| {
                    let packed = read(weights, matrix, tracker)?;
                    recipe.write(&packed, out, |bytes| tracker.keep(tracker.advance(bytes)))
                }));
            }
            Store::Dense(dtype) => {
                entries.push(Entry::new(&weight, dtype.stored(), shape, move |out| {
                    values::write_ternary(&read(weights, matrix, tracker)?, *dtype, out, tracker)
                }));
            }
            // Copies are among the others; blocks are of GGUF files.
            Store::Copy | Store::I2S | Store::Blocks { .. } => {}
        }
    }
    for other in &plan.others {
        let view = model.checkpoint.require(&other.name)?;
        entries.push(Entry::new(&other.name, other.dtype, view.info.shape.as_slice(), move |out| {
            values::write(&view, other.dtype, out, tracker)
        }));
    }
    // As the hub's checkpoints are: in the order of names, so that a layer's tensors lie together.
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let total = entries.iter().filter_map(|e| e.bytes().ok()).sum();
    tracker.begin(Phase::Writing, total)?;
    write_checkpoint(dir, entries, DEFAULT_SHARD_BYTES, &mut |_| {}).map_err(|e| tracker.cause(e))?;
    Ok(total)
}

/// A ternary weight of the plan, read again.
pub(super) fn read(weights: &CheckpointWeights, matrix: &Matrix, tracker: &Tracker) -> io::Result<PackedTernary> {
    let packed = tracker.keep(weights.ternary(matrix.layer, matrix.which))?;
    packed.ok_or_else(|| io::Error::other("not a ternary weight any more"))
}

/// A scale in the smallest type that holds it exactly.
fn scale_bytes(scale: f32) -> (StoredType, Vec<u8>) {
    let short = bf16::from_f32(scale);
    match short.to_f32() == scale {
        true => (StoredType::BF16, short.to_le_bytes().to_vec()),
        false => (StoredType::F32, scale.to_le_bytes().to_vec()),
    }
}
