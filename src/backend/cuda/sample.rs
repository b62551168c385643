//! Choosing tokens on the device, so that a decode step copies back one number for each sequence and no logits.

use super::launch::arg;
use super::{Cuda, CudaSlice, CudaView, failure, plan};
use crate::Result;
use crate::backend::gpu::sample::{BLOCKS, Draws, PICK_SHARED, no_settings};
use crate::backend::gpu::{Launch, MarkUpdate, SampleSettings};

/// Shared memory of a block that reads logits.
const SHARED: usize = 64;
/// Threads of `bitnet_sample_pick`.
const PICK_THREADS: usize = 1024;

/// Chooses a token for each row of logits, of up to `rows` rows; keeps their settings, marks and scratch memory.
///
/// [`CudaSampler::draw`] only launches kernels and can be part of a graph; what it reads is set before.
#[derive(Debug)]
pub struct CudaSampler {
    draws: Draws,
    settings: CudaSlice<SampleSettings>,
    best: CudaSlice<u64>,
    arrived: CudaSlice<u32>,
    ids: CudaSlice<i32>,
    /// Logits after penalties, and lists of candidates, `[rows, vocab]` each; none while the largest logit is all.
    scratch: Option<(CudaSlice<f32>, CudaSlice<i32>)>,
    /// What penalties know, `[rows, vocab]`; none while there are none.
    marks: Option<CudaSlice<u32>>,
    updates: Option<CudaSlice<MarkUpdate>>,
}

impl CudaSampler {
    /// A sampler that takes the largest logit of each of up to `rows` rows of `vocab`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for no row or a vocabulary of none or more than 2^24, [`crate::Error::Unavailable`] if memory
    /// is short.
    pub fn new(cuda: &Cuda, rows: usize, vocab: usize) -> Result<Self> {
        let (draws, what) = (Draws::new(rows, vocab)?, "sampling");
        Ok(Self {
            draws,
            settings: cuda.zeroed(rows, what)?,
            best: cuda.zeroed(rows, what)?,
            arrived: cuda.zeroed(rows, what)?,
            ids: cuda.zeroed(rows, what)?,
            scratch: None,
            marks: None,
            updates: None,
        })
    }

    /// Settings of the rows of the next draw, in order; rows with penalties name the slot (below `rows`) of their marks.
    /// Allocates what the first use of temperature or penalties needs.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for more rows than there is room for, [`crate::Error::Request`] for a slot that is not there,
    /// [`crate::Error::Unavailable`] if memory is short.
    pub fn set(&mut self, cuda: &Cuda, settings: &[SampleSettings]) -> Result<()> {
        let (draws, penalties) = self.draws.by(settings)?;
        if !draws.argmax {
            self.allocate(cuda, penalties)?;
            cuda.copy_in(settings, &mut self.settings.as_view_mut(), "sampling")?;
        }
        self.draws = draws;
        Ok(())
    }

    fn allocate(&mut self, cuda: &Cuda, penalties: bool) -> Result<()> {
        let size = self.draws.size();
        if self.scratch.is_none() {
            self.scratch = Some((cuda.zeroed(size, "sampling")?, cuda.zeroed(size, "sampling")?));
        }
        if penalties && self.marks.is_none() {
            self.marks = Some(cuda.zeroed(size, "penalties")?);
        }
        Ok(())
    }

    /// Whether the next draw takes the largest logits and nothing else: other kernels, so another graph.
    pub fn is_argmax(&self) -> bool {
        self.draws.argmax
    }

    /// Whether marks are kept: the first penalties allocate them, which changes what a graph has to know.
    pub fn has_marks(&self) -> bool {
        self.marks.is_some()
    }

    /// Forgets a slot's marks.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for a slot that is not there, [`crate::Error::Device`] for what fails on the device.
    pub fn clear_marks(&mut self, cuda: &Cuda, slot: usize) -> Result<()> {
        let range = self.draws.marks_of(slot)?;
        let Some(marks) = &mut self.marks else { return Ok(()) };
        let mut row = marks.slice_mut(range);
        cuda.stream.memset_zeros(&mut row).map_err(|e| failure::driver(&cuda.stream, "penalties", e))
    }

    /// Sets marks; no two updates are of one token of one slot. Uploads, so it is no part of a graph.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for a slot or token that is not there, [`crate::Error::Device`] for what fails on the device.
    pub fn mark(&mut self, cuda: &Cuda, updates: &[MarkUpdate]) -> Result<()> {
        let (count, vocab) = self.draws.check_marks(updates)?;
        if updates.is_empty() {
            return Ok(());
        }
        self.allocate(cuda, true)?;
        if self.updates.as_ref().is_none_or(|u| u.len() < updates.len()) {
            self.updates = Some(cuda.zeroed(updates.len().next_power_of_two().max(256), "penalties")?);
        }
        let (Some(memory), Some(marks)) = (&mut self.updates, &mut self.marks) else { return Ok(()) };
        cuda.copy_in(updates, &mut memory.as_view_mut(), "penalties")?;
        let (from, marks) = (cuda.read(memory), cuda.write(marks));
        // SAFETY: the arguments of bitnet_mark: as many updates as `count`, whose slots and tokens lie inside the marks,
        // checked above.
        unsafe { cuda.launch(Draws::mark_launch(updates), &mut [arg(&from), arg(&count), arg(&marks), arg(&vocab)]) }
    }

    /// Chooses a token for each row of f32 `logits` `[rows set, vocab]`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for logits that do not fit, [`crate::Error::Device`] for what fails on the device.
    pub fn draw(&mut self, cuda: &Cuda, logits: &CudaView<'_, f32>) -> Result<()> {
        let (size, count) = (self.draws.check_logits(logits.len())?, self.draws.count);
        if count == 0 {
            return Ok(());
        }
        let bytes = logits.len() * size_of::<f32>();
        let from = cuda.read(logits);
        let (best, ids) = (cuda.write(&mut self.best), cuda.write(&mut self.ids));
        let grid = (BLOCKS, count, 1);
        if self.draws.argmax {
            let arrived = cuda.write(&mut self.arrived);
            let launch = Launch::new("bitnet_argmax", grid, plan::THREADS).shared(SHARED).bytes(bytes);
            // SAFETY: the arguments of bitnet_argmax; `logits` was checked, best, arrived and ids have room for all rows
            // and the first two are zero between launches.
            return unsafe { cuda.launch(launch, &mut [arg(&from), arg(&size), arg(&best), arg(&arrived), arg(&ids)]) };
        }
        let (adjusted, list) = self.scratch.as_mut().ok_or_else(no_settings)?;
        let (adjusted, list) = (cuda.write(adjusted), cuda.write(list));
        let settings = cuda.write(&mut self.settings);
        let marks = self.marks.as_ref().map_or(0, |m| cuda.read(m));
        let launch = Launch::new("bitnet_sample_prepare", grid, plan::THREADS).shared(SHARED).bytes(2 * bytes);
        let arguments = &mut [arg(&from), arg(&size), arg(&settings), arg(&marks), arg(&adjusted), arg(&best)];
        // SAFETY: the arguments of bitnet_sample_prepare; `logits` was checked, settings were uploaded for all rows with
        // slots inside the marks, and the scratch has room for all rows.
        unsafe { cuda.launch(launch, arguments) }?;
        let launch = Launch::new("bitnet_sample_pick", (count, 1, 1), PICK_THREADS).shared(PICK_SHARED).bytes(bytes);
        let arguments = &mut [arg(&adjusted), arg(&size), arg(&settings), arg(&best), arg(&list), arg(&ids)];
        // SAFETY: the arguments of bitnet_sample_pick, as above.
        unsafe { cuda.launch(launch, arguments) }
    }

    /// Waits for the tokens of the last draw. A negative one stands for logits that no token can be chosen from: NaN, or
    /// no finite largest one.
    ///
    /// # Errors
    /// [`crate::Error::Device`] for what went wrong on the device.
    pub fn ids(&self, cuda: &Cuda) -> Result<Vec<i32>> {
        cuda.download(&self.ids.slice(..self.draws.count), "the tokens drawn")
    }
}

#[cfg(test)]
mod tests {
    use super::super::images::known;

    #[test]
    fn kernels_are_there() {
        let kernels = ["bitnet_argmax", "bitnet_mark", "bitnet_sample_prepare", "bitnet_sample_pick"];
        assert!(kernels.iter().all(|k| known(k) == Some(false)));
    }
}
