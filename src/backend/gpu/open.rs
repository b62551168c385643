//! One backend for all that use a device.

use crate::Result;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The backends of open devices, by what tells the devices apart.
pub(crate) struct Open<I, G>(Mutex<Vec<(I, Weak<G>)>>);

impl<I: PartialEq, G> Open<I, G> {
    /// None yet.
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// The backend of a device: the one that lives, or a new one.
    ///
    /// # Errors
    /// Those of `open`.
    pub(crate) fn shared(&self, device: I, open: impl FnOnce() -> Result<G>) -> Result<Arc<G>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(_, gpu)| gpu.strong_count() > 0);
        if let Some(gpu) = all.iter().find(|(id, _)| *id == device).and_then(|(_, gpu)| gpu.upgrade()) {
            return Ok(gpu);
        }
        let gpu = Arc::new(open()?);
        all.push((device, Arc::downgrade(&gpu)));
        Ok(gpu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_are_shared_while_they_live() {
        let open = Open::<u8, u32>::new();
        let first = open.shared(0, || Ok(10)).unwrap();
        assert_eq!((*open.shared(0, || Ok(11)).unwrap(), *open.shared(1, || Ok(12)).unwrap()), (10, 12));
        drop(first);
        assert_eq!(*open.shared(0, || Ok(13)).unwrap(), 13);
    }
}
