//! Files of a commit into the cache: several at once, resumed where an earlier download broke off, and checked.

use super::client::{Client, Identity, Refusal, header};
use super::layout::Repository;
use crate::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Files that are downloaded at a time.
const PARALLEL: usize = 4;
/// Attempts in a row that bring no byte, before a file is given up.
const ATTEMPTS: u32 = 4;
/// Bytes that are read at a time.
const CHUNK: usize = 128 << 10;

/// A file that is wanted.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub name: String,
    /// Where the hub's list tells it.
    pub identity: Option<Identity>,
}

/// Why a file did not come.
#[derive(Debug)]
pub(super) enum Broken {
    /// The hub gave none.
    Refused(Refusal),
    /// What came is not what was promised.
    Damaged(String),
    /// Another process downloads it.
    Busy,
    /// Somebody else's failure ended it.
    Stopped,
    /// The cache could not be written.
    Cache(Error),
}

impl From<Refusal> for Broken {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Downloads of one commit.
pub(super) struct Downloads<'a> {
    pub client: &'a Client<'a>,
    pub repository: &'a Repository,
    pub id: &'a str,
    pub commit: &'a str,
    /// Longest wait between attempts, and for another process.
    pub patience: Duration,
    pub bar: &'a ProgressBar,
}

/// One bar for all files of a model.
pub(super) fn bar(visible: bool) -> ProgressBar {
    if !visible {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(
        "{msg} [{elapsed_precise}] [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} ({eta})",
    );
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())).with_message("downloading")
}

impl Downloads<'_> {
    /// Brings all of these files into the snapshot.
    ///
    /// # Errors
    /// The first failure, with its file; the others are ended, and what they brought is kept for next time.
    pub fn fetch(&self, files: &[Wanted]) -> Result<(), (String, Broken)> {
        let missing: Vec<&Wanted> = files.iter().filter(|f| !self.repository.has(self.commit, &f.name)).collect();
        let size = |f: &&&Wanted| f.identity.as_ref().and_then(|i| i.size).unwrap_or(0);
        self.bar.inc_length(missing.iter().map(|f| size(&f)).sum());
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let failure: Mutex<Option<(String, Broken)>> = Mutex::new(None);
        let work = || {
            while let Some(file) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(broken) = self.file(file, &stop) {
                    stop.store(true, Ordering::Relaxed);
                    let mut first = failure.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert_with(|| (file.name.clone(), broken));
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..missing.len().min(PARALLEL) {
                scope.spawn(work);
            }
            work();
        });
        match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    fn file(&self, wanted: &Wanted, stop: &AtomicBool) -> Result<(), Broken> {
        let url = self.client.url(self.id, self.commit, &wanted.name);
        let identity = match &wanted.identity {
            Some(identity) => identity.clone(),
            None => self.client.identity(&url)?,
        };
        let blob = self.repository.blob(&identity.etag);
        if !blob.is_file() {
            let parent = blob.parent().unwrap_or(&blob);
            std::fs::create_dir_all(parent).map_err(|e| Broken::Cache(Error::io(parent, e)))?;
            let path = self.repository.incomplete(&identity.etag);
            let cache = |e: io::Error| Broken::Cache(Error::io(&path, e));
            let mut part =
                OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(cache)?;
            self.lock(&part, &path)?;
            // Another process may have finished it while this one waited.
            if !blob.is_file() {
                self.content(&mut part, &path, &url, &identity, stop)?;
                part.sync_all().map_err(cache)?;
                std::fs::rename(&path, &blob).map_err(|e| Broken::Cache(Error::io(&blob, e)))?;
            }
        }
        self.repository.link(self.commit, &wanted.name, &identity.etag).map_err(Broken::Cache)
    }

    /// Waits for its turn: two processes that write one file would garble it.
    fn lock(&self, part: &File, path: &Path) -> Result<(), Broken> {
        let start = Instant::now();
        loop {
            match part.try_lock() {
                Ok(()) => return Ok(()),
                Err(TryLockError::WouldBlock) if start.elapsed() < self.patience => {
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(TryLockError::WouldBlock) => return Err(Broken::Busy),
                // Some file systems have no locks; then there is nothing to wait for.
                Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => return Ok(()),
                Err(TryLockError::Error(e)) => return Err(Broken::Cache(Error::io(path, e))),
            }
        }
    }

    /// Completes the file: from where it ends, again after every interruption that came after some progress.
    fn content(
        &self,
        part: &mut File,
        path: &Path,
        url: &str,
        identity: &Identity,
        stop: &AtomicBool,
    ) -> Result<(), Broken> {
        let cache = |e: io::Error| Broken::Cache(Error::io(path, e));
        let mut have = part.seek(SeekFrom::End(0)).map_err(cache)?;
        self.bar.inc(have);
        // A server that begins anew every time and never ends would otherwise look like progress.
        let mut furthest = have;
        let (mut failures, mut restarted) = (0, false);
        loop {
            let done = match identity.size {
                Some(size) if have == size => Ok(Some(size)),
                size => self.piece(part, path, url, &mut have, size, stop),
            };
            let refusal = match done {
                Ok(total) => match self.check(part, path, identity, total)? {
                    None => return Ok(()),
                    Some(_) if !restarted => {
                        // An earlier download may have left a damaged part: once more from the beginning.
                        restarted = true;
                        self.rewind(part, &mut have).map_err(cache)?;
                        continue;
                    }
                    Some(reason) => {
                        self.rewind(part, &mut have).map_err(cache)?;
                        return Err(Broken::Damaged(reason));
                    }
                },
                Err(Broken::Refused(refusal)) => {
                    if have > furthest {
                        (furthest, failures) = (have, 0);
                    }
                    refusal
                }
                Err(broken) => return Err(broken),
            };
            let wait = match &refusal {
                // What is there may be longer than the file.
                Refusal::Status { status: 416, .. } if !restarted => {
                    restarted = true;
                    self.rewind(part, &mut have).map_err(cache)?;
                    continue;
                }
                Refusal::Status { status: 429, retry_after, .. } => retry_after.map(Duration::from_secs),
                Refusal::Status { status: 500.., .. } | Refusal::Network(_) => None,
                _ => return Err(refusal.into()),
            };
            failures += 1;
            let wait = wait.unwrap_or(Duration::from_millis(250) * 2u32.pow(failures));
            // Nobody waits for an hour because a server says so.
            if failures >= ATTEMPTS || matches!(refusal, Refusal::Status { status: 429, .. }) && wait > self.patience {
                return Err(refusal.into());
            }
            std::thread::sleep(wait.min(self.patience));
            if stop.load(Ordering::Relaxed) {
                return Err(Broken::Stopped);
            }
        }
    }

    /// One request, from `have` on; the size of the whole file if the answer tells it. Of more than `size` bytes only the
    /// beginning is taken.
    fn piece(
        &self,
        part: &mut File,
        path: &Path,
        url: &str,
        have: &mut u64,
        size: Option<u64>,
        stop: &AtomicBool,
    ) -> Result<Option<u64>, Broken> {
        let cache = |e: io::Error| Broken::Cache(Error::io(path, e));
        let response = self.client.get(url, *have)?;
        let total = if response.status().as_u16() == 206 {
            let range = header(response.headers(), "content-range").and_then(content_range);
            match range {
                Some((from, total)) if from == *have => total,
                _ => {
                    let reason = format!("it was asked for what follows byte {have}, and sends something else");
                    return Err(Refusal::Nonsense(reason).into());
                }
            }
        } else {
            // The whole file, whatever was asked for.
            self.rewind(part, have).map_err(cache)?;
            response.body().content_length()
        };
        part.seek(SeekFrom::Start(*have)).map_err(cache)?;
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; CHUNK];
        while size.is_none_or(|size| *have <= size) {
            if stop.load(Ordering::Relaxed) {
                return Err(Broken::Stopped);
            }
            match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    part.write_all(buffer.get(..n).unwrap_or_default()).map_err(cache)?;
                    *have += n as u64;
                    self.bar.inc(n as u64);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Refusal::Network(e.to_string()).into()),
            }
        }
        match total {
            Some(total) if *have < total && size.is_none_or(|size| *have <= size) => {
                let reason = format!("the connection ended after {have} of {total} bytes");
                Err(Refusal::Network(reason).into())
            }
            total => Ok(total),
        }
    }

    fn rewind(&self, part: &mut File, have: &mut u64) -> io::Result<()> {
        self.bar.dec(*have);
        *have = 0;
        part.set_len(0)?;
        part.rewind()
    }

    /// What is wrong with a file that came whole.
    fn check(
        &self,
        part: &mut File,
        path: &Path,
        identity: &Identity,
        total: Option<u64>,
    ) -> Result<Option<String>, Broken> {
        let cache = |e: io::Error| Broken::Cache(Error::io(path, e));
        let found = part.metadata().map_err(cache)?.len();
        if let Some(size) = identity.size.or(total).filter(|size| *size != found) {
            return Ok(Some(format!("{found} bytes came, {size} were announced")));
        }
        // Git's ids of small files are no plain hashes of their content.
        if identity.etag.len() != 64 || !identity.etag.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(None);
        }
        part.rewind().map_err(cache)?;
        let mut hasher = Sha256::new();
        io::copy(part, &mut hasher).map_err(cache)?;
        let found = format!("{:x}", hasher.finalize());
        let same = found.eq_ignore_ascii_case(&identity.etag);
        Ok((!same).then(|| format!("its SHA-256 is {found}, announced was {}", identity.etag)))
    }
}

/// First byte and size of the whole from `bytes 5-9/10`.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, total.parse().ok()))
}
