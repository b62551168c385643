//! SentencePiece models as [`tokenizers::Tokenizer`]s: from a `tokenizer.model`, or from the arrays of a GGUF file.
//!
//! BPE models merge by the score of the merged piece; here that becomes a list of merges, best score first, as in
//! transformers' `SpmConverter`. A piece that can be made in several ways gives several merges, longest left part first:
//! where two ways to make the same piece overlap in a text, sentencepiece takes the left one.

mod open;
mod proto;

pub(crate) use open::open;

use super::ends::around;
use crate::checkpoint::limits::quoted;
use crate::{Error, Result};
use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::BPE;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{NormalizerWrapper, Precompiled, Prepend, Replace, Sequence as Normalizers};
use tokenizers::{AddedToken, Tokenizer};

/// Largest `tokenizer.model` that is read; Gemma's 262k pieces take 5 MB.
pub const MAX_SENTENCEPIECE_BYTES: u64 = 16 << 20;
/// Pieces of a model.
pub const MAX_PIECES: usize = 1 << 20;
/// Bytes of a piece; sentencepiece's own default is 16 characters.
pub const MAX_PIECE_BYTES: usize = 256;
/// Merges that the pieces of a BPE model give; Gemma's give 0.6 million.
pub const MAX_MERGES: usize = 2 << 20;
/// Bytes of text in all merges.
pub const MAX_MERGE_BYTES: usize = 64 << 20;

/// What stands for a space in pieces.
const SPACE: char = '▁';

/// What a piece is for (`SentencePiece.Type`, and `tokenizer.ggml.token_type` of GGUF).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PieceKind {
    /// Text.
    Normal,
    /// Stands for text that no piece covers.
    Unknown,
    /// A special token such as `<s>`, never the outcome of encoding plain text.
    Control,
    /// Text that is never cut.
    UserDefined,
    /// A placeholder.
    Unused,
    /// One byte, spelt like `<0x0A>`.
    Byte,
}

impl PieceKind {
    /// The kind of a number in a file.
    pub fn from_code(code: u64) -> Option<Self> {
        Some(match code {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }

    /// The number in a file.
    pub(super) fn code(self) -> i32 {
        match self {
            Self::Normal => 1,
            Self::Unknown => 2,
            Self::Control => 3,
            Self::UserDefined => 4,
            Self::Unused => 5,
            Self::Byte => 6,
        }
    }

    /// Whether encoding may produce this piece by merging others.
    fn is_mergeable(self) -> bool {
        matches!(self, Self::Normal | Self::UserDefined)
    }
}

/// A piece; its place in the list is its id.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// Its text, spaces as `▁`.
    pub text: String,
    /// Log-probability (Unigram) or negated rank (BPE): higher is better.
    pub score: f32,
    /// What it is for.
    pub kind: PieceKind,
}

/// How text is cut into pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// The most probable segmentation.
    Unigram,
    /// Pairs are merged, best score first.
    Bpe,
}

/// A token that is not among the pieces: it takes the next id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtraToken {
    /// Its text.
    pub text: String,
    /// Whether decoding may skip it.
    pub special: bool,
}

/// A SentencePiece model.
#[derive(Debug, Clone, PartialEq)]
pub struct SentencePiece {
    /// How text is cut.
    pub algorithm: Algorithm,
    /// The pieces, by id.
    pub pieces: Vec<Piece>,
    /// Whether every text is encoded as if a space stood before it.
    pub add_dummy_prefix: bool,
    /// Whether spaces at both ends, and all but one of a row of them, are left out.
    pub remove_extra_whitespaces: bool,
    /// Normalisation rules (`precompiled_charsmap`); empty for none.
    pub charsmap: Vec<u8>,
    /// Id of the beginning-of-sequence token.
    pub bos: Option<u32>,
    /// Id of the end-of-sequence token.
    pub eos: Option<u32>,
}

impl SentencePiece {
    /// A model with Llama's settings: a dummy prefix, spaces kept, no rules, bos 1, eos 2.
    pub fn new(algorithm: Algorithm, pieces: Vec<Piece>) -> Self {
        let charsmap = Vec::new();
        let (add_dummy_prefix, remove_extra_whitespaces) = (true, false);
        Self { algorithm, pieces, add_dummy_prefix, remove_extra_whitespaces, charsmap, bos: Some(1), eos: Some(2) }
    }

    /// Reads the bytes of a `tokenizer.model`; `path` names it in errors.
    ///
    /// # Errors
    /// [`Error::File`] for more than [`MAX_SENTENCEPIECE_BYTES`], malformed protobuf, or settings that are not
    /// supported.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        if bytes.len() as u64 > MAX_SENTENCEPIECE_BYTES {
            let reason = format!("{} bytes; at most {MAX_SENTENCEPIECE_BYTES} are accepted", bytes.len());
            return Err(Error::file(path, reason));
        }
        proto::parse(bytes).map_err(|e| Error::file(path, format!("sentencepiece model: {e}")))
    }

    /// The spelling of a piece.
    pub fn text(&self, id: u32) -> Option<&str> {
        Some(&self.pieces.get(id as usize)?.text)
    }

    /// A tokenizer that encodes and decodes as SentencePiece does. Control tokens, and the unknown one, are special;
    /// where they, user-defined pieces or `extra` tokens stand in a text, what follows them is encoded as a text of its
    /// own (as llama.cpp does it). `bos` and `eos` are put around every text that is encoded with special tokens.
    ///
    /// # Errors
    /// [`Error::File`] naming `path` for pieces that are empty, too long, repeated or without a finite score, for an
    /// incomplete set of bytes, without a way to encode unknown text, and beyond [`MAX_PIECES`], [`MAX_MERGES`] or
    /// [`MAX_MERGE_BYTES`].
    pub fn to_tokenizer(
        &self,
        path: &Path,
        extra: &[ExtraToken],
        bos: Option<u32>,
        eos: Option<u32>,
    ) -> Result<Tokenizer> {
        // The library was not written for hostile input: should it panic, that is an error of the file.
        match catch_unwind(AssertUnwindSafe(|| self.build(extra, bos, eos))) {
            Ok(result) => result,
            Err(_) => Err("the tokenizer library panicked; the file is inconsistent".into()),
        }
        .map_err(|e| Error::file(path, format!("sentencepiece model: {e}")))
    }

    fn build(&self, extra: &[ExtraToken], bos: Option<u32>, eos: Option<u32>) -> Result<Tokenizer, String> {
        let ids = self.check()?;
        let mut tokenizer = Tokenizer::new(self.model(&ids)?);
        tokenizer.with_normalizer(Some(self.normalizer()?)).map_err(text)?;
        let space = Replace::new(SPACE.to_string(), " ").map_err(text)?;
        let mut decoders: Vec<DecoderWrapper> =
            vec![DecoderWrapper::Replace(space), ByteFallback::default().into(), Fuse::default().into()];
        if self.add_dummy_prefix {
            decoders.push(tokenizers::decoders::strip::Strip::new(' ', 1, 0).into());
        }
        tokenizer.with_decoder(Some(Decoders::new(decoders)));

        let added = |text: &str, special| AddedToken::from(text.to_owned(), special).normalized(false);
        let pieces = self.pieces.iter().filter_map(|p| match p.kind {
            PieceKind::Control | PieceKind::Unknown => Some(added(&p.text, true)),
            PieceKind::UserDefined => Some(added(&p.text, false)),
            PieceKind::Normal | PieceKind::Unused | PieceKind::Byte => None,
        });
        let mut seen = HashSet::new();
        for (at, token) in extra.iter().enumerate() {
            let length = token.text.len();
            if length == 0 || length > MAX_PIECE_BYTES {
                return Err(format!("added token {at}: {length} bytes where 1 to {MAX_PIECE_BYTES} are expected"));
            }
            if ids.contains_key(token.text.as_str()) || !seen.insert(token.text.as_str()) {
                return Err(format!("added token {at}: {:?} exists already", quoted(&token.text)));
            }
        }
        let extra = extra.iter().map(|t| added(&t.text, t.special));
        tokenizer.add_tokens(pieces.chain(extra)).map_err(text)?;

        let named = |id: Option<u32>, name: &str| -> Result<Option<(String, u32)>, String> {
            let Some(id) = id else { return Ok(None) };
            let token =
                tokenizer.id_to_token(id).ok_or_else(|| format!("{name} is {id}, but there is no such token"))?;
            Ok(Some((token, id)))
        };
        let template = around(named(bos, "bos")?, named(eos, "eos")?)?;
        if template.is_some() {
            tokenizer.with_post_processor(template);
        }
        Ok(tokenizer)
    }

    /// Checks every piece; ids by text.
    fn check(&self) -> Result<HashMap<&str, u32>, String> {
        if self.pieces.is_empty() || self.pieces.len() > MAX_PIECES {
            return Err(format!("{} pieces where 1 to {MAX_PIECES} are expected", self.pieces.len()));
        }
        let mut ids = HashMap::with_capacity(self.pieces.len());
        let mut bytes = 0;
        for (at, piece) in self.pieces.iter().enumerate() {
            let Piece { text, score, kind } = piece;
            let fail = |reason: String| Err(format!("piece {at} ({:?}): {reason}", quoted(text)));
            if text.is_empty() || text.len() > MAX_PIECE_BYTES {
                return fail(format!("{} bytes where 1 to {MAX_PIECE_BYTES} are expected", text.len()));
            }
            if !score.is_finite() {
                return fail(format!("its score is {score}"));
            }
            if *kind == PieceKind::Byte {
                if !is_byte(text) {
                    return fail("a byte is spelt like <0x0A>".into());
                }
                bytes += 1;
            }
            if let Some(other) = ids.insert(text.as_str(), u32::try_from(at).unwrap_or(u32::MAX)) {
                return fail(format!("the same as piece {other}"));
            }
        }
        if bytes != 0 && bytes != 256 {
            return Err(format!("{bytes} byte pieces where all 256 or none are expected"));
        }
        let unknown = self.pieces.iter().any(|p| p.kind == PieceKind::Unknown);
        if !unknown && (bytes == 0 || self.algorithm == Algorithm::Unigram) {
            return Err("no piece stands for unknown text (type 2)".into());
        }
        Ok(ids)
    }

    fn model(&self, ids: &HashMap<&str, u32>) -> Result<ModelWrapper, String> {
        let fallback = self.pieces.iter().any(|p| p.kind == PieceKind::Byte);
        let unknown = self.pieces.iter().position(|p| p.kind == PieceKind::Unknown);
        match self.algorithm {
            Algorithm::Unigram => {
                let pieces = self.pieces.iter().map(|p| (p.text.clone(), f64::from(p.score))).collect();
                Unigram::from(pieces, unknown, fallback).map(Into::into).map_err(text)
            }
            Algorithm::Bpe => {
                let vocab = ids.iter().map(|(text, id)| ((*text).to_owned(), *id));
                let mut bpe = BPE::builder()
                    .vocab_and_merges(vocab.collect::<tokenizers::models::bpe::Vocab>(), self.merges(ids)?)
                    .fuse_unk(true)
                    .byte_fallback(fallback);
                if let Some(piece) = unknown.and_then(|at| self.pieces.get(at)) {
                    bpe = bpe.unk_token(piece.text.clone());
                }
                bpe.build().map(Into::into).map_err(text)
            }
        }
    }

    /// Every way to make a piece of two others, best first.
    fn merges(&self, ids: &HashMap<&str, u32>) -> Result<Vec<(String, String)>, String> {
        let mergeable = |text: &str| {
            ids.get(text).and_then(|id| self.pieces.get(*id as usize)).is_some_and(|p| p.kind.is_mergeable())
        };
        let mut found: Vec<(usize, &Piece, usize)> = Vec::new();
        let mut bytes = 0;
        for (id, piece) in self.pieces.iter().enumerate().filter(|(_, p)| p.kind.is_mergeable()) {
            for (cut, _) in piece.text.char_indices().skip(1) {
                let (left, right) = piece.text.split_at(cut);
                if mergeable(left) && mergeable(right) {
                    found.push((id, piece, cut));
                    bytes += piece.text.len();
                    if found.len() > MAX_MERGES || bytes > MAX_MERGE_BYTES {
                        return Err(format!(
                            "its pieces give more than {MAX_MERGES} merges or {MAX_MERGE_BYTES} bytes of them"
                        ));
                    }
                }
            }
        }
        found.sort_unstable_by(|(id, piece, cut), (other_id, other, other_cut)| {
            let order = other.score.total_cmp(&piece.score);
            order.then(id.cmp(other_id)).then(other_cut.cmp(cut))
        });
        let split = |(_, piece, cut): (usize, &Piece, usize)| {
            let (left, right) = piece.text.split_at(cut);
            (left.to_owned(), right.to_owned())
        };
        Ok(found.into_iter().map(split).collect())
    }

    fn normalizer(&self) -> Result<NormalizerWrapper, String> {
        let mut steps: Vec<NormalizerWrapper> = Vec::new();
        if !self.charsmap.is_empty() {
            steps.push(self.rules()?.into());
        }
        if self.remove_extra_whitespaces {
            for (runs, left) in [("^ +|[ ▁]+$", ""), (" {2,}", " ")] {
                steps.push(Replace::new(ReplacePattern::Regex(runs.into()), left).map_err(text)?.into());
            }
        }
        if self.add_dummy_prefix {
            steps.push(Prepend::new(SPACE.to_string()).into());
        }
        steps.push(Replace::new(" ", SPACE.to_string()).map_err(text)?.into());
        Ok(Normalizers::new(steps).into())
    }

    /// `u32` size of a trie, the trie, and the texts that it points to, each ended by a zero. The library trusts the
    /// size and puts in whatever stands up to the next zero, so both are checked first.
    fn rules(&self) -> Result<Precompiled, String> {
        let cut = || "precompiled_charsmap is cut off".to_owned();
        let (size, rest) = self.charsmap.split_first_chunk().ok_or_else(cut)?;
        let (trie, texts) = rest.split_at_checked(u32::from_le_bytes(*size) as usize).ok_or_else(cut)?;
        if trie.is_empty() || !trie.len().is_multiple_of(4) || texts.last() != Some(&0) {
            return Err(cut());
        }
        match texts.split(|byte| *byte == 0).map(<[u8]>::len).max() {
            Some(longest) if longest > MAX_PIECE_BYTES => Err(format!(
                "precompiled_charsmap puts {longest} bytes for a character; at most {MAX_PIECE_BYTES} are accepted"
            )),
            _ => Precompiled::from(&self.charsmap).map_err(|e| format!("precompiled_charsmap: {e}")),
        }
    }
}

fn text(e: impl std::fmt::Display) -> String {
    quoted(&e.to_string())
}

pub(super) fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && d.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F')))
}
