//! The tokens of a forward pass: which they are, and where each stands.

use super::any::{on_any, on_gpu};
use super::attention::RowPosition;
#[cfg(feature = "cuda")]
use super::cuda::CudaBatch;
#[cfg(feature = "metal")]
use super::metal::MetalBatch;
use crate::{Error, Result};

/// The tokens of a forward pass where a device's kernels read them, made once and filled for every pass.
#[derive(Debug)]
#[non_exhaustive]
pub enum Batch {
    /// In this machine's memory.
    Cpu(HostBatch),
    /// In an NVIDIA GPU's memory, with a copy in this machine's.
    #[cfg(feature = "cuda")]
    Cuda(CudaBatch),
    /// In memory that an Apple GPU reads, with a copy in this machine's own.
    #[cfg(feature = "metal")]
    Metal(MetalBatch),
}

impl Batch {
    /// Takes `ids` with their `rows` for the next pass.
    ///
    /// # Errors
    /// As [`HostBatch::set`].
    pub fn set(&mut self, ids: &[u32], rows: &[RowPosition]) -> Result<()> {
        on_any!(self, batch => batch.set(ids, rows))
    }

    /// Most tokens of a pass.
    pub fn capacity(&self) -> usize {
        on_any!(self, batch => batch.capacity())
    }

    /// Tokens of this pass.
    pub fn len(&self) -> usize {
        self.ids().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids().is_empty()
    }

    /// The tokens.
    pub fn ids(&self) -> &[u32] {
        on_any!(self, batch => batch.ids())
    }

    /// Slot and position of each token.
    pub fn rows(&self) -> &[RowPosition] {
        on_any!(self, batch => batch.rows())
    }

    on_gpu!("batch", CudaBatch, MetalBatch);
}

/// A batch in this machine's memory; a batch of another device has one beside it.
#[derive(Debug)]
pub struct HostBatch {
    capacity: usize,
    ids: Vec<u32>,
    rows: Vec<RowPosition>,
}

impl HostBatch {
    /// An empty batch for up to `capacity` tokens; [`Self::set`] allocates nothing.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if memory is short.
    pub fn new(capacity: usize) -> Result<Self> {
        let (mut ids, mut rows) = (Vec::new(), Vec::new());
        if ids.try_reserve_exact(capacity).and_then(|()| rows.try_reserve_exact(capacity)).is_err() {
            return Err(Error::Unavailable {
                what: format!("memory for a batch of {capacity} tokens"),
                reason: "the system refused the allocation; give fewer tokens at once".into(),
            });
        }
        Ok(Self { capacity, ids, rows })
    }

    /// Replaces what the batch holds. A sequence's tokens follow each other at consecutive positions.
    ///
    /// # Errors
    /// [`Error::Shape`], with the batch as it was, for no tokens or more than the capacity, for another number of rows,
    /// and for a slot whose tokens are apart or not at consecutive positions.
    pub fn set(&mut self, ids: &[u32], rows: &[RowPosition]) -> Result<()> {
        let refuse = |reason| Err(Error::Shape { op: "batch", reason });
        if ids.is_empty() || ids.len() > self.capacity {
            return refuse(format!("{} tokens; 1 to {} are possible", ids.len(), self.capacity));
        }
        if ids.len() != rows.len() {
            return refuse(format!("{} tokens with {} positions", ids.len(), rows.len()));
        }
        for (i, row) in rows.iter().enumerate().skip(1) {
            let (before, last) = (&rows[..i], rows[i - 1]);
            if last.slot == row.slot {
                if last.position.checked_add(1) != Some(row.position) {
                    let (slot, from, to) = (row.slot, last.position, row.position);
                    return refuse(format!("slot {slot} goes from position {from} to {to}"));
                }
            } else if before.iter().any(|r| r.slot == row.slot) {
                return refuse(format!("the tokens of slot {} are apart", row.slot));
            }
        }
        self.ids.clear();
        self.ids.extend_from_slice(ids);
        self.rows.clear();
        self.rows.extend_from_slice(rows);
        Ok(())
    }

    /// Most tokens.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The tokens.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Slot and position of each token.
    pub fn rows(&self) -> &[RowPosition] {
        &self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(list: &[(usize, usize)]) -> Vec<RowPosition> {
        list.iter().map(|(slot, position)| RowPosition { slot: *slot, position: *position }).collect()
    }

    #[test]
    fn a_batch_holds_whole_runs_of_sequences_and_nothing_else() {
        let mut batch = HostBatch::new(4).unwrap();
        let good = rows(&[(3, 7), (3, 8), (0, 0), (5, 1)]);
        batch.set(&[9, 8, 7, 6], &good).unwrap();
        batch.set(&[1], &rows(&[(2, 2)])).unwrap();
        batch.set(&[9, 8, 7, 6], &good).unwrap();
        let mut refused = |ids: &[u32], list: &[(usize, usize)], reason: &str| {
            let e = batch.set(ids, &rows(list)).unwrap_err().to_string();
            assert!(e.starts_with("batch: ") && e.contains(reason), "{e}");
            assert_eq!((batch.ids(), batch.rows()), (&[9, 8, 7, 6][..], &good[..]), "as it was");
        };
        refused(&[], &[], "0 tokens; 1 to 4 are possible");
        refused(&[0; 5], &[(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)], "5 tokens");
        refused(&[1, 2], &[(0, 0)], "2 tokens with 1 positions");
        refused(&[1, 2], &[(0, 3), (0, 3)], "slot 0 goes from position 3 to 3");
        refused(&[1, 2], &[(0, 3), (0, 5)], "from position 3 to 5");
        refused(&[1, 2], &[(0, usize::MAX), (0, 0)], "slot 0");
        refused(&[1, 2, 3], &[(0, 3), (1, 0), (0, 4)], "slot 0 are apart");
        assert!(HostBatch::new(usize::MAX).is_err());
    }
}
