//! The few fields of a `tokenizer.model` that matter, read from its protobuf bytes.
//!
//! Follows sentencepiece's `sentencepiece_model.proto` (ModelProto: pieces 1, trainer_spec 2, normalizer_spec 3,
//! denormalizer_spec 5) and its defaults. Fields of other numbers are skipped, as protobuf prescribes.

use super::{Algorithm, MAX_PIECE_BYTES, MAX_PIECES, Piece, PieceKind, SentencePiece};
use crate::checkpoint::limits::quoted;

/// What follows a field's number, by wire type.
#[derive(Clone, Copy)]
enum Value<'a> {
    Varint(u64),
    Fixed32([u8; 4]),
    Bytes(&'a [u8]),
    Fixed64,
}

impl<'a> Value<'a> {
    fn bytes(self, name: &str) -> Result<&'a [u8], String> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            _ => Err(mistyped(name)),
        }
    }

    fn number(self, name: &str) -> Result<u64, String> {
        match self {
            Self::Varint(n) => Ok(n),
            _ => Err(mistyped(name)),
        }
    }

    fn float(self, name: &str) -> Result<f32, String> {
        match self {
            Self::Fixed32(bytes) => Ok(f32::from_le_bytes(bytes)),
            _ => Err(mistyped(name)),
        }
    }

    fn flag(self, name: &str) -> Result<bool, String> {
        self.number(name).map(|n| n != 0)
    }

    /// An `int32`; negative ones mean "none".
    fn id(self, name: &str) -> Result<Option<u32>, String> {
        let n = self.number(name)?;
        match i64::from_ne_bytes(n.to_ne_bytes()) {
            n if n < 0 => Ok(None),
            n => u32::try_from(n).map(Some).map_err(|_| format!("{name} is {n}, which is no id")),
        }
    }
}

fn mistyped(name: &str) -> String {
    format!("{name} is of another type than sentencepiece writes")
}

/// The unread rest of a message.
struct Message<'a>(&'a [u8]);

impl<'a> Message<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let (head, rest) = self.0.split_at_checked(n).ok_or("ends in the middle of a field")?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N)?.try_into().map_err(|_| "ends in the middle of a field".into())
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("holds a number of more than 64 bits".into())
    }

    fn next(&mut self) -> Result<Option<(u64, Value<'a>)>, String> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Value::Varint(self.varint()?),
            1 => self.take(8).map(|_| Value::Fixed64)?,
            2 => {
                let n = usize::try_from(self.varint()?).map_err(|_| "ends in the middle of a field")?;
                Value::Bytes(self.take(n)?)
            }
            5 => Value::Fixed32(self.array()?),
            other => return Err(format!("holds a field of wire type {other}, which sentencepiece does not use")),
        };
        Ok(Some((key >> 3, value)))
    }
}

/// # Errors
/// What is wrong with the file.
pub(super) fn parse(bytes: &[u8]) -> Result<SentencePiece, String> {
    let mut model = SentencePiece::new(Algorithm::Unigram, Vec::new());
    model.remove_extra_whitespaces = true;
    let mut whole = Message(bytes);
    while let Some((field, value)) = whole.next()? {
        match field {
            1 => {
                if model.pieces.len() == MAX_PIECES {
                    return Err(format!("more than {MAX_PIECES} pieces"));
                }
                let at = model.pieces.len();
                model.pieces.push(piece(value.bytes("pieces")?).map_err(|e| format!("piece {at}: {e}"))?);
            }
            2 => trainer(value.bytes("trainer_spec")?, &mut model)?,
            3 => normalizer(value.bytes("normalizer_spec")?, &mut model)?,
            5 => {
                let mut rules = Message(value.bytes("denormalizer_spec")?);
                while let Some((field, value)) = rules.next()? {
                    if field == 2 && !value.bytes("denormalizer_spec.precompiled_charsmap")?.is_empty() {
                        return Err("has rules for decoded text (denormalizer_spec), which are not supported".into());
                    }
                }
            }
            _ => {}
        }
    }
    if model.pieces.is_empty() {
        return Err("no sentencepiece model: it has no pieces".into());
    }
    Ok(model)
}

fn piece(bytes: &[u8]) -> Result<Piece, String> {
    let mut fields = Message(bytes);
    let mut piece = Piece { text: String::new(), score: 0.0, kind: PieceKind::Normal };
    while let Some((field, value)) = fields.next()? {
        match field {
            1 => {
                let text = value.bytes("its text")?;
                if text.len() > MAX_PIECE_BYTES {
                    return Err(format!("{} bytes; at most {MAX_PIECE_BYTES} are accepted", text.len()));
                }
                piece.text = std::str::from_utf8(text).map_err(|_| "not UTF-8")?.to_owned();
            }
            2 => piece.score = value.float("its score")?,
            3 => {
                let code = value.number("its type")?;
                piece.kind = PieceKind::from_code(code).ok_or_else(|| format!("type {code} is not known"))?;
            }
            _ => {}
        }
    }
    Ok(piece)
}

fn trainer(bytes: &[u8], model: &mut SentencePiece) -> Result<(), String> {
    let mut fields = Message(bytes);
    while let Some((field, value)) = fields.next()? {
        match field {
            3 => {
                model.algorithm = match value.number("model_type")? {
                    1 => Algorithm::Unigram,
                    2 => Algorithm::Bpe,
                    other => {
                        let name = ["word", "char"].get(other.wrapping_sub(3) as usize).unwrap_or(&"unknown");
                        return Err(format!("model_type {other} ({name}); supported are 1 (unigram) and 2 (BPE)"));
                    }
                }
            }
            24 if value.flag("treat_whitespace_as_suffix")? => {
                return Err("treat_whitespace_as_suffix is not supported".into());
            }
            41 => model.bos = value.id("bos_id")?,
            42 => model.eos = value.id("eos_id")?,
            _ => {}
        }
    }
    Ok(())
}

fn normalizer(bytes: &[u8], model: &mut SentencePiece) -> Result<(), String> {
    let mut fields = Message(bytes);
    let mut name = "";
    while let Some((field, value)) = fields.next()? {
        match field {
            1 => name = std::str::from_utf8(value.bytes("normalizer_spec.name")?).unwrap_or_default(),
            2 => model.charsmap = value.bytes("precompiled_charsmap")?.to_owned(),
            3 => model.add_dummy_prefix = value.flag("add_dummy_prefix")?,
            4 => model.remove_extra_whitespaces = value.flag("remove_extra_whitespaces")?,
            5 if !value.flag("escape_whitespaces")? => {
                return Err("escape_whitespaces is off, which is not supported".into());
            }
            _ => {}
        }
    }
    if model.charsmap.is_empty() && !["", "identity"].contains(&name) {
        return Err(format!("normalisation {:?} without its rules (precompiled_charsmap)", quoted(name)));
    }
    Ok(())
}
