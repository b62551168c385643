//! Where a decoder's weights come from: a checkpoint, or a preset's random numbers.

use super::config::{ModelConfig, Projection};
use super::presets::SyntheticWeights;
use crate::backend::{Backend, DenseType, DenseWeight};
use crate::checkpoint::{self, Checkpoint};
use crate::nn::LinearWeight;
use crate::ternary::PackedTernary;
use crate::{Error, Result};

/// Supplies a decoder's weights one by one, so that nothing is held twice.
pub trait WeightSource: Sync {
    /// A projection: its ternary weight, or its dense one where the configuration leaves it unconverted.
    ///
    /// # Errors
    /// If it is missing, malformed or not ternary.
    fn linear(&self, backend: &Backend, layer: usize, which: Projection) -> Result<LinearWeight>;

    /// A norm's weight.
    ///
    /// # Errors
    /// If it is missing or malformed.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>>;

    /// A dense matrix: embedding or output head.
    ///
    /// # Errors
    /// If it is missing or malformed.
    fn dense(&self, backend: &Backend, name: &str, rows: usize, cols: usize) -> Result<DenseWeight>;
}

/// The weights of a checkpoint, read as its configuration says.
#[derive(Debug)]
pub struct CheckpointWeights<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
}

impl<'a> CheckpointWeights<'a> {
    /// Pairs a checkpoint with its configuration.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a tensor that the configuration gives no meaning to: a model that ignored it would
    /// run, and be wrong.
    pub fn new(checkpoint: &'a Checkpoint, config: &'a ModelConfig) -> Result<Self> {
        match config.unexplained(checkpoint.names()).first() {
            None => Ok(Self { checkpoint, config }),
            Some(name) => {
                let reason = "config.json gives it no meaning, so the model would run without it and be wrong; \
                              this is not one of the supported b1.58 families";
                match checkpoint.tensor(name) {
                    Some(t) => Err(t.error(reason)),
                    None => Err(Error::tensor(checkpoint.dir(), *name, reason)),
                }
            }
        }
    }

    /// The codes and the scale of a projection, masters quantised as loading does; none where the configuration leaves
    /// the projection unconverted.
    ///
    /// # Errors
    /// As [`Checkpoint::linear`]; [`Error::Tensor`] for masters that are not finite.
    pub fn ternary(&self, layer: usize, which: Projection) -> Result<Option<PackedTernary>> {
        let (rows, cols) = self.config.projection_shape(which);
        let name = self.config.projection_name(layer, which);
        if !self.config.is_converted(&name) {
            return Ok(None);
        }
        match self.checkpoint.linear(&name, rows, cols, self.config.quantization.scale_style)? {
            checkpoint::LinearWeight::Ternary(w) => Ok(Some(w)),
            checkpoint::LinearWeight::Dense(view) => {
                let packed = PackedTernary::quantize_slice(rows, cols, &view.to_f32())
                    .map_err(|e| Error::tensor(view.file.path(), format!("{name}.weight"), e.to_string()))?;
                view.release();
                Ok(Some(packed))
            }
        }
    }

    fn view(&self, backend: &Backend, name: &str, rows: usize, cols: usize) -> Result<DenseWeight> {
        let view = self.checkpoint.dense(name, rows, cols)?;
        backend.dense_mapped(view.dtype, rows, cols, view.file.clone(), view.range.clone())
    }
}

impl WeightSource for CheckpointWeights<'_> {
    fn linear(&self, backend: &Backend, layer: usize, which: Projection) -> Result<LinearWeight> {
        let (rows, cols) = self.config.projection_shape(which);
        let name = self.config.projection_name(layer, which);
        match self.ternary(layer, which)? {
            Some(w) => Ok(LinearWeight::Ternary(w)),
            None => self.view(backend, &format!("{name}.weight"), rows, cols).map(LinearWeight::Dense),
        }
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.checkpoint.vector(name, len)
    }

    fn dense(&self, backend: &Backend, name: &str, rows: usize, cols: usize) -> Result<DenseWeight> {
        self.view(backend, name, rows, cols)
    }
}

impl WeightSource for SyntheticWeights {
    fn linear(&self, _: &Backend, layer: usize, which: Projection) -> Result<LinearWeight> {
        self.linear(layer, which).map(LinearWeight::Ternary)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        Ok(self.vector(name, len))
    }

    fn dense(&self, backend: &Backend, name: &str, rows: usize, cols: usize) -> Result<DenseWeight> {
        backend.dense_filled(DenseType::BF16, rows, cols, |out| self.dense_bf16(name, cols, 0, out))
    }
}
