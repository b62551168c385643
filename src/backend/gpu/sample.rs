//! What a sampler on a device is asked for, checked.

use super::launch::Launch;
use super::params::{MarkUpdate, SampleSettings};
use super::plan::THREADS;
use super::{int, shape};
use crate::{Error, Result};
use std::ops::Range;

/// Most tokens of a vocabulary: as many masses of 2^40 fit into 64 bits.
const MAX_VOCAB: usize = 1 << 24;
/// Blocks that share one row of logits.
pub(crate) const BLOCKS: usize = 64;
/// Shared memory of `bitnet_sample_pick`.
pub(crate) const PICK_SHARED: usize = 24_608;

/// Draws of up to `rows` tokens at a time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Draws {
    pub rows: usize,
    pub vocab: usize,
    /// Whether the next draw takes the largest logits and nothing else.
    pub argmax: bool,
    /// Rows of the next draw.
    pub count: usize,
}

impl Draws {
    /// The largest logit of each of up to `rows` rows of `vocab`.
    ///
    /// # Errors
    /// [`Error::Shape`] for no row or a vocabulary of none or more than 2^24.
    pub(crate) fn new(rows: usize, vocab: usize) -> Result<Self> {
        if rows == 0 || !(1..=MAX_VOCAB).contains(&vocab) {
            return Err(shape("sampling", format!("{rows} rows of {vocab} logits; a row has 1 to {MAX_VOCAB}")));
        }
        Ok(Self { rows, vocab, argmax: true, count: rows })
    }

    /// Draws by these settings, and whether there are penalties among them.
    ///
    /// # Errors
    /// [`Error::Shape`] for more rows than there is room for, [`Error::Request`] for a slot that is not there.
    pub(crate) fn by(self, settings: &[SampleSettings]) -> Result<(Self, bool)> {
        if settings.len() > self.rows {
            return Err(shape("sampling", format!("{} rows, room for {}", settings.len(), self.rows)));
        }
        let rows = i32::try_from(self.rows).unwrap_or(i32::MAX);
        if let Some(s) = settings.iter().find(|s| !(-1..rows).contains(&s.slot)) {
            return Err(Error::request("sampling slot", format!("{} is not below {rows}", s.slot)));
        }
        let draws = Self { argmax: settings.iter().all(SampleSettings::is_argmax), count: settings.len(), ..self };
        Ok((draws, settings.iter().any(SampleSettings::has_penalties)))
    }

    /// Values of all rows together.
    pub(crate) fn size(&self) -> usize {
        self.rows.saturating_mul(self.vocab)
    }

    /// A slot's marks.
    ///
    /// # Errors
    /// [`Error::Shape`] for a slot that is not there.
    pub(crate) fn marks_of(&self, slot: usize) -> Result<Range<usize>> {
        if slot >= self.rows {
            return Err(shape("penalties", format!("slot {slot} is not below {}", self.rows)));
        }
        Ok(slot * self.vocab..(slot + 1) * self.vocab)
    }

    /// Refuses marks of a slot or token that is not there: else their number and that of tokens, as the kernel takes them.
    ///
    /// # Errors
    /// [`Error::Shape`] for such a mark.
    pub(crate) fn check_marks(&self, updates: &[MarkUpdate]) -> Result<(i32, i32)> {
        let inside = |v: i32, end: usize| usize::try_from(v).is_ok_and(|v| v < end);
        let fits = |u: &&MarkUpdate| u.slot != -1 && !(inside(u.slot, self.rows) && inside(u.token, self.vocab));
        if let Some(u) = updates.iter().find(fits) {
            let reason = format!("{u:?} with {} slots and a vocabulary of {}", self.rows, self.vocab);
            return Err(shape("penalties", reason));
        }
        Ok((int("penalties", "marks", updates.len())?, int("penalties", "tokens", self.vocab)?))
    }

    /// The launch that sets marks.
    pub(crate) fn mark_launch(updates: &[MarkUpdate]) -> Launch {
        Launch::new("bitnet_mark", (updates.len().div_ceil(THREADS), 1, 1), THREADS)
            .bytes(updates.len() * (size_of::<MarkUpdate>() + size_of::<u32>()))
    }

    /// Refuses logits of another size than the next draw's: else the number of tokens, as kernels take it.
    ///
    /// # Errors
    /// [`Error::Shape`] for such logits.
    pub(crate) fn check_logits(&self, logits: usize) -> Result<i32> {
        let Self { count, vocab, .. } = *self;
        if count.checked_mul(vocab) != Some(logits) {
            return Err(shape("sampling", format!("{logits} logits for {count} rows of {vocab}")));
        }
        int("sampling", "tokens", vocab)
    }
}

/// The error for a draw that needs memory which settings would have allocated.
pub(crate) fn no_settings() -> Error {
    shape("sampling", "no settings were given".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_refused() {
        assert!(Draws::new(0, 5).is_err() && Draws::new(1, 0).is_err() && Draws::new(1, MAX_VOCAB + 1).is_err());
        let draws = Draws::new(2, 5).unwrap();
        assert!(draws.argmax && draws.check_logits(10).is_ok() && draws.check_logits(5).is_err());
        let warm = SampleSettings { temperature: 0.7, ..SampleSettings::GREEDY };
        let (one, penalties) = draws.by(&[warm]).unwrap();
        assert!(!one.argmax && !penalties && one.check_logits(5).is_ok());
        assert!(draws.by(&[warm; 3]).is_err());
        assert!(matches!(draws.by(&[SampleSettings { slot: 2, ..warm }]), Err(Error::Request { .. })));
        assert!(draws.by(&[SampleSettings { slot: 1, presence: 1.0, ..warm }]).unwrap().1);
        assert_eq!((draws.size(), draws.marks_of(1).unwrap()), (10, 5..10));
        assert!(draws.marks_of(2).is_err());
        let mark = MarkUpdate { slot: 1, token: 4, mark: 1 };
        assert_eq!(draws.check_marks(&[mark]).unwrap(), (1, 5));
        assert!(draws.check_marks(&[MarkUpdate { slot: -1, token: 9, ..mark }]).is_ok(), "nothing to do");
        for bad in [MarkUpdate { slot: 2, ..mark }, MarkUpdate { token: 5, ..mark }, MarkUpdate { token: -1, ..mark }] {
            assert!(draws.check_marks(&[bad]).is_err());
        }
    }
}
