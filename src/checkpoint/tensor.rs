//! What a file says about a tensor, and its bytes.

use super::gguf::GgmlType;
use crate::backend::host::MappedFile;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Element type of a stored tensor, as safetensors names it, or ggml's block types.
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
    /// A type of GGUF files alone.
    Ggml(GgmlType),
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

    /// safetensors' name, or ggml's.
    pub fn name(self) -> &'static str {
        if let Self::Ggml(block) = self {
            return block.name();
        }
        Self::ALL.iter().find(|(t, ..)| *t == self).map_or("", |(_, n, _)| n)
    }

    /// Bytes of one element, or of one of ggml's blocks.
    pub fn size(self) -> usize {
        if let Self::Ggml(block) = self {
            return block.block_bytes();
        }
        Self::ALL.iter().find(|(t, ..)| *t == self).map_or(1, |(.., size)| *size)
    }

    /// Whether this is one of ggml's block types for dense values.
    pub fn is_dense_block(self) -> bool {
        matches!(self, Self::Ggml(block) if block.candle().is_some())
    }

    /// Bytes of a tensor of this shape, outermost dimension first.
    ///
    /// # Errors
    /// What does not fit.
    pub(crate) fn bytes_of(self, shape: &[usize]) -> Result<usize, String> {
        let overflow = || format!("the size of shape {shape:?} overflows");
        let product = |dims: &[usize]| dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).ok_or_else(overflow);
        match self {
            Self::Ggml(block) => {
                let (cols, outer) = shape.split_last().unwrap_or((&1, &[]));
                block.bytes(product(outer)?, *cols)
            }
            plain => product(shape)?.checked_mul(plain.size()).ok_or_else(overflow),
        }
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
    /// Name, printable ASCII: the one of Hugging Face's checkpoints, where a GGUF file's tensor has one.
    pub name: String,
    /// The name in the file, where it is another.
    pub stored_name: Option<String>,
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
        self.shape.iter().product()
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
    /// The tensor's name in its file.
    pub fn stored_name(&self) -> &'a str {
        self.info.stored_name.as_deref().unwrap_or(&self.info.name)
    }

    /// The elements' bytes, little-endian, row-major; not necessarily aligned to the element type.
    pub fn bytes(&self) -> &'a [u8] {
        // The range was checked against the mapping when the checkpoint was opened.
        self.file.bytes().get(self.info.range.clone()).unwrap_or_default()
    }
}
