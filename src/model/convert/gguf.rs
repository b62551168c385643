//! Writes the forms that are GGUF files.

mod metadata;

use super::directory::read;
use super::plan::{Matrix, Plan, Store};
use super::progress::{Phase, Tracker};
use super::staging::{Companions, StagedFile};
use super::{Form, GgufType, Model, Summary, values, verify};
use crate::checkpoint::gguf::{self, Architecture, gguf_name};
use crate::checkpoint::write::Entry;
use crate::checkpoint::{ModelFiles, StoredType};
use crate::model::CheckpointWeights;
use crate::model::config::{Activation, Family, Projection};
use crate::ternary::{I2sLayout, PackedTernary};
use crate::text::GgufTokenizer;
use crate::{Error, Result};
use std::io::{self, BufWriter};
use std::path::Path;

pub(super) fn convert(model: &Model, plan: &Plan, kind: GgufType, target: &Path, tracker: &Tracker) -> Result<Summary> {
    let source = model.checkpoint.source();
    let arch = architecture(model)?;
    let tokenizer = GgufTokenizer::open(source)?;
    let metadata = metadata::of(model, arch, kind, tokenizer.as_ref(), target)?;
    let mut staged = StagedFile::new(target)?;
    let weights = model.weights()?;
    let mut entries = entries(model, &weights, plan, arch, kind, tracker)?;
    // As llama.cpp's converter has them: layer by layer.
    entries.sort_by_key(|e| order(&e.name));
    let bytes = entries.iter().filter_map(|e| e.bytes().ok()).sum();
    tracker.begin(Phase::Writing, bytes)?;
    let mut out = BufWriter::with_capacity(1 << 20, staged.file());
    gguf::write(target, &mut out, &metadata, entries, &mut |_| {}).map_err(|e| tracker.cause(e))?;
    drop(out);
    let written = match kind {
        GgufType::I2_S(layout) if layout != I2sLayout::default() => {
            ModelFiles::from(staged.path()).with_i2s_layout(Some(layout))?
        }
        _ => ModelFiles::from(staged.path()),
    };
    let verified = verify::compare(model, &Model::open(&written)?, tracker)?;
    if let Some(tokenizer) = &tokenizer {
        tokenizer.check(&written)?;
    }
    let files = vec![staged.commit()?];
    let all = Companions::of(source)?;
    // Tokenizer and defaults are in the file.
    let people = |name: &String| !name.ends_with(".json") && !name.starts_with("tokenizer") && !name.ends_with(".txt");
    let mut left: Vec<String> = all.copied.into_iter().filter(people).chain(all.left).collect();
    left.retain(|name| name != "chat_template.jinja");
    let form = Form::Gguf(kind);
    Ok(Summary { form, files, bytes, f32_masters: 0, verified, copied: Vec::new(), left })
}

/// The architecture that computes what the model does; a GGUF file's own.
fn architecture(model: &Model) -> Result<Architecture> {
    if let Some(gguf) = model.checkpoint.source().gguf()? {
        return gguf.architecture();
    }
    match (model.config.family, model.config.activation) {
        (Family::BitNet, Activation::Relu2) => Ok(Architecture::BitNetB158),
        (Family::BitNet | Family::FirstReproduction, Activation::Silu) => Ok(Architecture::BitNet),
        (Family::Llama, Activation::Silu) => Ok(Architecture::Llama),
        (family, activation) => {
            let (family, activation) = (family.architecture(), activation.name());
            let reason =
                format!("{activation} in {family}: no architecture of GGUF files is like that; use safetensors");
            Err(Error::config(model.checkpoint.config().0, "hidden_act", reason))
        }
    }
}

fn entries<'a>(
    model: &'a Model,
    weights: &'a CheckpointWeights<'a>,
    plan: &'a Plan,
    arch: Architecture,
    kind: GgufType,
    tracker: &'a Tracker,
) -> Result<Vec<Entry<'a>>> {
    let name_of = |name: &str| {
        gguf_name(&model.name_in_gguf(name)).ok_or_else(|| {
            Error::tensor(
                model.checkpoint.source().to_string(),
                name,
                "a GGUF file has no name for it; use safetensors",
            )
        })
    };
    let mut entries = Vec::new();
    for matrix in &plan.matrices {
        let shape = [matrix.rows, matrix.cols];
        let dtype = StoredType::Ggml(kind.ggml());
        entries.push(Entry::new(name_of(&format!("{}.weight", matrix.name))?, dtype, shape, move |out| {
            let bytes = encode(model, weights, matrix, arch, kind, tracker)?;
            values::put(out, &bytes, tracker)
        }));
        if let Store::Blocks { beside: Some(scale), .. } = matrix.store {
            let name = name_of(&format!("{}.weight_scale", matrix.name))?;
            entries.push(Entry::from_bytes(name, StoredType::F32, [1], scale.to_le_bytes().to_vec()));
        }
    }
    for other in &plan.others {
        let view = model.checkpoint.require(&other.name)?;
        entries.push(Entry::new(name_of(&other.name)?, other.dtype, view.info.shape.as_slice(), move |out| {
            values::write(&view, other.dtype, out, tracker)
        }));
    }
    Ok(entries)
}

fn encode(
    model: &Model,
    weights: &CheckpointWeights,
    matrix: &Matrix,
    arch: Architecture,
    kind: GgufType,
    tracker: &Tracker,
) -> io::Result<Vec<u8>> {
    let mut packed = read(weights, matrix, tracker)?;
    if arch == Architecture::Llama && matches!(matrix.which, Projection::Query | Projection::Key) {
        packed = interleaved(packed, model.config.head_dim);
    }
    tracker.keep(match (&matrix.store, kind) {
        (Store::Blocks { d, .. }, GgufType::TQ2_0) => packed.to_tq2_0(*d),
        (Store::Blocks { d, .. }, GgufType::TQ1_0) => packed.to_tq1_0(*d),
        (_, GgufType::I2_S(layout)) => packed.to_i2s(layout),
        _ => Err(Error::Shape { op: "GGUF", reason: format!("{} has no scale in its blocks", matrix.name) }),
    })
}

/// The rows of query and key as architecture llama has them: `j` and `j + d/2` of a head of `d` rows side by side.
fn interleaved(packed: PackedTernary, dim: usize) -> PackedTernary {
    packed.with_rows(|row| {
        let (head, at) = (row / dim, row % dim);
        head * dim + at % 2 * (dim / 2) + at / 2
    })
}

/// Where a tensor stands: what is outside the layers, then layer by layer.
fn order(name: &str) -> (bool, usize, String) {
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).and_then(|(n, _)| n.parse().ok());
    (layer.is_some(), layer.unwrap_or_default(), name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ternary::Scale;

    #[test]
    fn interleaving_is_what_reading_undoes() {
        let (heads, dim) = (3, 8);
        let weights: Vec<i8> = (0..heads * dim * 4).map(|i| [1, 0, -1, 1, 1, -1, 0][i % 7]).collect();
        let packed = PackedTernary::from_weights(heads * dim, 4, &weights, Scale::Multiply(1.0)).unwrap();
        let stored = interleaved(packed.clone(), dim);
        // As in checkpoint::gguf: rows 2j and 2j + 1 of a head are j and j + d/2.
        for head in 0..heads {
            for j in 0..dim / 2 {
                let row = |p: &PackedTernary, r: usize| p.row(head * dim + r).to_vec();
                assert_eq!(row(&stored, 2 * j), row(&packed, j));
                assert_eq!(row(&stored, 2 * j + 1), row(&packed, j + dim / 2));
            }
        }
    }
}
