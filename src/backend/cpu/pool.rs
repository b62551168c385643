//! A thread pool with a short hand-over: workers spin briefly for the next operation, then park.
//!
//! One dispatch per operation. Every thread has its own run of tasks and claims them one by one, in order, so that it
//! reads one stream; when it has none left it takes over those of others. So a core that is taken away for a moment
//! delays one task and not the operation. A worker that wakes late finds the operation closed and touches nothing.
//!
//! A run is the same part of every operation of one size. Where the threads are on several NUMA nodes, each worker is kept on
//! its core, so that what it writes first, its part of the weights, lies in its node's memory and is read from there; and it
//! takes over tasks of its own node first. The caller belongs to the program and is not moved: its core is the one that is
//! left free.

use crate::backend::topology::{Seats, Topology, keep_this_thread_on};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a worker looks for the next operation before it parks: longer than the gap between two operations
/// of a decode step (5–20 µs), short enough to cost nothing between tokens.
const SPIN: Duration = Duration::from_micros(60);

/// `state`: the operation's number in the high half, OPEN, and the count of workers inside it.
const OPEN: u64 = 1 << 31;
const COUNT: u64 = OPEN - 1;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

struct Shared {
    state: AtomicU64,
    /// The current operation's closure; only read by workers counted in `state`.
    task: Mutex<Option<&'static Task<'static>>>,
    tasks: AtomicUsize,
    /// The next task of each thread's run.
    next: Vec<Padded>,
    /// Where threads are kept, if they are.
    seats: Option<Seats>,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    spin: Duration,
}

/// A counter with a cache line of its own.
#[repr(align(64))]
struct Padded(AtomicUsize);

/// The run of thread `i` of `n`.
fn run_of(i: usize, n: usize, tasks: usize) -> std::ops::Range<usize> {
    i * tasks / n..(i + 1) * tasks / n
}

struct Worker {
    thread: Thread,
    sleeping: Arc<AtomicBool>,
    handle: Option<JoinHandle<()>>,
}

/// A fixed set of threads; the caller is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    busy: Mutex<()>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({} threads)", self.threads())
    }
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool of `threads` threads (at least one), the caller included; on a machine with several NUMA nodes, seated as
    /// [`Topology::seats`] says.
    pub fn new(threads: usize) -> Self {
        Self::seated(threads, Topology::here().seats(threads))
    }

    fn seated(threads: usize, seats: Option<Seats>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            task: Mutex::new(None),
            tasks: AtomicUsize::new(0),
            next: (0..threads.max(1)).map(|_| Padded(AtomicUsize::new(0))).collect(),
            seats,
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            // More spinning threads than cores would take the core from the one that has work.
            spin: if threads <= cores { SPIN } else { Duration::ZERO },
        });
        let spawn = |i| {
            let (shared, sleeping) = (Arc::clone(&shared), Arc::new(AtomicBool::new(false)));
            let flag = Arc::clone(&sleeping);
            let body = move || {
                if let Some(core) = shared.seats.as_ref().and_then(|seats| seats.cores.get(i).map(Vec::as_slice)) {
                    // A worker that the system does not let sit there works elsewhere.
                    keep_this_thread_on(core);
                }
                shared.work(i, &flag);
            };
            // A system that refuses threads leaves a smaller pool, which is slower and right.
            let handle = std::thread::Builder::new().name(format!("bitnet-{i}")).spawn(body).ok()?;
            Some(Worker { thread: handle.thread().clone(), sleeping, handle: Some(handle) })
        };
        let workers = (1..threads.max(1)).map_while(spawn).collect();
        Self { shared, workers, busy: Mutex::new(()) }
    }

    /// Whether each worker is kept on a core of its own, because they are on several NUMA nodes.
    pub fn is_seated(&self) -> bool {
        self.shared.seats.is_some()
    }

    /// Threads that take part, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(0) … task(tasks - 1)`, each once, on all threads; returns when all are done. Operations of several
    /// callers wait for each other, so a task must not start one on its own pool.
    ///
    /// # Panics
    /// Passes on a panic of a task, after all threads have left the operation.
    pub fn run(&self, tasks: usize, task: &Task<'_>) {
        if self.workers.is_empty() || tasks <= 1 {
            return (0..tasks).for_each(task);
        }
        let _one_operation = lock(&self.busy);
        // SAFETY: the reference is only used by threads counted in `state`, and `leave` waits until that count
        // is zero before this function returns or unwinds, so it never outlives the closure.
        let erased = unsafe { std::mem::transmute::<&Task<'_>, &'static Task<'static>>(task) };
        let shared = &*self.shared;
        *lock(&shared.task) = Some(erased);
        shared.tasks.store(tasks, Ordering::Relaxed);
        for (i, next) in shared.next.iter().enumerate() {
            next.0.store(run_of(i, shared.next.len(), tasks).start, Ordering::Relaxed);
        }
        let number = (shared.state.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        shared.state.store(number << 32 | OPEN, Ordering::SeqCst);
        for worker in &self.workers {
            if worker.sleeping.load(Ordering::SeqCst) {
                worker.thread.unpark();
            }
        }
        let mine = catch_unwind(AssertUnwindSafe(|| shared.claim(0, tasks, task)));
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while shared.state.load(Ordering::Acquire) & COUNT != 0 {
            spins += 1;
            // A worker that lost its core needs ours.
            if spins.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        *lock(&shared.task) = None;
        if let Some(payload) = lock(&shared.panic).take().or(mine.err()) {
            resume_unwind(payload);
        }
    }

    /// Splits `data` into chunks of `chunk` elements (the last may be shorter) and calls `task(i, chunk_i)` for
    /// each, on all threads.
    pub fn for_each_chunk<T: Send>(&self, data: &mut [T], chunk: usize, task: impl Fn(usize, &mut [T]) + Sync) {
        let (len, chunk) = (data.len(), chunk.max(1));
        let base = SendPtr(data.as_mut_ptr());
        self.run(len.div_ceil(chunk), &|i| {
            let (start, end) = (i * chunk, (i * chunk + chunk).min(len));
            // SAFETY: `run` calls each i once and the ranges of different i do not overlap; start < len, and
            // `data` is borrowed mutably for the whole call.
            task(i, unsafe { std::slice::from_raw_parts_mut(base.get().add(start), end - start) });
        });
    }
}

impl Shared {
    /// Runs tasks until none is left, first those of thread `me`, then those of its node.
    fn claim(&self, me: usize, tasks: usize, task: &Task<'_>) {
        let n = self.next.len();
        let all = 0..n;
        let near = self.seats.as_ref().and_then(|seats| seats.neighbours.get(me)).unwrap_or(&all);
        let here = (0..near.len()).map(|i| near.start + (me - near.start + i) % near.len());
        let elsewhere = (near.end..n).chain(0..near.start);
        for owner in here.chain(elsewhere) {
            let end = run_of(owner, n, tasks).end;
            loop {
                let i = self.next[owner].0.fetch_add(1, Ordering::Relaxed);
                if i >= end {
                    break;
                }
                task(i);
            }
        }
    }

    fn work(&self, me: usize, sleeping: &AtomicBool) {
        let mut seen = 0;
        while let Some(state) = self.wait(seen, sleeping) {
            seen = state >> 32;
            let joined = state & OPEN != 0
                && self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Acquire).is_ok();
            if !joined {
                // Another worker joined in between (look again), or the operation is over.
                if self.state.load(Ordering::Acquire) & OPEN != 0 {
                    seen = seen.wrapping_sub(1);
                }
                continue;
            }
            let task = *lock(&self.task);
            if let Some(task) = task {
                let tasks = self.tasks.load(Ordering::Relaxed);
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.claim(me, tasks, task))) {
                    *lock(&self.panic) = Some(payload);
                }
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for an operation other than `seen`; `None` when the pool is dropped.
    fn wait(&self, seen: u64, sleeping: &AtomicBool) -> Option<u64> {
        let fresh = |state: u64| state >> 32 != seen;
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                let state = self.state.load(Ordering::Acquire);
                if fresh(state) {
                    return Some(state);
                }
                std::hint::spin_loop();
            }
            if start.elapsed() < self.spin {
                continue;
            }
            sleeping.store(true, Ordering::SeqCst);
            // Looked at after the flag is up, so that an operation opened in between is seen or unparks us.
            let idle = !fresh(self.state.load(Ordering::SeqCst)) && !self.stop.load(Ordering::SeqCst);
            if idle {
                std::thread::park();
            }
            sleeping.store(false, Ordering::SeqCst);
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in &mut self.workers {
            worker.thread.unpark();
            if let Some(handle) = worker.handle.take() {
                let _ = handle.join();
            }
        }
    }
}

/// A pointer that the tasks of one operation share; each use says why its ranges are disjoint.
pub(super) struct SendPtr<T>(pub(super) *mut T);

impl<T> SendPtr<T> {
    /// The pointer; through a method, so that closures capture the wrapper.
    pub(super) fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: the wrapper only moves the address between threads; every dereference is justified where it happens.
unsafe impl<T: Send> Send for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SendPtr<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_every_operation() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 100] {
                for round in 0..50 {
                    let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, &|i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} {tasks} {round}");
                }
            }
        }
    }

    #[test]
    fn seated_threads_run_every_task_and_those_of_their_node_first() {
        // Two nodes, wherever these threads may be: a seat that is refused is no reason not to work.
        let seats = Seats { cores: vec![vec![0]; 5], neighbours: vec![0..3, 0..3, 0..3, 3..5, 3..5] };
        let pool = Pool::seated(5, Some(seats));
        assert!(pool.is_seated() && pool.threads() == 5);
        for round in 0..50 {
            let counts: Vec<_> = (0..40).map(|_| AtomicUsize::new(0)).collect();
            pool.run(40, &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{round}");
        }
        // Alone, a thread takes its own run, then its node's, then the others'.
        let order = |me| {
            for (i, next) in pool.shared.next.iter().enumerate() {
                next.0.store(run_of(i, 5, 10).start, Ordering::Relaxed);
            }
            let order = Mutex::new(Vec::new());
            pool.shared.claim(me, 10, &|i| lock(&order).push(i));
            order.into_inner().unwrap()
        };
        assert_eq!(order(1), [2, 3, 4, 5, 0, 1, 6, 7, 8, 9]);
        assert_eq!(order(4), [8, 9, 6, 7, 0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn chunks_cover_the_slice_without_overlap() {
        let pool = Pool::new(3);
        let mut data = vec![0u32; 1003];
        pool.for_each_chunk(&mut data, 10, |i, chunk| chunk.iter_mut().for_each(|v| *v += i as u32 + 1));
        assert!(data.iter().enumerate().all(|(at, v)| *v as usize == at / 10 + 1));
    }

    #[test]
    fn parked_workers_wake_and_callers_take_turns() {
        let pool = Pool::new(2);
        std::thread::sleep(Duration::from_millis(5));
        let total = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..200 {
                        pool.run(5, &|i| {
                            total.fetch_add(i, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 200 * 10);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives() {
        let pool = Pool::new(2);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, &|i| assert!(i != 5, "task five"));
        }));
        assert!(caught.is_err());
        let ran = AtomicUsize::new(0);
        pool.run(8, &|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.into_inner(), 8);
    }
}
