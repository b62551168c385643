//! Sums of the times of kernels.

use std::collections::BTreeMap;

/// What all launches of a kernel took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KernelTime {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Launches.
    pub launches: usize,
    /// Seconds on the device, all launches together.
    pub seconds: f64,
    /// Bytes of device memory that they had to move.
    pub bytes: usize,
}

/// The sums of all kernels.
#[derive(Default)]
pub(crate) struct Totals(BTreeMap<&'static str, KernelTime>);

impl Totals {
    /// Counts a launch.
    pub(crate) fn add(&mut self, kernel: &'static str, bytes: usize, seconds: f64) {
        let none = KernelTime { kernel, launches: 0, seconds: 0.0, bytes: 0 };
        let total = self.0.entry(kernel).or_insert(none);
        total.launches += 1;
        total.seconds += seconds;
        total.bytes += bytes;
    }

    /// What was counted since the last call, the longest first.
    pub(crate) fn take(&mut self) -> Vec<KernelTime> {
        let mut times: Vec<_> = std::mem::take(&mut self.0).into_values().collect();
        times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        times
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_of_a_kernel_are_summed_and_the_longest_come_first() {
        let mut totals = Totals::default();
        for (kernel, bytes, seconds) in [("a", 1, 0.5), ("b", 10, 2.0), ("a", 2, 0.25)] {
            totals.add(kernel, bytes, seconds);
        }
        let a = KernelTime { kernel: "a", launches: 2, seconds: 0.75, bytes: 3 };
        assert_eq!(totals.take(), [KernelTime { kernel: "b", launches: 1, seconds: 2.0, bytes: 10 }, a]);
        assert!(totals.take().is_empty());
    }
}
