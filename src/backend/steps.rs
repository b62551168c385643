//! Decode steps, repeated as cheaply as the device can.

use super::batch::Batch;
#[cfg(feature = "cuda")]
use super::cuda::{Cuda, GraphKey, Graphs};
use crate::Result;
#[cfg(feature = "cuda")]
use std::sync::Arc;

/// The decode steps of one model on one device. From [`super::Backend::steps`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Steps {
    /// Every step calls its operations.
    Plain,
    /// A step that was seen before is replayed as a graph.
    #[cfg(feature = "cuda")]
    Cuda(Graphs, Arc<Cuda>),
}

impl Steps {
    /// Runs one step: `run` itself, or what it was recorded to do. `cache` identifies the KV cache.
    ///
    /// `run` must call the same operations on the same tensors each time that the batch's length and the cache are the
    /// same, and allocate nothing.
    ///
    /// # Errors
    /// Those of `run`; [`crate::Error::Device`] if a graph cannot be launched.
    pub fn run(&mut self, batch: &Batch, cache: u64, mut run: impl FnMut() -> Result<()>) -> Result<()> {
        match self {
            Self::Plain => {
                let _ = (batch, cache);
                run()
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(graphs, cuda) => {
                let b = batch.cuda()?;
                let key = GraphKey { tokens: b.len(), bucket: b.bucket(), cache, other: 0 };
                graphs.replay(cuda, key, run)
            }
        }
    }

    /// Why steps are not replayed any more, once.
    pub fn take_failure(&mut self) -> Option<String> {
        match self {
            Self::Plain => None,
            #[cfg(feature = "cuda")]
            Self::Cuda(graphs, _) => graphs.take_failure(),
        }
    }
}
