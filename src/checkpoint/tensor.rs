//! What a file says about a tensor, and its bytes.

use crate::backend::host::MappedFile;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Element type of a stored tensor, as safetensors names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum StoredType {
    Bool,
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F16,
    BF16,
    F32,
    F64,
}

impl StoredType {
    const ALL: [(Self, &'static str, usize); 13] = [
        (Self::Bool, "BOOL", 1),
        (Self::U8, "U8", 1),
        (Self::I8, "I8", 1),
        (Self::U16, "U16", 2),
        (Self::I16, "I16", 2),
        (Self::U32, "U32", 4),
        (Self::I32, "I32", 4),
        (Self::U64, "U64", 8),
        (Self::I64, "I64", 8),
        (Self::F16, "F16", 2),
        (Self::BF16, "BF16", 2),
        (Self::F32, "F32", 4),
        (Self::F64, "F64", 8),
    ];

    /// The type that safetensors calls `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, n, _)| *n == name).map(|(t, ..)| *t)
    }

    /// safetensors' name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(t, ..)| *t == self).map_or("", |(_, n, _)| n)
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        Self::ALL.iter().find(|(t, ..)| *t == self).map_or(1, |(.., size)| *size)
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One tensor as its file's header describes it; checked against the file's size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, printable ASCII.
    pub name: String,
    /// Element type.
    pub dtype: StoredType,
    /// Shape, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Index into [`super::Checkpoint::files`].
    pub file: usize,
    /// The elements' bytes in that file, counted from its start.
    pub range: Range<usize>,
}

impl TensorInfo {
    /// Elements. The header check proved that the product fits.
    pub fn elements(&self) -> usize {
        self.range.len() / self.dtype.size()
    }
}

/// A tensor's description together with its mapped bytes.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// The description.
    pub info: &'a TensorInfo,
    /// The file that holds it.
    pub file: &'a Arc<MappedFile>,
}

impl<'a> TensorView<'a> {
    /// The elements' bytes, little-endian, row-major; not necessarily aligned to the element type.
    pub fn bytes(&self) -> &'a [u8] {
        // The range was checked against the mapping when the checkpoint was opened.
        self.file.bytes().get(self.info.range.clone()).unwrap_or_default()
    }
}
