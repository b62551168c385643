//! Choosing tokens on the device, so that a decode step copies back one number for each sequence and no logits.

use super::launch::Launch;
use super::params::{Choice, Marks, MetalMark, MetalSampling};
use super::{Metal, MetalBuffer, MetalSlice, int, plan, shape};
use crate::{Error, Result};

/// Most tokens of a vocabulary: as many masses of 2^40 fit into 64 bits.
const MAX_VOCAB: usize = 1 << 24;
/// Threadgroups that share one row of logits.
const GROUPS: usize = 64;
/// Threadgroup memory of the kernels that look for the largest logit.
const MEMORY: usize = 256;
/// Threads and threadgroup memory of `bitnet_sample_pick`.
const PICK: (usize, usize) = (512, 24_608);

/// Chooses a token for each row of logits, of up to `rows` rows; keeps their settings, marks and scratch memory.
#[derive(Debug)]
pub struct MetalSampler {
    rows: usize,
    vocab: usize,
    argmax: bool,
    count: usize,
    /// Kernels that use this memory may be on their way.
    pending: bool,
    settings: MetalBuffer<MetalSampling>,
    best: MetalBuffer<u64>,
    ids: MetalBuffer<i32>,
    /// Logits after penalties, and lists of candidates, `[rows, vocab]` each; none while the largest logit is all.
    scratch: Option<(MetalBuffer<f32>, MetalBuffer<i32>)>,
    /// What penalties know, `[rows, vocab]`; none while there are none.
    marks: Option<MetalBuffer<u32>>,
    updates: Option<MetalBuffer<MetalMark>>,
}

impl MetalSampler {
    /// A sampler that takes the largest logit of each of up to `rows` rows of `vocab`.
    ///
    /// # Errors
    /// [`Error::Shape`] for no row or a vocabulary of none or more than 2^24, [`Error::Unavailable`] if memory is short.
    pub fn new(metal: &Metal, rows: usize, vocab: usize) -> Result<Self> {
        if rows == 0 || !(1..=MAX_VOCAB).contains(&vocab) {
            return Err(shape("sampling", format!("{rows} rows of {vocab} logits; a row has 1 to {MAX_VOCAB}")));
        }
        let what = "sampling";
        Ok(Self {
            rows,
            vocab,
            argmax: true,
            count: rows,
            pending: false,
            settings: metal.zeroed(rows, what)?,
            best: metal.zeroed(rows.saturating_mul(GROUPS), what)?,
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
    /// [`Error::Shape`] for more rows than there is room for, [`Error::Request`] for a slot that is not there,
    /// [`Error::Unavailable`] if memory is short.
    pub fn set(&mut self, metal: &Metal, settings: &[MetalSampling]) -> Result<()> {
        if settings.len() > self.rows {
            return Err(shape("sampling", format!("{} rows, room for {}", settings.len(), self.rows)));
        }
        let rows = i32::try_from(self.rows).unwrap_or(i32::MAX);
        if let Some(s) = settings.iter().find(|s| !(-1..rows).contains(&s.slot)) {
            return Err(Error::request("sampling slot", format!("{} is not below {rows}", s.slot)));
        }
        let (argmax, penalties) = (settings.iter().all(is_argmax), settings.iter().any(has_penalties));
        if !argmax {
            self.allocate(metal, penalties)?;
            self.settle(metal)?;
            self.settings.write(settings)?;
        }
        (self.argmax, self.count) = (argmax, settings.len());
        Ok(())
    }

    fn allocate(&mut self, metal: &Metal, penalties: bool) -> Result<()> {
        let size = self.rows.saturating_mul(self.vocab);
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
        self.argmax
    }

    /// Forgets a slot's marks.
    ///
    /// # Errors
    /// [`Error::Shape`] for a slot that is not there, [`Error::Device`] for what fails on the device.
    pub fn clear_marks(&mut self, metal: &Metal, slot: usize) -> Result<()> {
        if slot >= self.rows {
            return Err(shape("penalties", format!("slot {slot} is not below {}", self.rows)));
        }
        self.settle(metal)?;
        match &mut self.marks {
            Some(marks) => marks.clear(slot * self.vocab..(slot + 1) * self.vocab),
            None => Ok(()),
        }
    }

    /// Sets marks; no two updates are of one token of one slot.
    ///
    /// # Errors
    /// [`Error::Shape`] for a slot or token that is not there, [`Error::Device`] for what fails on the device.
    pub fn mark(&mut self, metal: &Metal, updates: &[MetalMark]) -> Result<()> {
        let inside = |v: i32, end: usize| usize::try_from(v).is_ok_and(|v| v < end);
        let fits = |u: &&MetalMark| u.slot != -1 && !(inside(u.slot, self.rows) && inside(u.token, self.vocab));
        if let Some(u) = updates.iter().find(fits) {
            let reason = format!("{u:?} with {} slots and a vocabulary of {}", self.rows, self.vocab);
            return Err(shape("penalties", reason));
        }
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
        let (count, vocab) = (int("penalties", "marks", updates.len())?, int("penalties", "tokens", self.vocab)?);
        let launch = Launch::new("bitnet_mark", (updates.len().div_ceil(plan::THREADS), 1, 1), plan::THREADS)
            .bytes(updates.len() * (size_of::<MetalMark>() + size_of::<u32>()));
        let bindings = [memory.as_slice().input(), marks.as_slice().output()];
        // SAFETY: the bindings and parameters of bitnet_mark: as many updates as `count`, whose slots and tokens lie inside
        // the marks, checked above.
        unsafe { metal.launch(launch, &bindings, &Marks { count, vocab }) }?;
        self.pending = true;
        Ok(())
    }

    /// Chooses a token for each row of f32 `logits` `[rows set, vocab]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for logits that do not fit, [`Error::Device`] for what fails on the device.
    pub fn draw(&mut self, metal: &Metal, logits: MetalSlice<'_>) -> Result<()> {
        let (count, vocab) = (self.count, self.vocab);
        if count.checked_mul(vocab) != Some(logits.len()) {
            let reason = format!("{} logits for {count} rows of {vocab}", logits.len());
            return Err(shape("sampling", reason));
        }
        if count == 0 {
            return Ok(());
        }
        let bytes = logits.len() * size_of::<f32>();
        let grid = (GROUPS, count, 1);
        let choice = Choice {
            vocab: int("sampling", "tokens", vocab)?,
            groups: GROUPS as i32,
            has_marks: i32::from(self.marks.is_some()),
        };
        let (best, ids) = (self.best.as_slice(), self.ids.as_slice());
        self.pending = true;
        if self.argmax {
            let launch = Launch::new("bitnet_argmax", grid, plan::THREADS).threadgroup(MEMORY).bytes(bytes);
            // SAFETY: the bindings and parameters of bitnet_argmax; `logits` was checked, `best` has room for the groups of
            // all rows.
            unsafe { metal.launch(launch, &[logits.input(), best.output()], &choice) }?;
            let launch = Launch::new("bitnet_argmax_pick", (count, 1, 1), plan::THREADS)
                .threadgroup(MEMORY)
                .bytes(count * GROUPS * size_of::<u64>());
            // SAFETY: the bindings and parameters of bitnet_argmax_pick; `ids` has room for all rows.
            return unsafe { metal.launch(launch, &[best.input(), ids.output()], &choice) };
        }
        let Some((adjusted, list)) = &self.scratch else {
            return Err(shape("sampling", "no settings were given".into()));
        };
        let (adjusted, list, settings) = (adjusted.as_slice(), list.as_slice(), self.settings.as_slice());
        // Without marks anything stands in their place.
        let marks = self.marks.as_ref().map_or(settings.input(), |m| m.as_slice().input());
        let launch = Launch::new("bitnet_sample_prepare", grid, plan::THREADS).threadgroup(MEMORY).bytes(2 * bytes);
        let bindings = [logits.input(), settings.input(), marks, adjusted.output(), best.output()];
        // SAFETY: the bindings and parameters of bitnet_sample_prepare; `logits` was checked, settings are there for all
        // rows with slots inside the marks, and the scratch has room for all rows.
        unsafe { metal.launch(launch, &bindings, &choice) }?;
        let launch = Launch::new("bitnet_sample_pick", (count, 1, 1), PICK.0).threadgroup(PICK.1).bytes(bytes);
        let bindings = [adjusted.input(), settings.output(), best.input(), list.output(), ids.output()];
        // SAFETY: the bindings and parameters of bitnet_sample_pick, as above.
        unsafe { metal.launch(launch, &bindings, &choice) }
    }

    /// Waits for the tokens of the last draw. A negative one stands for logits that no token can be chosen from: NaN, or
    /// no finite largest one.
    ///
    /// # Errors
    /// [`Error::Device`] for what went wrong on the device.
    pub fn ids(&mut self, metal: &Metal) -> Result<Vec<i32>> {
        let ids = metal.download(&self.ids, self.count)?;
        self.pending = false;
        Ok(ids)
    }
}

fn has_penalties(s: &MetalSampling) -> bool {
    s.slot >= 0 && (s.repetition != 1.0 || s.presence != 0.0 || s.frequency != 0.0)
}

/// Whether the largest logit is all that these settings ask for.
fn is_argmax(s: &MetalSampling) -> bool {
    (s.temperature == 0.0 || s.top_k == 1) && !has_penalties(s)
}

#[cfg(test)]
mod tests {
    use super::super::kernels::kernel;
    use super::*;

    #[test]
    fn greedy_settings_need_no_scratch() {
        let greedy = MetalSampling::default();
        assert!(is_argmax(&greedy) && !has_penalties(&greedy));
        let warm = MetalSampling { temperature: 0.7, ..greedy };
        assert!(!is_argmax(&warm));
        assert!(is_argmax(&MetalSampling { top_k: 1, ..warm }));
        let penalties = MetalSampling { presence: 0.5, slot: 0, ..greedy };
        assert!(!is_argmax(&penalties) && has_penalties(&penalties));
        assert!(!has_penalties(&MetalSampling { slot: -1, ..penalties }), "no slot, no penalties");
    }

    #[test]
    fn kernels_are_there() {
        let names =
            ["bitnet_argmax", "bitnet_argmax_pick", "bitnet_mark", "bitnet_sample_prepare", "bitnet_sample_pick"];
        assert!(names.iter().all(|name| kernel(name).is_ok()));
    }
}
