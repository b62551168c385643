//! The crate's error type: every variant names the thing, the reason and, where there is one, the remedy.

use std::path::PathBuf;

/// Result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong, from opening a checkpoint to sampling a token.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read, written or mapped.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what it claims to be.
    #[error("{}: {reason}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor of a checkpoint is missing, malformed or of the wrong type or shape.
    #[error("{}: tensor {tensor}: {reason}", file.display())]
    Tensor {
        /// The file that holds (or should hold) the tensor.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A model configuration that this crate cannot run.
    #[error("{}: {key}: {reason}", file.display())]
    Config {
        /// The configuration file.
        file: PathBuf,
        /// The offending key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The hub could not deliver a file.
    #[error("hub repository {repo}: {reason}")]
    Hub {
        /// Repository id, with the revision if one was given.
        repo: String,
        /// What went wrong and what to do about it.
        reason: String,
    },
    /// A 2-bit code outside {0, 1, 2}.
    #[error("invalid ternary code 3 at row {row}, column {col}: not a b1.58 weight")]
    InvalidCode {
        /// Row of the weight matrix.
        row: usize,
        /// Column of the weight matrix.
        col: usize,
    },
    /// Operands whose shapes do not fit together.
    #[error("{op}: {reason}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// Expected and found shapes.
        reason: String,
    },
    /// A packed operand met a kernel that reads another layout.
    #[error("packed weight has layout {found}, but kernel {kernel} reads {expected}")]
    Layout {
        /// The kernel that was called.
        kernel: &'static str,
        /// The layout that it reads.
        expected: &'static str,
        /// The layout that the operand was packed for.
        found: &'static str,
    },
    /// A device or kernel that was asked for but cannot be had here.
    #[error("{what} is not available: {reason}")]
    Unavailable {
        /// Device or kernel.
        what: String,
        /// Why, and what can be used instead.
        reason: String,
    },
    /// An operation that a device took on and did not finish.
    #[error("{what} failed: {reason}")]
    Device {
        /// The operation, and the device.
        what: String,
        /// What the device's driver said, and what can be done.
        reason: String,
    },
    /// The chosen kernel disagreed with the reference on this machine.
    #[error(
        "kernel {kernel} failed its self-check on this machine ({reason}); run with --device cpu --kernel generic and \
         please report this"
    )]
    SelfCheck {
        /// The kernel.
        kernel: &'static str,
        /// The first disagreement.
        reason: String,
    },
    /// A tokenizer or chat template that cannot be used.
    #[error("{what}: {reason}")]
    Text {
        /// Tokenizer, template or file.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A request whose parameters make no sense or do not fit the model.
    #[error("{what}: {reason}")]
    Request {
        /// The parameter or flag.
        what: String,
        /// What is wrong with it and what would be accepted.
        reason: String,
    },
    /// The sequence would outgrow the context.
    #[error(
        "context full: {needed} positions needed, {available} available; shorten the prompt, generate fewer tokens or raise the context length"
    )]
    ContextFull {
        /// Positions needed.
        needed: usize,
        /// Positions the KV cache or the model has.
        available: usize,
    },
    /// Logits that no token can be chosen from.
    #[error("{0}: the checkpoint is damaged, or a logit bias is out of all proportion")]
    Logits(String),
    /// A training run that cannot go on.
    #[error("training: {0}")]
    Training(String),
    /// An error of candle itself.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// An I/O error that names its file.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    /// A malformed file.
    pub fn file(file: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::File { file: file.into(), reason: reason.into() }
    }

    /// A bad tensor of a checkpoint.
    pub fn tensor(file: impl Into<PathBuf>, tensor: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Tensor { file: file.into(), tensor: tensor.into(), reason: reason.into() }
    }

    /// A bad key of a configuration file.
    pub fn config(file: impl Into<PathBuf>, key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config { file: file.into(), key: key.into(), reason: reason.into() }
    }

    /// A bad parameter of a request.
    pub fn request(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Request { what: what.into(), reason: reason.into() }
    }
}

impl From<Error> for candle_core::Error {
    fn from(e: Error) -> Self {
        match e {
            Error::Candle(e) => e,
            e => candle_core::Error::wrap(e),
        }
    }
}
