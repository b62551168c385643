//! Where a repository lies in the cache, laid out as huggingface_hub does it:
//! `models--owner--name/{refs/REVISION, blobs/ETAG, snapshots/COMMIT/FILE → ../../blobs/ETAG}`.

use crate::{Error, Result};
use std::path::{Component, Path, PathBuf};

/// How the folder of a model begins.
pub(super) const PREFIX: &str = "models--";
/// How the name of a blob ends that is not complete.
pub(super) const INCOMPLETE: &str = "incomplete";

/// A model's folder in the cache.
#[derive(Debug, Clone)]
pub(super) struct Repository {
    root: PathBuf,
}

impl Repository {
    /// The folder of `owner/name`, which has been checked to be an id.
    pub fn new(cache: &Path, id: &str) -> Self {
        Self { root: cache.join(format!("{PREFIX}{}", id.replace('/', "--"))) }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    pub fn incomplete(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.{INCOMPLETE}"))
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub fn reference(&self, revision: &str) -> PathBuf {
        self.root.join("refs").join(revision)
    }

    /// Whether a snapshot has a file, and not only a link that leads nowhere.
    pub fn has(&self, commit: &str, name: &str) -> bool {
        self.snapshot(commit).join(name).is_file()
    }

    /// Notes which commit a revision is.
    pub fn note(&self, revision: &str, commit: &str) -> Result<()> {
        let path = self.reference(revision);
        let parent = path.parent().unwrap_or(&path);
        std::fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
        std::fs::write(&path, commit).map_err(|e| Error::io(&path, e))
    }

    /// Puts a blob into a snapshot under its name.
    pub fn link(&self, commit: &str, name: &str, etag: &str) -> Result<()> {
        let path = self.snapshot(commit).join(name);
        let parent = path.parent().unwrap_or(&path);
        std::fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
        // A dangling link, left by somebody who deleted the blob.
        if path.symlink_metadata().is_ok() {
            std::fs::remove_file(&path).map_err(|e| Error::io(&path, e))?;
        }
        let up = "../".repeat(Path::new(name).components().count() + 1);
        let relative = PathBuf::from(format!("{up}blobs/{etag}"));
        let linked = symlink(&relative, &path).or_else(|_| std::fs::hard_link(self.blob(etag), &path));
        match linked.or_else(|_| std::fs::copy(self.blob(etag), &path).map(drop)) {
            Err(_) if path.is_file() => Ok(()),
            result => result.map_err(|e| Error::io(&path, e)),
        }
    }
}

#[cfg(unix)]
fn symlink(target: &Path, path: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

/// Needs a privilege on Windows; a hard link serves as well.
#[cfg(not(unix))]
fn symlink(_target: &Path, _path: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Whether a name from a list leads to a place inside the snapshot, on every system.
pub(super) fn is_inside(name: &str) -> bool {
    let plain = |c: char| !c.is_control() && !['\\', ':'].contains(&c);
    let part = |c: Component| matches!(c, Component::Normal(_));
    !name.is_empty() && name.len() <= 255 && name.chars().all(plain) && Path::new(name).components().all(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_and_links_lead_to_blobs() {
        for name in ["a.gguf", "sub/a b.gguf"] {
            assert!(is_inside(name), "{name}");
        }
        for name in ["", "/a", "../a", "a/../../b", "./a", "a\\b", "C:a", "a\0", &"x".repeat(300)] {
            assert!(!is_inside(name), "{name}");
        }
        let cache = tempfile::tempdir().unwrap();
        let repository = Repository::new(cache.path(), "o/n");
        std::fs::create_dir_all(repository.root().join("blobs")).unwrap();
        std::fs::write(repository.blob("0123456789"), "x").unwrap();
        for name in ["a", "deep/er/a", "a"] {
            repository.link("c0ffee", name, "0123456789").unwrap();
            assert_eq!(std::fs::read(repository.snapshot("c0ffee").join(name)).unwrap(), b"x");
            assert!(repository.has("c0ffee", name));
        }
        repository.note("refs/pr/1", "c0ffee").unwrap();
        assert_eq!(std::fs::read(repository.reference("refs/pr/1")).unwrap(), b"c0ffee");
    }
}
