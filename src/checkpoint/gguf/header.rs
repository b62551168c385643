//! The head of a GGUF file: metadata and the list of tensors, checked before anything is believed.
//!
//! Layout (ggml `docs/gguf.md`, versions 2 and 3, little-endian): `GGUF`, u32 version, u64 tensors, u64 metadata
//! entries; per entry a key, a type and a value; per tensor a name, u32 dimensions, u64 each (innermost first), u32
//! type, u64 offset; then the tensors' bytes, from the next multiple of `general.alignment` on.

use super::types::stored_type;
use super::value::{Array, Cursor, Value, ValueType};
use crate::checkpoint::header::check_name;
use crate::checkpoint::limits::{
    MAX_DIMS, MAX_GGUF_ALIGNMENT, MAX_GGUF_ARRAY_DEPTH, MAX_GGUF_HEADER_SIZE, MAX_GGUF_KEY_LENGTH, MAX_GGUF_METADATA,
    MAX_TENSORS, quoted,
};
use crate::checkpoint::{StoredType, TensorInfo};
use crate::{Error, Result};
use std::ops::Range;
use std::path::Path;

pub(super) const MAGIC: &[u8; 4] = b"GGUF";
/// Alignment of the tensors where `general.alignment` does not say otherwise.
pub(super) const DEFAULT_ALIGNMENT: usize = 32;
/// Bytes of a metadata entry, at least: length of the key, a byte of it, type, value.
const LEAST_ENTRY: usize = 8 + 1 + 4 + 1;
/// Bytes of a tensor's description, at least: length of the name, a byte of it, dimensions, type, offset.
const LEAST_TENSOR: usize = 8 + 1 + 4 + 4 + 8;

/// What stands before the tensors' bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// What tensors' offsets are multiples of.
    pub alignment: usize,
    /// Keys and values, in the file's order; keys are unique.
    pub metadata: Vec<(String, Value)>,
    /// The tensors in the file's order, under the names that it gives them; shapes outermost first.
    pub tensors: Vec<TensorInfo>,
    /// Where the tensors' bytes begin.
    pub data_start: usize,
    /// Where the metadata's values are in the file, with the types in front of them.
    pub(super) places: Vec<Range<usize>>,
}

impl Header {
    /// Reads and checks the head of a whole file's `bytes`; `file` names it in errors.
    ///
    /// Allocates for at most [`MAX_GGUF_METADATA`] entries and [`MAX_TENSORS`] tensors, and for no more than the bytes that
    /// are there can hold; texts and arrays stay where they are.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Config`] naming a key or [`Error::Tensor`] for anything malformed, truncated, out of a
    /// limit, and for tensors that overlap or run past the end.
    pub fn parse(file: &Path, bytes: &[u8]) -> Result<Self> {
        Parser { file, cursor: Cursor { bytes: bytes.get(..MAX_GGUF_HEADER_SIZE).unwrap_or(bytes), at: 0 } }
            .parse(bytes.len())
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }
}

struct Parser<'a> {
    file: &'a Path,
    cursor: Cursor<'a>,
}

impl Parser<'_> {
    fn fail<T>(&self, reason: impl Into<String>) -> Result<T> {
        Err(Error::file(self.file, reason))
    }

    fn truncated<T>(&self, what: &str) -> Result<T> {
        match self.cursor.bytes.len() {
            MAX_GGUF_HEADER_SIZE => self
                .fail(format!("{what} lies beyond {MAX_GGUF_HEADER_SIZE} bytes, the most that is read before tensors")),
            len => self.fail(format!("{what} runs past the end of the file ({len} bytes): truncated?")),
        }
    }

    fn parse(mut self, file_len: usize) -> Result<Header> {
        if self.cursor.bytes.starts_with(b"version https://git-lfs") {
            return self.fail("this is a Git LFS pointer, not the file itself: run `git lfs pull`");
        }
        if self.cursor.take(4) != Some(MAGIC) {
            return self.fail("not a GGUF file: it does not begin with GGUF");
        }
        let (Some(version), Some(tensors), Some(entries)) = (self.cursor.u32(), self.cursor.u64(), self.cursor.u64())
        else {
            return self.truncated("the header");
        };
        match version {
            2 | 3 => {}
            1 => return self.fail("GGUF version 1 is not supported; convert the model again with a newer converter"),
            v if (1..=3).contains(&v.swap_bytes()) => return self.fail("a big-endian GGUF file is not supported"),
            v => return self.fail(format!("GGUF version {v} is not supported, only 2 and 3")),
        }
        let entries = self.count(entries, MAX_GGUF_METADATA, LEAST_ENTRY, "metadata entries")?;
        let tensors = self.count(tensors, MAX_TENSORS, LEAST_TENSOR, "tensors")?;
        let mut metadata: Vec<(String, Value)> = Vec::with_capacity(entries);
        let mut places = Vec::with_capacity(entries);
        for _ in 0..entries {
            let (key, value, place) = self.entry()?;
            metadata.push((key, value));
            places.push(place);
        }
        let mut keys: Vec<&str> = metadata.iter().map(|(k, _)| k.as_str()).collect();
        keys.sort_unstable();
        if let Some(pair) = keys.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::config(self.file, pair[0], "given twice"));
        }
        let alignment = self.alignment(&metadata)?;
        let mut infos = Vec::with_capacity(tensors);
        for _ in 0..tensors {
            infos.push(self.tensor(alignment)?);
        }
        // Room was checked for what the header says; the tensors' bytes are checked against the whole file.
        let data_start = match self.cursor.at.checked_next_multiple_of(alignment) {
            Some(at) if at <= file_len || infos.is_empty() => at.min(file_len),
            _ => return self.fail(format!("ends before its tensors ({file_len} bytes): truncated?")),
        };
        for info in &mut infos {
            let range = |r: &Range<usize>| Some(r.start.checked_add(data_start)?..r.end.checked_add(data_start)?);
            match range(&info.range).filter(|r| r.end <= file_len) {
                Some(range) => info.range = range,
                None => {
                    let reason = format!(
                        "its bytes {} to {} run past the end of the file ({} bytes of data): truncated?",
                        info.range.start,
                        info.range.end,
                        file_len - data_start
                    );
                    return Err(Error::tensor(self.file, &info.name, reason));
                }
            }
        }
        check_apart(self.file, &infos)?;
        Ok(Header { version, alignment, metadata, tensors: infos, data_start, places })
    }

    /// A number of things that the rest of the file can hold.
    fn count(&self, count: u64, most: usize, least_bytes: usize, what: &str) -> Result<usize> {
        match usize::try_from(count) {
            Ok(n) if n > most => self.fail(format!("lists {n} {what}; at most {most} are accepted")),
            Ok(n) if n.saturating_mul(least_bytes) <= self.cursor.left() => Ok(n),
            _ => self.fail(format!("lists {count} {what}, more than its bytes can hold: damaged or truncated")),
        }
    }

    fn entry(&mut self) -> Result<(String, Value, Range<usize>)> {
        let Some(key) = self.cursor.text() else { return self.truncated("a metadata key") };
        let key = self.cursor.bytes.get(key).unwrap_or_default();
        let key = match std::str::from_utf8(key) {
            Ok(key) if !key.is_empty() && key.len() <= MAX_GGUF_KEY_LENGTH => key.to_owned(),
            Ok(key) => {
                let len = key.len();
                return self.fail(format!("a metadata key has {len} bytes; 1 to {MAX_GGUF_KEY_LENGTH} are accepted"));
            }
            Err(_) => return self.fail("a metadata key is not UTF-8"),
        };
        if key.chars().any(char::is_control) {
            return self.fail(format!("metadata key {:?} holds control characters", quoted(&key)));
        }
        let start = self.cursor.at;
        let value = self.value().map_err(|e| Error::config(self.file, quoted(&key), e))?;
        Ok((key, value, start..self.cursor.at))
    }

    fn value(&mut self) -> Result<Value, String> {
        let kind = value_type(&mut self.cursor)?;
        match kind {
            ValueType::Text => {
                let range = self.cursor.text().ok_or_else(past_the_end)?;
                match std::str::from_utf8(self.cursor.bytes.get(range.clone()).unwrap_or_default()) {
                    Ok(_) => Ok(Value::Text(range)),
                    Err(_) => Err("not UTF-8".into()),
                }
            }
            ValueType::Array => array(&mut self.cursor, 1).map(Value::Array),
            kind if self.cursor.left() < kind.least_bytes() => Err(past_the_end()),
            kind => self.cursor.scalar(kind).ok_or_else(|| "a bool that is neither 0 nor 1".into()),
        }
    }

    fn alignment(&self, metadata: &[(String, Value)]) -> Result<usize> {
        let key = "general.alignment";
        let found = match metadata.iter().find(|(k, _)| k == key) {
            None => return Ok(DEFAULT_ALIGNMENT),
            Some((_, Value::Unsigned(n))) => usize::try_from(*n).unwrap_or(usize::MAX),
            Some((_, other)) => {
                let reason = format!("{} where a whole number is expected", other.describe());
                return Err(Error::config(self.file, key, reason));
            }
        };
        // Blocks are read in place, and hold f32 and f16.
        if !found.is_power_of_two() || !(8..=MAX_GGUF_ALIGNMENT).contains(&found) {
            let reason = format!("{found} is not a power of two from 8 to {MAX_GGUF_ALIGNMENT}");
            return Err(Error::config(self.file, key, reason));
        }
        Ok(found)
    }

    /// A tensor's description; its range counts from the beginning of the data.
    fn tensor(&mut self, alignment: usize) -> Result<TensorInfo> {
        let Some(name) = self.cursor.text() else { return self.truncated("a tensor's name") };
        let name = match std::str::from_utf8(self.cursor.bytes.get(name).unwrap_or_default()) {
            Ok(name) => name,
            Err(_) => return self.fail("a tensor's name is not UTF-8"),
        };
        if let Err(reason) = check_name(name) {
            return self.fail(quoted(&reason));
        }
        let (name, file) = (name.to_owned(), self.file);
        let described = describe(&mut self.cursor, alignment).map_err(|e| Error::tensor(file, &name, e))?;
        let (shape, dtype, range) = described;
        Ok(TensorInfo { name, stored_name: None, dtype, shape, file: 0, range })
    }
}

fn past_the_end() -> String {
    "runs past the end of the file: truncated?".into()
}

fn value_type(cursor: &mut Cursor) -> Result<ValueType, String> {
    let id = cursor.u32().ok_or_else(past_the_end)?;
    ValueType::from_id(id).ok_or_else(|| format!("value type {id} does not exist"))
}

/// An array at this depth, skipped; its work is bounded by its bytes.
fn array(cursor: &mut Cursor, depth: usize) -> Result<Array, String> {
    let element = value_type(cursor)?;
    let len = cursor.u64().ok_or_else(past_the_end)?;
    let held = usize::try_from(len).ok().filter(|n| n.saturating_mul(element.least_bytes()) <= cursor.left());
    let Some(len) = held else {
        return Err(format!("an array of {len} values ({}), more than the file's bytes can hold", element.name()));
    };
    let start = cursor.at;
    if element.is_fixed() {
        cursor.take(len * element.least_bytes()).ok_or_else(past_the_end)?;
    } else {
        for _ in 0..len {
            if element == ValueType::Text {
                cursor.text().ok_or_else(past_the_end)?;
            } else if depth == MAX_GGUF_ARRAY_DEPTH {
                return Err(format!("arrays nested deeper than {MAX_GGUF_ARRAY_DEPTH}"));
            } else {
                array(cursor, depth + 1)?;
            }
        }
    }
    Ok(Array { element, len, range: start..cursor.at })
}

fn describe(cursor: &mut Cursor, alignment: usize) -> Result<(Vec<usize>, StoredType, Range<usize>), String> {
    let rank = cursor.u32().ok_or_else(past_the_end)? as usize;
    if rank > MAX_DIMS {
        return Err(format!("{rank} dimensions; at most {MAX_DIMS} are accepted"));
    }
    let mut shape = Vec::with_capacity(rank);
    for _ in 0..rank {
        let dim = cursor.u64().ok_or_else(past_the_end)?;
        shape.push(usize::try_from(dim).map_err(|_| format!("dimension {dim} is too large"))?);
    }
    shape.reverse();
    let id = cursor.u32().ok_or_else(past_the_end)?;
    let offset = cursor.u64().ok_or_else(past_the_end)?;
    let dtype = stored_type(id)?;
    let bytes = dtype.bytes_of(&shape)?;
    let offset = usize::try_from(offset).map_err(|_| format!("offset {offset} is too large"))?;
    if !offset.is_multiple_of(alignment) {
        return Err(format!("offset {offset} is not a multiple of the alignment, {alignment}"));
    }
    let end = offset.checked_add(bytes).ok_or_else(|| format!("offset {offset} and {bytes} bytes overflow"))?;
    Ok((shape, dtype, offset..end))
}

/// No name twice, no byte in two tensors. Bytes between tensors are padding.
fn check_apart(file: &Path, tensors: &[TensorInfo]) -> Result<()> {
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = order.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(Error::tensor(file, &pair[0].name, "listed twice"));
    }
    order.retain(|t| !t.range.is_empty());
    order.sort_unstable_by_key(|t| (t.range.start, t.range.end));
    match order.windows(2).find(|pair| pair[1].range.start < pair[0].range.end) {
        Some(pair) => {
            Err(Error::tensor(file, &pair[1].name, format!("its bytes overlap those of tensor {}", pair[0].name)))
        }
        None => Ok(()),
    }
}
