//! Writes a GGUF file, version 3: metadata, the list of tensors, and their bytes as they are produced.

use super::header::{DEFAULT_ALIGNMENT, MAGIC};
use super::types::type_id;
use super::value::ValueType;
use crate::checkpoint::header::check_name;
use crate::checkpoint::limits::{MAX_DIMS, MAX_GGUF_HEADER_SIZE, MAX_GGUF_KEY_LENGTH, MAX_GGUF_METADATA};
use crate::checkpoint::write::{Entry, check_unique};
use crate::{Error, Result};
use std::io::Write;
use std::path::Path;

/// The version written: the current one.
const VERSION: u32 = 3;

/// A metadata value to write.
#[derive(Debug, Clone, PartialEq)]
pub enum Metadata {
    /// u32.
    U32(u32),
    /// i32.
    I32(i32),
    /// f32.
    F32(f32),
    /// bool.
    Bool(bool),
    /// A string.
    Text(String),
    /// An array of strings.
    Texts(Vec<String>),
    /// An array of i32.
    I32s(Vec<i32>),
    /// An array of f32.
    F32s(Vec<f32>),
    /// An array of u8.
    Bytes(Vec<u8>),
    /// Type and value as they are in another file.
    Stored(Vec<u8>),
}

impl Metadata {
    fn put(&self, out: &mut Vec<u8>) {
        let kind = |out: &mut Vec<u8>, kind: ValueType| out.extend(kind.id().to_le_bytes());
        let array = |out: &mut Vec<u8>, element: ValueType, len: usize| {
            kind(out, ValueType::Array);
            kind(out, element);
            out.extend((len as u64).to_le_bytes());
        };
        match self {
            Self::U32(n) => {
                kind(out, ValueType::U32);
                out.extend(n.to_le_bytes());
            }
            Self::I32(n) => {
                kind(out, ValueType::I32);
                out.extend(n.to_le_bytes());
            }
            Self::F32(x) => {
                kind(out, ValueType::F32);
                out.extend(x.to_le_bytes());
            }
            Self::Bool(b) => {
                kind(out, ValueType::Bool);
                out.push(u8::from(*b));
            }
            Self::Text(text) => {
                kind(out, ValueType::Text);
                put_text(out, text);
            }
            Self::Texts(all) => {
                array(out, ValueType::Text, all.len());
                all.iter().for_each(|text| put_text(out, text));
            }
            Self::I32s(all) => {
                array(out, ValueType::I32, all.len());
                all.iter().for_each(|n| out.extend(n.to_le_bytes()));
            }
            Self::F32s(all) => {
                array(out, ValueType::F32, all.len());
                all.iter().for_each(|x| out.extend(x.to_le_bytes()));
            }
            Self::Bytes(all) => {
                array(out, ValueType::U8, all.len());
                out.extend(all);
            }
            Self::Stored(bytes) => out.extend(bytes),
        }
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Writes a whole file to `out`: the metadata and the tensors, in the orders given, with the default alignment. `file`
/// names it in errors; `progress` is told the tensors' bytes written since it was last called.
///
/// # Errors
/// [`Error::File`], [`Error::Config`] naming a key or [`Error::Tensor`] for what could not be read back, and for a tensor
/// whose producer fails or writes another number of bytes than its shape says; [`Error::Io`].
pub fn write(
    file: &Path,
    out: &mut dyn Write,
    metadata: &[(String, Metadata)],
    mut entries: Vec<Entry>,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let head = head(file, metadata, &entries)?;
    let io_error = |e| Error::io(file, e);
    let pad = |out: &mut dyn Write, written: usize| {
        let zeros = [0u8; DEFAULT_ALIGNMENT];
        out.write_all(&zeros[..written.next_multiple_of(DEFAULT_ALIGNMENT) - written]).map_err(io_error)
    };
    out.write_all(&head).map_err(io_error)?;
    pad(out, head.len())?;
    for entry in &mut entries {
        let bytes = entry.bytes().map_err(|reason| Error::tensor(file, &entry.name, reason))?;
        entry.write(file, out, progress)?;
        pad(out, bytes as usize)?;
    }
    out.flush().map_err(io_error)
}

/// What stands before the tensors' bytes, without the padding.
fn head(file: &Path, metadata: &[(String, Metadata)], entries: &[Entry]) -> Result<Vec<u8>> {
    check_unique(file, entries)?;
    if metadata.len() > MAX_GGUF_METADATA {
        let reason = format!("{} metadata entries; at most {MAX_GGUF_METADATA} can be read back", metadata.len());
        return Err(Error::file(file, reason));
    }
    let mut head = MAGIC.to_vec();
    head.extend(VERSION.to_le_bytes());
    head.extend((entries.len() as u64).to_le_bytes());
    head.extend((metadata.len() as u64).to_le_bytes());
    for (at, (key, value)) in metadata.iter().enumerate() {
        if key.is_empty() || key.len() > MAX_GGUF_KEY_LENGTH {
            let reason = format!("a key of {} bytes; 1 to {MAX_GGUF_KEY_LENGTH} can be read back", key.len());
            return Err(Error::config(file, key, reason));
        }
        if metadata.iter().take(at).any(|(other, _)| other == key) {
            return Err(Error::config(file, key, "given twice"));
        }
        put_text(&mut head, key);
        value.put(&mut head);
    }
    let mut offset = 0u64;
    for entry in entries {
        let bad = |reason: String| Error::tensor(file, &entry.name, reason);
        check_name(&entry.name).map_err(bad)?;
        let id = type_id(entry.dtype).ok_or_else(|| bad(format!("GGUF has no type {}", entry.dtype)))?;
        if entry.shape.len() > MAX_DIMS {
            return Err(bad(format!("{} dimensions; at most {MAX_DIMS} can be written", entry.shape.len())));
        }
        put_text(&mut head, &entry.name);
        head.extend((entry.shape.len() as u32).to_le_bytes());
        entry.shape.iter().rev().for_each(|dim| head.extend((*dim as u64).to_le_bytes()));
        head.extend(id.to_le_bytes());
        head.extend(offset.to_le_bytes());
        let end = entry.bytes().map_err(bad)?.checked_add(offset);
        offset = end
            .and_then(|end| end.checked_next_multiple_of(DEFAULT_ALIGNMENT as u64))
            .ok_or_else(|| bad("the sizes of all tensors together overflow".into()))?;
    }
    match head.len() {
        n if n > MAX_GGUF_HEADER_SIZE => {
            Err(Error::file(file, format!("{n} bytes before the tensors; {MAX_GGUF_HEADER_SIZE} can be read back")))
        }
        _ => Ok(head),
    }
}
