//! Writes safetensors as the hub has them: one file or shards with an index, streamed, never half there.
//!
//! Everything is written to temporary files in the target directory, synchronised and then renamed, so that a
//! reader sees the old file or the new one, and an error or a crash leaves nothing under the final names.

use super::header::check_name;
use super::limits::{MAX_DIMS, MAX_HEADER_SIZE, MAX_SHARDS, MAX_TENSORS};
use super::open::{INDEX_FILE, SINGLE_FILE};
use super::{StoredType, header};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Bytes of a shard unless the caller says otherwise.
pub const DEFAULT_SHARD_BYTES: u64 = 4_000_000_000;

/// How the names of files begin that are not complete yet.
pub(crate) const UNFINISHED: &str = ".writing-";

/// Writes a tensor's bytes, little-endian, row-major.
pub type Producer<'a> = Box<dyn FnMut(&mut dyn Write) -> io::Result<()> + 'a>;

/// A tensor to be written, whose bytes are produced when its turn comes.
pub struct Entry<'a> {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: StoredType,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    produce: Producer<'a>,
}

impl fmt::Debug for Entry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entry({} {} {:?})", self.name, self.dtype, self.shape)
    }
}

impl<'a> Entry<'a> {
    /// A tensor whose bytes `produce` writes.
    pub fn new(
        name: impl Into<String>,
        dtype: StoredType,
        shape: impl Into<Vec<usize>>,
        produce: impl FnMut(&mut dyn Write) -> io::Result<()> + 'a,
    ) -> Self {
        Self { name: name.into(), dtype, shape: shape.into(), produce: Box::new(produce) }
    }

    /// A tensor whose bytes are there already.
    pub fn from_bytes(
        name: impl Into<String>,
        dtype: StoredType,
        shape: impl Into<Vec<usize>>,
        bytes: Vec<u8>,
    ) -> Self {
        Self::new(name, dtype, shape, move |out| out.write_all(&bytes))
    }

    /// Bytes of the tensor, after checking everything that a reader will check.
    fn check(&self, file: &Path) -> Result<u64> {
        let bad = |reason: String| Error::tensor(file, &self.name, reason);
        check_name(&self.name).map_err(bad)?;
        if self.name.contains(['"', '\\']) || self.name == header::METADATA {
            return Err(bad("this name cannot be written".into()));
        }
        if self.shape.len() > MAX_DIMS {
            return Err(bad(format!("{} dimensions; at most {MAX_DIMS} can be written", self.shape.len())));
        }
        if let StoredType::Ggml(dtype) = self.dtype {
            return Err(bad(format!("safetensors has no type {dtype}")));
        }
        self.bytes().map_err(bad)
    }

    /// Bytes of the tensor.
    ///
    /// # Errors
    /// What does not fit.
    pub(crate) fn bytes(&self) -> Result<u64, String> {
        self.dtype.bytes_of(&self.shape).map(|n| n as u64)
    }

    /// Writes the tensor's bytes, of which there must be as many as its shape says; `file` names them in errors.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there are not, or if the producer or `out` fails.
    pub(super) fn write(&mut self, file: &Path, out: &mut dyn Write, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let bad = |reason: String| Error::tensor(file, &self.name, reason);
        let expected = self.dtype.bytes_of(&self.shape).map_err(bad)? as u64;
        let mut counted = Counted { out, written: 0, progress };
        (self.produce)(&mut counted).map_err(|e| bad(format!("writing it: {e}")))?;
        match counted.written {
            n if n == expected => Ok(()),
            n => Err(bad(format!("{n} bytes were produced where its shape needs {expected}"))),
        }
    }
}

/// Writes one safetensors file with these tensors, replacing what was there. `progress` is told the bytes
/// written since it was last called.
///
/// # Errors
/// [`Error::Tensor`] for a tensor that could not be read back or whose producer wrote another number of bytes
/// than its shape says, [`Error::Io`] if the system or a producer fails. The target is then unchanged.
pub fn write_file(path: &Path, entries: Vec<Entry>, progress: &mut dyn FnMut(u64)) -> Result<()> {
    check_unique(path, &entries)?;
    Pending::write(path.to_owned(), entries, progress)?.commit().map(drop)
}

/// Writes `model.safetensors`, or shards of at most `shard_bytes` (but at least one tensor) with their index.
/// Returns the files' paths. Tensors are put into shards in the order given.
///
/// # Errors
/// As [`write_file`]; nothing is left in the directory.
pub fn write_checkpoint(
    dir: &Path,
    entries: Vec<Entry>,
    shard_bytes: u64,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<PathBuf>> {
    check_unique(dir, &entries)?;
    let mut shards: Vec<Vec<Entry>> = Vec::new();
    let (mut total, mut filled) = (0u64, 0u64);
    for entry in entries {
        let bytes = entry.check(dir)?;
        total = total.saturating_add(bytes);
        match shards.last_mut() {
            Some(shard) if filled.saturating_add(bytes) <= shard_bytes => {
                filled += bytes;
                shard.push(entry);
            }
            _ => {
                filled = bytes;
                shards.push(vec![entry]);
            }
        }
    }
    let count = shards.len();
    if count > MAX_SHARDS {
        return Err(Error::file(
            dir,
            format!("{count} shards; at most {MAX_SHARDS} can be read back: make them larger"),
        ));
    }
    let mut pending = Vec::with_capacity(count + 1);
    let mut weight_map = Map::new();
    for (i, shard) in shards.into_iter().enumerate() {
        let name = match count {
            1 => SINGLE_FILE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        weight_map.extend(shard.iter().map(|e| (e.name.clone(), Value::from(name.as_str()))));
        pending.push(Pending::write(dir.join(name), shard, progress)?);
    }
    if count > 1 {
        weight_map.sort_keys();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        pending.push(Pending::text(dir.join(INDEX_FILE), &format!("{index:#}\n"))?);
    }
    let mut done: Vec<PathBuf> = Vec::with_capacity(pending.len());
    for file in pending {
        match file.commit() {
            Ok(path) => done.push(path),
            Err(e) => {
                // Best effort: the error to report is the first one.
                done.iter().for_each(|path| drop(std::fs::remove_file(path)));
                return Err(e);
            }
        }
    }
    Ok(done)
}

/// Writes a text file, replacing what was there.
///
/// # Errors
/// [`Error::Io`]; the target is then unchanged.
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    Pending::text(path.to_owned(), text)?.commit().map(drop)
}

/// An ordinary new file in `dir`, under the user's umask, removed unless it is renamed; its name begins with `prefix`, a
/// dot first, and ends with `suffix`.
pub(crate) fn unfinished(dir: &Path, prefix: &str, suffix: &str) -> Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix).suffix(suffix);
    // Temporary files are private by default.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(dir).map_err(|e| Error::io(dir, e))
}

/// The directory that a file is in.
pub(crate) fn directory_of(file: &Path) -> &Path {
    match file.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// Makes new names in a directory durable; not every file system offers that.
pub(crate) fn sync_directory(dir: &Path) {
    if let Ok(dir) = File::open(dir) {
        let _ = dir.sync_all();
    }
}

/// Refuses a directory that holds a checkpoint already, or what could be taken for a part of one: whoever writes a new
/// one must not mix it with another. A directory that does not exist yet is fine.
///
/// # Errors
/// [`Error::Request`] naming what is there.
pub fn check_target(dir: &Path) -> Result<()> {
    let refuse = |what: String| Error::request("output directory", format!("{what}; choose another directory"));
    if dir.exists() && !dir.is_dir() {
        return Err(refuse(format!("{} is not a directory", dir.display())));
    }
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let name = entry.map_err(|e| Error::io(dir, e))?.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".safetensors") || name.ends_with(".json") || name.ends_with(".gguf") {
            return Err(refuse(format!("{} already holds {name}", dir.display())));
        }
    }
    Ok(())
}

pub(super) fn check_unique(file: &Path, entries: &[Entry]) -> Result<()> {
    if entries.is_empty() || entries.len() > MAX_TENSORS {
        return Err(Error::file(file, format!("{} tensors; 1 to {MAX_TENSORS} can be written", entries.len())));
    }
    let mut names: Vec<&str> = entries.iter().map(|e| e.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Error::tensor(file, pair[0], "given twice")),
        None => Ok(()),
    }
}

/// A file that is complete but not yet under its name; removed if dropped.
struct Pending {
    temp: NamedTempFile,
    path: PathBuf,
}

impl Pending {
    fn create(path: PathBuf) -> Result<Self> {
        let temp = unfinished(directory_of(&path), UNFINISHED, "")?;
        Ok(Self { temp, path })
    }

    fn text(path: PathBuf, text: &str) -> Result<Self> {
        let mut pending = Self::create(path)?;
        match pending.temp.write_all(text.as_bytes()) {
            Ok(()) => Ok(pending),
            Err(e) => Err(Error::io(pending.path, e)),
        }
    }

    fn write(path: PathBuf, mut entries: Vec<Entry>, progress: &mut dyn FnMut(u64)) -> Result<Self> {
        // The reference implementation's order: wide types first keeps every tensor aligned.
        entries.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then_with(|| a.name.cmp(&b.name)));
        let mut header = Map::new();
        header.insert(header::METADATA.into(), json!({ "format": "pt" }));
        let mut offset = 0u64;
        for entry in &entries {
            let end = offset + entry.check(&path)?;
            let (dtype, shape) = (entry.dtype.name(), &entry.shape);
            header.insert(entry.name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [offset, end] }));
            offset = end;
        }
        let mut text = Value::Object(header).to_string();
        // Spaces up to a multiple of 8 keep the data behind the header aligned.
        text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
        if text.len() > MAX_HEADER_SIZE {
            return Err(Error::file(path, format!("a header of {} bytes could not be read back", text.len())));
        }
        let mut pending = Self::create(path)?;
        let path = &pending.path;
        let io_error = |e| Error::io(path, e);
        let mut out = BufWriter::with_capacity(1 << 20, pending.temp.as_file_mut());
        out.write_all(&(text.len() as u64).to_le_bytes()).map_err(io_error)?;
        out.write_all(text.as_bytes()).map_err(io_error)?;
        progress(8 + text.len() as u64);
        for entry in &mut entries {
            entry.write(path, &mut out, progress)?;
        }
        out.flush().map_err(io_error)?;
        drop(out);
        Ok(pending)
    }

    fn commit(self) -> Result<PathBuf> {
        let Self { temp, path } = self;
        temp.as_file().sync_all().map_err(|e| Error::io(&path, e))?;
        temp.persist(&path).map_err(|e| Error::io(&path, e.error))?;
        sync_directory(directory_of(&path));
        Ok(path)
    }
}

struct Counted<'w> {
    out: &'w mut dyn Write,
    written: u64,
    progress: &'w mut dyn FnMut(u64),
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.written += n as u64;
        (self.progress)(n as u64);
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
