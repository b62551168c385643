//! Penalties for tokens that are already there.

use super::SamplingParams;
use super::device::{MarksHeld, TokenMark};
use std::sync::atomic::{AtomicU64, Ordering};

/// Marks a token as present, in the prompt or generated; the bits below count how often it was generated.
const SEEN: u32 = 1 << 31;

/// Which tokens the sequence holds, as far as the penalties need it. Costs nothing while no penalty is set.
#[derive(Debug, Clone)]
pub(super) struct History {
    repetition: f32,
    presence: f32,
    frequency: f32,
    identity: Identity,
    /// Per token of the vocabulary.
    marks: Vec<u32>,
    /// Every token of the sequence once.
    distinct: Vec<u32>,
    /// All tokens in the order they came: what a device lacks are the last of them.
    observed: Vec<u32>,
}

/// Tells histories apart; a clone goes its own way.
#[derive(Debug)]
struct Identity(u64);

impl Identity {
    fn new() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self::new()
    }
}

impl History {
    pub(super) fn new(params: &SamplingParams, vocab: usize) -> Self {
        let active =
            params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        Self {
            repetition: params.repetition_penalty,
            presence: params.presence_penalty,
            frequency: params.frequency_penalty,
            identity: Identity::new(),
            marks: if active { vec![0; vocab] } else { Vec::new() },
            distinct: Vec::new(),
            observed: Vec::new(),
        }
    }

    /// Whether any penalty is set.
    pub(super) fn is_active(&self) -> bool {
        !self.marks.is_empty()
    }

    /// Whether [`Self::apply`] would change anything.
    pub(super) fn applies(&self) -> bool {
        !self.distinct.is_empty()
    }

    pub(super) fn observe(&mut self, token: u32, generated: bool) {
        let Some(mark) = self.marks.get_mut(token as usize) else { return };
        if *mark == 0 {
            self.distinct.push(token);
        }
        *mark |= SEEN;
        if generated && *mark & !SEEN < SEEN - 1 {
            *mark += 1;
        }
        self.observed.push(token);
    }

    /// See [`super::Sampler::marks_since`].
    pub(super) fn since(&self, held: &mut MarksHeld, marks: &mut Vec<TokenMark>) -> bool {
        let other = held.history != self.identity.0;
        let from = if other { 0 } else { held.observed };
        *held = MarksHeld { history: self.identity.0, observed: self.observed.len() };
        marks.clear();
        let changed = self.observed.get(from..).unwrap_or_default();
        marks.extend(changed.iter().filter_map(|&token| {
            let mark = *self.marks.get(token as usize)?;
            Some(TokenMark { token, mark })
        }));
        marks.sort_unstable_by_key(|m| m.token);
        marks.dedup();
        other
    }

    pub(super) fn apply(&self, scores: &mut [f32]) {
        for &token in &self.distinct {
            let (Some(score), Some(mark)) = (scores.get_mut(token as usize), self.marks.get(token as usize)) else {
                continue;
            };
            if self.repetition != 1.0 {
                *score = if *score < 0.0 { *score * self.repetition } else { *score / self.repetition };
            }
            let count = mark & !SEEN;
            if count > 0 {
                *score -= self.presence + self.frequency * count as f32;
            }
        }
    }
}
