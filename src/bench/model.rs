//! What is measured: a checkpoint, or a preset's shapes.

use super::memory;
use crate::checkpoint::{Checkpoint, ModelFiles};
use crate::model::config::ModelConfig;
use crate::model::presets::Preset;
use crate::{LoadOptions, LoadedDecoder, Result};

/// A model that can be loaded more than once, with other settings each time.
#[derive(Debug, Clone)]
pub struct BenchModel {
    name: String,
    files: Option<ModelFiles>,
    config: ModelConfig,
}

impl BenchModel {
    /// A checkpoint; `name` is what reports call it.
    ///
    /// # Errors
    /// For files that are no checkpoint of a model that runs here.
    pub fn files(name: &str, files: ModelFiles) -> Result<Self> {
        let checkpoint = Checkpoint::open(&files)?;
        let (path, text) = checkpoint.config();
        let config = ModelConfig::parse(path, text)?;
        Ok(Self { name: name.to_owned(), files: Some(files), config })
    }

    /// A preset's shapes with random weights.
    ///
    /// # Errors
    /// [`crate::Error::Request`] for an unknown preset.
    pub fn synthetic(preset: &str) -> Result<Self> {
        let config = Preset::find(preset)?.config();
        Ok(Self { name: preset.to_owned(), files: None, config })
    }

    /// What reports call it.
    pub fn name(&self) -> String {
        match self.files {
            Some(_) => self.name.clone(),
            None => format!("synthetic {}", self.name),
        }
    }

    /// Its configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Loads it. On the CPU, what cannot fit in the memory that is available is refused before it is made.
    ///
    /// # Errors
    /// As [`LoadedDecoder::open`] and [`LoadedDecoder::synthetic`]; [`crate::Error::Unavailable`] if memory is short.
    pub fn load(&self, options: &LoadOptions) -> Result<LoadedDecoder> {
        match &self.files {
            Some(files) => LoadedDecoder::open(files, options),
            None => {
                if options.is_for_cpu() {
                    memory::ensure(&self.name(), memory::synthetic_bytes(&self.config))?;
                }
                LoadedDecoder::synthetic(&self.name, options)
            }
        }
    }
}
