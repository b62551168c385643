//! Drawing tokens on the device that computed their logits, so that one number comes back instead of a vocabulary's.

use crate::Result;
use crate::backend::Backend;
#[cfg(feature = "cuda")]
use crate::backend::cuda::{Cuda, CudaSampler, MarkUpdate, SampleSettings};
#[cfg(feature = "cuda")]
use crate::generate::{DeviceSampling, MarksHeld, TokenMark};
use crate::generate::{Sampled, Sampler};
use candle_core::Tensor;

/// Draws the tokens of one sequence on a GPU.
#[cfg(feature = "cuda")]
#[derive(Debug)]
pub(crate) struct DeviceDraw {
    cuda: std::sync::Arc<Cuda>,
    sampler: CudaSampler,
    held: MarksHeld,
    marks: Vec<TokenMark>,
    updates: Vec<MarkUpdate>,
}

#[cfg(feature = "cuda")]
impl DeviceDraw {
    /// For one sequence over this vocabulary; none where the backend's device is the CPU.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if the device's memory is short.
    pub fn new(backend: &Backend, vocab: usize) -> Result<Option<Self>> {
        if backend.device().is_cpu() {
            return Ok(None);
        }
        let cuda = backend.cuda()?.clone();
        let sampler = CudaSampler::new(&cuda, 1, vocab)?;
        Ok(Some(Self { cuda, sampler, held: MarksHeld::default(), marks: Vec::new(), updates: Vec::new() }))
    }

    /// Draws from f32 `logits` `[1, vocab]`. None if only the host can: for what the sampler asks (log-probabilities, logit
    /// bias), or to name what is wrong with the logits.
    ///
    /// # Errors
    /// [`crate::Error::Device`] for what fails on the device.
    pub fn draw(&mut self, logits: &Tensor, sampler: &mut Sampler) -> Result<Option<Sampled>> {
        let Some(sampling) = sampler.on_device() else { return Ok(None) };
        if sampling.has_penalties() {
            self.update_marks(sampler).inspect_err(|_| self.held = MarksHeld::default())?;
        }
        self.sampler.set(&self.cuda, &[settings(&sampling)])?;
        let (storage, layout) = logits.storage_and_layout();
        match &*storage {
            candle_core::Storage::Cuda(storage) => {
                self.sampler.draw(&self.cuda, &crate::ops::gpu(storage, layout)?)?;
            }
            _ => return Ok(None),
        }
        Ok(self.sampler.ids(&self.cuda)?.first().and_then(|id| sampler.drawn(*id)))
    }

    fn update_marks(&mut self, sampler: &Sampler) -> Result<()> {
        let clear = sampler.marks_since(&mut self.held, &mut self.marks);
        if clear {
            self.sampler.clear_marks(&self.cuda, 0)?;
        }
        let update = |m: &TokenMark| MarkUpdate { slot: 0, token: m.token as i32, mark: m.mark };
        self.updates.clear();
        self.updates.extend(self.marks.iter().map(update));
        self.sampler.mark(&self.cuda, &self.updates)
    }
}

#[cfg(feature = "cuda")]
fn settings(s: &DeviceSampling) -> SampleSettings {
    SampleSettings {
        seed: s.seed,
        draw: s.draw,
        temperature: s.temperature,
        top_p: s.top_p,
        min_p: s.min_p,
        repetition: s.repetition_penalty,
        presence: s.presence_penalty,
        frequency: s.frequency_penalty,
        top_k: i32::try_from(s.top_k).unwrap_or(i32::MAX),
        slot: if s.has_penalties() { 0 } else { -1 },
    }
}

/// This build has no device to draw on.
#[cfg(not(feature = "cuda"))]
#[derive(Debug)]
pub(crate) enum DeviceDraw {}

#[cfg(not(feature = "cuda"))]
impl DeviceDraw {
    /// None.
    pub fn new(_: &Backend, _: usize) -> Result<Option<Self>> {
        Ok(None)
    }

    /// Cannot be called.
    pub fn draw(&mut self, _: &Tensor, _: &mut Sampler) -> Result<Option<Sampled>> {
        match *self {}
    }
}
