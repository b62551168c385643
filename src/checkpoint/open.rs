//! A model's files as a set of mapped, checked tensors.

use super::gguf::{Gguf, Rules, gguf_name};
use super::limits::{MAX_CONFIG_SIZE, MAX_TENSORS};
use super::{DenseView, ModelFiles, StoredType, TensorInfo, TensorView, header, index};
use crate::backend::DenseType;
use crate::backend::host::MappedFile;
use crate::{Error, Result};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Name of an unsharded checkpoint's weights.
pub(super) const SINGLE_FILE: &str = "model.safetensors";
/// Name of a sharded checkpoint's index.
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";
/// Name of a checkpoint's configuration.
pub(super) const CONFIG_FILE: &str = "config.json";

/// An open checkpoint: `config.json` and the tensors of one or several memory-mapped safetensors files, or a GGUF file
/// in the same terms.
///
/// Nothing is copied when it is opened; tensors are read on demand, from any thread.
#[derive(Debug)]
pub struct Checkpoint {
    source: ModelFiles,
    config_path: PathBuf,
    config: String,
    files: Vec<Arc<MappedFile>>,
    /// Sorted by name.
    tensors: Vec<TensorInfo>,
    /// The file that lists the tensors: the index, or the only file. Named when a tensor is missing.
    listing: PathBuf,
    /// How a GGUF file's weights are read.
    gguf: Option<Rules>,
}

impl Checkpoint {
    /// Opens a directory that holds `config.json` and `model.safetensors`, or the shards that
    /// `model.safetensors.index.json` lists, or exactly one other `*.safetensors` file; a GGUF file, whose tensors get the
    /// names of Hugging Face's checkpoints; or the built-in model.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::File`], [`Error::Tensor`] or (GGUF) [`Error::Config`], naming the file, for anything missing,
    /// malformed, truncated or contradictory. See [`header::parse`], [`super::gguf::Header::parse`] and [`super::limits`].
    pub fn open(files: impl Into<ModelFiles>) -> Result<Self> {
        match files.into() {
            ModelFiles::Directory(dir) => Self::open_dir(dir),
            source @ ModelFiles::Gguf { .. } => Self::open_gguf(source),
            source @ ModelFiles::Builtin => Self::open_embedded(source),
        }
    }

    fn open_gguf(source: ModelFiles) -> Result<Self> {
        let (path, layout) = (source.path(CONFIG_FILE), source.i2s_layout());
        let gguf = Gguf::open(&path)?;
        let rules = Rules::of(&gguf, layout)?;
        let (config, tensors) = (gguf.config_json()?, gguf.renamed()?);
        let files = vec![Arc::clone(gguf.file())];
        Ok(Self { source, config_path: path.clone(), config, files, tensors, listing: path, gguf: Some(rules) })
    }

    fn open_embedded(source: ModelFiles) -> Result<Self> {
        let (config_path, listing) = (source.path(CONFIG_FILE), source.path(SINGLE_FILE));
        let bytes = |name: &str| source.embedded(name).unwrap_or_default();
        let config =
            std::str::from_utf8(bytes(CONFIG_FILE)).map_err(|_| Error::file(&config_path, "not UTF-8 text"))?;
        let file = MappedFile::embedded(&listing, bytes(SINGLE_FILE));
        let tensors = header::parse(&listing, file.bytes())?;
        let (config, files) = (config.to_owned(), vec![Arc::new(file)]);
        Ok(Self { source, config_path, config, files, tensors, listing, gguf: None })
    }

    fn open_dir(dir: PathBuf) -> Result<Self> {
        let dir = dir.as_path();
        let meta = std::fs::metadata(dir).map_err(|e| Error::io(dir, e))?;
        if !meta.is_dir() {
            return Err(Error::file(
                dir,
                "not a directory; a checkpoint is a directory with config.json and *.safetensors",
            ));
        }
        let config_path = dir.join(CONFIG_FILE);
        let config = read_text(&config_path, MAX_CONFIG_SIZE).map_err(|e| match e {
            Error::Io { path, source } if source.kind() == io::ErrorKind::NotFound => {
                Error::file(path, "not found; a checkpoint is a directory with config.json and *.safetensors")
            }
            e => e,
        })?;
        let index_path = dir.join(INDEX_FILE);
        let single = dir.join(SINGLE_FILE);
        // symlink_metadata, so that a dangling link is an error that names it rather than "no such file".
        let (files, tensors, listing) = if single.symlink_metadata().is_ok() {
            open_single(single)?
        } else if index_path.symlink_metadata().is_ok() {
            open_shards(dir, index_path)?
        } else {
            open_single(only_safetensors(dir)?)?
        };
        let source = ModelFiles::Directory(dir.to_owned());
        Ok(Self { source, config_path, config, files, tensors, listing, gguf: None })
    }

    /// What was opened.
    pub fn source(&self) -> &ModelFiles {
        &self.source
    }

    /// Whether this is a GGUF file.
    pub fn is_gguf(&self) -> bool {
        self.gguf.is_some()
    }

    pub(super) fn gguf_rules(&self) -> Option<&Rules> {
        self.gguf.as_ref()
    }

    /// Path and text of `config.json`; of a GGUF file its own, and its metadata in the terms of config.json.
    pub fn config(&self) -> (&Path, &str) {
        (&self.config_path, &self.config)
    }

    /// The mapped files; [`TensorInfo::file`] counts them.
    pub fn files(&self) -> &[Arc<MappedFile>] {
        &self.files
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.iter()
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.iter().map(|t| t.name.as_str())
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensor(name).is_some()
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let at = self.tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok()?;
        let info = self.tensors.get(at)?;
        Some(TensorView { info, file: self.files.get(info.file)? })
    }

    /// The tensor of this name, which must be there.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is not.
    pub fn require(&self, name: &str) -> Result<TensorView<'_>> {
        self.tensor(name).ok_or_else(|| {
            let stored = self.gguf.and_then(|_| gguf_name(name));
            let name = stored.as_deref().unwrap_or(name);
            Error::tensor(&self.listing, name, "missing, although the configuration calls for it")
        })
    }

    /// A dense matrix `[rows, cols]` of F32, F16 or BF16; its values stay in the file.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing or of another shape or type.
    pub fn dense(&self, name: &str, rows: usize, cols: usize) -> Result<DenseView> {
        let view = self.require(name)?;
        let dtype = DenseType::from_stored(view.info.dtype).ok_or_else(|| {
            view.error(format!(
                "{} where F32, F16 or BF16 is expected: packed weights need a BitLinear",
                view.info.dtype
            ))
        })?;
        if view.info.shape != [rows, cols] {
            return Err(view.error(format!("shape {:?} where [{rows}, {cols}] is expected", view.info.shape)));
        }
        Ok(DenseView::new(dtype, rows, cols, Arc::clone(view.file), view.info.range.clone()))
    }

    /// A vector of `len` F32, F16 or BF16 values, widened to f32.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing, of another shape or type, or holds NaN or infinities.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let view = self.require(name)?;
        if view.info.shape != [len] {
            return Err(view.error(format!("shape {:?} where [{len}] is expected", view.info.shape)));
        }
        let values = view.floats()?;
        match values.iter().position(|v| !v.is_finite()) {
            Some(at) => Err(view.error(format!("value {at} is {}", values[at]))),
            None => Ok(values),
        }
    }
}

impl TensorView<'_> {
    /// An error that names this tensor and its file.
    pub(crate) fn error(&self, reason: impl Into<String>) -> Error {
        Error::tensor(self.file.path(), self.stored_name(), reason)
    }

    /// All values as f32.
    pub(super) fn floats(&self) -> Result<Vec<f32>> {
        let dtype = DenseType::from_stored(self.info.dtype)
            .ok_or_else(|| self.error(format!("{} where F32, F16 or BF16 is expected", self.info.dtype)))?;
        let mut out = vec![0.0; self.info.elements()];
        dtype.widen(self.bytes(), &mut out);
        Ok(out)
    }
}

type Opened = (Vec<Arc<MappedFile>>, Vec<TensorInfo>, PathBuf);

fn open_single(path: PathBuf) -> Result<Opened> {
    let file = map(&path)?;
    let tensors = header::parse(&path, file.bytes())?;
    if tensors.is_empty() {
        return Err(Error::file(path, "holds no tensors"));
    }
    Ok((vec![Arc::new(file)], tensors, path))
}

fn open_shards(dir: &Path, index_path: PathBuf) -> Result<Opened> {
    let index_file = map(&index_path)?;
    let index = index::parse(&index_path, index_file.bytes())?;
    let mut files = Vec::with_capacity(index.shards.len());
    let mut tensors: Vec<TensorInfo> = Vec::with_capacity(index.entries.len());
    for shard in &index.shards {
        let path = dir.join(shard);
        let file = map(&path)?;
        let found = header::parse(&path, file.bytes())?;
        if tensors.len() + found.len() > MAX_TENSORS {
            return Err(Error::file(path, format!("more than {MAX_TENSORS} tensors in all shards together")));
        }
        tensors.reserve_exact(found.len());
        tensors.extend(found.into_iter().map(|t| TensorInfo { file: files.len(), ..t }));
        files.push(Arc::new(file));
    }
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    let path_of = |t: &TensorInfo| files.get(t.file).map_or(index_path.as_path(), |f| f.path());
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        let reason = format!("also in {}: a tensor belongs to one shard", path_of(&pair[0]).display());
        return Err(Error::tensor(path_of(&pair[1]), &pair[1].name, reason));
    }
    for (name, shard) in &index.entries {
        let found = tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok().and_then(|at| tensors.get(at));
        if found.is_none_or(|t| t.file != *shard as usize) {
            let file = files.get(*shard as usize).map_or(index_path.as_path(), |f| f.path());
            return Err(Error::tensor(file, *name, format!("not in this shard, although {INDEX_FILE} says so")));
        }
    }
    Ok((files, tensors, index_path))
}

/// Maps a file that is a regular one; the check comes first because opening a pipe would wait for its writer.
pub(super) fn map(path: &Path) -> Result<MappedFile> {
    check_regular(path)?;
    MappedFile::open(path)
}

fn check_regular(path: &Path) -> Result<()> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_file() => Ok(()),
        Ok(_) => Err(Error::file(path, "not a regular file")),
        Err(e) if e.kind() == io::ErrorKind::NotFound && path.symlink_metadata().is_ok() => {
            Err(Error::file(path, "a link to a file that does not exist"))
        }
        Err(e) => Err(Error::io(path, e)),
    }
}

/// A whole text file of at most `limit` bytes.
pub(super) fn read_text(path: &Path, limit: u64) -> Result<String> {
    check_regular(path)?;
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let size = file.metadata().map_err(|e| Error::io(path, e))?.len();
    if size > limit {
        return Err(Error::file(path, format!("{size} bytes; at most {limit} are accepted")));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    file.take(limit).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    String::from_utf8(bytes).map_err(|_| Error::file(path, "not UTF-8 text"))
}

/// The one `*.safetensors` file of a directory.
fn only_safetensors(dir: &Path) -> Result<PathBuf> {
    let mut only = None;
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        if path.extension().is_some_and(|e| e == "safetensors") && only.replace(path).is_some() {
            return Err(Error::file(
                dir,
                format!("several *.safetensors files, but neither {SINGLE_FILE} nor {INDEX_FILE} to choose by"),
            ));
        }
    }
    only.ok_or_else(|| {
        Error::file(dir, format!("no weights: expected {SINGLE_FILE}, {INDEX_FILE} or one *.safetensors file"))
    })
}

impl DenseType {
    /// The dense type of a stored one, if it is one.
    pub fn from_stored(dtype: StoredType) -> Option<Self> {
        match dtype {
            StoredType::F32 => Some(Self::F32),
            StoredType::F16 => Some(Self::F16),
            StoredType::BF16 => Some(Self::BF16),
            _ => None,
        }
    }

    /// The stored type of the same values.
    pub fn stored(self) -> StoredType {
        match self {
            Self::F32 => StoredType::F32,
            Self::F16 => StoredType::F16,
            Self::BF16 => StoredType::BF16,
        }
    }
}
