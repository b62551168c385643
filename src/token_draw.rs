//! Drawing tokens on the device that computed their logits, so that one number comes back instead of a vocabulary's.

use crate::backend::Backend;
#[cfg(feature = "cuda")]
use crate::backend::cuda::{Cuda, CudaSampler};
#[cfg(any(feature = "cuda", feature = "metal"))]
use crate::backend::gpu::{MarkUpdate, SampleSettings};
#[cfg(feature = "metal")]
use crate::backend::metal::{Metal, MetalSampler};
#[cfg(any(feature = "cuda", feature = "metal"))]
use crate::generate::{DeviceSampling, MarksHeld, TokenMark};
use crate::generate::{Sampled, Sampler};
use crate::model::{Logits, read_logits};
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

    /// The logits that samplers need, each of its row.
    pub fn wanted(samplers: &[Sampler]) -> Logits {
        let most = samplers.iter().try_fold(1, |most, sampler| Some(sampler.decided_by()?.max(most)));
        most.map_or(Logits::Last, Logits::Top)
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
#[cfg(any(feature = "cuda", feature = "metal"))]
#[derive(Debug)]
struct DeviceDraw {
    gpu: GpuSampler,
    /// Of each row.
    held: Vec<MarksHeld>,
    settings: Vec<DeviceSampling>,
    marks: Vec<TokenMark>,
    updates: Vec<(usize, TokenMark)>,
}

#[cfg(any(feature = "cuda", feature = "metal"))]
impl DeviceDraw {
    /// None where the backend's device is the CPU.
    fn new(backend: &Backend, sequences: usize, vocab: usize) -> Result<Option<Self>> {
        let Some(gpu) = GpuSampler::new(backend, sequences, vocab)? else { return Ok(None) };
        let held = (0..sequences).map(|_| MarksHeld::default()).collect();
        Ok(Some(Self { gpu, held, settings: Vec::new(), marks: Vec::new(), updates: Vec::new() }))
    }

    /// An id for each row, negative where no token can be drawn. None if a sampler asks for what only the host can do
    /// (log-probabilities, logit bias).
    fn draw(&mut self, logits: &Tensor, samplers: &[Sampler]) -> Result<Option<Vec<i32>>> {
        self.settings.clear();
        self.updates.clear();
        for sampler in samplers {
            let Some(sampling) = sampler.on_device() else { return Ok(None) };
            self.settings.push(sampling);
        }
        self.update_marks(samplers).inspect_err(|_| self.held.fill_with(MarksHeld::default))?;
        self.gpu.draw(&self.settings, logits).map(Some)
    }

    fn update_marks(&mut self, samplers: &[Sampler]) -> Result<()> {
        let rows = samplers.iter().zip(&self.settings).zip(&mut self.held).enumerate();
        for (row, ((sampler, _), held)) in rows.filter(|(_, ((_, settings), _))| settings.has_penalties()) {
            if sampler.marks_since(held, &mut self.marks) {
                self.gpu.clear_marks(row)?;
            }
            self.updates.extend(self.marks.iter().map(|mark| (row, *mark)));
        }
        self.gpu.mark(&self.updates)
    }
}

/// A kind of GPU's sampler. A row's marks are in the slot of its number.
#[cfg(any(feature = "cuda", feature = "metal"))]
#[derive(Debug)]
enum GpuSampler {
    #[cfg(feature = "cuda")]
    Cuda(std::sync::Arc<Cuda>, CudaSampler),
    #[cfg(feature = "metal")]
    Metal(std::sync::Arc<Metal>, MetalSampler),
}

#[cfg(any(feature = "cuda", feature = "metal"))]
impl GpuSampler {
    fn new(backend: &Backend, sequences: usize, vocab: usize) -> Result<Option<Self>> {
        #[cfg(feature = "metal")]
        if let Ok(metal) = backend.metal() {
            let sampler = MetalSampler::new(metal, sequences, vocab)?;
            return Ok(Some(Self::Metal(metal.clone(), sampler)));
        }
        #[cfg(feature = "cuda")]
        if let Ok(cuda) = backend.cuda() {
            let sampler = CudaSampler::new(cuda, sequences, vocab)?;
            return Ok(Some(Self::Cuda(cuda.clone(), sampler)));
        }
        Ok(None)
    }

    fn clear_marks(&mut self, row: usize) -> Result<()> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(cuda, sampler) => sampler.clear_marks(cuda, row),
            #[cfg(feature = "metal")]
            Self::Metal(metal, sampler) => sampler.clear_marks(metal, row),
        }
    }

    fn mark(&mut self, updates: &[(usize, TokenMark)]) -> Result<()> {
        let update =
            |(row, m): &(usize, TokenMark)| MarkUpdate { slot: *row as i32, token: m.token as i32, mark: m.mark };
        let updates: Vec<_> = updates.iter().map(update).collect();
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(cuda, sampler) => sampler.mark(cuda, &updates),
            #[cfg(feature = "metal")]
            Self::Metal(metal, sampler) => sampler.mark(metal, &updates),
        }
    }

    fn draw(&mut self, settings: &[DeviceSampling], logits: &Tensor) -> Result<Vec<i32>> {
        let settings: Vec<_> = settings.iter().enumerate().map(|(row, s)| row_settings(s, row)).collect();
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(cuda, sampler) => {
                sampler.set(cuda, &settings)?;
                let (storage, layout) = logits.storage_and_layout();
                let candle_core::Storage::Cuda(storage) = &*storage else {
                    return Err(Error::Shape {
                        op: "sample",
                        reason: "the logits lie elsewhere than on the GPU".into(),
                    });
                };
                sampler.draw(cuda, &crate::ops::gpu(storage, layout)?)?;
                sampler.ids(cuda)
            }
            #[cfg(feature = "metal")]
            Self::Metal(metal, sampler) => {
                sampler.set(metal, &settings)?;
                crate::ops::metal_logits(logits, |logits| sampler.draw(metal, logits))?;
                sampler.ids(metal)
            }
        }
    }
}

/// A row's settings as GPUs take them.
#[cfg(any(feature = "cuda", feature = "metal"))]
fn row_settings(s: &DeviceSampling, row: usize) -> SampleSettings {
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
#[cfg(not(any(feature = "cuda", feature = "metal")))]
#[derive(Debug)]
enum DeviceDraw {}

#[cfg(not(any(feature = "cuda", feature = "metal")))]
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
    #[cfg(any(feature = "cuda", feature = "metal"))]
    #[test]
    fn a_gpu_draws_each_row_as_the_host_does() {
        let (found, why) = crate::backend::auto_device();
        if found == crate::DeviceChoice::Cpu {
            eprintln!("there is no GPU here ({why}), nothing was run");
            return;
        }
        let gpu = crate::select_device(found).unwrap();
        let greedy = || GenerateOptions::new().greedy();
        for last in [greedy().presence_penalty(0.5), greedy().logit_bias(2, 9.0)] {
            let run = |device: &Device| {
                let all = [greedy().repetition_penalty(2.0), greedy(), greedy().frequency_penalty(1.0), last.clone()];
                let mut samplers = all.map(sampler);
                let backend = Backend::for_device(device).unwrap();
                let mut draw = TokenDraw::new(&backend, 4, 4).unwrap();
                let logits = Tensor::new(&[[4.0f32, 3.0, 2.9, 0.5]; 4], backend.device()).unwrap();
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
