//! Configuration JSON read into a bounded tree: only known keys are kept, and only so many values.

use super::limits::MAX_CONFIG_VALUES;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::cell::Cell;
use std::fmt;

/// A JSON value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Node {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Object(Fields),
}

impl Node {
    /// The value as a message shows it.
    pub fn describe(&self) -> String {
        match self {
            Self::Null => "null".into(),
            Self::Bool(b) => b.to_string(),
            Self::Int(n) => n.to_string(),
            Self::Float(x) => x.to_string(),
            Self::Text(s) => format!("{:?}", super::limits::quoted(s)),
            Self::List(items) if items.is_empty() => "[]".into(),
            Self::List(items) if items.len() <= 4 => {
                format!("[{}]", items.iter().map(Self::describe).collect::<Vec<_>>().join(", "))
            }
            Self::List(items) => format!("a list of {} values", items.len()),
            Self::Object(_) => "an object".into(),
        }
    }
}

/// An object's keys and values, in the file's order, keys unique.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Fields(Vec<(String, Node)>);

impl Fields {
    /// The value of a key; `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v).filter(|v| **v != Node::Null)
    }

    /// All keys with their values, in the file's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v))
    }
}

/// Reads an object, keeping what stands under the `known` keys.
///
/// # Errors
/// A message for malformed JSON, a known key given twice, or more than [`MAX_CONFIG_VALUES`] values kept.
pub(crate) fn parse(text: &str, known: &[&str]) -> Result<Fields, String> {
    read(text, Some(known))
}

/// Reads an object with all of its keys.
///
/// # Errors
/// As [`parse`], for every key.
pub(crate) fn parse_all(text: &str) -> Result<Fields, String> {
    read(text, None)
}

fn read(text: &str, known: Option<&[&str]>) -> Result<Fields, String> {
    let budget = Cell::new(MAX_CONFIG_VALUES);
    let mut json = serde_json::Deserializer::from_str(text);
    let object = ObjectSeed { known, budget: &budget };
    object
        .deserialize(&mut json)
        .and_then(|v| json.end().map(|()| v))
        .map_err(|e| super::limits::quoted(&e.to_string()))
}

struct ObjectSeed<'b> {
    known: Option<&'b [&'b str]>,
    budget: &'b Cell<usize>,
}

impl<'de> DeserializeSeed<'de> for ObjectSeed<'_> {
    type Value = Fields;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Fields, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ObjectSeed<'_> {
    type Value = Fields;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let mut fields = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if self.known.is_some_and(|known| !known.contains(&key.as_str())) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if fields.iter().any(|(k, _)| *k == key) {
                return Err(de::Error::custom(format!("key {:?} is given twice", super::limits::quoted(&key))));
            }
            let value = map.next_value_seed(NodeSeed { budget: self.budget })?;
            fields.push((key, value));
        }
        Ok(Fields(fields))
    }
}

struct NodeSeed<'b> {
    budget: &'b Cell<usize>,
}

impl<'de> DeserializeSeed<'de> for NodeSeed<'_> {
    type Value = Node;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Node, D::Error> {
        let left = self.budget.get().checked_sub(1).ok_or_else(|| {
            de::Error::custom(format!("more than {MAX_CONFIG_VALUES} values under the keys that are read"))
        })?;
        self.budget.set(left);
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for NodeSeed<'_> {
    type Value = Node;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a value")
    }
    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }
    fn visit_bool<E>(self, b: bool) -> Result<Node, E> {
        Ok(Node::Bool(b))
    }
    fn visit_i64<E>(self, n: i64) -> Result<Node, E> {
        Ok(Node::Int(n))
    }
    fn visit_u64<E>(self, n: u64) -> Result<Node, E> {
        Ok(i64::try_from(n).map_or(Node::Float(n as f64), Node::Int))
    }
    fn visit_f64<E>(self, x: f64) -> Result<Node, E> {
        Ok(Node::Float(x))
    }
    fn visit_str<E>(self, s: &str) -> Result<Node, E> {
        Ok(Node::Text(s.to_owned()))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(NodeSeed { budget: self.budget })? {
            items.push(item);
        }
        Ok(Node::List(items))
    }
    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Node, A::Error> {
        ObjectSeed { known: None, budget: self.budget }.visit_map(map).map(Node::Object)
    }
}
