//! The header of a safetensors file, checked before anything is believed.
//!
//! Layout: 8 bytes little-endian length `n`, `n` bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the
//! tensors' bytes, back to back. As in the reference implementation, the tensors must cover the rest of the
//! file: no overlap, no hole, nothing after the last one.

use super::limits::{MAX_DIMS, MAX_HEADER_SIZE, MAX_NAME_LENGTH, MAX_TENSORS, quoted};
use super::{StoredType, TensorInfo};
use crate::{Error, Result};
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;
use std::path::Path;

/// Key of the header that holds free text instead of a tensor.
pub(super) const METADATA: &str = "__metadata__";

/// Bytes of the length field.
const LENGTH_FIELD: usize = 8;

/// Reads and checks the header of a whole file's `bytes`; `file` names it in errors. The result is sorted by
/// name and its `file` fields are 0.
///
/// Allocates for at most [`MAX_TENSORS`] descriptions, and only after they were counted.
///
/// # Errors
/// [`Error::File`] or [`Error::Tensor`] for anything that is not exactly as described above.
pub fn parse(file: &Path, bytes: &[u8]) -> Result<Vec<TensorInfo>> {
    let (text, data_start) = split(file, bytes)?;
    let malformed = |e: serde_json::Error| Error::file(file, format!("header: {}", quoted(&e.to_string())));
    let mut json = serde_json::Deserializer::from_slice(text);
    let count = Count.deserialize(&mut json).and_then(|n| json.end().map(|()| n)).map_err(malformed)?;
    if count > MAX_TENSORS {
        return Err(Error::file(file, format!("header lists {count} tensors; at most {MAX_TENSORS} are accepted")));
    }
    let mut state = State { tensors: Vec::with_capacity(count), current: None };
    let mut json = serde_json::Deserializer::from_slice(text);
    let collect = Collect { state: &mut state, data_start, file_len: bytes.len() };
    if let Err(e) = collect.deserialize(&mut json) {
        return Err(match state.current {
            Some(name) => Error::tensor(file, name, quoted(&e.to_string())),
            None => malformed(e),
        });
    }
    let mut tensors = state.tensors;
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(Error::tensor(file, &pair[0].name, "listed twice in the header"));
    }
    check_coverage(file, &tensors, data_start, bytes.len())?;
    Ok(tensors)
}

/// The header's JSON text and the offset of the data behind it.
fn split<'a>(file: &Path, bytes: &'a [u8]) -> Result<(&'a [u8], usize)> {
    let bad = |reason: String| Err(Error::file(file, reason));
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_FIELD>() else {
        return bad(format!("{} bytes are too few for a safetensors file: truncated?", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    if bytes.starts_with(b"version https://git-lfs") {
        return bad("this is a Git LFS pointer, not the file itself: run `git lfs pull`".into());
    }
    if length > MAX_HEADER_SIZE as u64 {
        return bad(format!(
            "not a safetensors file: it claims a header of {length} bytes, at most {MAX_HEADER_SIZE} are accepted"
        ));
    }
    let length = length as usize;
    match rest.get(..length) {
        Some(text) => Ok((text, LENGTH_FIELD + length)),
        None => bad(format!(
            "the header of {length} bytes runs past the end of the file ({} bytes): truncated?",
            bytes.len()
        )),
    }
}

/// Tensors must lie back to back from `start` to `end`.
fn check_coverage(file: &Path, tensors: &[TensorInfo], start: usize, end: usize) -> Result<()> {
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_unstable_by_key(|t| (t.range.start, t.range.end));
    let mut covered = start;
    for (i, tensor) in order.iter().enumerate() {
        if tensor.range.start < covered {
            let other = i.checked_sub(1).and_then(|i| order.get(i)).map_or("", |t| t.name.as_str());
            return Err(Error::tensor(file, &tensor.name, format!("its bytes overlap those of tensor {other}")));
        }
        if tensor.range.start > covered {
            let gap = tensor.range.start - covered;
            return Err(Error::tensor(file, &tensor.name, format!("{gap} bytes before it belong to no tensor")));
        }
        covered = tensor.range.end;
    }
    match end - covered {
        0 => Ok(()),
        rest => Err(Error::file(file, format!("{rest} bytes at the end belong to no tensor"))),
    }
}

/// Whether a tensor's name may be kept and printed.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > MAX_NAME_LENGTH {
        return Err(format!("a tensor's name has {} bytes; 1 to {MAX_NAME_LENGTH} are accepted", name.len()));
    }
    if !name.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(format!("tensor name {name:?} is not printable ASCII"));
    }
    Ok(())
}

/// Counts the keys of the outer object without keeping anything.
struct Count;

impl<'de> DeserializeSeed<'de> for Count {
    type Value = usize;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<usize, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Count {
    type Value = usize;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<usize, A::Error> {
        let mut count = 0;
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            count += 1;
        }
        Ok(count)
    }
}

struct State {
    tensors: Vec<TensorInfo>,
    /// The tensor being read, for error messages.
    current: Option<String>,
}

struct Collect<'s> {
    state: &'s mut State,
    data_start: usize,
    file_len: usize,
}

impl<'de> DeserializeSeed<'de> for Collect<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Collect<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Plain(name)) = map.next_key()? {
            if name == METADATA {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            check_name(name).map_err(de::Error::custom)?;
            self.state.current = Some(name.to_owned());
            let entry: Entry = map.next_value()?;
            let info = entry.check(name, self.data_start, self.file_len).map_err(de::Error::custom)?;
            self.state.tensors.push(info);
            self.state.current = None;
        }
        Ok(())
    }
}

/// A string without escape sequences, borrowed from the file.
pub(super) struct Plain<'a>(pub &'a str);

impl<'de> de::Deserialize<'de> for Plain<'de> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Borrow;
        impl<'de> Visitor<'de> for Borrow {
            type Value = Plain<'de>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string without escape sequences")
            }
            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Plain<'de>, E> {
                Ok(Plain(text))
            }
        }
        d.deserialize_str(Borrow)
    }
}

/// One tensor's entry, not yet checked against the file.
struct Entry {
    dtype: StoredType,
    dims: [usize; MAX_DIMS],
    rank: usize,
    offsets: [u64; 2],
}

impl Entry {
    fn check(&self, name: &str, data_start: usize, file_len: usize) -> Result<TensorInfo, String> {
        let shape = self.dims[..self.rank].to_vec();
        let bytes = shape
            .iter()
            .try_fold(1usize, |n, d| n.checked_mul(*d))
            .and_then(|n| n.checked_mul(self.dtype.size()))
            .ok_or_else(|| format!("the size of shape {shape:?} overflows"))?;
        let [begin, end] = self.offsets;
        if end < begin {
            return Err(format!("data_offsets [{begin}, {end}] end before they begin"));
        }
        if end - begin != bytes as u64 {
            let (dtype, length) = (self.dtype, end - begin);
            return Err(format!("{dtype} {shape:?} needs {bytes} bytes, but data_offsets give {length}"));
        }
        let absolute = |at: u64| usize::try_from(at).ok()?.checked_add(data_start).filter(|at| *at <= file_len);
        match (absolute(begin), absolute(end)) {
            (Some(begin), Some(end)) => {
                let (name, dtype, range) = (name.to_owned(), self.dtype, begin..end);
                Ok(TensorInfo { name, stored_name: None, dtype, shape, file: 0, range })
            }
            _ => Err(format!(
                "data_offsets [{begin}, {end}] run past the end of the file ({} bytes of data): truncated?",
                file_len - data_start
            )),
        }
    }
}

impl<'de> de::Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_map(EntryVisitor)
    }
}

struct EntryVisitor;

impl<'de> Visitor<'de> for EntryVisitor {
    type Value = Entry;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entry, A::Error> {
        fn once<T, E: de::Error>(slot: &mut Option<T>, value: T, key: &'static str) -> Result<(), E> {
            match slot.replace(value) {
                Some(_) => Err(E::duplicate_field(key)),
                None => Ok(()),
            }
        }
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(Plain(key)) = map.next_key()? {
            match key {
                "dtype" => {
                    let Plain(name) = map.next_value()?;
                    let known = StoredType::from_name(name)
                        .ok_or_else(|| de::Error::custom(format!("unsupported dtype {:?}", quoted(name))))?;
                    once(&mut dtype, known, "dtype")?;
                }
                "shape" => once(&mut shape, map.next_value::<Numbers<MAX_DIMS>>()?, "shape")?,
                "data_offsets" => once(&mut offsets, map.next_value::<Numbers<2>>()?, "data_offsets")?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        let missing = |key| move || <A::Error as de::Error>::missing_field(key);
        let dtype = dtype.ok_or_else(missing("dtype"))?;
        let shape = shape.ok_or_else(missing("shape"))?;
        let offsets = offsets.ok_or_else(missing("data_offsets"))?;
        if offsets.len != 2 {
            return Err(de::Error::custom("data_offsets must be two numbers"));
        }
        let mut dims = [0; MAX_DIMS];
        for (dim, n) in dims.iter_mut().zip(&shape.values[..shape.len]) {
            *dim = usize::try_from(*n).map_err(|_| de::Error::custom(format!("dimension {n} is too large")))?;
        }
        Ok(Entry { dtype, dims, rank: shape.len, offsets: offsets.values })
    }
}

/// At most `N` unsigned numbers.
struct Numbers<const N: usize> {
    values: [u64; N],
    len: usize,
}

impl<'de, const N: usize> de::Deserialize<'de> for Numbers<N> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Fill<const N: usize>;
        impl<'de, const N: usize> Visitor<'de> for Fill<N> {
            type Value = Numbers<N>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "a list of at most {N} whole numbers")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Numbers<N>, A::Error> {
                let mut numbers = Numbers { values: [0; N], len: 0 };
                while let Some(n) = seq.next_element()? {
                    let Some(slot) = numbers.values.get_mut(numbers.len) else {
                        return Err(de::Error::custom(format!("a list has more than the {N} entries accepted")));
                    };
                    *slot = n;
                    numbers.len += 1;
                }
                Ok(numbers)
            }
        }
        d.deserialize_seq(Fill)
    }
}
