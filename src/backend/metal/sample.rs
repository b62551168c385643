//! Choosing tokens on the device, so that a decode step copies back one number for each sequence and no logits.

use super::params::{Choice, Marks};
use super::{Metal, MetalBuffer, MetalSlice, plan};
use crate::Result;
use crate::backend::gpu::sample::{BLOCKS, Draws, PICK_SHARED, no_settings};
use crate::backend::gpu::{Launch, MarkUpdate, SampleSettings};

/// Threadgroup memory of the kernels that look for the largest logit.
const MEMORY: usize = 256;
/// Threads of `bitnet_sample_pick`.
const PICK_THREADS: usize = 512;

/// Chooses a token for each row of logits, of up to `rows` rows; keeps their settings, marks and scratch memory.
#[derive(Debug)]
pub struct MetalSampler {
    draws: Draws,
    /// Kernels that use this memory may be on their way.
    pending: bool,
    settings: MetalBuffer<SampleSettings>,
    best: MetalBuffer<u64>,
    ids: MetalBuffer<i32>,
    /// Logits after penalties, and lists of candidates, `[rows, vocab]` each; none while the largest logit is all.
    scratch: Option<(MetalBuffer<f32>, MetalBuffer<i32>)>,
    /// What penalties know, `[rows, vocab]`; none while there are none.
    marks: Option<MetalBuffer<u32>>,
    updates: Option<MetalBuffer<MarkUpdate>>,
}

impl MetalSampler {
    /// A sampler that takes the largest logit of each of up to `rows` rows of `vocab`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for no row or a vocabulary of none or more than 2^24, [`crate::Error::Unavailable`] if memory
    /// is short.
    pub fn new(metal: &Metal, rows: usize, vocab: usize) -> Result<Self> {
        let (draws, what) = (Draws::new(rows, vocab)?, "sampling");
        Ok(Self {
            draws,
            pending: false,
            settings: metal.zeroed(rows, what)?,
            best: metal.zeroed(rows.saturating_mul(BLOCKS), what)?,
            ids: metal.zeroed(rows, what)?,
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
    pub fn set(&mut self, metal: &Metal, settings: &[SampleSettings]) -> Result<()> {
        let (draws, penalties) = self.draws.by(settings)?;
        if !draws.argmax {
            self.allocate(metal, penalties)?;
            self.settle(metal)?;
            self.settings.write(settings)?;
        }
        self.draws = draws;
        Ok(())
    }

    fn allocate(&mut self, metal: &Metal, penalties: bool) -> Result<()> {
        let size = self.draws.size();
        if self.scratch.is_none() {
            self.scratch = Some((metal.zeroed(size, "sampling")?, metal.zeroed(size, "sampling")?));
        }
        if penalties && self.marks.is_none() {
            self.marks = Some(metal.zeroed(size, "penalties")?);
        }
        Ok(())
    }

    /// Waits for the kernels that use this memory. Usually the ids of the last draw were waited for already.
    fn settle(&mut self, metal: &Metal) -> Result<()> {
        if std::mem::take(&mut self.pending) { metal.synchronize() } else { Ok(()) }
    }

    /// Whether the next draw takes the largest logits and nothing else.
    pub fn is_argmax(&self) -> bool {
        self.draws.argmax
    }

    /// Forgets a slot's marks.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for a slot that is not there, [`crate::Error::Device`] for what fails on the device.
    pub fn clear_marks(&mut self, metal: &Metal, slot: usize) -> Result<()> {
        let range = self.draws.marks_of(slot)?;
        self.settle(metal)?;
        match &mut self.marks {
            Some(marks) => marks.clear(range),
            None => Ok(()),
        }
    }

    /// Sets marks; no two updates are of one token of one slot.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for a slot or token that is not there, [`crate::Error::Device`] for what fails on the device.
    pub fn mark(&mut self, metal: &Metal, updates: &[MarkUpdate]) -> Result<()> {
        let (count, vocab) = self.draws.check_marks(updates)?;
        if updates.is_empty() {
            return Ok(());
        }
        self.allocate(metal, true)?;
        self.settle(metal)?;
        if self.updates.as_ref().is_none_or(|u| u.len() < updates.len()) {
            self.updates = Some(metal.zeroed(updates.len().next_power_of_two().max(256), "penalties")?);
        }
        let (Some(memory), Some(marks)) = (&mut self.updates, &self.marks) else { return Ok(()) };
        memory.write(updates)?;
        let bindings = [memory.as_slice().input(), marks.as_slice().output()];
        // SAFETY: the bindings and parameters of bitnet_mark: as many updates as `count`, whose slots and tokens lie inside
        // the marks, checked above.
        unsafe { metal.launch(Draws::mark_launch(updates), &bindings, &Marks { count, vocab }) }?;
        self.pending = true;
        Ok(())
    }

    /// Chooses a token for each row of f32 `logits` `[rows set, vocab]`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for logits that do not fit, [`crate::Error::Device`] for what fails on the device.
    pub fn draw(&mut self, metal: &Metal, logits: MetalSlice<'_>) -> Result<()> {
        let (vocab, count) = (self.draws.check_logits(logits.len())?, self.draws.count);
        if count == 0 {
            return Ok(());
        }
        let bytes = logits.len() * size_of::<f32>();
        let grid = (BLOCKS, count, 1);
        let choice = Choice { vocab, groups: BLOCKS as i32, has_marks: i32::from(self.marks.is_some()) };
        let (best, ids) = (self.best.as_slice(), self.ids.as_slice());
        self.pending = true;
        if self.draws.argmax {
            let launch = Launch::new("bitnet_argmax", grid, plan::THREADS).shared(MEMORY).bytes(bytes);
            // SAFETY: the bindings and parameters of bitnet_argmax; `logits` was checked, `best` has room for the groups of
            // all rows.
            unsafe { metal.launch(launch, &[logits.input(), best.output()], &choice) }?;
            let launch = Launch::new("bitnet_argmax_pick", (count, 1, 1), plan::THREADS)
                .shared(MEMORY)
                .bytes(count * BLOCKS * size_of::<u64>());
            // SAFETY: the bindings and parameters of bitnet_argmax_pick; `ids` has room for all rows.
            return unsafe { metal.launch(launch, &[best.input(), ids.output()], &choice) };
        }
        let (adjusted, list) = self.scratch.as_ref().ok_or_else(no_settings)?;
        let (adjusted, list, settings) = (adjusted.as_slice(), list.as_slice(), self.settings.as_slice());
        // Without marks anything stands in their place.
        let marks = self.marks.as_ref().map_or(settings.input(), |m| m.as_slice().input());
        let launch = Launch::new("bitnet_sample_prepare", grid, plan::THREADS).shared(MEMORY).bytes(2 * bytes);
        let bindings = [logits.input(), settings.input(), marks, adjusted.output(), best.output()];
        // SAFETY: the bindings and parameters of bitnet_sample_prepare; `logits` was checked, settings are there for all
        // rows with slots inside the marks, and the scratch has room for all rows.
        unsafe { metal.launch(launch, &bindings, &choice) }?;
        let launch = Launch::new("bitnet_sample_pick", (count, 1, 1), PICK_THREADS).shared(PICK_SHARED).bytes(bytes);
        let bindings = [adjusted.input(), settings.output(), best.input(), list.output(), ids.output()];
        // SAFETY: the bindings and parameters of bitnet_sample_pick, as above.
        unsafe { metal.launch(launch, &bindings, &choice) }
    }

    /// Waits for the tokens of the last draw. A negative one stands for logits that no token can be chosen from: NaN, or
    /// no finite largest one.
    ///
    /// # Errors
    /// [`crate::Error::Device`] for what went wrong on the device.
    pub fn ids(&mut self, metal: &Metal) -> Result<Vec<i32>> {
        let ids = metal.download(&self.ids, self.draws.count)?;
        self.pending = false;
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernels::kernel;

    #[test]
    fn kernels_are_there() {
        let names =
            ["bitnet_argmax", "bitnet_argmax_pick", "bitnet_mark", "bitnet_sample_prepare", "bitnet_sample_pick"];
        assert!(names.iter().all(|name| kernel(name).is_ok()));
    }
}
