//! The tensor types of ggml, by the numbers that a GGUF file gives them.

use crate::checkpoint::StoredType;
use candle_core::quantized::GgmlDType;

/// A tensor type of ggml whose values are stored in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types)]
pub enum GgmlType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_K,
    IQ2_XXS,
    IQ2_XS,
    IQ3_XXS,
    IQ1_S,
    IQ4_NL,
    IQ3_S,
    IQ2_S,
    IQ4_XS,
    IQ1_M,
    TQ1_0,
    TQ2_0,
    /// Codes in one of the three layouts of [`crate::ternary::I2sLayout`], and 32 bytes with the scale.
    I2_S,
}

/// What a tensor occupies beyond its blocks.
const I2S_TAIL: usize = 32;

impl GgmlType {
    /// Number in files, name, values of a block, bytes of a block.
    const ALL: [(u32, Self, &'static str, usize, usize); 24] = [
        (2, Self::Q4_0, "Q4_0", 32, 18),
        (3, Self::Q4_1, "Q4_1", 32, 20),
        (6, Self::Q5_0, "Q5_0", 32, 22),
        (7, Self::Q5_1, "Q5_1", 32, 24),
        (8, Self::Q8_0, "Q8_0", 32, 34),
        (9, Self::Q8_1, "Q8_1", 32, 36),
        (10, Self::Q2_K, "Q2_K", 256, 84),
        (11, Self::Q3_K, "Q3_K", 256, 110),
        (12, Self::Q4_K, "Q4_K", 256, 144),
        (13, Self::Q5_K, "Q5_K", 256, 176),
        (14, Self::Q6_K, "Q6_K", 256, 210),
        (15, Self::Q8_K, "Q8_K", 256, 292),
        (16, Self::IQ2_XXS, "IQ2_XXS", 256, 66),
        (17, Self::IQ2_XS, "IQ2_XS", 256, 74),
        (18, Self::IQ3_XXS, "IQ3_XXS", 256, 98),
        (19, Self::IQ1_S, "IQ1_S", 256, 50),
        (20, Self::IQ4_NL, "IQ4_NL", 32, 18),
        (21, Self::IQ3_S, "IQ3_S", 256, 110),
        (22, Self::IQ2_S, "IQ2_S", 256, 82),
        (23, Self::IQ4_XS, "IQ4_XS", 256, 136),
        (29, Self::IQ1_M, "IQ1_M", 256, 56),
        (34, Self::TQ1_0, "TQ1_0", 256, 54),
        (35, Self::TQ2_0, "TQ2_0", 256, 66),
        (36, Self::I2_S, "I2_S", 4, 1),
    ];

    fn row(self) -> (u32, &'static str, usize, usize) {
        let found = Self::ALL.iter().find(|(_, t, ..)| *t == self);
        found.map_or((0, "", 1, 1), |(id, _, name, values, bytes)| (*id, *name, *values, *bytes))
    }

    /// ggml's number.
    pub fn id(self) -> u32 {
        self.row().0
    }

    /// ggml's name.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Values of a block; a row holds whole blocks, except in I2_S.
    pub fn block_values(self) -> usize {
        self.row().2
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.row().3
    }

    /// Bytes of `rows` rows of `cols` values.
    ///
    /// # Errors
    /// What does not fit.
    pub(crate) fn bytes(self, rows: usize, cols: usize) -> Result<usize, String> {
        let overflow = || format!("the size of {rows} rows of {cols} values overflows");
        let count = rows.checked_mul(cols).ok_or_else(overflow)?;
        let (name, block) = (self.name(), self.block_values());
        if self == Self::I2_S {
            return match count.is_multiple_of(block) {
                true => (count / block).checked_add(I2S_TAIL).ok_or_else(overflow),
                false => Err(format!("{count} values of {name} are not a multiple of {block}")),
            };
        }
        match cols.is_multiple_of(block) {
            true => (count / block).checked_mul(self.block_bytes()).ok_or_else(overflow),
            false => Err(format!("rows of {cols} values of {name} are not a multiple of {block}")),
        }
    }

    /// candle's type, where candle can widen it.
    pub(in crate::checkpoint) fn candle(self) -> Option<GgmlDType> {
        Some(match self {
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q5_1 => GgmlDType::Q5_1,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q2_K => GgmlDType::Q2K,
            Self::Q3_K => GgmlDType::Q3K,
            Self::Q4_K => GgmlDType::Q4K,
            Self::Q5_K => GgmlDType::Q5K,
            Self::Q6_K => GgmlDType::Q6K,
            _ => return None,
        })
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Types that are stored as they are in safetensors, by their numbers.
const PLAIN: [(u32, StoredType); 8] = [
    (0, StoredType::F32),
    (1, StoredType::F16),
    (24, StoredType::I8),
    (25, StoredType::I16),
    (26, StoredType::I32),
    (27, StoredType::I64),
    (28, StoredType::F64),
    (30, StoredType::BF16),
];

/// The number of a type, where ggml has one.
pub(super) fn type_id(dtype: StoredType) -> Option<u32> {
    match dtype {
        StoredType::Ggml(block) => Some(block.id()),
        plain => PLAIN.iter().find(|(_, t)| *t == plain).map(|(id, _)| *id),
    }
}

/// The type with this number.
///
/// # Errors
/// What is known about it.
pub(super) fn stored_type(id: u32) -> Result<StoredType, String> {
    if let Some((_, plain)) = PLAIN.iter().find(|(n, _)| *n == id) {
        return Ok(*plain);
    }
    match GgmlType::ALL.iter().find(|(n, ..)| *n == id) {
        Some((_, t, ..)) => Ok(StoredType::Ggml(*t)),
        None => {
            let known = match id {
                38 => " (TL1 of bitnet.cpp, made for one machine)",
                39 => " (MXFP4, or TL2 of bitnet.cpp, made for one machine)",
                134..=137 => " (one of ik_llama.cpp's BitNet types)",
                _ => "",
            };
            Err(format!("type {id}{known} is not supported; ternary weights are I2_S, TQ1_0 or TQ2_0"))
        }
    }
}
