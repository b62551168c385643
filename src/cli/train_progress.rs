//! What `train` and `finetune` show while they run, and how they are stopped.

use anyhow::{Context, Result};
use candle_bitnet::backend::host;
use candle_bitnet::train::scratch::Summary;
use candle_bitnet::train::{Event, Outcome, Validation};
use candle_bitnet::{DeviceChoice, Error, select_device};
use candle_core::Device;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Most threads that are accepted.
const MAX_THREADS: usize = 1024;

/// The device, and the threads that compute micro-batches: one on a GPU, which is busy with one.
pub fn device_and_threads(choice: DeviceChoice, threads: Option<usize>) -> Result<(Device, usize)> {
    let device = select_device(choice)?;
    if let Some(n) = threads
        && !(1..=MAX_THREADS).contains(&n)
    {
        return Err(Error::request("--threads", format!("{n} is out of range: 1 to {MAX_THREADS}")).into());
    }
    let threads = if device.is_cpu() { threads.unwrap_or_else(host::physical_cores) } else { 1 };
    Ok((device, threads))
}

/// How a run ended, for reports.
pub fn outcome_name(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Finished => "finished",
        Outcome::Stopped => "stopped: no improvement",
        Outcome::Interrupted => "interrupted",
    }
}

/// Lines about skipped steps and the best validation, where there were any.
pub fn remarks(s: &Summary) -> String {
    let mut text = String::new();
    if s.skipped > 0 {
        text += &format!("{} steps were skipped, their loss or gradient not finite\n", s.skipped);
    }
    if let Some(v) = &s.best {
        text += &format!("best validation at step {}: {:.4} nats a token{}\n", v.step, v.loss, bits_per_byte(v));
    }
    text
}

/// A validation's bits per byte after a comma, if they are known.
fn bits_per_byte(v: &Validation) -> String {
    v.bits_per_byte.map_or(String::new(), |b| format!(", {b:.4} bits per byte"))
}

/// A line on standard error. Whether anybody reads it must not decide whether training goes on.
fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A progress bar on terminals, and Ctrl-C as a request to save and stop.
pub struct TrainingDisplay {
    bar: ProgressBar,
    stop: Arc<AtomicBool>,
}

impl TrainingDisplay {
    /// For a run of `steps` steps.
    pub fn start(steps: u64) -> Result<Self> {
        let bar = match std::io::stderr().is_terminal() {
            false => ProgressBar::hidden(),
            true => {
                let style = ProgressStyle::with_template("{bar:24} {pos}/{len} steps, {msg}, {eta} left");
                ProgressBar::new(steps).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
            }
        };
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        ctrlc::set_handler(move || {
            // The second time it ends at once; the last saved state stays whole.
            if asked.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
            tell("\nsaving and stopping after this step; press Ctrl-C again to stop at once");
        })
        .context("catching Ctrl-C")?;
        Ok(Self { bar, stop })
    }

    /// A line above the bar, or on standard error.
    pub fn note(&self, line: &str) {
        match self.bar.is_hidden() {
            true => tell(line),
            false => self.bar.println(line),
        }
    }

    /// Shows events and breaks after Ctrl-C.
    pub fn observer(&self) -> impl FnMut(Event<'_>) -> candle_bitnet::Result<ControlFlow<()>> {
        let (bar, stop) = (self.bar.clone(), Arc::clone(&self.stop));
        let note = move |bar: &ProgressBar, line: String| {
            if bar.is_hidden() { tell(&line) } else { bar.println(line) }
        };
        // Smoothed, so that the number can be read.
        let (mut loss, mut speed, mut begun) = (None, None, false);
        let smooth = |old: &mut Option<f64>, new: f64| {
            let value = old.map_or(new, |old| old + 0.05 * (new - old));
            *old = Some(value);
            value
        };
        move |event| {
            match event {
                Event::Step(m) => {
                    let (loss, speed) = (smooth(&mut loss, m.loss), smooth(&mut speed, m.tokens_per_second));
                    bar.set_position(m.step);
                    // A run that goes on did not take its first steps in no time.
                    if !std::mem::replace(&mut begun, true) {
                        bar.reset_eta();
                    }
                    bar.set_message(format!("loss {loss:.3}, {speed:.0} tokens/s"));
                }
                Event::Skipped { step, loss } => {
                    note(&bar, format!("step {step} skipped: its loss is {loss}, or its gradient is not finite"));
                }
                Event::Validated(v) => {
                    let bits = bits_per_byte(v);
                    let best = if v.best { ", the best so far" } else { "" };
                    note(&bar, format!("step {}: validation {:.4} nats a token{bits}{best}", v.step, v.loss));
                }
                Event::Saved { .. } | Event::Best(_) => {}
            }
            Ok(if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
