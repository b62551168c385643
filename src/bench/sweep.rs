//! Sweeps: the same measurement over threads, context and batch, one at a time, each point beside the bandwidth of its own
//! run.

use super::axes::{Axis, Bounds, SweepAxes};
use super::measure::{Plan, measure};
use super::memory;
use super::model::BenchModel;
use super::report::Report;
use crate::backend::host;
use crate::chart::{self, BLUE, LIMIT, Line, ORANGE, Panel};
use crate::checkpoint::write::write_text;
use crate::{Error, LoadOptions, LoadedDecoder, Result};
use serde::Serialize;
use std::path::Path;

/// A point of a sweep.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    /// What varies.
    pub axis: Axis,
    /// Its value here.
    pub value: usize,
    /// What was measured.
    #[serde(flatten)]
    pub report: Option<Report>,
    /// Why nothing was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

/// All points.
#[derive(Debug, Clone, Serialize)]
pub struct Sweep {
    /// The model's name.
    pub model: String,
    /// Where it ran.
    pub device: String,
    /// The ternary kernel.
    pub kernel: String,
    /// The CPU's name.
    pub cpu: Option<String>,
    /// Tokens that are prefilled and decoded where the context does not vary.
    pub prefill_tokens: usize,
    /// As `prefill_tokens`.
    pub decode_tokens: usize,
    /// Repetitions of each point.
    pub reps: usize,
    /// Why energy could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub energy_unreadable: Option<String>,
    /// The points, axis by axis.
    pub points: Vec<Point>,
}

/// Measures a model over each axis in turn; what does not vary is as `options` and `plan` say. The model is loaded once for
/// context and batch, and anew for each number of threads. A point that memory cannot hold is skipped and says so.
/// `done` is told each point.
///
/// # Errors
/// [`Error::Request`] for values out of range or threads on a GPU; those of loading and measuring.
pub fn sweep(
    model: &BenchModel,
    options: &LoadOptions,
    plan: Plan,
    axes: &SweepAxes,
    mut done: impl FnMut(&Point),
) -> Result<Sweep> {
    if axes.has(Axis::Threads) && !options.is_for_cpu() {
        return Err(Error::request("--sweep", "threads are the CPU's: add --device cpu, or leave them out"));
    }
    let config = model.config();
    let length = plan.pp + plan.tg;
    let axes = axes.resolve(Bounds {
        cores: host::physical_cores(),
        hardware_threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        positions: config.max_positions,
        kv_bytes_per_position: memory::kv_bytes(config, options.kv_type(), 1, 1),
        available: host::available_bytes(),
        length,
    })?;
    let longest = axes.iter().filter(|(axis, _)| *axis == Axis::Context).flat_map(|(_, values)| values).max();
    let context = longest.map_or(length, |n| length.max(*n));
    let mut points = Vec::new();
    let mut shared: Option<LoadedDecoder> = None;
    let mut add = |axis, value, result| {
        let (report, skipped) = match result {
            Ok(report) => (Some(report), None),
            // What is short is memory; the next point may need less.
            Err(Error::Unavailable { what, reason }) => (None, Some(format!("{what} is not available: {reason}"))),
            Err(e) => return Err(e),
        };
        let point = Point { axis, value, report, skipped };
        done(&point);
        points.push(point);
        Ok(())
    };
    for (axis, values) in axes {
        for value in values {
            if axis == Axis::Threads {
                // Only one model in memory at a time.
                shared = None;
                let loaded = model.load(&options.clone().threads(Some(value)).context(Some(length)))?;
                add(axis, value, measure(model.name(), &loaded, plan))?;
                continue;
            }
            if shared.is_none() {
                shared = Some(model.load(&options.clone().context(Some(context)))?);
            }
            let Some(loaded) = &shared else { continue };
            let plan = match axis {
                Axis::Context => {
                    let tg = plan.tg.min(value / 2).max(1);
                    Plan { pp: value - tg, tg, ..plan }
                }
                _ => Plan { batch: value, ..plan },
            };
            add(axis, value, measure(model.name(), loaded, plan))?;
        }
    }
    let mut sweep = Sweep {
        model: model.name(),
        device: String::new(),
        kernel: String::new(),
        cpu: host::cpu_name(),
        prefill_tokens: plan.pp,
        decode_tokens: plan.tg,
        reps: plan.reps,
        energy_unreadable: None,
        points,
    };
    // Said once.
    for report in sweep.points.iter_mut().filter_map(|p| p.report.as_mut()) {
        (sweep.device, sweep.kernel) = (report.device.clone(), report.kernel.clone());
        sweep.energy_unreadable = report.energy_unreadable.take().or(sweep.energy_unreadable);
    }
    match sweep.points.iter().find_map(|p| p.skipped.as_ref()) {
        Some(reason) if sweep.points.iter().all(|p| p.report.is_none()) => {
            Err(Error::Unavailable { what: "every point of the sweep".into(), reason: reason.clone() })
        }
        _ => Ok(sweep),
    }
}

/// A point in a line of a table, without what varies.
fn cells(report: &Report) -> String {
    let bandwidth = report.read_gbps.or(report.copy_gbps).unwrap_or_default();
    let resident = report.resident_bytes.map_or("-".into(), |b| format!("{:.0}", b as f64 / 1e6));
    let joules = report.energy.map_or("-".into(), |e| format!("{:.3}", e.decode_joules_per_token));
    format!(
        "{:>8.1}  {:>8.2}  {:>7.1}  {:>9.1}  {:>5.0} %  {resident:>11}  {joules:>7}",
        report.prefill_tps,
        report.decode_tps,
        report.decode_gbps,
        bandwidth,
        100.0 * report.decode_share
    )
}

impl Sweep {
    fn axes(&self) -> impl Iterator<Item = (Axis, Vec<&Point>)> {
        let points = |axis| self.points.iter().filter(|p| p.axis == axis).collect::<Vec<_>>();
        let mut axes: Vec<Axis> = self.points.iter().map(|p| p.axis).collect();
        axes.dedup();
        axes.into_iter().map(move |axis| (axis, points(axis)))
    }

    /// For people: a table for each axis.
    pub fn describe(&self) -> String {
        let cpu = self.cpu.as_ref().map(|c| format!("; {c}")).unwrap_or_default();
        let mut text = format!(
            "{}: {} kernel {}{cpu}\n{} tokens prefilled and {} decoded where the context does not vary, {} repetition{}\n",
            self.model,
            self.device,
            self.kernel,
            self.prefill_tokens,
            self.decode_tokens,
            self.reps,
            if self.reps == 1 { "" } else { "s" },
        );
        for (axis, points) in self.axes() {
            text += &format!(
                "\n{:>7}  {:>8}  {:>8}  {:>7}  {:>9}  {:>7}  {:>11}  {:>7}\n",
                axis.name(),
                "prefill/s",
                "decode/s",
                "GB/s",
                "of GB/s",
                "share",
                "resident MB",
                "J/token"
            );
            for point in points {
                let cells = match (&point.report, &point.skipped) {
                    (Some(report), _) => cells(report),
                    (None, reason) => format!(" skipped: {}", reason.as_deref().unwrap_or_default()),
                };
                text += &format!("{:>7}  {cells}\n", point.value);
            }
        }
        text + "\n" + &Report::energy_line(None, self.energy_unreadable.as_deref())
    }

    /// Draws the points as an SVG file, a row for each axis, replacing what was there.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn write_chart(&self, svg: &Path) -> Result<()> {
        let rows: Vec<Vec<Panel>> = self.axes().map(|(axis, points)| row(axis, &points)).collect();
        let title = format!("{}, {} kernel {}", self.model, self.device, self.kernel);
        let text = chart::panels(&title, &rows);
        let text = text.map_err(|e| Error::file(svg, format!("the chart could not be drawn: {e}")))?;
        write_text(svg, &text)
    }
}

/// Decode, bandwidth and prefill over an axis.
fn row(axis: Axis, points: &[&Point]) -> Vec<Panel> {
    let line = |label: &str, colour, value: &dyn Fn(&Report) -> f64| Line {
        label: label.into(),
        colour,
        points: points.iter().filter_map(|p| Some((p.value as f64, value(p.report.as_ref()?)))).collect(),
    };
    let panel = |title: &str, lines| Panel { title: title.into(), x: axis.name().into(), lines };
    vec![
        panel("decode, tokens/s", vec![line("decode", BLUE, &|r| r.decode_tps)]),
        panel(
            "decode, GB/s",
            vec![
                line("memory gives", LIMIT, &|r| r.read_gbps.or(r.copy_gbps).unwrap_or_default()),
                line("decode reads", BLUE, &|r| r.decode_gbps),
            ],
        ),
        panel("prefill, tokens/s", vec![line("prefill", ORANGE, &|r| r.prefill_tps)]),
    ]
}
