//! Files in memory.

use crate::{Error, Result};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A file mapped read-only into memory: one of its own, or a part of the program, which the system maps as well.
///
/// The bytes are the file's as long as nobody truncates or rewrites it in place; writers of this crate replace
/// files by renaming, which leaves an existing mapping whole (SECURITY.md).
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Map,
}

#[derive(Debug)]
enum Map {
    File(memmap2::Mmap),
    Program(&'static [u8]),
}

impl MappedFile {
    /// Maps a regular file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened or mapped, [`Error::File`] if it is empty or not a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let meta = file.metadata().map_err(|e| Error::io(path, e))?;
        if !meta.is_file() {
            return Err(Error::file(path, "not a regular file"));
        }
        if meta.len() == 0 {
            return Err(Error::file(path, "the file is empty"));
        }
        // SAFETY: the mapping is private and read-only, and lives as long as `self`. A truncation by another
        // process is outside what can be checked; SECURITY.md says so.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        Ok(Self { path: path.to_owned(), map: Map::File(map) })
    }

    /// A file that was compiled into the program; `path` names it in errors.
    pub fn embedded(path: impl Into<PathBuf>, bytes: &'static [u8]) -> Self {
        Self { path: path.into(), map: Map::Program(bytes) }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.map {
            Map::File(map) => map,
            Map::Program(bytes) => bytes,
        }
    }

    /// Tells the system that `range` has been read and is not needed in memory any more.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Map::File(map) = &self.map {
            let page = 4096;
            let (start, end) = (range.start.next_multiple_of(page), range.end / page * page);
            if start < end && end <= map.len() {
                // SAFETY: the mapping is read-only and file-backed, so dropped pages read the same again; the
                // range is whole pages inside the mapping, checked above.
                let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}
