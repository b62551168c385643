//! The preallocated cache of keys and values.

use crate::Result;
use crate::backend::DenseType;
use crate::backend::attention::AttentionShape;
use crate::backend::{Backend, KvLayer};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Keys and values of all layers: `slots` sequences of `capacity` positions each, allocated once.
///
/// Which positions of a slot are valid is the caller's knowledge: writing a position overwrites it, and
/// attention reads positions 0 up to the row's own.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Mutex<KvLayer>>,
    shape: AttentionShape,
    dtype: DenseType,
    slots: usize,
    capacity: usize,
    id: u64,
}

impl KvCache {
    /// Room for `slots` sequences of `capacity` positions in each of `layers` layers.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if the device refuses the memory.
    pub fn new(
        backend: &Backend,
        shape: AttentionShape,
        dtype: DenseType,
        layers: usize,
        slots: usize,
        capacity: usize,
    ) -> Result<Self> {
        static CACHES: AtomicU64 = AtomicU64::new(0);
        let id = CACHES.fetch_add(1, Ordering::Relaxed);
        let layer = |_| backend.kv_layer(dtype, shape, slots, capacity).map(Mutex::new);
        Ok(Self { layers: (0..layers).map(layer).collect::<Result<_>>()?, shape, dtype, slots, capacity, id })
    }

    /// One layer.
    pub(crate) fn layer(&self, index: usize) -> Option<&Mutex<KvLayer>> {
        self.layers.get(index)
    }

    /// A number that no other cache of this process has: replayed steps know their cache by it.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Layers that the cache serves.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Sequences that the cache can hold.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Positions of a sequence.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Stored type.
    pub fn dtype(&self) -> DenseType {
        self.dtype
    }

    /// Bytes of one position of one sequence, over all layers.
    pub fn bytes_per_position(&self) -> usize {
        2 * self.layers.len() * self.shape.kv_heads * self.shape.head_dim * self.dtype.size()
    }
}
