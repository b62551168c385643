//! What several fuzz targets share: files for parsers that open one, GGUF files made of lines of text, and a hook that
//! tells panics of this crate from those that a library's caller turns into errors.

mod lines;

pub use lines::{Tokenizer, checkpoint};

use std::path::{Path, PathBuf};

/// A file in memory, rewritten for every input.
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// A file whose name ends like this; one for each process.
    pub fn new(suffix: &str) -> Self {
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        Self { path: dir.join(format!("fuzz-{}{suffix}", std::process::id())) }
    }

    /// Replaces the file's bytes.
    pub fn write(&self, bytes: &[u8]) -> &Path {
        std::fs::write(&self.path, bytes).unwrap();
        &self.path
    }
}

/// Lets panics in other crates unwind: this crate catches those of the tokenizer library and reports them as errors. Any
/// panic of this crate's own code still ends the run, also where it would be caught; so does one that nothing catches.
pub fn allow_panics_of_libraries() {
    let abort = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let library = panic
            .location()
            .is_some_and(|l| ["/registry/src/", "/rustc/", "/library/"].iter().any(|p| l.file().contains(p)));
        if !library {
            abort(panic);
        }
    }));
}
