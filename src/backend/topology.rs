//! Cores: which of them this process may use, how much of their time, and which memory they are near to; from that, how many
//! threads to use and where.
//!
//! On Linux everything is read from files: the affinity mask from `/proc/thread-self/status`, cores from
//! `/sys/devices/system/cpu/*/topology/thread_siblings_list`, NUMA nodes from `/sys/devices/system/node/*/cpulist`, quotas
//! from control groups (`topology/quota.rs`). What cannot be read or makes no sense is left out: then every hardware thread is a
//! core, and all of them are one node.

mod quota;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

/// The largest number of a hardware thread that is believed: Linux is built for at most 8192.
const MAX_HARDWARE_THREADS: usize = 8192;

/// A core, as far as this process may use it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Core {
    /// Its NUMA node.
    node: usize,
    /// The numbers of its hardware threads.
    threads: Vec<usize>,
}

/// The cores that this process may use.
#[derive(Debug, Clone, PartialEq)]
pub struct Topology {
    /// Node by node, those with more cores first.
    cores: Vec<Core>,
    /// Hardware threads of the machine.
    online: usize,
    /// Cores' worth of time that a control group allows.
    quota: Option<f64>,
    /// Cores of a slower kind, which are not counted in `cores`.
    efficient: usize,
}

/// Where the threads of a pool run: each on the hardware threads of one core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seats {
    /// The hardware threads of each thread's core.
    pub cores: Vec<Vec<usize>>,
    /// For each thread, the threads on the same node, which follow each other.
    pub neighbours: Vec<Range<usize>>,
}

impl Topology {
    /// This machine, as this process saw it when it first asked.
    pub fn here() -> &'static Self {
        static HERE: OnceLock<Topology> = OnceLock::new();
        HERE.get_or_init(Self::of_this_system)
    }

    /// What Linux tells.
    #[cfg(not(target_os = "macos"))]
    fn of_this_system() -> Self {
        Self::read(Path::new("/")).unwrap_or_else(|| Self::uniform(hardware_threads(), 0))
    }

    /// What macOS tells: on Apple's chips the performance cores, as a share of work on another one would be waited for.
    #[cfg(target_os = "macos")]
    fn of_this_system() -> Self {
        let count = |name| super::host::sysctl_number(name).and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
        let all = count(c"hw.physicalcpu").unwrap_or_else(hardware_threads);
        let fast = count(c"hw.perflevel0.physicalcpu").unwrap_or(all).min(all);
        Self { online: hardware_threads(), ..Self::uniform(fast, all - fast) }
    }

    /// Cores of one hardware thread each, on one node.
    fn uniform(cores: usize, efficient: usize) -> Self {
        let core = |i| Core { node: 0, threads: vec![i] };
        let cores = (0..cores.clamp(1, MAX_HARDWARE_THREADS)).map(core).collect::<Vec<_>>();
        Self { online: cores.len(), cores, quota: None, efficient }
    }

    /// A machine whose `/proc` and `/sys` are under `root`. None if they do not tell which hardware threads there are.
    pub fn read(root: &Path) -> Option<Self> {
        let text = |path: &str| std::fs::read_to_string(root.join(path)).ok();
        let list = |path: &str| cpu_list(&text(path)?);
        let online = list("sys/devices/system/cpu/online");
        let mask = ["proc/thread-self/status", "proc/self/status"].iter().find_map(|path| {
            let status = text(path)?;
            cpu_list(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?)
        });
        // A mask may name threads that are not there.
        let allowed = match (mask, &online) {
            (Some(mask), Some(online)) => mask.into_iter().filter(|cpu| online.contains(cpu)).collect(),
            (Some(mask), None) => mask,
            (None, Some(online)) => online.clone(),
            (None, None) => return None,
        };
        if allowed.is_empty() {
            return None;
        }
        let nodes = nodes(root, &allowed);
        // By the least number of a thread of the core, allowed or not.
        let mut cores = BTreeMap::<usize, Core>::new();
        for cpu in &allowed {
            let siblings = list(&format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"));
            let key = siblings.filter(|s| s.contains(cpu)).and_then(|s| s.first().copied()).unwrap_or(*cpu);
            let node = nodes.get(cpu).copied().unwrap_or(0);
            cores.entry(key).or_insert_with(|| Core { node, threads: Vec::new() }).threads.push(*cpu);
        }
        let mut cores: Vec<_> = cores.into_values().collect();
        let mut counts = BTreeMap::<usize, usize>::new();
        cores.iter().for_each(|core| *counts.entry(core.node).or_default() += 1);
        cores.sort_by_key(|core| (std::cmp::Reverse(counts.get(&core.node).copied()), core.node));
        let online = online.map_or(allowed.len(), |online| online.len());
        Some(Self { cores, online, quota: quota::read(root), efficient: 0 })
    }

    /// Physical cores of which this process may use a hardware thread; on Apple's chips, performance cores.
    pub fn cores(&self) -> usize {
        self.cores.len()
    }

    /// Cores of a slower kind, which threads are not counted for.
    pub fn efficient_cores(&self) -> usize {
        self.efficient
    }

    /// Hardware threads that this process may use.
    pub fn hardware_threads(&self) -> usize {
        self.cores.iter().map(|core| core.threads.len()).sum()
    }

    /// Hardware threads of the machine.
    pub fn online_threads(&self) -> usize {
        self.online
    }

    /// Cores' worth of time that a control group (a container) allows.
    pub fn quota(&self) -> Option<f64> {
        self.quota
    }

    /// Cores of each NUMA node, those that this process may use: the node's number and how many.
    pub fn nodes(&self) -> Vec<(usize, usize)> {
        self.cores.chunk_by(|a, b| a.node == b.node).map(|cores| (cores[0].node, cores.len())).collect()
    }

    /// Threads to use where nobody says how many: one for each core, as two on a core share its loads and its multipliers;
    /// no more than the quota pays for, as the system stops all of them when it is used up.
    pub fn threads(&self) -> usize {
        let paid = self.quota.map_or(usize::MAX, |quota| quota as usize);
        self.cores().min(paid).max(1)
    }

    /// Why [`Self::threads`] is what it is.
    pub fn why(&self) -> String {
        match self.quota {
            Some(quota) if self.threads() < self.cores() => {
                format!("a control group allows the time of {quota:.1} cores")
            }
            _ if self.efficient > 0 => "one for each performance core".into(),
            _ if self.hardware_threads() < self.online => "one for each core that the affinity mask allows".into(),
            _ => "one for each core".into(),
        }
    }

    /// Where so many threads run if their number takes the cores of more than one node: spread over all nodes in proportion
    /// to their cores, node by node. None where one node has cores enough, or is all there is: then the system decides.
    pub fn seats(&self, threads: usize) -> Option<Seats> {
        let nodes = self.nodes();
        // The largest comes first.
        if nodes.len() < 2 || threads <= nodes.first()?.1 {
            return None;
        }
        let core = |thread: usize| &self.cores[thread * self.cores.len() / threads];
        let node = |thread: usize| core(thread).node;
        let neighbours = |thread: usize| {
            let before = (0..thread).rev().take_while(|other| node(*other) == node(thread)).count();
            let after = (thread..threads).take_while(|other| node(*other) == node(thread)).count();
            thread - before..thread + after
        };
        Some(Seats {
            cores: (0..threads).map(|thread| core(thread).threads.clone()).collect(),
            neighbours: (0..threads).map(neighbours).collect(),
        })
    }
}

/// What the standard library counts.
fn hardware_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// The node of each hardware thread. Empty if not every allowed one is on one: then they count as one node.
fn nodes(root: &Path, allowed: &[usize]) -> BTreeMap<usize, usize> {
    let mut nodes = BTreeMap::new();
    for entry in std::fs::read_dir(root.join("sys/devices/system/node")).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("node")?.parse::<usize>().ok());
        let list = std::fs::read_to_string(entry.path().join("cpulist")).ok();
        if let (Some(number), Some(list)) = (number, list.and_then(|list| cpu_list(&list))) {
            for cpu in list {
                // A thread on two nodes makes no sense; the lower number is as good as any.
                nodes.entry(cpu).and_modify(|at: &mut usize| *at = number.min(*at)).or_insert(number);
            }
        }
    }
    if allowed.iter().all(|cpu| nodes.contains_key(cpu)) { nodes } else { BTreeMap::new() }
}

/// A list like `0-3,8,10-11`, in order and each once. None if it is none.
fn cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut list = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<usize>().ok()?, last.trim().parse::<usize>().ok()?);
        if first > last || last >= MAX_HARDWARE_THREADS || list.len() > MAX_HARDWARE_THREADS {
            return None;
        }
        list.extend(first..=last);
    }
    list.sort_unstable();
    list.dedup();
    Some(list)
}

/// Keeps the calling thread on these hardware threads, where the system can (Linux). False if it stays where it is.
pub fn keep_this_thread_on(hardware_threads: &[usize]) -> bool {
    #[cfg(target_os = "linux")]
    {
        const BITS: usize = usize::BITS as usize;
        // A mask of as many words as the largest number needs, at least the size that the C library has.
        let mut mask = vec![0usize; MAX_HARDWARE_THREADS / BITS];
        for cpu in hardware_threads {
            let Some(word) = mask.get_mut(cpu / BITS) else { return false };
            *word |= 1 << (cpu % BITS);
        }
        // SAFETY: the mask is as long as the call is told and lives until it returns; it is only read.
        unsafe { libc::sched_setaffinity(0, size_of_val(&mask[..]), mask.as_ptr().cast()) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = hardware_threads;
        false
    }
}
