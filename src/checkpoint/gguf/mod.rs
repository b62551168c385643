//! GGUF, the file format of llama.cpp and its relatives (ggml `docs/gguf.md`): metadata, tokenizer and tensors in one
//! file. candle's own reader refuses any file that holds ternary types, so this is another.

mod blocks;
mod config;
mod header;
mod linear;
mod names;
mod types;
mod value;
mod write;

pub use blocks::{BlockView, DenseMatrix};
pub use config::Architecture;
pub use header::Header;
pub use names::hugging_face_name;
pub use types::GgmlType;
pub use value::{Array, Value, ValueType};
pub use write::{Metadata, write};

pub(super) use linear::Rules;
pub(crate) use names::gguf_name;

use super::TensorInfo;
use super::open::map;
use crate::backend::host::MappedFile;
use crate::{Error, Result};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use value::Cursor;

/// Name of an array's key and the array that is read.
const TOKENS: &str = "tokenizer.ggml.tokens";

/// An open GGUF file: mapped, its head read and checked.
#[derive(Debug, Clone)]
pub struct Gguf {
    file: Arc<MappedFile>,
    header: Header,
}

impl Gguf {
    /// Opens a file. Nothing but its head is read.
    ///
    /// # Errors
    /// As [`Header::parse`]; [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = Arc::new(map(path)?);
        let header = Header::parse(path, file.bytes())?;
        Ok(Self { file, header })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The mapped file.
    pub fn file(&self) -> &Arc<MappedFile> {
        &self.file
    }

    /// What stands before the tensors' bytes.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The value of a metadata key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.header.get(key)
    }

    /// A text of the metadata.
    ///
    /// # Errors
    /// [`Error::Config`] for another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(found @ Value::Text(range)) => {
                let bytes = self.file.bytes().get(range.clone()).unwrap_or_default();
                match std::str::from_utf8(bytes) {
                    Ok(text) => Ok(Some(text)),
                    Err(_) => self.unexpected(key, found, "UTF-8 text"),
                }
            }
            Some(other) => self.unexpected(key, other, "a string"),
        }
    }

    /// A flag of the metadata.
    ///
    /// # Errors
    /// [`Error::Config`] for another type.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(other) => self.unexpected(key, other, "true or false"),
        }
    }

    /// An array of texts; each is checked to be UTF-8 when it is read.
    ///
    /// # Errors
    /// [`Error::Config`] for another type.
    pub fn strings(&self, key: &str) -> Result<Option<Strings<'_>>> {
        let Some(array) = self.array(key, &[ValueType::Text], "an array of strings")? else { return Ok(None) };
        let cursor = Cursor { bytes: self.file.bytes(), at: array.range.start };
        Ok(Some(Strings { path: self.path(), key: key.to_owned(), cursor, left: array.len }))
    }

    /// An array of numbers, whole or not.
    ///
    /// # Errors
    /// [`Error::Config`] for another type.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        const NUMBERS: [ValueType; 10] = [
            ValueType::U8,
            ValueType::I8,
            ValueType::U16,
            ValueType::I16,
            ValueType::U32,
            ValueType::I32,
            ValueType::U64,
            ValueType::I64,
            ValueType::F32,
            ValueType::F64,
        ];
        let Some(array) = self.array(key, &NUMBERS, "an array of numbers")? else { return Ok(None) };
        let mut cursor = Cursor { bytes: self.file.bytes(), at: array.range.start };
        let mut numbers = Vec::with_capacity(array.len);
        for _ in 0..array.len {
            numbers.push(match cursor.scalar(array.element) {
                Some(Value::Unsigned(n)) => n as f64,
                Some(Value::Signed(n)) => n as f64,
                Some(Value::F32(x)) => f64::from(x),
                Some(Value::F64(x)) => x,
                _ => return Err(Error::config(self.path(), key, "changed while it was read")),
            });
        }
        Ok(Some(numbers))
    }

    fn array(&self, key: &str, elements: &[ValueType], expected: &str) -> Result<Option<&Array>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) if elements.contains(&array.element) => Ok(Some(array)),
            Some(other) => self.unexpected(key, other, expected),
        }
    }

    /// All metadata, to be written to another file as it is here.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, Metadata)> {
        let stored = |place: &Range<usize>| self.file.bytes().get(place.clone()).unwrap_or_default().to_vec();
        let entries = self.header.metadata.iter().zip(&self.header.places);
        entries.map(move |((key, _), place)| (key.as_str(), Metadata::Stored(stored(place))))
    }

    /// The tensors under Hugging Face's names, sorted by them.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a name is taken twice then.
    pub(super) fn renamed(&self) -> Result<Vec<TensorInfo>> {
        let mut tensors: Vec<TensorInfo> = self.header.tensors.iter().cloned().map(names::rename).collect();
        tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        match tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            Some(pair) => Err(Error::tensor(self.path(), &pair[0].name, "there under two names")),
            None => Ok(tensors),
        }
    }

    /// Number of tokens of the tokenizer.
    pub fn tokens(&self) -> Option<usize> {
        match self.get(TOKENS) {
            Some(Value::Array(array)) => Some(array.len),
            _ => None,
        }
    }
}

/// The texts of an array.
#[derive(Debug, Clone)]
pub struct Strings<'a> {
    path: &'a Path,
    key: String,
    cursor: Cursor<'a>,
    left: usize,
}

impl<'a> Iterator for Strings<'a> {
    type Item = Result<&'a str>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let bytes = self.cursor.text().and_then(|range| self.cursor.bytes.get(range));
        Some(match bytes.map(std::str::from_utf8) {
            Some(Ok(text)) => Ok(text),
            Some(Err(_)) => Err(Error::config(self.path, &self.key, "a string that is not UTF-8")),
            None => Err(Error::config(self.path, &self.key, "changed while it was read")),
        })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strings<'_> {}
