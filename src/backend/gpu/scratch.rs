//! Memory that operations use between two kernels: kept, and grown where a call needs more.

use super::{Memory, failure};
use crate::Result;

/// Memory that grows.
pub(crate) struct Kept<M>(Option<M>);

impl<M> Default for Kept<M> {
    fn default() -> Self {
        Self(None)
    }
}

impl<M: Memory> Kept<M> {
    /// The memory, `len` values or more. Where that takes more than there is, `before` is called, the old memory given back,
    /// and new memory allocated for at least as many; nothing is kept.
    ///
    /// # Errors
    /// Those of `before` and `allocate`.
    pub(crate) fn grown(
        &mut self,
        len: usize,
        what: &str,
        before: impl FnOnce() -> Result<()>,
        allocate: impl FnOnce(usize) -> Result<M>,
    ) -> Result<&mut M> {
        if self.0.as_ref().is_none_or(|m| m.len() < len) {
            before()?;
            self.0 = None;
            self.0 = Some(allocate(room(len))?);
        }
        self.0.as_mut().ok_or_else(|| failure::unavailable(what, "it was not allocated"))
    }
}

/// A little more than is needed, so that growing prompts do not move it every time.
fn room(len: usize) -> usize {
    len.saturating_add(len / 4).max(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    impl Memory for Vec<u8> {
        fn len(&self) -> usize {
            Vec::len(self)
        }

        fn bytes(&self) -> usize {
            Vec::len(self)
        }
    }

    #[test]
    fn memory_grows_with_room_to_spare() {
        assert_eq!([0, 4000, usize::MAX].map(room), [1024, 5000, usize::MAX]);
        let (mut kept, moved) = (Kept::default(), Cell::new(0));
        let mut after = |len: usize| {
            let before = || {
                moved.set(moved.get() + 1);
                Ok(())
            };
            (kept.grown(len, "bytes", before, |len| Ok(vec![0u8; len])).unwrap().len(), moved.get())
        };
        assert_eq!([1, 1024, 1025, 3].map(&mut after), [(1024, 1), (1024, 1), (1281, 2), (1281, 2)]);
    }
}
