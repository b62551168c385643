//! Measuring a model on this machine: speed beside the bandwidth measured in the same run, energy, memory; sweeps, all
//! devices compared, and what to compare with: the dense model of the same shape, and completion servers.

mod against;
mod axes;
mod baseline;
mod compare;
mod energy;
mod measure;
mod memory;
mod model;
mod operations;
mod report;
mod spread;
mod sweep;

pub use against::{Server, Streamed};
pub use axes::{Axis, SweepAxes};
pub use baseline::{Baseline, BaselineType};
pub use compare::{Comparison, Contender, Entry, Narrowed, Workload, compare};
pub use energy::{EnergyCounters, EnergyReading, POWERCAP};
pub use measure::{MAX_BATCH, MAX_REPS, Plan, measure};
pub use model::BenchModel;
pub use operations::Operation;
pub use report::{Energy, Report};
pub use spread::Spread;
pub use sweep::{Point, Sweep, sweep};
