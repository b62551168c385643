//! Where a decoder's weights come from: a checkpoint, or a preset's random numbers.

use super::config::{Mode, ModelConfig, Projection, SUPPORTED};
use super::presets::SyntheticWeights;
use super::ternary_of;
use crate::backend::{Backend, DenseType, DenseWeight};
use crate::checkpoint::adapter::{Adapter, tensor_names};
use crate::checkpoint::gguf::DenseMatrix;
use crate::checkpoint::{self, Checkpoint};
use crate::nn::{LinearWeight, LowRank};
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

    /// The low-rank update of a projection, if it has one.
    ///
    /// # Errors
    /// If it is malformed.
    fn adapter(&self, _backend: &Backend, _layer: usize, _which: Projection) -> Result<Option<LowRank>> {
        Ok(None)
    }
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
                let reason = "its configuration gives it no meaning, so the model would run without it and be wrong; \
                              this is not one of the supported b1.58 families";
                match checkpoint.tensor(name) {
                    Some(t) => Err(t.error(reason)),
                    None => Err(Error::tensor(checkpoint.source().to_string(), *name, reason)),
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
        let quantization = &self.config.quantization;
        if let (Mode::Dequantized, Some(scale)) =
            (quantization.mode, self.checkpoint.tensor(&format!("{name}.weight_scale")))
        {
            return Err(scale.error(format!(
                "there, but config.json has no quantization_config, which says whether it multiplies or divides: this is not \
                 a b1.58 checkpoint as it is; {SUPPORTED}"
            )));
        }
        match self.checkpoint.linear(&name, rows, cols, quantization.scale_style)? {
            checkpoint::LinearWeight::Ternary(w) => Ok(Some(w)),
            checkpoint::LinearWeight::Dense(view) => {
                ternary_of(&view, &format!("{name}.weight"), quantization.mode).map(Some)
            }
        }
    }

    fn view(&self, backend: &Backend, name: &str, rows: usize, cols: usize) -> Result<DenseWeight> {
        match self.checkpoint.matrix(name, rows, cols)? {
            DenseMatrix::Values(view) => {
                backend.dense_mapped(view.dtype, rows, cols, view.file.clone(), view.range.clone())
            }
            DenseMatrix::Blocks(blocks) => {
                let mut widened = Ok(());
                let weight = backend.dense_filled(DenseType::BF16, rows, cols, |out| widened = blocks.to_bf16(out))?;
                widened.map(|()| weight)
            }
        }
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

/// The weights of another source with a LoRA adapter beside them.
pub struct AdaptedWeights<'a> {
    base: &'a dyn WeightSource,
    adapter: &'a Adapter,
    config: &'a ModelConfig,
}

impl<'a> AdaptedWeights<'a> {
    /// Puts an adapter beside the weights of a model.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a matrix that belongs to no projection of this model, or to one of another shape, and for
    /// one that is missing although the adapter's configuration targets its projection.
    pub fn new(base: &'a dyn WeightSource, adapter: &'a Adapter, config: &'a ModelConfig) -> Result<Self> {
        let file = adapter.weights_file();
        let mut found = 0;
        for layer in 0..config.num_layers {
            for (name, rows, cols) in config.linears(layer) {
                let [a, b] = tensor_names(&name);
                let Some(module) = adapter.module(&name) else {
                    if adapter.config().targets(&name) {
                        return Err(Error::tensor(file, a, "missing, although target_modules calls for it"));
                    }
                    continue;
                };
                found += 1;
                let other = |tensor: String, shape: [usize; 2], expected: [usize; 2]| {
                    let reason = format!("shape {shape:?} where this model needs {expected:?}: it adapts another base");
                    Err(Error::tensor(file, tensor, reason))
                };
                let rank = module.rank();
                if module.a.cols != cols {
                    return other(a, [rank, module.a.cols], [rank, cols]);
                }
                if module.b.rows != rows {
                    return other(b, [module.b.rows, rank], [rows, rank]);
                }
            }
        }
        if found < adapter.modules().len() {
            let known: Vec<String> = (0..config.num_layers).flat_map(|l| config.linears(l)).map(|l| l.0).collect();
            if let Some(module) = adapter.modules().iter().find(|m| !known.contains(&m.name)) {
                let [a, _] = tensor_names(&module.name);
                let reason = format!("no projection of this model of {} layers has this name", config.num_layers);
                return Err(Error::tensor(file, a, reason));
            }
        }
        Ok(Self { base, adapter, config })
    }
}

impl WeightSource for AdaptedWeights<'_> {
    fn linear(&self, backend: &Backend, layer: usize, which: Projection) -> Result<LinearWeight> {
        self.base.linear(backend, layer, which)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.base.vector(name, len)
    }

    fn dense(&self, backend: &Backend, name: &str, rows: usize, cols: usize) -> Result<DenseWeight> {
        self.base.dense(backend, name, rows, cols)
    }

    fn adapter(&self, backend: &Backend, layer: usize, which: Projection) -> Result<Option<LowRank>> {
        let Some(module) = self.adapter.module(&self.config.projection_name(layer, which)) else {
            return self.base.adapter(backend, layer, which);
        };
        let (a, b) = module.matrices()?;
        LowRank::new(backend, module.rank(), &a, &b, module.scaling).map(Some)
    }
}
