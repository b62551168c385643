//! What a checkpoint can be converted to.

use super::staging::check_new_file;
use crate::backend::DenseType;
use crate::checkpoint::gguf::GgmlType;
use crate::checkpoint::write::check_target;
use crate::checkpoint::{ScaleStyle, StoredType, is_gguf};
use crate::ternary::I2sLayout;
use crate::{Error, Result};
use std::path::Path;

/// How a checkpoint stores its ternary weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Form {
    /// Safetensors with codes, four to a byte, and a `weight_scale` that multiplies (`linear_class: autobitlinear`) or
    /// divides.
    Packed(ScaleStyle),
    /// Safetensors with masters (`quantization_mode: online`), quantised at load. Masters of the source are copied; from
    /// codes, values are made that quantise to them and their multiplier: the same model to run, and something to train
    /// from, but not what the model was trained with.
    Masters,
    /// Safetensors with the values −s, 0 and s, and no `quantization_config`: for software that knows no ternary weights,
    /// and that will not quantise activations either. The scale is rounded to the type. Read here, it is a b1.58 model.
    Dense(DenseType),
    /// A GGUF file with codes.
    Gguf(GgufType),
}

/// How a GGUF file stores ternary weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum GgufType {
    /// microsoft/BitNet's 2 bits, with an f32 scale.
    I2_S(I2sLayout),
    /// llama.cpp's 2.06 bits. Where f16 cannot hold the scale, it is a tensor of its own (`.scale`).
    TQ2_0,
    /// llama.cpp's 1.69 bits; the scale as in TQ2_0.
    TQ1_0,
}

impl GgufType {
    /// ggml's type.
    pub fn ggml(self) -> GgmlType {
        match self {
            Self::I2_S(_) => GgmlType::I2_S,
            Self::TQ2_0 => GgmlType::TQ2_0,
            Self::TQ1_0 => GgmlType::TQ1_0,
        }
    }
}

/// How to convert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The form of the ternary weights.
    pub form: Form,
    /// Type of the embedding and of the output head: F32, F16 or BF16, or in a GGUF file also a block type. `None` keeps
    /// the source's, except that block types become BF16 in safetensors, as they do when a model is loaded.
    pub head: Option<StoredType>,
}

impl From<Form> for Options {
    fn from(form: Form) -> Self {
        Self { form, head: None }
    }
}

impl Options {
    /// Whether something can be written to `target` at all: before a download, which may take an hour.
    ///
    /// # Errors
    /// [`Error::Request`] if it is there already, holds a checkpoint or has a name of the other kind, and for a type of the
    /// head that the form has not.
    pub fn check(&self, target: &Path) -> Result<()> {
        let is_gguf = is_gguf(target);
        let plain = |head: &StoredType| DenseType::from_stored(*head).is_some();
        match (self.form, self.head) {
            (Form::Gguf(_), _) if !is_gguf => {
                let reason = format!("{}: a GGUF file's name ends in .gguf", target.display());
                Err(Error::request("output file", reason))
            }
            (Form::Gguf(_), Some(head)) if !plain(&head) && !head.is_dense_block() => {
                Err(Error::request("--head", format!("{head} is no type for dense values")))
            }
            (Form::Gguf(_), _) => check_new_file(target),
            (_, _) if is_gguf => {
                let reason = format!("{}: this form is a directory; --to i2_s writes a GGUF file", target.display());
                Err(Error::request("output directory", reason))
            }
            (_, Some(head)) if !plain(&head) => {
                Err(Error::request("--head", format!("safetensors has no type {head}; use f32, f16 or bf16, or GGUF")))
            }
            _ => check_target(target),
        }
    }
}
