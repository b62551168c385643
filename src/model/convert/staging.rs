//! A directory that becomes a checkpoint all at once, or not at all.

use crate::checkpoint::ModelFiles;
use crate::checkpoint::write::{check_target, directory_of, sync_directory, unfinished};
use crate::text::Tokenizer;
use crate::{Error, Result};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use tempfile::{NamedTempFile, TempDir};

/// What a tokenizer is written as.
const TOKENIZER: &str = "tokenizer.json";

/// How the names of what is not complete begin.
const CONVERTING: &str = ".converting-";

/// A hidden directory inside the target, so on its file system; removed with all it holds unless it is committed. A
/// process that is killed leaves it behind, and nothing that could be taken for a checkpoint.
pub(super) struct Staging {
    temp: Option<TempDir>,
    target: PathBuf,
    /// Whether the target is to be removed again if nothing comes of it.
    made: bool,
}

impl Staging {
    /// Makes the target, which must not hold a checkpoint yet, and the hidden directory in it.
    pub fn new(target: &Path) -> Result<Self> {
        check_target(target)?;
        let made = !target.exists();
        std::fs::create_dir_all(target).map_err(|e| Error::io(target, e))?;
        let mut staging = Self { temp: None, target: target.to_owned(), made };
        let temp = tempfile::Builder::new().prefix(CONVERTING).tempdir_in(target);
        staging.temp = Some(temp.map_err(|e| Error::io(target, e))?);
        Ok(staging)
    }

    pub fn dir(&self) -> &Path {
        self.temp.as_ref().map_or(&self.target, |temp| temp.path())
    }

    /// Copies a regular file, following links: the hub's cache is made of them.
    pub fn copy(&self, from: &ModelFiles, name: &str) -> Result<()> {
        let mut source = Companions::reader(from, name)?;
        let path = self.dir().join(name);
        let copied = File::create(&path).and_then(|mut file| {
            io::copy(&mut source, &mut file)?;
            file.sync_all()
        });
        copied.map_err(|e| Error::io(path, e))
    }

    /// Moves every file into the target, `config.json` last: no directory without one is a checkpoint. Returns the names.
    pub fn commit(mut self) -> Result<Vec<String>> {
        let dir = self.dir().to_owned();
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(|e| Error::io(&dir, e))? {
            names.push(entry.map_err(|e| Error::io(&dir, e))?.file_name());
        }
        names.sort_by_key(|name| (name == "config.json", name.clone()));
        // Somebody may have written here in the meantime, and a file of the user's may have one of these names.
        check_target(&self.target)?;
        for name in &names {
            let path = self.target.join(name);
            if path.symlink_metadata().is_ok() {
                let reason = format!("{} is already there; choose another directory", path.display());
                return Err(Error::request("output directory", reason));
            }
        }
        for (i, name) in names.iter().enumerate() {
            if let Err(e) = std::fs::rename(dir.join(name), self.target.join(name)) {
                // Best effort: the error to report is the first one.
                names.iter().take(i).for_each(|name| drop(std::fs::remove_file(self.target.join(name))));
                return Err(Error::io(self.target.join(name), e));
            }
        }
        self.made = false;
        sync_directory(&self.target);
        Ok(names.into_iter().map(|name| name.to_string_lossy().into_owned()).collect())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        drop(self.temp.take());
        if self.made {
            // Only succeeds while it is empty.
            let _ = std::fs::remove_dir(&self.target);
        }
    }
}

/// A file that appears under its name all at once, or not at all; until then it has a hidden one beside it.
pub(super) struct StagedFile {
    temp: NamedTempFile,
    target: PathBuf,
}

impl StagedFile {
    /// Makes the hidden file.
    pub fn new(target: &Path) -> Result<Self> {
        check_new_file(target)?;
        let temp = unfinished(directory_of(target), CONVERTING, ".gguf")?;
        Ok(Self { temp, target: target.to_owned() })
    }

    pub fn file(&mut self) -> &mut File {
        self.temp.as_file_mut()
    }

    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Gives the file its name, unless somebody else has taken it in the meantime. Returns the name.
    pub fn commit(self) -> Result<String> {
        let Self { temp, target } = self;
        temp.as_file().sync_all().map_err(|e| Error::io(&target, e))?;
        temp.persist_noclobber(&target).map_err(|e| match e.error.kind() {
            io::ErrorKind::AlreadyExists => there_already(&target),
            _ => Error::io(&target, e.error),
        })?;
        sync_directory(directory_of(&target));
        Ok(target.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()))
    }
}

/// Refuses a file that is there already, or that has no directory to be in.
pub(super) fn check_new_file(target: &Path) -> Result<()> {
    if target.symlink_metadata().is_ok() {
        return Err(there_already(target));
    }
    let dir = directory_of(target);
    match dir.is_dir() {
        true => Ok(()),
        false => Err(Error::request("output file", format!("there is no directory {}; make it first", dir.display()))),
    }
}

fn there_already(target: &Path) -> Error {
    Error::request("output file", format!("{} is already there; choose another name", target.display()))
}

/// The files beside a checkpoint's weights and configuration: what goes with the model, and what stays.
#[derive(Debug, Default)]
pub(crate) struct Companions {
    pub copied: Vec<String>,
    pub left: Vec<String>,
}

impl Companions {
    /// Sorts the files of `source`; hidden files and the checkpoint's own are neither.
    pub fn of(source: &ModelFiles) -> Result<Self> {
        let mut found = Self::default();
        // A pipe would never end.
        for (name, regular) in source.list()? {
            let own = name == "config.json" || name.starts_with("model") && name.contains(".safetensors");
            if own || name.starts_with('.') {
                continue;
            }
            let list = if regular && goes_along(&name) { &mut found.copied } else { &mut found.left };
            list.push(name);
        }
        if source.gguf()?.is_some_and(|file| file.tokens().is_some()) {
            found.copied.push(TOKENIZER.to_owned());
        }
        found.copied.sort();
        found.left.sort();
        Ok(found)
    }
}

impl Companions {
    /// A reader of one of the files to copy. A GGUF file's tokenizer is none, and becomes one.
    pub fn reader(source: &ModelFiles, name: &str) -> Result<Box<dyn io::Read>> {
        match source {
            ModelFiles::Gguf { .. } if name == TOKENIZER => {
                Ok(Box::new(io::Cursor::new(Tokenizer::open(source)?.to_json()?)))
            }
            _ => source.reader(name),
        }
    }
}

/// Tokenizer, chat template, generation defaults, and what is for people to read.
fn goes_along(name: &str) -> bool {
    let named = ["special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json"];
    let lower = name.to_ascii_lowercase();
    let text = ["license", "licence", "notice", "readme", "use_policy"].iter().any(|p| lower.starts_with(p));
    let tokenizer = name.starts_with("tokenizer") && (name.ends_with(".json") || name.ends_with(".model"));
    named.contains(&name) || tokenizer || name.starts_with("chat_template.") || text && !lower.contains(".safetensors")
}
