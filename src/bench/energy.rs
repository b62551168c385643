//! Energy of the CPU's packages, as RAPL counts it (Linux, Intel and AMD): what a token costs in joules.
//!
//! The counters are the kernel's powercap files: `intel-rapl:N/energy_uj` counts the microjoules of a package, with
//! everything in it, and begins anew at `max_energy_range_uj`. Most systems let only root read them (CVE-2020-8694), and
//! most virtual machines have none.

use std::path::{Path, PathBuf};
use std::time::Instant;

/// Where the kernel keeps the counters.
pub const POWERCAP: &str = "/sys/class/powercap";

/// Watts that no package exceeds: an interval in which a counter could have begun anew twice at this power is not told.
const MAX_WATTS: f64 = 1000.0;
/// Most packages that are read.
const MAX_PACKAGES: usize = 64;

/// The counter of a package.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Package {
    energy: PathBuf,
    /// Microjoules at which it begins anew.
    range: u64,
}

/// The counters of all packages of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnergyCounters {
    packages: Vec<Package>,
}

/// What the counters showed at a time.
#[derive(Debug, Clone)]
pub struct EnergyReading {
    micro_joules: Vec<u64>,
    at: Instant,
}

impl EnergyCounters {
    /// The counters of this machine.
    ///
    /// # Errors
    /// Why there are none that can be read, and what can be done, for a report.
    pub fn open() -> Result<Self, String> {
        Self::open_at(Path::new(POWERCAP))
    }

    /// The counters below another directory than [`POWERCAP`].
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_at(root: &Path) -> Result<Self, String> {
        let entries =
            std::fs::read_dir(root).map_err(|e| format!("{}: {e}; it takes Linux with RAPL", root.display()))?;
        let mut names: Vec<_> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
        names.sort();
        let mut packages = Vec::new();
        // Parts of a package have a second colon. "intel-rapl-mmio" counts the same packages once more.
        for name in names.iter().filter(|n| n.strip_prefix("intel-rapl:").is_some_and(|n| n.parse::<u16>().is_ok())) {
            let dir = root.join(name);
            let kind = read(&dir.join("name"))?;
            if !kind.starts_with("package") {
                continue;
            }
            let energy = dir.join("energy_uj");
            number(&energy)?;
            packages.push(Package { energy, range: number(&dir.join("max_energy_range_uj"))? });
        }
        match packages.len() {
            0 => Err(format!("{}: no counter of a CPU package (intel-rapl:N)", root.display())),
            1..=MAX_PACKAGES => Ok(Self { packages }),
            n => Err(format!("{}: {n} packages, more than the {MAX_PACKAGES} that are read", root.display())),
        }
    }

    /// Packages that are counted.
    pub fn packages(&self) -> usize {
        self.packages.len()
    }

    /// What the counters show now; none if they cannot be read any more.
    pub fn read(&self) -> Option<EnergyReading> {
        let micro_joules = self.packages.iter().map(|p| number(&p.energy)).collect::<Result<_, _>>().ok()?;
        Some(EnergyReading { micro_joules, at: Instant::now() })
    }

    /// Joules of all packages since a reading. None if the counters cannot be read any more, or so much time has passed
    /// that one could have begun anew more than once.
    pub fn joules_since(&self, begin: &EnergyReading) -> Option<f64> {
        let end = self.read()?;
        let seconds = end.at.saturating_duration_since(begin.at).as_secs_f64();
        let pairs = begin.micro_joules.iter().zip(&end.micro_joules);
        let micro_joules = self.packages.iter().zip(pairs).map(|(p, (a, b))| used(*a, *b, p.range, seconds));
        Some(micro_joules.sum::<Option<u64>>()? as f64 / 1e6)
    }
}

/// Microjoules between two values of a counter that begins anew at `range`.
fn used(begin: u64, end: u64, range: u64, seconds: f64) -> Option<u64> {
    if seconds * MAX_WATTS * 1e6 > range as f64 {
        return None;
    }
    match end.checked_sub(begin) {
        Some(used) => Some(used),
        None => range.checked_sub(begin)?.checked_add(end),
    }
}

fn read(file: &Path) -> Result<String, String> {
    match std::fs::read_to_string(file) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(format!("{}: {e}; run as root, or let this user read it", file.display()))
        }
        Err(e) => Err(format!("{}: {e}", file.display())),
    }
}

fn number(file: &Path) -> Result<u64, String> {
    read(file)?.parse().map_err(|_| format!("{}: holds no number", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A zone of powercap.
    fn zone(root: &Path, zone: &str, name: &str, energy: &str, range: &str) {
        let dir = root.join(zone);
        std::fs::create_dir_all(&dir).unwrap();
        for (file, text) in [("name", name), ("energy_uj", energy), ("max_energy_range_uj", range)] {
            std::fs::write(dir.join(file), format!("{text}\n")).unwrap();
        }
    }

    #[test]
    fn packages_are_summed_and_their_parts_are_not() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        std::fs::create_dir(root.join("intel-rapl")).unwrap();
        zone(root, "intel-rapl:0", "package-0", "1000000", "262143328850");
        zone(root, "intel-rapl:0:0", "core", "5", "262143328850");
        zone(root, "intel-rapl:1", "package-1", "262143328000", "262143328850");
        zone(root, "intel-rapl:2", "psys", "7", "262143328850");
        zone(root, "intel-rapl-mmio:0", "package-0", "1000000", "262143328850");
        let counters = EnergyCounters::open_at(root).unwrap();
        assert_eq!(counters.packages(), 2);
        let begin = counters.read().unwrap();
        assert_eq!(counters.joules_since(&begin), Some(0.0));
        std::fs::write(root.join("intel-rapl:0/energy_uj"), "3500000\n").unwrap();
        // This one begins anew.
        std::fs::write(root.join("intel-rapl:1/energy_uj"), "999150\n").unwrap();
        assert_eq!(counters.joules_since(&begin), Some(3.5));
        std::fs::remove_file(root.join("intel-rapl:1/energy_uj")).unwrap();
        assert_eq!(counters.joules_since(&begin), None);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let reason = |root: &Path| EnergyCounters::open_at(root).unwrap_err();
        assert!(reason(&root.join("gone")).contains("gone"), "{}", reason(&root.join("gone")));
        assert!(reason(root).contains("no counter of a CPU package"), "{}", reason(root));
        zone(root, "intel-rapl:0", "psys", "1", "2");
        assert!(reason(root).contains("no counter of a CPU package"));
        zone(root, "intel-rapl:0", "package-0", "many", "2");
        assert!(reason(root).contains("energy_uj: holds no number"), "{}", reason(root));
        zone(root, "intel-rapl:0", "package-0", "1", "-2");
        assert!(reason(root).contains("max_energy_range_uj: holds no number"), "{}", reason(root));
        std::fs::remove_file(root.join("intel-rapl:0/energy_uj")).unwrap();
        assert!(reason(root).contains("energy_uj"));
    }

    #[test]
    fn a_counter_that_may_have_begun_anew_twice_tells_nothing() {
        assert_eq!(used(10, 30, 100_000_000, 0.01), Some(20));
        assert_eq!(used(90_000_000, 5, 100_000_000, 0.01), Some(10_000_005));
        assert_eq!(used(10, 30, 100_000_000, 0.2), None);
        // A counter beyond its own range is no counter.
        assert_eq!(used(200, 5, 100, 0.0), None);
        assert_eq!(used(10, 5, u64::MAX, 1.0), Some(u64::MAX - 5));
    }
}
