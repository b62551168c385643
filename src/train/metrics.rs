//! The log of a run: one JSON object a line.

use super::trainer::Event;
use crate::checkpoint::write::write_text;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Appends to a log. What a killed run wrote after its last saved state is dropped when the run goes on.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Opens or creates the log of a run that stands at `step`: later lines, and a last line that was cut off, go.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        if path.exists() {
            let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
            let text = String::from_utf8_lossy(&bytes);
            let before = |line: &&str| {
                let value: Option<Value> = serde_json::from_str(line).ok();
                value.and_then(|v| v.get("step")?.as_u64()).is_some_and(|s| s <= step)
            };
            let kept: Vec<&str> = text.lines().filter(before).collect();
            let mut kept = kept.join("\n");
            if !kept.is_empty() {
                kept.push('\n');
            }
            if kept != text {
                write_text(path, &kept)?;
            }
        }
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(|e| Error::io(path, e))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Adds a line for a step, a skipped step or a validation.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn record(&mut self, event: &Event<'_>) -> Result<()> {
        let round = |x: f64, digits: i32| (x * 10f64.powi(digits)).round() / 10f64.powi(digits);
        let line = match event {
            Event::Step(m) => json!({
                "step": m.step,
                "loss": round(m.loss, 5),
                "lr": round(m.lr, 8),
                "gradient_norm": round(m.gradient_norm, 4),
                "tokens": m.tokens,
                "tokens_per_second": m.tokens_per_second.round(),
            }),
            Event::Skipped { step, loss } => json!({ "step": step, "skipped": loss.to_string() }),
            Event::Validated(v) => json!({
                "step": v.step,
                "validation_loss": round(v.loss, 5),
                "validation_bits_per_byte": v.bits_per_byte.map(|b| round(b, 5)),
            }),
            Event::Saved { .. } | Event::Best(_) => return Ok(()),
        };
        // One write a line: a reader never sees half of it.
        self.file.write_all(format!("{line}\n").as_bytes()).map_err(|e| Error::io(&self.path, e))
    }
}
