//! Names to places: a local path as it is, a hub id through the cache that all Hugging Face tools share.
//!
//! hf-hub downloads one file at a time, trusts the server with names of files, and takes what it gets for whole; so the
//! few requests that are needed are made here.

pub mod cache;
mod client;
mod download;
mod layout;
mod options;

use super::files::BUILTIN;
use super::index;
use super::limits::{MAX_INDEX_SIZE, quoted};
use super::open::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_text};
use crate::{Error, Result};
use client::{Client, Listing, Refusal};
use download::{Broken, Downloads, Wanted, bar};
use layout::{Repository, is_inside};
pub use options::{DEFAULT_ENDPOINT, HubOptions};
use std::path::{Path, PathBuf};

/// Files beside the weights, fetched where the repository has them.
const SIDE_FILES: [&str; 8] = [
    CONFIG_FILE,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// How the names of the only other weights that are read end.
const GGUF: &str = ".gguf";

/// The place of a model: `model` itself if it is a directory or a GGUF file; else what a hub id leads to, downloaded if
/// needed: for `owner/name` or `owner/name@revision` the snapshot's directory, for `owner/name:file.gguf` or
/// `owner/name@revision:file.gguf` that file. A repository that holds no safetensors but one GGUF file gives that file. If
/// the hub cannot be reached and the cache holds what is needed, that is used.
///
/// Fetches the configuration, tokenizer files and safetensors, or one GGUF file, and nothing else.
///
/// # Errors
/// [`Error::File`] if `model` is none of these, or for a malformed index of shards; [`Error::Request`] if `model` is empty
/// or its revision or file malformed; [`Error::Hub`] if the hub or the cache cannot deliver, saying what to do about it.
pub fn resolve(model: &str, options: &HubOptions) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.is_dir() || path.is_file() && is_gguf(model) {
        return Ok(path.to_owned());
    }
    let neither = |reason: &str| {
        let id =
            "a hub id such as microsoft/bitnet-b1.58-2B-4T (owner/name, owner/name@revision or owner/name:file.gguf)";
        format!("is neither {BUILTIN}, nor an existing directory or .gguf file, nor {id}: {reason}")
    };
    if model.is_empty() {
        return Err(Error::request("model", neither("it is empty")));
    }
    if path.exists() {
        return Err(Error::file(quoted(model), neither("it is a file; name the directory that holds it")));
    }
    let (repository, file) = match model.split_once(':') {
        Some((repository, file)) => (repository, Some(file)),
        None => (model, None),
    };
    let (id, revision) = match repository.split_once('@') {
        Some((id, revision)) => (id, revision),
        None => (repository, options.revision.as_deref().unwrap_or("main")),
    };
    if !is_id(id) {
        return Err(Error::file(quoted(model), neither("there is no such directory, and this is no hub id")));
    }
    if !is_revision(revision) {
        let reason = format!("{:?} is not a branch, tag or commit", quoted(revision));
        return Err(Error::request(quoted(model), neither(&reason)));
    }
    if let Some(file) = file.filter(|file| !is_inside(file) || !is_gguf(file)) {
        let reason = format!("{:?} is no name of a .gguf file; other files come by themselves", quoted(file));
        return Err(Error::request(quoted(model), neither(&reason)));
    }
    let Some(cache_dir) = &options.cache_dir else {
        return Err(Error::request(
            "HF_HOME",
            "no cache directory: set HF_HOME, or give a local directory as the model",
        ));
    };
    Hub { id, revision, file, options, cache_dir, repository: Repository::new(cache_dir, id) }.resolve()
}

fn is_gguf(name: &str) -> bool {
    name.len() > GGUF.len() && name.to_ascii_lowercase().ends_with(GGUF)
}

fn is_id(id: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && p.len() <= 96
            && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            && !p.starts_with(['.', '-'])
            && !p.contains("..")
    };
    id.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

/// A revision becomes part of a path in the cache.
fn is_revision(revision: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty() && !p.starts_with('.') && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b))
    };
    revision.len() <= 200 && revision.split('/').all(part)
}

/// Whether a directory is the snapshot, in a hub's cache, that the repository's branch or tag `name` stood for when it
/// was last asked.
pub(crate) fn is_snapshot_of(snapshot: &Path, name: &str) -> bool {
    let commit = snapshot.file_name().and_then(|n| n.to_str()).filter(|n| is_commit(n));
    let reference = snapshot.parent().and_then(Path::parent).map(|repository| repository.join("refs").join(name));
    commit.is_some() && reference.and_then(|r| read_text(&r, 100).ok()).as_deref().map(str::trim) == commit
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

struct Hub<'a> {
    id: &'a str,
    revision: &'a str,
    /// The only file that is wanted.
    file: Option<&'a str>,
    options: &'a HubOptions,
    cache_dir: &'a Path,
    repository: Repository,
}

impl Hub<'_> {
    fn resolve(&self) -> Result<PathBuf> {
        let cached = self.cached();
        if self.options.offline {
            return cached.map_err(|why| {
                self.error(format!("{why}, and downloads are off; run once without --offline and HF_HUB_OFFLINE"))
            });
        }
        match cached {
            // A commit never changes, so nothing needs to be asked.
            Ok(place) if is_commit(self.revision) => Ok(place),
            cached => match self.download() {
                Err(Failure::Unreachable(e)) => cached.map_err(|_| e),
                Err(Failure::Other(e)) => Err(e),
                Ok(place) => Ok(place),
            },
        }
    }

    fn error(&self, reason: impl Into<String>) -> Error {
        let repo = match self.revision {
            "main" => self.id.to_owned(),
            revision => format!("{}@{revision}", self.id),
        };
        Error::Hub { repo, reason: reason.into() }
    }

    fn other<T>(&self, reason: impl Into<String>) -> Result<T, Failure> {
        Err(Failure::Other(self.error(reason)))
    }

    /// What the cache holds of the model, if it is complete, or why not.
    fn cached(&self) -> Result<PathBuf, String> {
        let absent = || format!("not in the cache {}", self.cache_dir.display());
        let commit = match is_commit(self.revision) {
            true => self.revision.to_owned(),
            false => {
                let reference = self.repository.reference(self.revision);
                read_text(&reference, 100).map_err(|_| absent())?.trim().to_owned()
            }
        };
        let snapshot = self.repository.snapshot(&commit);
        if !is_commit(&commit) || !snapshot.is_dir() {
            return Err(absent());
        }
        let missing = |name: &str| (!snapshot.join(name).exists()).then(|| format!("{name} is not in the cache"));
        if let Some(file) = self.file {
            return missing(file).map_or_else(|| Ok(snapshot.join(file)), Err);
        }
        let of_kind = |extension: &str| -> Vec<PathBuf> {
            let any = std::fs::read_dir(&snapshot).into_iter().flatten().filter_map(|e| Some(e.ok()?.path()));
            any.filter(|p| p.extension().is_some_and(|e| e.eq_ignore_ascii_case(extension)) && p.exists()).collect()
        };
        let lacking = if snapshot.join(INDEX_FILE).exists() && !snapshot.join(SINGLE_FILE).exists() {
            let index_path = snapshot.join(INDEX_FILE);
            let text = read_text(&index_path, MAX_INDEX_SIZE as u64).map_err(|e| e.to_string())?;
            let shards = index::shards(&index_path, text.as_bytes()).map_err(|e| e.to_string())?;
            shards.iter().find_map(|shard| missing(shard))
        } else if of_kind("safetensors").is_empty() {
            if let ([one], true) = (&of_kind("gguf")[..], missing(CONFIG_FILE).is_some()) {
                return Ok(one.clone());
            }
            Some(format!("{SINGLE_FILE} is not in the cache"))
        } else {
            None
        };
        match missing(CONFIG_FILE).or(lacking) {
            Some(why) => Err(why),
            None => Ok(snapshot),
        }
    }

    fn download(&self) -> Result<PathBuf, Failure> {
        let client = Client::new(self.options)?;
        let listing = client.listing(self.id, self.revision).map_err(|e| self.explain(&client, &e, None))?;
        if !is_commit(&listing.sha) {
            return self.other("the hub's answer names no commit; is HF_ENDPOINT right?");
        }
        let bar = bar(self.options.progress);
        let commit = &listing.sha;
        let patience = self.options.patience;
        let downloads =
            Downloads { client: &client, repository: &self.repository, id: self.id, commit, patience, bar: &bar };
        let place = self.fetch(&downloads, &listing);
        bar.finish_and_clear();
        let place = place?;
        // Only now does the name point to the snapshot, so that an interrupted download is never taken for whole.
        if self.revision != commit {
            self.repository.note(self.revision, commit)?;
        }
        Ok(place)
    }

    /// Decides what is needed of a commit, and brings it.
    fn fetch(&self, downloads: &Downloads, listing: &Listing) -> Result<PathBuf, Failure> {
        let snapshot = self.repository.snapshot(downloads.commit);
        let find = |name: &str| listing.siblings.iter().find(|s| s.name == name && is_inside(name));
        let fetch = |names: &[&str]| -> Result<(), Failure> {
            let wanted = |name: &&str| Some(Wanted { name: (*name).to_owned(), identity: find(name)?.identity() });
            let files: Vec<Wanted> = names.iter().filter_map(wanted).collect();
            downloads.fetch(&files).map_err(|(name, broken)| self.broken(downloads.client, &name, broken))
        };
        if let Some(file) = self.file {
            if find(file).is_none() {
                return self.other(format!("holds no file {file}{}", self.choice(listing)));
            }
            fetch(&[file])?;
            return Ok(snapshot.join(file));
        }
        let mut names: Vec<&str> = SIDE_FILES.into_iter().filter(|name| find(name).is_some()).collect();
        let index_path = snapshot.join(INDEX_FILE);
        let sharded = find(SINGLE_FILE).is_none() && find(INDEX_FILE).is_some();
        let root = |name: &&str| name.ends_with(".safetensors") && index::check_shard_name(name).is_ok();
        let weights: Vec<&str> = listing.siblings.iter().map(|s| s.name.as_str()).filter(root).collect();
        if !sharded && weights.is_empty() {
            return match ggufs(listing)[..] {
                [one] => {
                    fetch(&[one])?;
                    Ok(snapshot.join(one))
                }
                [] => self.other("holds no safetensors weights and no GGUF file, the only formats read here"),
                _ => self.other(format!("holds several GGUF files{}", self.choice(listing))),
            };
        }
        if find(CONFIG_FILE).is_none() {
            return self.other("holds no config.json, so it is not a model that can be run");
        }
        if !sharded {
            match (find(SINGLE_FILE).is_some(), &weights[..]) {
                (true, _) => names.push(SINGLE_FILE),
                (false, [one]) => names.push(one),
                (false, _) => {
                    return self.other(format!(
                        "holds several *.safetensors files, but neither {SINGLE_FILE} nor {INDEX_FILE}"
                    ));
                }
            }
            fetch(&names)?;
            return Ok(snapshot);
        }
        names.push(INDEX_FILE);
        fetch(&names)?;
        let text = read_text(&index_path, MAX_INDEX_SIZE as u64)?;
        let shards = index::shards(&index_path, text.as_bytes())?;
        if let Some(shard) = shards.iter().find(|shard| find(shard).is_none()) {
            return self.other(format!("{INDEX_FILE} lists {shard}, which is not there"));
        }
        fetch(&shards.iter().map(String::as_str).collect::<Vec<_>>())?;
        Ok(snapshot)
    }

    /// The GGUF files that can be named instead.
    fn choice(&self, listing: &Listing) -> String {
        let names: Vec<String> =
            ggufs(listing).into_iter().take(8).map(|name| format!("{}:{}", self.id, quoted(name))).collect();
        if names.is_empty() { String::new() } else { format!("; name one, such as {}", names.join(" or ")) }
    }

    /// What went wrong, and what to do about it. `file` is none while the repository itself is asked for.
    fn explain(&self, client: &Client, e: &Refusal, file: Option<&str>) -> Failure {
        let (id, endpoint) = (self.id, client.endpoint());
        let what = file.unwrap_or("the repository");
        let other = |reason: String| Failure::Other(self.error(reason));
        match e {
            Refusal::Status { status: status @ (401 | 403), code, .. } => {
                let with = if self.options.token.is_some() { "the token given" } else { "no token" };
                let gated = if code == "GatedRepo" { "the model is gated" } else { "if the model is private or gated" };
                other(format!(
                    "the hub refuses {what} (HTTP {status}, {with}): check the name; {gated}, accept its licence at \
                     {endpoint}/{id} and set HF_TOKEN to a token of that account"
                ))
            }
            Refusal::Status { status: 404, code, .. } => match file {
                None if code == "RevisionNotFound" => other(format!(
                    "has no branch, tag or commit {}: check the revision at {endpoint}/{id}",
                    self.revision
                )),
                None => other(format!(
                    "not found at {endpoint}: check the name and the revision; there is no directory of that name here either"
                )),
                Some(name) => other(format!("{name} is listed, but could not be found (HTTP 404); try again")),
            },
            Refusal::Status { status: 429, retry_after, .. } => {
                let wait = retry_after.map_or("a few minutes".to_owned(), |s| format!("{s} seconds"));
                let token = match self.options.token {
                    Some(_) => "",
                    None => "; with a token (HF_TOKEN) the hub allows more",
                };
                Failure::Unreachable(self.error(format!(
                    "{endpoint} answers HTTP 429 for {what}: too many requests from here; wait {wait} and try again{token}"
                )))
            }
            Refusal::Status { status: status @ 500.., .. } => {
                Failure::Unreachable(self.error(format!("{endpoint} answers HTTP {status} for {what}; try again later")))
            }
            Refusal::Status { status, .. } => other(format!("{endpoint} answers HTTP {status} for {what}")),
            Refusal::Network(reason) => Failure::Unreachable(self.error(format!(
                "{what} could not be fetched from {endpoint} ({}): check the network, HF_ENDPOINT and proxy settings; what \
                 has arrived is kept, and the next run goes on from there; with the files in a local directory, give that \
                 as the model",
                quoted(reason)
            ))),
            Refusal::Nonsense(reason) => {
                let remedy = "check HF_ENDPOINT and proxy settings";
                other(format!("{endpoint} gives no usable answer for {what}: {}; {remedy}", quoted(reason)))
            }
        }
    }

    fn broken(&self, client: &Client, name: &str, broken: Broken) -> Failure {
        match broken {
            Broken::Refused(refusal) => self.explain(client, &refusal, Some(name)),
            Broken::Damaged(reason) => Failure::Other(
                self.error(format!("{name} arrived damaged twice ({reason}), and was thrown away; try again later")),
            ),
            Broken::Busy => Failure::Other(
                self.error(format!("another process is downloading {name}; wait for it, then try again")),
            ),
            Broken::Stopped => Failure::Other(self.error(format!("the download of {name} was stopped"))),
            Broken::Cache(e) => Failure::Other(e),
        }
    }
}

/// The GGUF files of a repository.
fn ggufs(listing: &Listing) -> Vec<&str> {
    listing.siblings.iter().map(|s| s.name.as_str()).filter(|name| is_gguf(name) && is_inside(name)).collect()
}

/// What an answer of the hub may lead to: names of files and, where it tells them, of their blobs. For the fuzz target.
#[doc(hidden)]
pub fn listed(answer: &[u8]) -> Option<Vec<(String, Option<String>)>> {
    let inside = Listing::parse(answer).ok()?.siblings.into_iter().filter(|s| is_inside(&s.name));
    Some(inside.map(|s| (s.name.clone(), s.identity().map(|identity| identity.etag))).collect())
}

/// Whether the cache may stand in.
enum Failure {
    Unreachable(Error),
    Other(Error),
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self::Other(e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_revisions_cannot_escape_the_cache() {
        for id in ["microsoft/bitnet-b1.58-2B-4T", "a/b_c.d"] {
            assert!(is_id(id), "{id}");
        }
        for id in ["", "a", "a/", "/a", "a/b/c", "../a", "a/..", "a/.b", "a/b c", "a\\b/c", "-a/b", "ä/b"] {
            assert!(!is_id(id), "{id}");
        }
        for revision in ["main", "v1.0", "refs/pr/3", "0123abc"] {
            assert!(is_revision(revision), "{revision}");
        }
        for revision in ["", "..", "a/../b", "/a", "a/", "a b", ".git", "a\0"] {
            assert!(!is_revision(revision), "{revision}");
        }
    }
}
