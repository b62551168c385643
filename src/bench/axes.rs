//! What a sweep varies, as `--sweep` takes it, and the values that it chooses.

use super::measure::MAX_BATCH;
use crate::backend::cpu::MAX_THREADS;
use crate::{Error, Result};
use serde::Serialize;

/// The first context that a sweep chooses, if the model has so many positions.
const FIRST_CONTEXT: usize = 128;
/// Most values of an axis.
const MAX_VALUES: usize = 64;

/// A setting that a sweep varies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Axis {
    /// Threads of the CPU.
    Threads,
    /// Positions of the sequence at the end of its decode.
    Context,
    /// Sequences that are decoded together.
    Batch,
}

impl Axis {
    /// All axes.
    pub const ALL: [Self; 3] = [Self::Threads, Self::Context, Self::Batch];

    /// The name that `--sweep` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::Context => "context",
            Self::Batch => "batch",
        }
    }
}

/// The axes of a sweep, each with its values; those without are chosen from machine and model.
///
/// Written as `threads,context=128,1024,batch`: a number continues the values of the axis before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SweepAxes(Vec<(Axis, Vec<usize>)>);

/// What the values are chosen from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Physical cores, and hardware threads.
    pub cores: usize,
    pub hardware_threads: usize,
    /// Of the model.
    pub positions: usize,
    /// Of keys and values, one sequence.
    pub kv_bytes_per_position: u64,
    /// Of memory, where the system tells.
    pub available: Option<u64>,
    /// Positions of a sequence where the batch varies.
    pub length: usize,
}

impl SweepAxes {
    /// Whether an axis varies.
    pub fn has(&self, axis: Axis) -> bool {
        self.0.iter().any(|(a, _)| *a == axis)
    }

    /// The axes with their values, ascending.
    ///
    /// # Errors
    /// [`Error::Request`] for a value out of range.
    pub(super) fn resolve(&self, bounds: Bounds) -> Result<Vec<(Axis, Vec<usize>)>> {
        let axis = |(axis, values): &(Axis, Vec<usize>)| {
            let (least, most) = match axis {
                Axis::Threads => (1, MAX_THREADS),
                Axis::Context => (2, bounds.positions),
                Axis::Batch => (1, MAX_BATCH),
            };
            if let Some(value) = values.iter().find(|v| !(least..=most).contains(*v)) {
                let reason = format!("{} {value} is not between {least} and {most}", axis.name());
                return Err(Error::request("--sweep", reason));
            }
            let mut values = if values.is_empty() { bounds.choose(*axis) } else { values.clone() };
            values.sort_unstable();
            values.dedup();
            Ok((*axis, values))
        };
        self.0.iter().map(axis).collect()
    }
}

impl Bounds {
    /// Powers of two, and the most that machine and model have.
    fn choose(&self, axis: Axis) -> Vec<usize> {
        let mut values = match axis {
            Axis::Threads => doubling(1, self.cores),
            Axis::Context => {
                let first = FIRST_CONTEXT.min((self.positions / 4).max(2));
                doubling(first, self.fitting(1, self.positions).max(first))
            }
            Axis::Batch => doubling(1, self.fitting(self.length, MAX_BATCH)),
        };
        if axis == Axis::Threads && self.hardware_threads > self.cores {
            values.push(self.hardware_threads);
        }
        values
    }

    /// How many of something that keeps `positions` fit in half of the memory, at most `most` and at least one.
    fn fitting(&self, positions: usize, most: usize) -> usize {
        let each = self.kv_bytes_per_position.saturating_mul(positions as u64).max(1);
        match self.available {
            Some(available) => (available / 2 / each).clamp(1, most.max(1) as u64) as usize,
            None => most,
        }
    }
}

/// `first`, twice that and so on, and `last` itself.
fn doubling(first: usize, last: usize) -> Vec<usize> {
    let mut values: Vec<_> =
        std::iter::successors(Some(first), |v| v.checked_mul(2)).take_while(|v| *v < last).take(MAX_VALUES).collect();
    values.push(last);
    values
}

impl std::str::FromStr for SweepAxes {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let bad = |reason: String| Error::request("--sweep", reason);
        let mut axes: Vec<(Axis, Vec<usize>)> = Vec::new();
        for item in s.split(',').map(str::trim) {
            let (name, first) =
                item.split_once('=').map_or((item, None), |(name, first)| (name.trim(), Some(first.trim())));
            let value = match Axis::ALL.into_iter().find(|a| a.name() == name) {
                Some(axis) if axes.iter().any(|(a, _)| *a == axis) => {
                    return Err(bad(format!("{name} is there twice; its values follow each other: {name}=1,2,4")));
                }
                Some(axis) => {
                    axes.push((axis, Vec::new()));
                    first
                }
                None if first.is_none() && axes.last().is_some_and(|(_, values)| !values.is_empty()) => Some(item),
                None => {
                    let names = Axis::ALL.map(Axis::name).join(", ");
                    return Err(bad(format!("{item:?} is not one of {names}, or one with values (threads=1,2,4)")));
                }
            };
            let (Some(value), Some((axis, values))) = (value, axes.last_mut()) else { continue };
            let number = value.parse().map_err(|_| bad(format!("{value:?} is no number of {}", axis.name())))?;
            values.push(number);
            if values.len() > MAX_VALUES {
                return Err(bad(format!("more than {MAX_VALUES} values of {}", axis.name())));
            }
        }
        Ok(Self(axes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds() -> Bounds {
        Bounds {
            cores: 6,
            hardware_threads: 12,
            positions: 4096,
            kv_bytes_per_position: 100_000,
            available: Some(20_000_000_000),
            length: 160,
        }
    }

    fn resolve(text: &str, bounds: Bounds) -> Result<Vec<(Axis, Vec<usize>)>> {
        text.parse::<SweepAxes>()?.resolve(bounds)
    }

    #[test]
    fn values_are_given_or_chosen() {
        let chosen = resolve("threads,context,batch", bounds()).unwrap();
        assert_eq!(chosen[0], (Axis::Threads, vec![1, 2, 4, 6, 12]));
        assert_eq!(chosen[1], (Axis::Context, vec![128, 256, 512, 1024, 2048, 4096]));
        assert_eq!(chosen[2], (Axis::Batch, vec![1, 2, 4, 8, 16, 32]));
        let given = resolve("batch=8,1,8, context , threads=3", bounds()).unwrap();
        assert_eq!((&given[0], &given[2]), (&(Axis::Batch, vec![1, 8]), &(Axis::Threads, vec![3])));
        assert_eq!(given[1].1.len(), 6);
    }

    #[test]
    fn small_machines_and_models_have_fewer_values() {
        let one = Bounds { cores: 1, hardware_threads: 1, positions: 256, available: Some(1), ..bounds() };
        let chosen = resolve("threads,context,batch", one).unwrap();
        assert_eq!(chosen.iter().map(|(_, v)| v.as_slice()).collect::<Vec<_>>(), [&[1][..], &[64], &[1]]);
        let unknown = Bounds { available: None, positions: 300, ..bounds() };
        assert_eq!(resolve("context", unknown).unwrap()[0].1, [75, 150, 300]);
        // 16 GB for 160 positions of 25 MB each: four sequences.
        let large = Bounds { kv_bytes_per_position: 25_000_000, available: Some(32_000_000_000), ..bounds() };
        assert_eq!(resolve("batch", large).unwrap()[0].1, [1, 2, 4]);
        assert_eq!(resolve("context", large).unwrap()[0].1, [128, 256, 512, 640]);
    }

    #[test]
    fn bad_axes_are_named() {
        for (text, words) in [
            ("", "\"\" is not one of threads, context, batch"),
            ("speed", "\"speed\" is not one of threads, context, batch"),
            ("threads,2", "\"2\" is not one of"),
            ("batch=1,batch=2", "batch is there twice"),
            ("batch=", "\"\" is no number of batch"),
            ("batch=1,x", "\"x\" is no number of batch"),
            ("context=-1", "\"-1\" is no number of context"),
        ] {
            let error = text.parse::<SweepAxes>().unwrap_err();
            assert!(matches!(&error, Error::Request { what, .. } if what == "--sweep"));
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
        for (text, words) in [
            ("batch=0", "batch 0 is not between 1 and 32"),
            ("batch=1,33", "batch 33 is not"),
            ("context=4097", "context 4097 is not between 2 and 4096"),
            ("threads=99999", "threads 99999"),
        ] {
            let error = resolve(text, bounds()).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let many = format!("threads={}", vec!["1"; 65].join(","));
        assert!(many.parse::<SweepAxes>().unwrap_err().to_string().contains("more than 64"));
    }
}
