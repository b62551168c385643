//! Times of operations, for `bench --profile`: on the CPU of the ops room's calls, on a GPU of kernels, as it takes them itself.

#[cfg(any(feature = "cuda", feature = "metal"))]
use super::gpu::KernelTime;
use super::select::Backend;
use crate::Result;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What all calls of an operation, or all launches of a kernel, took.
#[derive(Debug, Clone, PartialEq)]
pub struct OpTime {
    /// The operation, with `rows`x`columns` of its weight if it has one; on a GPU the kernel.
    pub name: String,
    /// Calls, or launches.
    pub calls: usize,
    /// Seconds of all of them.
    pub seconds: f64,
    /// Bytes that they had to read: weights, and keys and values of attention. On a GPU, also what they had to write.
    pub bytes: usize,
}

#[cfg(any(feature = "cuda", feature = "metal"))]
impl From<KernelTime> for OpTime {
    fn from(t: KernelTime) -> Self {
        Self { name: t.kernel.into(), calls: t.launches, seconds: t.seconds, bytes: t.bytes }
    }
}

/// An operation, and the weight `[rows, columns]` that it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    op: &'static str,
    weight: Option<(usize, usize)>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Total {
    calls: usize,
    time: Duration,
    bytes: usize,
}

/// The times of a CPU's operations.
#[derive(Debug, Default)]
pub(super) struct OpProfile {
    on: AtomicBool,
    totals: Mutex<BTreeMap<Key, Total>>,
}

impl OpProfile {
    fn totals(&self) -> MutexGuard<'_, BTreeMap<Key, Total>> {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Times an operation until it is dropped.
#[derive(Debug)]
pub(crate) struct OpTimer<'a> {
    profile: &'a OpProfile,
    key: Key,
    bytes: usize,
    start: Instant,
}

impl OpTimer<'_> {
    /// Counts bytes that only the operation itself could tell.
    pub(crate) fn add_bytes(&mut self, bytes: usize) {
        self.bytes += bytes;
    }
}

impl Drop for OpTimer<'_> {
    fn drop(&mut self) {
        let time = self.start.elapsed();
        let mut totals = self.profile.totals();
        let total = totals.entry(self.key).or_default();
        *total = Total { calls: total.calls + 1, time: total.time + time, bytes: total.bytes + self.bytes };
    }
}

impl Backend {
    /// Turns the timing of operations on or off, for all that share this backend; what was timed before stays. On a GPU,
    /// steps are not replayed while it is on, and kernels run one after the other.
    pub fn profile(&self, on: bool) {
        #[cfg(feature = "cuda")]
        if let Ok(cuda) = self.cuda() {
            return cuda.profile(on);
        }
        #[cfg(feature = "metal")]
        if let Ok(metal) = self.metal() {
            return metal.profile(on);
        }
        self.ops.on.store(on, Ordering::Relaxed);
    }

    /// What was timed since the last call, the longest first; waits for the device.
    ///
    /// # Errors
    /// [`crate::Error::Device`] for what went wrong on the device.
    pub fn take_profile(&self) -> Result<Vec<OpTime>> {
        #[cfg(feature = "cuda")]
        if let Ok(cuda) = self.cuda() {
            return Ok(cuda.take_profile()?.into_iter().map(OpTime::from).collect());
        }
        #[cfg(feature = "metal")]
        if let Ok(metal) = self.metal() {
            return Ok(metal.take_profile()?.into_iter().map(OpTime::from).collect());
        }
        let totals = std::mem::take(&mut *self.ops.totals()).into_iter();
        let time = |(Key { op, weight }, total): (Key, Total)| OpTime {
            name: weight.map_or(op.into(), |(rows, cols)| format!("{op} {rows}x{cols}")),
            calls: total.calls,
            seconds: total.time.as_secs_f64(),
            bytes: total.bytes,
        };
        let mut times: Vec<_> = totals.map(time).collect();
        times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(times)
    }

    /// Times an operation of the CPU, if the profile is on; `about` tells its weight's `(rows, columns)` and the bytes that
    /// it reads.
    pub(crate) fn timed(
        &self,
        op: &'static str,
        about: impl FnOnce() -> (Option<(usize, usize)>, usize),
    ) -> Option<OpTimer<'_>> {
        if !self.ops.on.load(Ordering::Relaxed) {
            return None;
        }
        let (weight, bytes) = about();
        Some(OpTimer { profile: &self.ops, key: Key { op, weight }, bytes, start: Instant::now() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn operations_are_told_apart_by_their_weights_and_timed_only_when_asked() {
        let backend = Backend::for_device(&Device::Cpu).unwrap();
        let call = |weight, bytes| drop(backend.timed("op", || (weight, bytes)));
        call(None, 1);
        assert!(backend.take_profile().unwrap().is_empty());
        backend.profile(true);
        // A clone is the same backend.
        drop(backend.clone().timed("slow", || {
            std::thread::sleep(Duration::from_millis(20));
            (None, 0)
        }));
        let slow = backend.timed("slow", || (None, 0));
        std::thread::sleep(Duration::from_millis(5));
        drop(slow);
        call(Some((3, 4)), 10);
        call(Some((3, 4)), 10);
        call(Some((4, 3)), 7);
        backend.profile(false);
        call(None, 1);
        let times = backend.take_profile().unwrap();
        assert_eq!((times[0].name.as_str(), times[0].calls), ("slow", 2));
        assert!((0.005..10.0).contains(&times[0].seconds), "{times:?}");
        let of = |name: &str| times.iter().find(|t| t.name == name).map(|t| (t.calls, t.bytes));
        assert_eq!((of("op 3x4"), of("op 4x3"), of("op")), (Some((2, 20)), Some((1, 7)), None));
        assert!(backend.take_profile().unwrap().is_empty());
    }
}
