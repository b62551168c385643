//! How far a conversion is, and how it is stopped.

use crate::{Error, Result};
use std::cell::RefCell;
use std::io;
use std::ops::ControlFlow;

/// What a conversion is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Reading and checking the source's ternary weights.
    Reading,
    /// Writing the new checkpoint.
    Writing,
    /// Reading it back and comparing it with the source.
    Verifying,
}

/// How far a phase is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The phase.
    pub phase: Phase,
    /// Bytes done.
    pub done: u64,
    /// Bytes of the phase.
    pub total: u64,
}

/// What is told of progress, and says whether to go on: after `Break` nothing is left of the conversion.
pub type OnProgress<'a> = dyn FnMut(Progress) -> ControlFlow<()> + 'a;

/// Shares the callback between a conversion's producers, and keeps the error that a producer cannot return.
pub(super) struct Tracker<'a> {
    state: RefCell<(Progress, &'a mut OnProgress<'a>)>,
    error: RefCell<Option<Error>>,
}

impl<'a> Tracker<'a> {
    pub fn new(report: &'a mut OnProgress<'a>) -> Self {
        let start = Progress { phase: Phase::Reading, done: 0, total: 0 };
        Self { state: RefCell::new((start, report)), error: RefCell::default() }
    }

    pub fn begin(&self, phase: Phase, total: u64) -> Result<()> {
        self.state.borrow_mut().0 = Progress { phase, done: 0, total };
        self.advance(0)
    }

    pub fn advance(&self, bytes: u64) -> Result<()> {
        let (progress, report) = &mut *self.state.borrow_mut();
        progress.done += bytes;
        match report(*progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => {
                Err(Error::io("conversion", io::Error::new(io::ErrorKind::Interrupted, "stopped; nothing was kept")))
            }
        }
    }

    /// A result inside a producer, which can only fail with an [`io::Error`].
    pub fn keep<T>(&self, result: Result<T>) -> io::Result<T> {
        result.map_err(|e| {
            let text = e.to_string();
            self.error.borrow_mut().get_or_insert(e);
            io::Error::other(text)
        })
    }

    /// The error that a producer met, or else the writer's own.
    pub fn cause(&self, error: Error) -> Error {
        self.error.borrow_mut().take().unwrap_or(error)
    }
}
