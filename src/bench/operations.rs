//! `bench --profile`: what each operation of a decode step takes.

use crate::backend::OpTime;
use serde::Serialize;

/// An operation, or on a GPU a kernel, within a decode step.
#[derive(Debug, Clone, Serialize)]
pub struct Operation {
    name: String,
    calls_per_step: f64,
    ms_per_step: f64,
    /// Of the time of all operations.
    share: f64,
    bytes_per_step: f64,
    /// None where it reads next to nothing.
    gbps: Option<f64>,
}

impl Operation {
    /// What was timed in so many steps.
    pub(super) fn of(times: Vec<OpTime>, steps: usize) -> Vec<Self> {
        let (all, steps) = (times.iter().map(|t| t.seconds).sum::<f64>(), steps.max(1) as f64);
        let share = |seconds: f64| if all > 0.0 { seconds / all } else { 0.0 };
        let operation = |t: OpTime| Self {
            calls_per_step: t.calls as f64 / steps,
            ms_per_step: 1e3 * t.seconds / steps,
            share: share(t.seconds),
            bytes_per_step: t.bytes as f64 / steps,
            gbps: (t.bytes > 0 && t.seconds > 0.0).then(|| t.bytes as f64 / t.seconds / 1e9),
            name: t.name,
        };
        times.into_iter().map(operation).collect()
    }
}

/// A table, and how it compares with a step of `step_ms` that was measured without the profile.
pub(super) fn describe(operations: &[Operation], step_ms: f64) -> String {
    let width = operations.iter().map(|o| o.name.len()).max().unwrap_or(0).max("operation".len());
    let mut text = format!("\n{:width$}  calls/step  ms/step   share   GB/s\n", "operation");
    for o in operations {
        let gbps = o.gbps.map_or("-".into(), |g| format!("{g:.1}"));
        let (calls, ms, share) = (o.calls_per_step, o.ms_per_step, 100.0 * o.share);
        text += &format!("{:width$}  {calls:10.1}  {ms:7.3}  {share:4.1} %  {gbps:>6}\n", o.name);
    }
    let all: f64 = operations.iter().map(|o| o.ms_per_step).sum();
    text + &format!("{:width$}  {:10}  {all:7.3}; a step takes {step_ms:.3} ms without the profile\n", "all", "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_by_the_step() {
        let time = |name: &str, calls, seconds, bytes| OpTime { name: name.into(), calls, seconds, bytes };
        let times = vec![time("norm-linear 8x4", 60, 0.3, 600_000_000), time("rms-norm", 2, 0.1, 0)];
        let operations = Operation::of(times, 2);
        let [linear, norm] = &operations[..] else { panic!("{operations:?}") };
        assert_eq!((linear.calls_per_step, linear.ms_per_step, linear.bytes_per_step), (30.0, 150.0, 3e8));
        assert!((linear.share - 0.75).abs() < 1e-9 && (linear.gbps.unwrap() - 2.0).abs() < 1e-9);
        assert_eq!((norm.calls_per_step, norm.gbps), (1.0, None));
        let text = describe(&operations, 190.0);
        let lines: Vec<&str> = text.trim().lines().collect();
        assert!(lines.len() == 4 && lines[1].contains("75.0 %") && lines[2].ends_with('-'), "{text}");
        assert!(lines[3].contains("200.000; a step takes 190.000 ms"), "{text}");
        assert!(Operation::of(vec![], 1).is_empty());
    }
}
