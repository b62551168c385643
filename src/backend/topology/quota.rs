//! How much time control groups give: `cpu.max` of version 2, `cpu.cfs_quota_us` and `cpu.cfs_period_us` of version 1, of the
//! process's group and of every group above it.

use std::path::{Component, Path, PathBuf};

/// Where the groups of version 2 are.
const UNIFIED: [&str; 2] = ["sys/fs/cgroup", "sys/fs/cgroup/unified"];
/// Where those of version 1 are that share out time.
const TIME: [&str; 3] = ["sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/cpuacct,cpu"];

/// Cores' worth of time, the least that a group allows. None if none limits it.
pub(super) fn read(root: &Path) -> Option<f64> {
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mut least = None;
    for line in groups.lines() {
        // number:controllers:path
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let quotas: Vec<f64> = if controllers.is_empty() {
            upward(root, &UNIFIED, path).filter_map(|group| max(&group)).collect()
        } else if controllers.split(',').any(|controller| controller == "cpu") {
            upward(root, &TIME, path).filter_map(|group| cfs(&group)).collect()
        } else {
            continue;
        };
        least = quotas.into_iter().chain(least).reduce(f64::min);
    }
    least
}

/// The directories of a group and of those above it. Inside a container the path may be the host's, which is not there: the
/// topmost directory, the container's own group, always is.
fn upward(root: &Path, mounts: &[&str], path: &str) -> impl Iterator<Item = PathBuf> {
    let names = Path::new(path).components().filter(|part| matches!(part, Component::Normal(_)));
    let group: PathBuf = names.collect();
    let all = mounts.iter().map(|mount| root.join(mount)).collect::<Vec<_>>();
    all.into_iter().flat_map(move |mount| group.ancestors().map(|group| mount.join(group)).collect::<Vec<_>>())
}

/// `QUOTA PERIOD` in microseconds, or `max PERIOD`.
fn max(group: &Path) -> Option<f64> {
    let text = std::fs::read_to_string(group.join("cpu.max")).ok()?;
    let mut words = text.split_whitespace();
    share(words.next()?, words.next()?)
}

/// A quota of −1 is none.
fn cfs(group: &Path) -> Option<f64> {
    let word = |name| std::fs::read_to_string(group.join(name)).ok();
    share(word("cpu.cfs_quota_us")?.trim(), word("cpu.cfs_period_us")?.trim())
}

fn share(quota: &str, period: &str) -> Option<f64> {
    let (quota, period) = (quota.parse::<u64>().ok()?, period.parse::<u64>().ok()?);
    (quota > 0 && period > 0).then(|| quota as f64 / period as f64)
}
