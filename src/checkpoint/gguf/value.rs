//! Metadata values. Texts and arrays stay in the file.

use std::ops::Range;

/// Type of a metadata value or of an array's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    /// By their numbers in files, 0 to 12.
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::Text,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// The type with this number.
    pub(super) fn from_id(id: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(id).ok()?).copied()
    }

    /// The number in files.
    pub(super) fn id(self) -> u32 {
        Self::ALL.iter().zip(0..).find(|(kind, _)| **kind == self).map_or(0, |(_, id)| id)
    }

    /// Bytes of a value, at least: a text has its length in front, an array its type and length.
    pub(super) fn least_bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::Text | Self::U64 | Self::I64 | Self::F64 => 8,
            Self::Array => 12,
        }
    }

    /// Whether all values have the same size.
    pub(super) fn is_fixed(self) -> bool {
        !matches!(self, Self::Text | Self::Array)
    }

    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::Text => "a string",
            Self::Array => "an array",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        }
    }
}

/// A metadata value; numbers widened.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// u8 to u64.
    Unsigned(u64),
    /// i8 to i64.
    Signed(i64),
    /// f32.
    F32(f32),
    /// f64.
    F64(f64),
    /// bool.
    Bool(bool),
    /// UTF-8 text, by its bytes in the file.
    Text(Range<usize>),
    /// An array, by its place in the file.
    Array(Array),
}

impl Value {
    /// What it is, for messages.
    pub fn describe(&self) -> String {
        match self {
            Self::Unsigned(n) => n.to_string(),
            Self::Signed(n) => n.to_string(),
            Self::F32(x) => x.to_string(),
            Self::F64(x) => x.to_string(),
            Self::Bool(b) => b.to_string(),
            Self::Text(_) => "a string".into(),
            Self::Array(a) => format!("an array of {} values ({})", a.len, a.element.name()),
        }
    }
}

/// An array's elements, one behind the other in the file; checked to lie in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// Type of the elements.
    pub element: ValueType,
    /// How many there are.
    pub len: usize,
    /// Their bytes.
    pub range: Range<usize>,
}

/// Reads little-endian values from a file's bytes, never past their end.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    pub bytes: &'a [u8],
    pub at: usize,
}

impl<'a> Cursor<'a> {
    pub fn left(&self) -> usize {
        self.bytes.len().saturating_sub(self.at)
    }

    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let found = self.bytes.get(self.at..self.at.checked_add(len)?)?;
        self.at += len;
        Some(found)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.first_chunk().copied()
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A length, then as many bytes; the place of these.
    pub fn text(&mut self) -> Option<Range<usize>> {
        let len = usize::try_from(self.u64()?).ok()?;
        let start = self.at;
        self.take(len)?;
        Some(start..self.at)
    }

    /// A value of fixed size; `None` also for a bool that is neither 0 nor 1.
    pub fn scalar(&mut self, kind: ValueType) -> Option<Value> {
        Some(match kind {
            ValueType::U8 => Value::Unsigned(self.array().map(u8::from_le_bytes)?.into()),
            ValueType::U16 => Value::Unsigned(self.array().map(u16::from_le_bytes)?.into()),
            ValueType::U32 => Value::Unsigned(self.u32()?.into()),
            ValueType::U64 => Value::Unsigned(self.u64()?),
            ValueType::I8 => Value::Signed(self.array().map(i8::from_le_bytes)?.into()),
            ValueType::I16 => Value::Signed(self.array().map(i16::from_le_bytes)?.into()),
            ValueType::I32 => Value::Signed(self.array().map(i32::from_le_bytes)?.into()),
            ValueType::I64 => Value::Signed(self.array().map(i64::from_le_bytes)?),
            ValueType::F32 => Value::F32(self.array().map(f32::from_le_bytes)?),
            ValueType::F64 => Value::F64(self.array().map(f64::from_le_bytes)?),
            ValueType::Bool => match self.array()? {
                [0u8] => Value::Bool(false),
                [1] => Value::Bool(true),
                _ => return None,
            },
            ValueType::Text | ValueType::Array => return None,
        })
    }
}
