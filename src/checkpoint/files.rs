//! Where a model's files are: in a directory, or in this program.

use super::builtin;
use super::hub::{self, HubOptions};
use super::limits::quoted;
use crate::{Error, Result};
use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// The name of the built-in model, wherever a model is named; a directory of this name is `./builtin`.
pub const BUILTIN: &str = "builtin";

/// The files of a model, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelFiles {
    /// Those of a directory.
    Directory(PathBuf),
    /// Those of the built-in model: embedded in the program, so that they are there without a network, a cache or a
    /// file system that can be written to.
    Builtin,
}

impl ModelFiles {
    /// The files of a model: [`BUILTIN`], a directory or a hub id, which [`hub::resolve`] looks up.
    ///
    /// # Errors
    /// As [`hub::resolve`]; [`Error::Request`] for a revision of the built-in model.
    pub fn find(model: &str, options: &HubOptions) -> Result<Self> {
        if model != BUILTIN {
            return hub::resolve(model, options).map(Self::Directory);
        }
        match &options.revision {
            None => Ok(Self::Builtin),
            Some(revision) => {
                let revision = quoted(revision);
                let reason = "the built-in model has no revisions; name a model of the hub, or leave this out";
                Err(Error::request("revision", format!("{revision}: {reason}")))
            }
        }
    }

    /// What errors call a file; also where it is, in a directory.
    pub fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Directory(dir) => dir.join(name),
            Self::Builtin => Path::new(BUILTIN).join(name),
        }
    }

    /// Whether there is a file of this name.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Self::Directory(dir) => dir.join(name).is_file(),
            Self::Builtin => self.embedded(name).is_some(),
        }
    }

    /// A whole file; `None` if there is no such file.
    ///
    /// # Errors
    /// [`Error::File`] for one of more than `limit` bytes or that is not a regular file, [`Error::Io`].
    pub fn read(&self, name: &str, limit: u64) -> Result<Option<Cow<'static, [u8]>>> {
        match self {
            Self::Directory(dir) => Ok(read_bounded(&dir.join(name), limit)?.map(Cow::Owned)),
            Self::Builtin => Ok(self.embedded(name).map(Cow::Borrowed)),
        }
    }

    /// Names of the files, in no order, and whether each is a regular file or a link to one.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn list(&self) -> Result<Vec<(String, bool)>> {
        let Self::Directory(dir) = self else {
            return Ok(builtin::files().map(|(n, _)| (n.to_owned(), true)).collect());
        };
        let entries = std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
        entries
            .map(|entry| {
                let entry = entry.map_err(|e| Error::io(dir, e))?;
                // A link's own metadata would say "link".
                let regular = std::fs::metadata(entry.path()).is_ok_and(|m| m.is_file());
                Ok((entry.file_name().to_string_lossy().into_owned(), regular))
            })
            .collect()
    }

    /// A reader of a regular file.
    ///
    /// # Errors
    /// [`Error::Io`] if it is not there.
    pub fn reader(&self, name: &str) -> Result<Box<dyn Read>> {
        let path = self.path(name);
        match self {
            Self::Directory(_) => Ok(Box::new(File::open(&path).map_err(|e| Error::io(&path, e))?)),
            Self::Builtin => match self.embedded(name) {
                Some(bytes) => Ok(Box::new(bytes)),
                None => Err(Error::io(path, ErrorKind::NotFound.into())),
            },
        }
    }

    /// The bytes of a file of the built-in model.
    pub(super) fn embedded(&self, name: &str) -> Option<&'static [u8]> {
        match self {
            Self::Directory(_) => None,
            Self::Builtin => builtin::files().find(|(n, _)| *n == name).map(|(_, bytes)| bytes),
        }
    }
}

impl fmt::Display for ModelFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(dir) => dir.display().fmt(f),
            Self::Builtin => f.write_str(BUILTIN),
        }
    }
}

impl<P: AsRef<Path> + ?Sized> From<&P> for ModelFiles {
    fn from(dir: &P) -> Self {
        Self::Directory(dir.as_ref().to_owned())
    }
}

impl From<&ModelFiles> for ModelFiles {
    fn from(files: &ModelFiles) -> Self {
        files.clone()
    }
}

/// Reads a file of at most `limit` bytes; `None` if there is no such file.
fn read_bounded(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path, e)),
    };
    let metadata = file.metadata().map_err(|e| Error::io(path, e))?;
    if !metadata.is_file() {
        return Err(Error::file(path, "not a regular file"));
    }
    let mut bytes = Vec::new();
    // One byte beyond the limit tells a file that is too long from one that fits exactly, also if it grows meanwhile.
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > limit {
        return Err(Error::file(
            path,
            format!("{} bytes or more, but at most {limit} are read: not a file of a real checkpoint", bytes.len()),
        ));
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_read_with_a_limit() {
        let dir = tempfile::tempdir().unwrap();
        let files = ModelFiles::from(dir.path());
        assert!(files.read("a", 9).unwrap().is_none() && !files.contains("a"));
        std::fs::write(dir.path().join("a"), b"12345678").unwrap();
        std::fs::create_dir(dir.path().join("b")).unwrap();
        assert_eq!(files.read("a", 8).unwrap().unwrap().as_ref(), b"12345678");
        assert!(matches!(files.read("a", 7), Err(Error::File { .. })));
        assert!(files.read("b", 8).is_err() && files.contains("a") && !files.contains("b"));
        let mut list = files.list().unwrap();
        list.sort();
        assert_eq!(list, [("a".to_owned(), true), ("b".to_owned(), false)]);
    }

    #[test]
    fn the_built_in_model_is_a_name_and_nothing_else() {
        let options = HubOptions { offline: true, ..HubOptions::default() };
        let files = ModelFiles::find(BUILTIN, &options).unwrap();
        assert_eq!((files.to_string(), files.path("config.json")), (BUILTIN.into(), "builtin/config.json".into()));
        let config = files.read("config.json", 0).unwrap().unwrap();
        assert!(matches!(config, Cow::Borrowed(_)) && files.read("../config.json", 9).unwrap().is_none());
        let mut read = Vec::new();
        files.reader("config.json").unwrap().read_to_end(&mut read).unwrap();
        assert!(read == *config && files.reader("gone").is_err());
        assert_eq!(files.list().unwrap().len(), 5);
        let revision = HubOptions { revision: Some("v1".into()), ..options };
        let error = ModelFiles::find(BUILTIN, &revision).unwrap_err();
        assert!(matches!(error, Error::Request { .. }) && error.to_string().contains("v1"), "{error}");
    }
}
