//! Decode steps as CUDA graphs: recorded once for each shape, then launched with one call.
//!
//! A step whose kernels, sizes and addresses are the same each time needs no host work but the call: what changes (ids,
//! positions, slots, sampling settings) lies in device memory and is uploaded before. The first step of a shape runs as it
//! is, which loads kernels and brings scratch memory to its size; the second is recorded and launched; later ones are only
//! launched. Recording fails if anything is allocated, freed or copied to the host; such a step then runs as it is.

use super::open::opening_or_recording;
use super::{Cuda, failure};
use crate::Result;
use candle_core::cuda_backend::cudarc::driver::CudaGraph;
use candle_core::cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use std::sync::atomic::Ordering;

/// Most graphs that are kept; the one unused for longest makes room.
const LIMIT: usize = 16;

/// All that decides which kernels a step launches over which memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GraphKey {
    /// Tokens, one of each sequence.
    pub tokens: usize,
    /// Class of the longest sequence; see [`super::CudaBatch::bucket`].
    pub bucket: usize,
    /// The KV cache; see [`super::CudaKv::id`].
    pub cache: u64,
    /// Anything else that changes launches: the batch, buffers, an adapter, sampling or not.
    pub other: u64,
}

/// A recorded step.
struct Recorded(CudaGraph);

// SAFETY: a graph may be used from any thread as long as no two use it at once; it is only reached through `&mut Graphs`,
// and every call makes its context current first.
unsafe impl Send for Recorded {}

struct Entry {
    key: GraphKey,
    /// None after the first run.
    recorded: Option<Recorded>,
    /// Of the scratch memory that the graph knows.
    generation: u64,
    used: u64,
}

/// The recorded decode steps of one model on one device.
pub struct Graphs {
    entries: Vec<Entry>,
    clock: u64,
    on: bool,
    failure: Option<String>,
}

impl Graphs {
    /// No graphs yet; `on` false (`--no-graph`) runs every step as it is.
    pub fn new(on: bool) -> Self {
        Self { entries: Vec::new(), clock: 0, on, failure: None }
    }

    /// Whether steps are recorded.
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Graphs that are ready.
    pub fn len(&self) -> usize {
        self.entries.iter().filter(|e| e.recorded.is_some()).count()
    }

    /// Whether no graph is ready.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all graphs, as when memory that they know is given back.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    /// Why steps are not recorded any more, once: the first failure turns recording off.
    pub fn take_failure(&mut self) -> Option<String> {
        self.failure.take()
    }

    /// Runs a step: by `run`, by recording `run`, or by its graph.
    ///
    /// `run` must launch the same kernels over the same memory each time that `key` is the same, and must not allocate or
    /// free device memory, upload, read back or wait. While it is recorded, nothing it launches runs, and whatever another
    /// thread launched in the device's stream would be recorded with it: the caller sees to it that there is none.
    ///
    /// # Errors
    /// Those of `run` when it runs as it is; [`crate::Error::Device`] if a graph cannot be launched.
    pub fn replay(&mut self, cuda: &Cuda, key: GraphKey, mut run: impl FnMut() -> Result<()>) -> Result<()> {
        if !self.on || cuda.profile.is_on() {
            return run();
        }
        self.clock += 1;
        let (clock, generation) = (self.clock, cuda.generation());
        let Some(entry) = self.entries.iter_mut().find(|e| e.key == key) else {
            run()?;
            self.make_room();
            self.entries.push(Entry { key, recorded: None, generation: 0, used: clock });
            return Ok(());
        };
        entry.used = clock;
        if entry.generation != generation {
            entry.recorded = None;
        }
        if entry.recorded.is_none() {
            match record(cuda, &mut run) {
                Ok(graph) => *entry = Entry { key, recorded: Some(graph), generation, used: clock },
                Err(reason) => {
                    // A step that fails as it is as well says nothing about recording.
                    run()?;
                    self.on = false;
                    self.entries.clear();
                    self.failure = Some(reason);
                    return Ok(());
                }
            }
        }
        match &entry.recorded {
            Some(graph) => graph.0.launch().map_err(|e| failure::driver(&cuda.stream, "launching a graph", e)),
            None => run(),
        }
    }

    /// Drops the entry that was not used for longest. A graph that still runs is released when it has ended.
    fn make_room(&mut self) {
        if self.entries.len() >= LIMIT
            && let Some(oldest) = (0..self.entries.len()).min_by_key(|i| self.entries[*i].used)
        {
            self.entries.swap_remove(oldest);
        }
    }
}

impl std::fmt::Debug for Graphs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let keys: Vec<_> = self.entries.iter().map(|e| (e.key, e.recorded.is_some())).collect();
        f.debug_struct("Graphs").field("on", &self.on).field("entries", &keys).finish()
    }
}

/// Records a step. The stream is out of capture again in every case.
fn record(cuda: &Cuda, run: &mut impl FnMut() -> Result<()>) -> Result<Recorded, String> {
    let _alone = opening_or_recording();
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    cuda.stream.begin_capture(mode).map_err(failure::text)?;
    cuda.capturing.store(true, Ordering::Relaxed);
    let result = run();
    cuda.capturing.store(false, Ordering::Relaxed);
    // Memory that is allocated all the same is freed at the next launch rather than failing it.
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = cuda.stream.end_capture(flags);
    result.map_err(|e| e.to_string())?;
    match graph.map_err(failure::text)? {
        Some(graph) => Ok(Recorded(graph)),
        None => Err("the driver recorded nothing".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_entry_makes_room() {
        let mut graphs = Graphs::new(true);
        for used in 0..LIMIT as u64 {
            let key = GraphKey { tokens: 1, bucket: 256, cache: used, other: 0 };
            graphs.entries.push(Entry { key, recorded: None, generation: 0, used: used + 10 });
        }
        graphs.entries[5].used = 1;
        graphs.make_room();
        assert_eq!(graphs.entries.len(), LIMIT - 1);
        assert!(graphs.entries.iter().all(|e| e.key.cache != 5));
        assert!(graphs.is_empty() && graphs.is_on() && !Graphs::new(false).is_on());
    }
}
