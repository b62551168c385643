//! `model.safetensors.index.json`: which shard holds which tensor.

use super::header::{Plain, check_name};
use super::limits::{MAX_INDEX_SIZE, MAX_SHARDS, MAX_TENSORS, quoted};
use crate::{Error, Result};
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::fmt;
use std::path::Path;

/// The index's contents, borrowed from its text.
#[derive(Debug)]
pub struct Index<'a> {
    /// Shard file names, in order of appearance.
    pub shards: Vec<&'a str>,
    /// Tensor name and index into `shards`, sorted by name.
    pub entries: Vec<(&'a str, u32)>,
}

/// Reads and checks an index; `file` names it in errors.
///
/// # Errors
/// [`Error::File`] or [`Error::Tensor`] for malformed JSON, a name given twice, more than
/// [`super::limits`] allow, or a shard that is not a plain file name beside the index.
pub fn parse<'a>(file: &Path, text: &'a [u8]) -> Result<Index<'a>> {
    if text.len() > MAX_INDEX_SIZE {
        return Err(Error::file(file, format!("{} bytes; an index has at most {MAX_INDEX_SIZE}", text.len())));
    }
    let bad = |e: serde_json::Error| Error::file(file, quoted(&e.to_string()));
    let mut index = None;
    let mut json = serde_json::Deserializer::from_slice(text);
    Outer { index: &mut index }.deserialize(&mut json).and_then(|()| json.end()).map_err(bad)?;
    let mut index = index.ok_or_else(|| Error::file(file, "no weight_map: not an index of a sharded checkpoint"))?;
    if index.entries.is_empty() {
        return Err(Error::file(file, "weight_map is empty"));
    }
    index.entries.sort_unstable();
    if let Some(pair) = index.entries.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(Error::tensor(file, pair[0].0, "listed twice in weight_map"));
    }
    Ok(index)
}

/// A shard must be a plain file name beside the index; `..`, separators and absolute paths escape.
pub(super) fn check_shard_name(name: &str) -> Result<(), String> {
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b));
    if plain && !name.starts_with('.') && name.ends_with(".safetensors") && name.len() <= 255 {
        Ok(())
    } else {
        Err(format!(
            "shard {:?} is not a plain *.safetensors file name inside the checkpoint's directory",
            quoted(name)
        ))
    }
}

struct Outer<'s, 'a> {
    index: &'s mut Option<Index<'a>>,
}

impl<'de> DeserializeSeed<'de> for Outer<'_, 'de> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Outer<'_, 'de> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object with a weight_map")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Plain(key)) = map.next_key()? {
            if key != "weight_map" {
                map.next_value::<IgnoredAny>()?;
            } else if self.index.replace(map.next_value()?).is_some() {
                return Err(de::Error::duplicate_field("weight_map"));
            }
        }
        Ok(())
    }
}

impl<'de> de::Deserialize<'de> for Index<'de> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Index<'de>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object from tensor names to shard names")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index<'de>, A::Error> {
                let mut index = Index { shards: Vec::new(), entries: Vec::new() };
                while let Some((Plain(name), Plain(shard))) = map.next_entry()? {
                    check_name(name).map_err(de::Error::custom)?;
                    // Shards come in runs, so the last one is the likeliest.
                    let at = match index.shards.iter().rposition(|s| *s == shard) {
                        Some(at) => at,
                        None => {
                            check_shard_name(shard).map_err(|e| de::Error::custom(format!("tensor {name}: {e}")))?;
                            index.shards.push(shard);
                            index.shards.len() - 1
                        }
                    };
                    index.entries.push((name, at as u32));
                    if index.entries.len() > MAX_TENSORS || index.shards.len() > MAX_SHARDS {
                        return Err(de::Error::custom(format!(
                            "more than {MAX_TENSORS} tensors or {MAX_SHARDS} shards"
                        )));
                    }
                }
                Ok(index)
            }
        }
        d.deserialize_map(Entries)
    }
}

/// The shard names of an index, for the hub to download.
pub(super) fn shards(file: &Path, text: &[u8]) -> Result<Vec<String>> {
    Ok(parse(file, text)?.shards.into_iter().map(str::to_owned).collect())
}
