//! Random weights as a packed checkpoint stores them.

use super::SyntheticWeights;
use crate::checkpoint::StoredType;
use crate::checkpoint::write::Entry;
use crate::model::config::Projection;
use half::bf16;
use std::io::{self, Write};

/// Bytes of an embedding that are made at a time.
const CHUNK: usize = 4 << 20;

impl SyntheticWeights {
    /// All tensors of the model in the hub's packed layout, in the order of its layers; made when they are written.
    pub fn entries(&self) -> Vec<Entry<'_>> {
        let config = self.config();
        let mut entries = vec![self.dense_entry("model.embed_tokens.weight")];
        if !config.tied_embeddings {
            entries.push(self.dense_entry("lm_head.weight"));
        }
        for layer in 0..config.num_layers {
            for which in Projection::ALL {
                let (rows, cols) = config.projection_shape(which);
                let name = config.projection_name(layer, which);
                let scale = bf16::from_f32(self.stored_scale(which)).to_le_bytes().to_vec();
                entries.push(Entry::from_bytes(format!("{name}.weight_scale"), StoredType::BF16, [1], scale));
                entries.push(Entry::new(format!("{name}.weight"), StoredType::U8, [rows / 4, cols], move |out| {
                    let packed = self.linear(layer, which).and_then(|w| w.to_hf()).map_err(io::Error::other)?;
                    out.write_all(&packed)
                }));
            }
            entries.extend(config.norms(layer).into_iter().map(|(name, len)| self.norm_entry(name, len)));
        }
        entries.push(self.norm_entry("model.norm.weight".into(), config.hidden_size));
        entries
    }

    fn norm_entry(&self, name: String, len: usize) -> Entry<'_> {
        let bytes = self.vector(&name, len).into_iter().flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect();
        Entry::from_bytes(name, StoredType::BF16, [len], bytes)
    }

    /// The embedding or the output head, made in pieces.
    fn dense_entry(&self, name: &'static str) -> Entry<'_> {
        let (rows, cols) = (self.config().vocab_size, self.config().hidden_size);
        Entry::new(name, StoredType::BF16, [rows, cols], move |out: &mut dyn Write| {
            let at_once = (CHUNK / (2 * cols)).max(1);
            let mut buffer = vec![0; at_once * 2 * cols];
            for first in (0..rows).step_by(at_once) {
                let count = at_once.min(rows - first);
                let part = buffer.get_mut(..count * 2 * cols).unwrap_or_default();
                self.dense_bf16(name, cols, first, part);
                out.write_all(part)?;
            }
            Ok(())
        })
    }
}
