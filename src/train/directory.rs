//! The directory of a run: one process at a time, a log, a curve, a state to resume from, the best parameters.

use super::curve::write_curve;
use super::metrics::MetricsLog;
use super::parameters::Parameters;
use super::trainer::{Data, Event, Outcome, Trainable, Trainer, Validation};
use crate::checkpoint::write::UNFINISHED;
use crate::{Error, Result};
use std::fs::{File, TryLockError};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// The state's file.
pub const STATE: &str = "state.safetensors";
/// The log's file.
pub const METRICS: &str = "metrics.jsonl";
/// The curve's file.
pub const CURVE: &str = "curve.svg";
/// The directory of the best masters.
pub const MASTERS: &str = "masters";

/// The file by which a process keeps others out.
const LOCK: &str = ".lock";

/// What a run came to.
#[derive(Debug, Clone)]
pub struct Summary {
    /// How it ended.
    pub outcome: Outcome,
    /// Steps done.
    pub steps: u64,
    /// Targets trained on.
    pub tokens: u64,
    /// Seconds spent in steps.
    pub seconds: f64,
    /// Steps skipped because loss or gradient was not finite.
    pub skipped: u64,
    /// The best validation.
    pub best: Option<Validation>,
}

/// A directory that this process alone trains in, as long as this exists.
#[derive(Debug)]
pub(super) struct RunDirectory {
    path: PathBuf,
    resumed: bool,
    /// The system ends the lock with the process, however that ends.
    _lock: File,
}

impl RunDirectory {
    /// Locks a directory for a new run; makes it if needed.
    ///
    /// # Errors
    /// [`Error::Request`] if another process trains there; [`Error::Io`].
    pub fn create(path: &Path) -> Result<Self> {
        std::fs::create_dir_all(path).map_err(|e| Error::io(path, e))?;
        Ok(Self { path: path.to_owned(), resumed: false, _lock: lock(path)? })
    }

    /// Locks the directory of a run to go on with, and clears away what a killed process was writing.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn reopen(path: &Path) -> Result<Self> {
        let lock = lock(path)?;
        [path, &path.join(MASTERS)].into_iter().for_each(remove_unfinished);
        Ok(Self { path: path.to_owned(), resumed: true, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Trains from the saved state, if the run is resumed and there is one, to the end or until `observe` breaks. `export`
    /// gets the best parameters, or the last if nothing validates.
    ///
    /// # Errors
    /// Those of [`Trainer::resume`], [`Trainer::run`] and `export`.
    pub fn run<M: Trainable, D: Data>(
        &self,
        mut trainer: Trainer<'_, M, D>,
        export: &dyn Fn(&Parameters) -> Result<()>,
        observe: &mut dyn FnMut(Event<'_>) -> Result<ControlFlow<()>>,
    ) -> Result<Summary> {
        let state = self.path.join(STATE);
        if self.resumed && state.exists() {
            trainer = trainer.resume(&state)?;
        }
        let (metrics, curve) = (self.path.join(METRICS), self.path.join(CURVE));
        let mut log = MetricsLog::open(&metrics, trainer.progress().step)?;
        let outcome = trainer.run(Some(&state), &mut |event| {
            log.record(&event)?;
            match &event {
                Event::Best(parameters) => export(parameters)?,
                Event::Validated(_) => write_curve(&metrics, &curve)?,
                _ => {}
            }
            observe(event)
        });
        // Also of a run that failed: the curve may show why.
        let drawn = write_curve(&metrics, &curve);
        let outcome = outcome?;
        drawn?;
        let p = trainer.progress();
        if p.best.is_none() {
            export(trainer.parameters())?;
        }
        Ok(Summary { outcome, steps: p.step, tokens: p.tokens, seconds: p.seconds, skipped: p.skipped, best: p.best })
    }
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    let file = File::create(&path).map_err(|e| Error::io(&path, e))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            let reason = format!("another process is training in {}; wait for it, or stop it", dir.display());
            Err(Error::request("output directory", reason))
        }
        // Not every file system has locks.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
}

/// Best effort: such files only take space.
fn remove_unfinished(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
