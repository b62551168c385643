//! Names to directories: a local path as it is, a hub id through the cache that all Hugging Face tools share.

use super::files::BUILTIN;
use super::index;
use super::limits::{MAX_INDEX_SIZE, quoted};
use super::open::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_text};
use crate::{Error, Result};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Where the hub is unless `HF_ENDPOINT` says otherwise.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Files beside the weights, fetched where the repository has them.
const SIDE_FILES: [&str; 6] = [
    CONFIG_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// How to reach the hub.
#[derive(Clone, Default)]
pub struct HubOptions {
    /// Branch, tag or commit; a revision in the model's name wins. `main` if none is given.
    pub revision: Option<String>,
    /// Use only what the cache holds.
    pub offline: bool,
    /// Show progress bars on stderr.
    pub progress: bool,
    /// The cache, `…/huggingface/hub`.
    pub cache_dir: Option<PathBuf>,
    /// [`DEFAULT_ENDPOINT`] if none is given.
    pub endpoint: Option<String>,
    /// Access token.
    pub token: Option<String>,
}

impl std::fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the token itself.
        let token = self.token.as_ref().map(|_| "…");
        let Self { revision, offline, progress, cache_dir, endpoint, .. } = self;
        f.debug_struct("HubOptions")
            .field("revision", revision)
            .field("offline", offline)
            .field("progress", progress)
            .field("cache_dir", cache_dir)
            .field("endpoint", endpoint)
            .field("token", &token)
            .finish()
    }
}

impl HubOptions {
    /// What the environment says: `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HF_TOKEN` (or the token that
    /// `hf auth login` stored), `HF_ENDPOINT`, `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        Self::from_vars(|key| std::env::var(key).ok().filter(|v| !v.is_empty()), std::env::home_dir())
    }

    /// [`HubOptions::from_env`] on given variables.
    pub fn from_vars(var: impl Fn(&str) -> Option<String>, user_home: Option<PathBuf>) -> Self {
        let dir = |key| var(key).map(PathBuf::from);
        let cache = || dir("XDG_CACHE_HOME").or_else(|| Some(user_home?.join(".cache")));
        let home = dir("HF_HOME").or_else(|| Some(cache()?.join("huggingface")));
        let stored = || {
            let path = dir("HF_TOKEN_PATH").or_else(|| Some(home.as_ref()?.join("token")))?;
            read_text(&path, 4096).ok()
        };
        let token = var("HF_TOKEN").or_else(stored).map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
        let yes = |v: String| ["1", "true", "yes", "on"].contains(&v.to_ascii_lowercase().as_str());
        Self {
            revision: None,
            offline: var("HF_HUB_OFFLINE").is_some_and(yes),
            progress: false,
            cache_dir: dir("HF_HUB_CACHE").or_else(|| Some(home.as_ref()?.join("hub"))),
            endpoint: var("HF_ENDPOINT").map(|e| e.trim_end_matches('/').to_owned()),
            token,
        }
    }
}

/// The directory of a model: `model` itself if it is one, else the snapshot of the hub repository `owner/name` or
/// `owner/name@revision`, downloaded if needed. If the hub cannot be reached and the cache holds a complete
/// snapshot, that is used.
///
/// Fetches the configuration, tokenizer files and safetensors, and nothing else.
///
/// # Errors
/// [`Error::File`] if `model` is neither, or for a malformed index of shards; [`Error::Request`] if `model` is empty or
/// its revision malformed; [`Error::Hub`] if the hub or the cache cannot deliver, saying what to do about it.
pub fn resolve(model: &str, options: &HubOptions) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    let neither = |reason: &str| {
        let id = "a hub id such as microsoft/bitnet-b1.58-2B-4T (owner/name or owner/name@revision)";
        format!("is neither {BUILTIN}, nor an existing directory, nor {id}: {reason}")
    };
    if model.is_empty() {
        return Err(Error::request("model", neither("it is empty")));
    }
    if path.exists() {
        return Err(Error::file(quoted(model), neither("it is a file; name the directory that holds it")));
    }
    let (id, revision) = match model.split_once('@') {
        Some((id, revision)) => (id, revision),
        None => (model, options.revision.as_deref().unwrap_or("main")),
    };
    if !is_id(id) {
        return Err(Error::file(quoted(model), neither("there is no such directory, and this is no hub id")));
    }
    if !is_revision(revision) {
        let reason = format!("{:?} is not a branch, tag or commit", quoted(revision));
        return Err(Error::request(quoted(model), neither(&reason)));
    }
    let Some(cache_dir) = &options.cache_dir else {
        return Err(Error::request(
            "HF_HOME",
            "no cache directory: set HF_HOME, or give a local directory as the model",
        ));
    };
    Hub { id, revision, options, cache: Cache::new(cache_dir.clone()) }.resolve()
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
    options: &'a HubOptions,
    cache: Cache,
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
            Ok(snapshot) if is_commit(self.revision) => Ok(snapshot),
            cached => match self.download() {
                Err(Failure::Unreachable(e)) => cached.map_err(|_| e),
                Err(Failure::Other(e)) => Err(e),
                Ok(snapshot) => Ok(snapshot),
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

    fn endpoint(&self) -> &str {
        self.options.endpoint.as_deref().unwrap_or(DEFAULT_ENDPOINT)
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.to_owned(), RepoType::Model, revision.to_owned())
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.cache.repo(self.repo(self.revision)).pointer_path(commit)
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.cache.path().join(self.repo(revision).folder_name()).join("refs").join(revision)
    }

    /// The complete snapshot in the cache, or why there is none.
    fn cached(&self) -> Result<PathBuf, String> {
        let absent = || format!("not in the cache {}", self.cache.path().display());
        let commit = match is_commit(self.revision) {
            true => self.revision.to_owned(),
            false => read_text(&self.reference(self.revision), 100).map_err(|_| absent())?.trim().to_owned(),
        };
        if !is_commit(&commit) {
            return Err(absent());
        }
        let snapshot = self.snapshot(&commit);
        if !snapshot.is_dir() {
            return Err(absent());
        }
        let missing = |name: &str| (!snapshot.join(name).exists()).then(|| format!("{name} is not in the cache"));
        let lacking = if snapshot.join(INDEX_FILE).exists() && !snapshot.join(SINGLE_FILE).exists() {
            let index_path = snapshot.join(INDEX_FILE);
            let text = read_text(&index_path, MAX_INDEX_SIZE as u64).map_err(|e| e.to_string())?;
            let shards = index::shards(&index_path, text.as_bytes()).map_err(|e| e.to_string())?;
            shards.iter().find_map(|shard| missing(shard))
        } else {
            let any = std::fs::read_dir(&snapshot).into_iter().flatten().filter_map(|e| Some(e.ok()?.path()));
            let found = any.filter(|p| p.extension().is_some_and(|e| e == "safetensors") && p.exists()).count();
            (found == 0).then(|| format!("{SINGLE_FILE} is not in the cache"))
        };
        match missing(CONFIG_FILE).or(lacking) {
            Some(why) => Err(why),
            None => Ok(snapshot),
        }
    }

    fn download(&self) -> Result<PathBuf, Failure> {
        let api = ApiBuilder::from_cache(self.cache.clone())
            .with_endpoint(self.endpoint().to_owned())
            .with_token(self.options.token.clone())
            .with_progress(self.options.progress)
            .with_user_agent("candle-bitnet", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|e| self.explain(&e, None))?;
        let info = api.repo(self.repo(self.revision)).info().map_err(|e| self.explain(&e, None))?;
        if !is_commit(&info.sha) {
            return Err(Failure::Other(self.error("the hub's answer names no commit; is HF_ENDPOINT right?")));
        }
        let files: BTreeSet<&str> = info.siblings.iter().map(|s| s.rfilename.as_str()).collect();
        let snapshot = self.snapshot(&info.sha);
        if !files.contains(CONFIG_FILE) {
            return Err(Failure::Other(self.error("holds no config.json, so it is not a model that can be run")));
        }
        let fetch = |name: &str| self.fetch(&api, &info.sha, &snapshot, name);
        for name in SIDE_FILES.into_iter().filter(|name| files.contains(name)) {
            fetch(name)?;
        }
        if files.contains(SINGLE_FILE) {
            fetch(SINGLE_FILE)?;
        } else if files.contains(INDEX_FILE) {
            fetch(INDEX_FILE)?;
            let index_path = snapshot.join(INDEX_FILE);
            let text = read_text(&index_path, MAX_INDEX_SIZE as u64)?;
            for shard in index::shards(&index_path, text.as_bytes())? {
                if !files.contains(shard.as_str()) {
                    return Err(Failure::Other(self.error(format!("{INDEX_FILE} lists {shard}, which is not there"))));
                }
                fetch(&shard)?;
            }
        } else {
            let root = |name: &&&str| name.ends_with(".safetensors") && index::check_shard_name(name).is_ok();
            let weights: Vec<_> = files.iter().filter(root).collect();
            match weights[..] {
                [one] => fetch(one)?,
                [] => {
                    return Err(Failure::Other(self.error("holds no safetensors weights, the only format read here")));
                }
                _ => {
                    return Err(Failure::Other(self.error(format!(
                        "holds several *.safetensors files, but neither {SINGLE_FILE} nor {INDEX_FILE}"
                    ))));
                }
            }
        }
        // Only now does the name point to the snapshot, so that an interrupted download is never taken for whole.
        let reference = |e| Failure::Other(Error::io(self.reference(self.revision), e));
        self.cache.repo(self.repo(self.revision)).create_ref(&info.sha).map_err(reference)?;
        if self.revision != info.sha {
            let _ = std::fs::remove_file(self.reference(&info.sha));
        }
        Ok(snapshot)
    }

    /// Downloads one file of a commit unless it is there.
    fn fetch(&self, api: &Api, commit: &str, snapshot: &Path, name: &str) -> Result<(), Failure> {
        if snapshot.join(name).exists() {
            return Ok(());
        }
        match api.repo(self.repo(commit)).download(name) {
            Ok(_) => Ok(()),
            Err(e) => Err(self.explain(&e, Some(name))),
        }
    }

    /// What went wrong, and what to do about it. `file` is none while the repository itself is asked for.
    fn explain(&self, e: &ApiError, file: Option<&str>) -> Failure {
        let (id, endpoint) = (self.id, self.endpoint());
        let what = file.unwrap_or("the repository");
        let other = |reason: String| Failure::Other(self.error(reason));
        match e {
            ApiError::TooManyRetries(e) => self.explain(e, file),
            ApiError::RequestError(e) => match **e {
                ureq::Error::StatusCode(status @ (401 | 403)) => {
                    let with = if self.options.token.is_some() { "the token given" } else { "no token" };
                    other(format!(
                        "the hub refuses {what} (HTTP {status}, {with}): check the name; if the model is private or gated, \
                         accept its licence at {endpoint}/{id} and set HF_TOKEN to a token of that account"
                    ))
                }
                ureq::Error::StatusCode(404) => match file {
                    None => other(format!(
                        "not found at {endpoint}: check the name and the revision; there is no directory of that name here either"
                    )),
                    Some(name) => other(format!("{name} is listed, but could not be found (HTTP 404); try again")),
                },
                ureq::Error::StatusCode(416) => other(self.broken_part(what)),
                ureq::Error::StatusCode(status @ 500..) | ureq::Error::StatusCode(status @ 429) => {
                    Failure::Unreachable(self.error(format!("{endpoint} answers HTTP {status} for {what}; try again later")))
                }
                ureq::Error::StatusCode(status) => other(format!("{endpoint} answers HTTP {status} for {what}")),
                ref e => Failure::Unreachable(self.error(format!(
                    "{what} could not be fetched from {endpoint} ({}): check the network, HF_ENDPOINT and proxy settings; \
                     with the files in a local directory, give that as the model",
                    quoted(&e.to_string())
                ))),
            },
            ApiError::InvalidResume => other(self.broken_part(what)),
            ApiError::LockAcquisition(lock) => other(format!(
                "another process is downloading {what}; wait for it, or delete {} if there is none",
                lock.display()
            )),
            ApiError::IoError(e) => other(format!("{what}: {e} (cache {})", self.cache.path().display())),
            e => other(format!("{endpoint} gives no usable answer for {what}: {}", quoted(&e.to_string()))),
        }
    }

    fn broken_part(&self, what: &str) -> String {
        let blobs = self.cache.path().join(self.repo(self.revision).folder_name()).join("blobs");
        format!("an earlier download of {what} cannot be resumed; delete the *.part files in {}", blobs.display())
    }
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
    fn the_environment_is_read_as_huggingface_hub_reads_it() {
        let vars = |set: &'static [(&str, &str)]| {
            move |key: &str| set.iter().find(|(k, _)| *k == key).map(|(_, v)| (*v).to_owned())
        };
        let o = HubOptions::from_vars(vars(&[]), Some("/home/u".into()));
        assert_eq!(o.cache_dir.unwrap(), Path::new("/home/u/.cache/huggingface/hub"));
        assert!(!o.offline && o.token.is_none() && o.endpoint.is_none());
        let o = HubOptions::from_vars(
            vars(&[("HF_HOME", "/hf"), ("HF_HUB_OFFLINE", "True"), ("HF_TOKEN", " t\n"), ("HF_ENDPOINT", "http://h/")]),
            None,
        );
        assert_eq!(o.cache_dir.as_deref(), Some(Path::new("/hf/hub")));
        assert_eq!((o.offline, o.token.as_deref(), o.endpoint.as_deref()), (true, Some("t"), Some("http://h")));
        assert!(!format!("{o:?}").contains("\"t\""), "the token is not printed");
        let o = HubOptions::from_vars(vars(&[("HF_HUB_CACHE", "/c"), ("HF_HUB_OFFLINE", "0")]), None);
        assert_eq!((o.cache_dir.as_deref(), o.offline), (Some(Path::new("/c")), false));
        assert_eq!(
            HubOptions::from_vars(vars(&[("XDG_CACHE_HOME", "/x")]), None).cache_dir.unwrap(),
            Path::new("/x/huggingface/hub")
        );
    }

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
