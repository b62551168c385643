//! What the hub's cache holds, and how to remove some of it.
//!
//! Nothing outside the cache is ever read for its size or removed: links are neither followed nor trusted.

use super::layout::{INCOMPLETE, PREFIX, Repository};
use super::{is_commit, is_id, is_revision};
use crate::checkpoint::limits::quoted;
use crate::checkpoint::open::read_text;
use crate::{Error, Result};
use std::collections::HashSet;
use std::fs::{DirEntry, Metadata};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// A model in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedModel {
    /// `owner/name`.
    pub id: String,
    /// Its folder.
    pub path: PathBuf,
    /// Bytes on disk, all revisions together: they share files.
    pub bytes: u64,
    /// Those of downloads that were interrupted.
    pub incomplete_bytes: u64,
    /// Its commits, newest first.
    pub revisions: Vec<CachedRevision>,
}

/// A commit of a model in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedRevision {
    /// The commit.
    pub commit: String,
    /// Branches and tags that stood for it when they were last asked, sorted.
    pub refs: Vec<String>,
    /// Files.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// What [`remove`] removed, or would remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// `owner/name`.
    pub id: String,
    /// The commit, if not all of them.
    pub commit: Option<String>,
    /// Bytes that are free then.
    pub bytes: u64,
    /// What is deleted: a model's folder, or a snapshot with the names and files that only it needs.
    paths: Vec<PathBuf>,
}

/// The models in the cache `dir`, by name; none if there is no such directory.
///
/// # Errors
/// [`Error::Io`] if it cannot be read.
pub fn list(dir: &Path) -> Result<Vec<CachedModel>> {
    let mut models = Vec::new();
    for entry in entries(dir)? {
        let name = entry.file_name();
        let id = name.to_str().and_then(|n| n.strip_prefix(PREFIX)).map(|n| n.replacen("--", "/", 1));
        if let (Some(id), true) = (id.filter(|id| is_id(id)), is_dir(&entry.path())) {
            models.push(model(dir, id)?);
        }
    }
    models.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(models)
}

fn model(dir: &Path, id: String) -> Result<CachedModel> {
    let repository = Repository::new(dir, &id);
    let (mut bytes, mut incomplete_bytes) = (0, 0);
    for (path, meta) in files(repository.root())? {
        bytes += meta.len();
        if path.extension().is_some_and(|e| e == INCOMPLETE || e == "part") {
            incomplete_bytes += meta.len();
        }
    }
    let refs = references(&repository)?;
    let mut revisions = Vec::new();
    for entry in entries(&repository.root().join("snapshots"))? {
        let commit = entry.file_name().to_string_lossy().into_owned();
        if !is_commit(&commit) || !is_dir(&entry.path()) {
            continue;
        }
        let blobs = contents(&repository, &commit)?;
        let age = entry.metadata().and_then(|m| m.modified()).ok();
        let named = refs.iter().filter(|(_, c)| *c == commit).map(|(name, _)| name.clone()).collect();
        let bytes = blobs.iter().map(|(_, bytes)| bytes).sum();
        revisions.push((age, CachedRevision { commit, refs: named, files: blobs.len(), bytes }));
    }
    revisions.sort_by(|(x, a), (y, b)| y.cmp(x).then_with(|| a.commit.cmp(&b.commit)));
    let revisions = revisions.into_iter().map(|(_, r)| r).collect();
    Ok(CachedModel { id, path: repository.root().to_owned(), bytes, incomplete_bytes, revisions })
}

/// What removing `owner/name` or `owner/name@revision` from the cache `dir` means. Files that another revision needs stay.
///
/// # Errors
/// [`Error::Request`] for a malformed name; [`Error::Hub`] if it is not in the cache, or not as a plain directory.
pub fn plan(dir: &Path, model: &str) -> Result<Removal> {
    let (id, revision) = match model.split_once('@') {
        Some((id, revision)) => (id, Some(revision)),
        None => (model, None),
    };
    if !is_id(id) || revision.is_some_and(|r| !is_revision(r)) {
        let reason =
            "is no model in the cache: give owner/name or owner/name@revision, as bitnet cache list shows them";
        return Err(Error::request(quoted(model), reason));
    }
    let absent = |reason: String| Error::Hub { repo: model.to_owned(), reason };
    let repository = Repository::new(dir, id);
    let root = repository.root();
    if !is_dir(root) {
        return Err(absent(match root.symlink_metadata() {
            Ok(_) => {
                format!("{} is a link or a file, so what it holds may lie elsewhere; it is left alone", root.display())
            }
            Err(_) => format!("not in the cache {}", dir.display()),
        }));
    }
    let Some(revision) = revision else {
        let bytes = files(root)?.iter().map(|(_, meta)| meta.len()).sum();
        return Ok(Removal { id: id.to_owned(), commit: None, bytes, paths: vec![root.to_owned()] });
    };
    let refs = references(&repository)?;
    let commit = match refs.iter().find(|(name, _)| name == revision) {
        Some((_, commit)) => commit.clone(),
        None => revision.to_owned(),
    };
    let snapshot = repository.snapshot(&commit);
    if !is_commit(&commit) || !is_dir(&snapshot) {
        return Err(absent(format!("this revision is not in the cache {}", dir.display())));
    }
    let mut needed = HashSet::new();
    for entry in entries(&root.join("snapshots"))? {
        let other = entry.file_name().to_string_lossy().into_owned();
        if other != commit {
            needed.extend(contents(&repository, &other)?.into_iter().map(|(path, _)| path));
        }
    }
    let mut paths: Vec<PathBuf> =
        refs.iter().filter(|(_, c)| *c == commit).map(|(name, _)| repository.reference(name)).collect();
    paths.push(snapshot);
    let mut bytes = 0;
    for (path, size) in contents(&repository, &commit)? {
        if !needed.contains(&path) {
            bytes += size;
            // A file that is no link goes with the snapshot.
            if path.starts_with(root.join("blobs")) && needed.insert(path.clone()) {
                paths.push(path);
            }
        }
    }
    Ok(Removal { id: id.to_owned(), commit: Some(commit), bytes, paths })
}

impl Removal {
    /// Does it.
    ///
    /// # Errors
    /// [`Error::Io`] naming what could not be deleted.
    pub fn run(&self) -> Result<()> {
        for path in &self.paths {
            // Neither follows links.
            let removed = if is_dir(path) { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
            match removed {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(Error::io(path, e)),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A directory itself, not a link to one.
fn is_dir(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|m| m.is_dir())
}

/// The entries of a directory that may not exist.
fn entries(dir: &Path) -> Result<Vec<DirEntry>> {
    match std::fs::read_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::io(dir, e)),
        Ok(found) => found.collect::<std::io::Result<_>>().map_err(|e| Error::io(dir, e)),
    }
}

/// All regular files below a directory; links are not followed.
fn files(dir: &Path) -> Result<Vec<(PathBuf, Metadata)>> {
    let (mut found, mut open) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = open.pop() {
        for entry in entries(&dir)? {
            let path = entry.path();
            match path.symlink_metadata() {
                Ok(meta) if meta.is_dir() => open.push(path),
                Ok(meta) if meta.is_file() => found.push((path, meta)),
                _ => {}
            }
        }
    }
    Ok(found)
}

/// The files of a snapshot: blobs of this model that its links lead to, and files that are none, with their sizes. Links
/// to anywhere else count for nothing.
fn contents(repository: &Repository, commit: &str) -> Result<Vec<(PathBuf, u64)>> {
    let (mut found, mut open) = (Vec::new(), vec![repository.snapshot(commit)]);
    while let Some(dir) = open.pop() {
        for entry in entries(&dir)? {
            let path = entry.path();
            match path.symlink_metadata() {
                Ok(meta) if meta.is_dir() => open.push(path),
                Ok(meta) if meta.is_file() => found.push((path, meta.len())),
                Ok(meta) if meta.is_symlink() => {
                    let target = std::fs::read_link(&path).unwrap_or_default();
                    let inside = target.parent().is_some_and(|p| p.ends_with("blobs"));
                    let etag = target.file_name().and_then(|n| n.to_str()).filter(|_| inside);
                    let Some(blob) = etag.map(|etag| repository.blob(etag)) else { continue };
                    if let Some(meta) = blob.symlink_metadata().ok().filter(Metadata::is_file) {
                        found.push((blob, meta.len()));
                    }
                }
                _ => {}
            }
        }
    }
    Ok(found)
}

/// Branches and tags with their commits, by name.
fn references(repository: &Repository) -> Result<Vec<(String, String)>> {
    let root = repository.root().join("refs");
    let mut found = Vec::new();
    for (path, _) in files(&root)? {
        let name = path.strip_prefix(&root).ok().and_then(Path::to_str).map(|n| n.replace('\\', "/"));
        let commit = read_text(&path, 100).ok().map(|text| text.trim().to_owned());
        if let (Some(name), Some(commit)) = (name.filter(|n| is_revision(n)), commit.filter(|c| is_commit(c))) {
            found.push((name, commit));
        }
    }
    found.sort();
    Ok(found)
}
