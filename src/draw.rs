//! Drawing tokens on the device that computed their logits, so that one number comes back instead of a vocabulary's.

use crate::backend::Backend;
#[cfg(feature = "cuda")]
use crate::backend::cuda::{Cuda, CudaSampler, MarkUpdate, SampleSettings};
#[cfg(feature = "cuda")]
use crate::generate::{DeviceSampling, MarksHeld, TokenMark};
use crate::generate::{Sampled, Sampler};
use crate::model::read_logits;
use crate::{Error, Result};
use candle_core::Tensor;

/// Draws the next token of each of several sequences from their logits: on a GPU if they lie there and it can, else on the
/// host.
#[derive(Debug)]
pub struct TokenDraw {
    device: Option<DeviceDraw>,
    vocab: usize,
    /// Logits that the host draws from.
    logits: Vec<f32>,
}

impl TokenDraw {
    /// For up to `sequences` sequences over this vocabulary.
    ///
    /// # Errors
    /// [`Error::Shape`] for a vocabulary that a GPU cannot draw from, [`Error::Unavailable`] if its memory is short.
    pub fn new(backend: &Backend, sequences: usize, vocab: usize) -> Result<Self> {
        Ok(Self { device: DeviceDraw::new(backend, sequences, vocab)?, vocab, logits: Vec::new() })
    }

    /// Replaces `drawn` by one token for each row of f32 `logits` `[samplers, vocab]`, by that row's sampler. A row keeps
    /// its sampler from call to call as long as it is the same sequence's.
    ///
    /// # Errors
    /// [`Error::Shape`] for logits that do not fit, [`Error::Logits`] for a row that no token can be drawn from,
    /// [`Error::Device`] for what fails on the device.
    pub fn draw(&mut self, logits: &Tensor, samplers: &mut [Sampler], drawn: &mut Vec<Sampled>) -> Result<()> {
        if logits.dims() != [samplers.len(), self.vocab] {
            let reason = format!("{:?} logits for {} rows of {}", logits.dims(), samplers.len(), self.vocab);
            return Err(Error::Shape { op: "sample", reason });
        }
        drawn.clear();
        let ids = match &mut self.device {
            Some(device) => device.draw(logits, samplers)?,
            None => None,
        };
        let mut on_host = false;
        for (row, sampler) in samplers.iter_mut().enumerate() {
            let id = ids.as_ref().and_then(|ids| ids.get(row));
            if let Some(sampled) = id.and_then(|id| sampler.drawn(*id)) {
                drawn.push(sampled);
                continue;
            }
            // What the samplers ask for, only the host can do, or the host names what is wrong with the logits.
            if !on_host {
                read_logits(logits, &mut self.logits)?;
                on_host = true;
            }
            drawn.push(sampler.sample(self.logits.chunks(self.vocab).nth(row).unwrap_or_default())?);
        }
        Ok(())
    }

    /// The logits on the host, until the next call.
    pub(crate) fn read(&mut self, logits: &Tensor) -> Result<()> {
        read_logits(logits, &mut self.logits)
    }

    /// What [`Self::read`] read.
    pub(crate) fn logits(&self) -> &[f32] {
        &self.logits
    }
}

/// Draws on a GPU.
#[cfg(feature = "cuda")]
#[derive(Debug)]
struct DeviceDraw {
    cuda: std::sync::Arc<Cuda>,
    sampler: CudaSampler,
    /// Of each row.
    held: Vec<MarksHeld>,
    settings: Vec<SampleSettings>,
    marks: Vec<TokenMark>,
    updates: Vec<MarkUpdate>,
}

#[cfg(feature = "cuda")]
impl DeviceDraw {
    /// None where the backend's device is the CPU.
    fn new(backend: &Backend, sequences: usize, vocab: usize) -> Result<Option<Self>> {
        if backend.device().is_cpu() {
            return Ok(None);
        }
        let cuda = backend.cuda()?.clone();
        let sampler = CudaSampler::new(&cuda, sequences, vocab)?;
        let held = (0..sequences).map(|_| MarksHeld::default()).collect();
        Ok(Some(Self { cuda, sampler, held, settings: Vec::new(), marks: Vec::new(), updates: Vec::new() }))
    }

    /// An id for each row, negative where no token can be drawn. None if a sampler asks for what only the host can do
    /// (log-probabilities, logit bias).
    fn draw(&mut self, logits: &Tensor, samplers: &[Sampler]) -> Result<Option<Vec<i32>>> {
        self.settings.clear();
        self.updates.clear();
        for (row, sampler) in samplers.iter().enumerate() {
            let Some(sampling) = sampler.on_device() else { return Ok(None) };
            self.settings.push(settings(&sampling, row));
        }
        self.update_marks(samplers).inspect_err(|_| self.held.fill_with(MarksHeld::default))?;
        self.sampler.set(&self.cuda, &self.settings)?;
        let (storage, layout) = logits.storage_and_layout();
        match &*storage {
            candle_core::Storage::Cuda(storage) => {
                self.sampler.draw(&self.cuda, &crate::ops::gpu(storage, layout)?)?;
            }
            _ => return Ok(None),
        }
        self.sampler.ids(&self.cuda).map(Some)
    }

    fn update_marks(&mut self, samplers: &[Sampler]) -> Result<()> {
        let rows = samplers.iter().zip(&self.settings).zip(&mut self.held).enumerate();
        for (row, ((sampler, _), held)) in rows.filter(|(_, ((_, settings), _))| settings.slot >= 0) {
            if sampler.marks_since(held, &mut self.marks) {
                self.sampler.clear_marks(&self.cuda, row)?;
            }
            let update = |m: &TokenMark| MarkUpdate { slot: row as i32, token: m.token as i32, mark: m.mark };
            self.updates.extend(self.marks.iter().map(update));
        }
        self.sampler.mark(&self.cuda, &self.updates)
    }
}

#[cfg(feature = "cuda")]
fn settings(s: &DeviceSampling, row: usize) -> SampleSettings {
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
        slot: if s.has_penalties() { row as i32 } else { -1 },
    }
}

/// This build has no device to draw on.
#[cfg(not(feature = "cuda"))]
#[derive(Debug)]
enum DeviceDraw {}

#[cfg(not(feature = "cuda"))]
impl DeviceDraw {
    fn new(_: &Backend, _: usize, _: usize) -> Result<Option<Self>> {
        Ok(None)
    }

    fn draw(&mut self, _: &Tensor, _: &[Sampler]) -> Result<Option<Vec<i32>>> {
        match *self {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::{GenerateOptions, GenerationDefaults};
    use candle_core::Device;

    fn sampler(options: GenerateOptions) -> Sampler {
        Sampler::new(&options.resolve(&GenerationDefaults::default(), 4).unwrap().sampling, 4)
    }

    #[test]
    fn each_row_has_its_sampler() {
        let backend = Backend::for_device(&Device::Cpu).unwrap();
        let mut draw = TokenDraw::new(&backend, 2, 4).unwrap();
        let rows = [[0.0f32, 3.0, 1.0, 2.0], [5.0, 0.0, 0.0, 4.0]];
        let logits = Tensor::new(&rows, &Device::Cpu).unwrap();
        let biased = GenerateOptions::new().greedy().logit_bias(0, f32::NEG_INFINITY);
        let mut samplers = [sampler(GenerateOptions::new().greedy()), sampler(biased)];
        let mut drawn = Vec::new();
        for _ in 0..2 {
            draw.draw(&logits, &mut samplers, &mut drawn).unwrap();
            assert_eq!(drawn.iter().map(|s| s.token).collect::<Vec<_>>(), [1, 3]);
        }
        let error = draw.draw(&logits, &mut samplers[..1], &mut drawn).unwrap_err();
        assert!(matches!(error, Error::Shape { .. }), "{error}");
        let nan = Tensor::new(&[[0.0f32, f32::NAN, 0.0, 0.0]], &Device::Cpu).unwrap();
        let error = draw.draw(&nan, &mut samplers[..1], &mut drawn).unwrap_err();
        assert!(matches!(error, Error::Logits(_)), "{error}");
    }

    /// Rows with penalties, which a GPU keeps marks for, beside one without and one that only the host can draw.
    #[cfg(feature = "cuda")]
    #[test]
    fn a_gpu_draws_each_row_as_the_host_does() {
        if crate::backend::cuda::count() == 0 {
            eprintln!("there is no CUDA device here, nothing was run");
            return;
        }
        let gpu = crate::backend::cuda::open(0).unwrap();
        let greedy = || GenerateOptions::new().greedy();
        for last in [greedy().presence_penalty(0.5), greedy().logit_bias(2, 9.0)] {
            let run = |device: &Device| {
                let all = [greedy().repetition_penalty(2.0), greedy(), greedy().frequency_penalty(1.0), last.clone()];
                let mut samplers = all.map(sampler);
                let mut draw = TokenDraw::new(&Backend::for_device(device).unwrap(), 4, 4).unwrap();
                let logits = Tensor::new(&[[4.0f32, 3.0, 2.9, 0.5]; 4], device).unwrap();
                let (mut drawn, mut all) = (Vec::new(), Vec::new());
                for _ in 0..5 {
                    draw.draw(&logits, &mut samplers, &mut drawn).unwrap();
                    samplers.iter_mut().zip(&drawn).for_each(|(sampler, drawn)| sampler.accept(drawn.token));
                    all.push(drawn.iter().map(|s| s.token).collect::<Vec<_>>());
                }
                all
            };
            let host = run(&Device::Cpu);
            assert!(host.iter().any(|row| row[0] != row[1]), "{host:?}");
            assert_eq!(run(&gpu), host);
        }
    }
}
