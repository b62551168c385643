//! Where a model's files are: in a directory, in a GGUF file, or in this program.

use super::builtin;
use super::gguf::Gguf;
use super::hub::{self, HubOptions};
use super::limits::quoted;
use crate::ternary::I2sLayout;
use crate::{Error, Result};
use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{Cursor, ErrorKind, Read};
use std::path::{Path, PathBuf};

/// The name of the built-in model, wherever a model is named; a directory of this name is `./builtin`.
pub const BUILTIN: &str = "builtin";

/// The files of a model, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelFiles {
    /// Those of a directory.
    Directory(PathBuf),
    /// A GGUF file. What its metadata says is there as `config.json`, `generation_config.json` and
    /// `tokenizer_config.json`; the tokenizer itself and the weights are read from the file.
    Gguf {
        /// The file.
        path: PathBuf,
        /// The layout of its I2_S tensors, which the file does not tell.
        i2s_layout: Option<I2sLayout>,
    },
    /// Those of the built-in model: embedded in the program, so that they are there without a network, a cache or a
    /// file system that can be written to.
    Builtin,
}

impl ModelFiles {
    /// The files of a model: [`BUILTIN`], a GGUF file, a directory, or a hub id, which [`hub::resolve`] looks up. A
    /// directory without `config.json` but with one GGUF file is that file.
    ///
    /// # Errors
    /// As [`hub::resolve`]; [`Error::File`] for a GGUF file that is not there, [`Error::Request`] for a revision of the
    /// built-in model.
    pub fn find(model: &str, options: &HubOptions) -> Result<Self> {
        if model != BUILTIN {
            let path = Path::new(model);
            // With a colon it can be a file of a hub repository.
            if is_gguf(path) && !path.is_dir() && (path.exists() || !model.contains(':')) {
                return match path.exists() {
                    true => Ok(path.into()),
                    false => Err(Error::file(path, "there is no such file")),
                };
            }
            let found = hub::resolve(model, options)?;
            return Ok(match only_gguf(&found) {
                Some(file) => Self::from(&file),
                None => Self::from(&found),
            });
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

    /// Sets the layout of I2_S tensors.
    ///
    /// # Errors
    /// [`Error::Request`] if this is no GGUF file.
    pub fn with_i2s_layout(self, layout: Option<I2sLayout>) -> Result<Self> {
        match (self, layout) {
            (files, None) => Ok(files),
            (Self::Gguf { path, .. }, i2s_layout) => Ok(Self::Gguf { path, i2s_layout }),
            (files, Some(_)) => Err(Error::request("--i2s-layout", format!("{files} is no GGUF file"))),
        }
    }

    /// The layout of I2_S tensors, if one was set.
    pub fn i2s_layout(&self) -> Option<I2sLayout> {
        match self {
            Self::Gguf { i2s_layout, .. } => *i2s_layout,
            _ => None,
        }
    }

    /// The GGUF file, opened; `None` if this is none.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn gguf(&self) -> Result<Option<Gguf>> {
        match self {
            Self::Gguf { path, .. } => Gguf::open(path).map(Some),
            _ => Ok(None),
        }
    }

    /// What errors call a file; also where it is, in a directory. In a GGUF file everything has its path.
    pub fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Directory(dir) => dir.join(name),
            Self::Gguf { path, .. } => path.clone(),
            Self::Builtin => Path::new(BUILTIN).join(name),
        }
    }

    /// Whether there is a file of this name.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Self::Directory(dir) => dir.join(name).is_file(),
            Self::Gguf { .. } => GGUF_FILES.iter().any(|(n, _)| *n == name),
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
            Self::Gguf { path, .. } => {
                let Some((_, text)) = GGUF_FILES.iter().find(|(n, _)| *n == name) else { return Ok(None) };
                let text = text(&Gguf::open(path)?)?;
                match text.len() as u64 > limit {
                    true => {
                        Err(Error::file(path, format!("{} bytes of metadata for {name}; at most {limit}", text.len())))
                    }
                    false => Ok(Some(Cow::Owned(text.into_bytes()))),
                }
            }
            Self::Builtin => Ok(self.embedded(name).map(Cow::Borrowed)),
        }
    }

    /// Names of the files, in no order, and whether each is a regular file or a link to one.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn list(&self) -> Result<Vec<(String, bool)>> {
        let dir = match self {
            Self::Directory(dir) => dir,
            Self::Gguf { .. } => return Ok(GGUF_FILES.iter().map(|(n, _)| ((*n).to_owned(), true)).collect()),
            Self::Builtin => return Ok(builtin::files().map(|(n, _)| (n.to_owned(), true)).collect()),
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
            Self::Gguf { .. } => match self.read(name, u64::MAX)? {
                Some(bytes) => Ok(Box::new(Cursor::new(bytes))),
                None => Err(Error::io(path, ErrorKind::NotFound.into())),
            },
            Self::Builtin => match self.embedded(name) {
                Some(bytes) => Ok(Box::new(bytes)),
                None => Err(Error::io(path, ErrorKind::NotFound.into())),
            },
        }
    }

    /// The bytes of a file of the built-in model.
    pub(super) fn embedded(&self, name: &str) -> Option<&'static [u8]> {
        match self {
            Self::Directory(_) | Self::Gguf { .. } => None,
            Self::Builtin => builtin::files().find(|(n, _)| *n == name).map(|(_, bytes)| bytes),
        }
    }
}

impl fmt::Display for ModelFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) | Self::Gguf { path, .. } => path.display().fmt(f),
            Self::Builtin => f.write_str(BUILTIN),
        }
    }
}

impl<P: AsRef<Path> + ?Sized> From<&P> for ModelFiles {
    /// A GGUF file, if the name ends in `.gguf` and is no directory; otherwise a directory.
    fn from(path: &P) -> Self {
        let path = path.as_ref().to_owned();
        match is_gguf(&path) && !path.is_dir() {
            true => Self::Gguf { path, i2s_layout: None },
            false => Self::Directory(path),
        }
    }
}

/// What a GGUF file's metadata makes up for.
type Text = fn(&Gguf) -> Result<String>;
const GGUF_FILES: [(&str, Text); 3] = [
    ("config.json", Gguf::config_json),
    ("generation_config.json", Gguf::generation_json),
    ("tokenizer_config.json", Gguf::tokenizer_config_json),
];

/// Whether a name ends in `.gguf`.
pub(crate) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}

/// The GGUF file of a directory that holds one and no `config.json`.
fn only_gguf(dir: &Path) -> Option<PathBuf> {
    if dir.join("config.json").exists() {
        return None;
    }
    let mut found = std::fs::read_dir(dir).ok()?.filter_map(|e| Some(e.ok()?.path())).filter(|p| is_gguf(p));
    let only = found.next()?;
    found.next().is_none().then_some(only)
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
