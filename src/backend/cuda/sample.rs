//! Choosing tokens on the device, so that a decode step copies back one number for each sequence and no logits.

use super::launch::{Launch, arg};
use super::params::{MarkUpdate, SampleSettings};
use super::{Cuda, CudaSlice, CudaView, failure, int, shape};
use crate::{Error, Result};

/// Most tokens of a vocabulary: as many masses of 2^40 fit into 64 bits.
const MAX_VOCAB: usize = 1 << 24;
/// Blocks that share one row of logits.
const BLOCKS: usize = 64;
/// Threads of a block that reads logits.
const THREADS: usize = 256;
/// Shared memory of such a block.
const SHARED: usize = 64;
/// Threads and shared memory of `bitnet_sample_pick`.
const PICK: (usize, usize) = (1024, 24_608);

/// Chooses a token for each row of logits, of up to `rows` rows; keeps their settings, marks and scratch memory.
///
/// [`CudaSampler::draw`] only launches kernels and can be part of a graph; what it reads is set before.
#[derive(Debug)]
pub struct CudaSampler {
    rows: usize,
    vocab: usize,
    argmax: bool,
    count: usize,
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
    /// [`Error::Shape`] for no row or a vocabulary of none or more than 2^24, [`Error::Unavailable`] if memory is short.
    pub fn new(cuda: &Cuda, rows: usize, vocab: usize) -> Result<Self> {
        if rows == 0 || !(1..=MAX_VOCAB).contains(&vocab) {
            return Err(shape("sampling", format!("{rows} rows of {vocab} logits; a row has 1 to {MAX_VOCAB}")));
        }
        let what = "sampling";
        Ok(Self {
            rows,
            vocab,
            argmax: true,
            count: rows,
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
    /// [`Error::Shape`] for more rows than there is room for, [`Error::Request`] for a slot that is not there,
    /// [`Error::Unavailable`] if memory is short.
    pub fn set(&mut self, cuda: &Cuda, settings: &[SampleSettings]) -> Result<()> {
        if settings.len() > self.rows {
            return Err(shape("sampling", format!("{} rows, room for {}", settings.len(), self.rows)));
        }
        let rows = i32::try_from(self.rows).unwrap_or(i32::MAX);
        if let Some(s) = settings.iter().find(|s| !(-1..rows).contains(&s.slot)) {
            return Err(Error::request("sampling slot", format!("{} is not below {rows}", s.slot)));
        }
        let (argmax, penalties) = (settings.iter().all(is_argmax), settings.iter().any(has_penalties));
        if !argmax {
            self.allocate(cuda, penalties)?;
            cuda.copy_in(settings, &mut self.settings.as_view_mut(), "sampling")?;
        }
        (self.argmax, self.count) = (argmax, settings.len());
        Ok(())
    }

    fn allocate(&mut self, cuda: &Cuda, penalties: bool) -> Result<()> {
        let size = self.rows.saturating_mul(self.vocab);
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
        self.argmax
    }

    /// Whether marks are kept: the first penalties allocate them, which changes what a graph has to know.
    pub fn has_marks(&self) -> bool {
        self.marks.is_some()
    }

    /// Forgets a slot's marks.
    ///
    /// # Errors
    /// [`Error::Shape`] for a slot that is not there, [`Error::Device`] for what fails on the device.
    pub fn clear_marks(&mut self, cuda: &Cuda, slot: usize) -> Result<()> {
        if slot >= self.rows {
            return Err(shape("penalties", format!("slot {slot} is not below {}", self.rows)));
        }
        let Some(marks) = &mut self.marks else { return Ok(()) };
        let mut row = marks.slice_mut(slot * self.vocab..(slot + 1) * self.vocab);
        cuda.stream.memset_zeros(&mut row).map_err(|e| failure::driver(&cuda.stream, "penalties", e))
    }

    /// Sets marks; no two updates are of one token of one slot. Uploads, so it is no part of a graph.
    ///
    /// # Errors
    /// [`Error::Shape`] for a slot or token that is not there, [`Error::Device`] for what fails on the device.
    pub fn mark(&mut self, cuda: &Cuda, updates: &[MarkUpdate]) -> Result<()> {
        let inside = |v: i32, end: usize| usize::try_from(v).is_ok_and(|v| v < end);
        let fits = |u: &&MarkUpdate| u.slot != -1 && !(inside(u.slot, self.rows) && inside(u.token, self.vocab));
        if let Some(u) = updates.iter().find(fits) {
            let reason = format!("{u:?} with {} slots and a vocabulary of {}", self.rows, self.vocab);
            return Err(shape("penalties", reason));
        }
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
        let (count, vocab) = (int("penalties", "marks", updates.len())?, int("penalties", "tokens", self.vocab)?);
        let launch = Launch::new("bitnet_mark", (updates.len().div_ceil(THREADS), 1, 1), THREADS)
            .bytes(updates.len() * (size_of::<MarkUpdate>() + size_of::<u32>()));
        // SAFETY: the arguments of bitnet_mark: as many updates as `count`, whose slots and tokens lie inside the marks,
        // checked above.
        unsafe { cuda.launch(launch, &mut [arg(&from), arg(&count), arg(&marks), arg(&vocab)]) }
    }

    /// Chooses a token for each row of f32 `logits` `[rows set, vocab]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for logits that do not fit, [`Error::Device`] for what fails on the device.
    pub fn draw(&mut self, cuda: &Cuda, logits: &CudaView<'_, f32>) -> Result<()> {
        let (count, vocab) = (self.count, self.vocab);
        if count.checked_mul(vocab) != Some(logits.len()) {
            let reason = format!("{} logits for {count} rows of {vocab}", logits.len());
            return Err(shape("sampling", reason));
        }
        if count == 0 {
            return Ok(());
        }
        let bytes = logits.len() * size_of::<f32>();
        let (from, size) = (cuda.read(logits), int("sampling", "tokens", vocab)?);
        let (best, ids) = (cuda.write(&mut self.best), cuda.write(&mut self.ids));
        let grid = (BLOCKS, count, 1);
        if self.argmax {
            let arrived = cuda.write(&mut self.arrived);
            let launch = Launch::new("bitnet_argmax", grid, THREADS).shared(SHARED).bytes(bytes);
            // SAFETY: the arguments of bitnet_argmax; `logits` was checked, best, arrived and ids have room for all rows
            // and the first two are zero between launches.
            return unsafe { cuda.launch(launch, &mut [arg(&from), arg(&size), arg(&best), arg(&arrived), arg(&ids)]) };
        }
        let Some((adjusted, list)) = &mut self.scratch else {
            return Err(shape("sampling", "no settings were given".into()));
        };
        let (adjusted, list) = (cuda.write(adjusted), cuda.write(list));
        let settings = cuda.write(&mut self.settings);
        let marks = self.marks.as_ref().map_or(0, |m| cuda.read(m));
        let launch = Launch::new("bitnet_sample_prepare", grid, THREADS).shared(SHARED).bytes(2 * bytes);
        let arguments = &mut [arg(&from), arg(&size), arg(&settings), arg(&marks), arg(&adjusted), arg(&best)];
        // SAFETY: the arguments of bitnet_sample_prepare; `logits` was checked, settings were uploaded for all rows with
        // slots inside the marks, and the scratch has room for all rows.
        unsafe { cuda.launch(launch, arguments) }?;
        let launch = Launch::new("bitnet_sample_pick", (count, 1, 1), PICK.0).shared(PICK.1).bytes(bytes);
        let arguments = &mut [arg(&adjusted), arg(&size), arg(&settings), arg(&best), arg(&list), arg(&ids)];
        // SAFETY: the arguments of bitnet_sample_pick, as above.
        unsafe { cuda.launch(launch, arguments) }
    }

    /// Waits for the tokens of the last draw. A negative one stands for logits that no token can be chosen from: NaN, or
    /// no finite largest one.
    ///
    /// # Errors
    /// [`Error::Device`] for what went wrong on the device.
    pub fn ids(&self, cuda: &Cuda) -> Result<Vec<i32>> {
        cuda.download(&self.ids.slice(..self.count), "the tokens drawn")
    }
}

fn has_penalties(s: &SampleSettings) -> bool {
    s.slot >= 0 && (s.repetition != 1.0 || s.presence != 0.0 || s.frequency != 0.0)
}

/// Whether the largest logit is all that these settings ask for.
fn is_argmax(s: &SampleSettings) -> bool {
    (s.temperature == 0.0 || s.top_k == 1) && !has_penalties(s)
}

#[cfg(test)]
mod tests {
    use super::super::images::known;
    use super::*;

    #[test]
    fn greedy_settings_need_no_scratch() {
        let greedy = SampleSettings::default();
        assert!(is_argmax(&greedy) && !has_penalties(&greedy));
        let warm = SampleSettings { temperature: 0.7, ..greedy };
        assert!(!is_argmax(&warm));
        assert!(is_argmax(&SampleSettings { top_k: 1, ..warm }));
        let penalties = SampleSettings { presence: 0.5, slot: 0, ..greedy };
        assert!(!is_argmax(&penalties) && has_penalties(&penalties));
        assert!(!has_penalties(&SampleSettings { slot: -1, ..penalties }), "no slot, no penalties");
    }

    #[test]
    fn kernels_are_there() {
        let kernels = ["bitnet_argmax", "bitnet_mark", "bitnet_sample_prepare", "bitnet_sample_pick"];
        assert!(kernels.iter().all(|k| known(k) == Some(false)));
    }
}
