//! The tokenizer in a GGUF file's metadata, under the keys `tokenizer.ggml.*`.
//!
//! Byte-level BPE (`gpt2`) becomes what tokenizer.json would hold: vocabulary, merges, the pre-tokeniser that
//! `tokenizer.ggml.pre` names (llama.cpp's names), special tokens by their type. SentencePiece (`llama`, `t5`) goes
//! through [`super::sentencepiece`].

mod write;

pub(crate) use write::Written;

use super::Tokenizer;
use super::ends::around;
use super::sentencepiece::{Algorithm, Piece, PieceKind, SentencePiece};
use crate::checkpoint::gguf::Gguf;
use crate::checkpoint::limits::quoted;
use crate::{Error, Result};
use std::collections::HashMap;
use tokenizers::AddedToken;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::punctuation::Punctuation;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::normalizer::SplitDelimiterBehavior;

/// Tokens of a vocabulary.
const MAX_TOKENS: usize = 1 << 20;
/// Merges of a vocabulary; Llama 3 has 280,147.
const MAX_MERGES: usize = 2 << 20;

/// Token ids that the metadata names, all of which are special whatever their type says.
const SPECIAL: [&str; 10] = ["bos", "eos", "eot", "eom", "unknown", "separator", "padding", "cls", "mask", "fim_pad"];

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How text is cut into words before merging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Words {
    Llama3,
    Qwen2,
    Gpt2,
    /// GPT-2's after single digits.
    Digits,
    /// Falcon's first generation: runs of punctuation, GPT-2's, digits by three.
    Falcon,
}

/// Names of llama.cpp (`llama-vocab.cpp`) by how they cut words.
const PRE: [(Words, &[&str]); 5] = [
    (
        Words::Llama3,
        &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-e",
            "falcon_e",
            "falcon-h1",
            "smaug-bpe",
            "dbrx",
            "pixtral",
            "lfm2",
        ],
    ),
    (Words::Qwen2, &["qwen2", "stablelm2", "deepseek-r1-qwen"]),
    (Words::Gpt2, &["gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais"]),
    (Words::Digits, &["starcoder", "refact", "command-r", "smollm", "codeshell"]),
    (Words::Falcon, &["falcon"]),
];

impl Words {
    const ALL: [Self; 5] = [Self::Llama3, Self::Qwen2, Self::Gpt2, Self::Digits, Self::Falcon];

    /// The name that llama.cpp gives it, the first of several.
    fn name(self) -> &'static str {
        PRE.iter().find(|(words, _)| *words == self).and_then(|(_, names)| names.first()).copied().unwrap_or_default()
    }

    fn pre_tokenizer(self) -> tokenizers::Result<Sequence> {
        let split = |regex: &str| {
            Split::new(SplitPattern::Regex(regex.into()), SplitDelimiterBehavior::Isolated, false)
                .map(PreTokenizerWrapper::Split)
        };
        // Its own expression is GPT-2's.
        let bytes = |use_regex| PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, use_regex));
        Ok(Sequence::new(match self {
            Self::Llama3 => vec![split(LLAMA3)?, bytes(false)],
            Self::Qwen2 => vec![split(QWEN2)?, bytes(false)],
            Self::Gpt2 => vec![bytes(true)],
            Self::Digits => vec![PreTokenizerWrapper::Digits(Digits::new(true)), bytes(true)],
            Self::Falcon => vec![
                PreTokenizerWrapper::Punctuation(Punctuation::new(SplitDelimiterBehavior::Contiguous)),
                bytes(true),
                PreTokenizerWrapper::Digits(Digits::new(false)),
                split("[0-9][0-9][0-9]")?,
            ],
        }))
    }
}

/// Builds the tokenizer of a GGUF file.
///
/// # Errors
/// [`Error::Config`] naming the metadata key for what is missing, inconsistent or not supported.
pub(super) fn tokenizer(gguf: &Gguf) -> Result<Tokenizer> {
    let key = "tokenizer.ggml.model";
    let inner = match gguf.text(key)? {
        Some("gpt2") => byte_level(gguf)?,
        Some("llama") => sentencepiece(gguf, Algorithm::Bpe)?,
        Some("t5") => sentencepiece(gguf, Algorithm::Unigram)?,
        Some(other) => {
            let reason = format!(
                "{:?} is not supported, only gpt2 (byte-level BPE), llama and t5 (sentencepiece)",
                quoted(other)
            );
            return Err(Error::config(gguf.path(), key, reason));
        }
        None => return Err(Error::config(gguf.path(), key, "missing: this file has no tokenizer")),
    };
    Tokenizer::from_tokenizers(inner, gguf.special_tokens()?, gguf.path())
}

/// The ids of BOS and EOS, where they are to be put around every text.
fn ends(gguf: &Gguf, bos_by_default: bool) -> Result<(Option<u32>, Option<u32>)> {
    let wanted = |key: &str, default| Ok::<_, Error>(gguf.flag(&format!("tokenizer.ggml.{key}"))?.unwrap_or(default));
    let bos = if wanted("add_bos_token", bos_by_default)? { gguf.token("bos")? } else { None };
    let eos = if wanted("add_eos_token", false)? { gguf.token("eos")? } else { None };
    Ok((bos, eos))
}

/// What kind each of `count` tokens is; normal where the file does not say.
fn kinds(gguf: &Gguf, count: usize) -> Result<Vec<PieceKind>> {
    let key = "tokenizer.ggml.token_type";
    let Some(codes) = gguf.numbers(key)? else { return Ok(vec![PieceKind::Normal; count]) };
    if codes.len() != count {
        return Err(Error::config(gguf.path(), key, format!("{} types for {count} tokens", codes.len())));
    }
    // 0 is "undefined" and as good as normal.
    let kind = |code: f64| match code {
        0.0 => Some(PieceKind::Normal),
        code if code.fract() == 0.0 => PieceKind::from_code(code as u64),
        _ => None,
    };
    let known = codes
        .iter()
        .map(|c| kind(*c).ok_or_else(|| Error::config(gguf.path(), key, format!("{c} is no type of token (1 to 6)"))));
    known.collect()
}

/// The number of tokens, within the limit.
fn count(gguf: &Gguf, key: &str, most: usize) -> Result<usize> {
    match gguf.strings(key)?.map(|all| all.len()) {
        None => Err(Error::config(gguf.path(), key, "missing")),
        Some(n) if n > most => {
            Err(Error::config(gguf.path(), key, format!("{n} strings; at most {most} are accepted")))
        }
        Some(n) => Ok(n),
    }
}

fn sentencepiece(gguf: &Gguf, algorithm: Algorithm) -> Result<tokenizers::Tokenizer> {
    let key = "tokenizer.ggml.tokens";
    let count = count(gguf, key, MAX_TOKENS)?;
    let kinds = kinds(gguf, count)?;
    let key_of_scores = "tokenizer.ggml.scores";
    let Some(scores) = gguf.numbers(key_of_scores)? else {
        return Err(Error::config(gguf.path(), key_of_scores, "missing"));
    };
    if scores.len() != count {
        let reason = format!("{} scores for {count} tokens", scores.len());
        return Err(Error::config(gguf.path(), key_of_scores, reason));
    }
    let tokens = gguf.strings(key)?.into_iter().flatten();
    let pieces: Result<Vec<Piece>> = tokens
        .zip(scores.into_iter().zip(kinds))
        .map(|(text, (score, kind))| Ok(Piece { text: text?.to_owned(), score: score as f32, kind }))
        .collect();
    let mut model = SentencePiece::new(algorithm, pieces?);
    let flag = |key: &str, default| Ok::<_, Error>(gguf.flag(&format!("tokenizer.ggml.{key}"))?.unwrap_or(default));
    model.add_dummy_prefix = flag("add_space_prefix", true)?;
    model.remove_extra_whitespaces = flag("remove_extra_whitespaces", false)?;
    if let Some(charsmap) = gguf.numbers("tokenizer.ggml.precompiled_charsmap")? {
        model.charsmap = charsmap.into_iter().map(|b| b as u8).collect();
    }
    model.bos = gguf.token("bos")?;
    model.eos = gguf.token("eos")?;
    let (bos, eos) = ends(gguf, true)?;
    model.to_tokenizer(gguf.path(), &[], bos, eos)
}

fn byte_level(gguf: &Gguf) -> Result<tokenizers::Tokenizer> {
    let fail = |key: &str, reason: String| Error::config(gguf.path(), key, reason);
    let key = "tokenizer.ggml.tokens";
    let count = count(gguf, key, MAX_TOKENS)?;
    let kinds = kinds(gguf, count)?;
    let mut vocab: HashMap<String, u32> = HashMap::with_capacity(count);
    let mut added: Vec<(u32, AddedToken)> = Vec::new();
    let mut special = Vec::new();
    for name in SPECIAL {
        special.extend(gguf.token(name)?);
    }
    for ((token, kind), id) in gguf.strings(key)?.into_iter().flatten().zip(kinds).zip(0u32..) {
        let token = token?;
        if let Some(other) = vocab.insert(token.to_owned(), id) {
            return Err(fail(key, format!("{other} and {id} are both {:?}", quoted(token))));
        }
        let special = special.contains(&id) || matches!(kind, PieceKind::Control | PieceKind::Unknown);
        if special || kind == PieceKind::UserDefined {
            if token.is_empty() {
                return Err(fail(key, format!("special token {id} is empty")));
            }
            added.push((id, AddedToken::from(token.to_owned(), special).normalized(false)));
        }
    }
    if let Some(id) = special.iter().find(|id| **id as usize >= count) {
        return Err(fail(key, format!("{count} tokens, but {id} is said to be a special one")));
    }
    let bos = gguf.token("bos")?.and_then(|id| added.iter().find(|(i, _)| *i == id)).map(|(_, t)| t.content.as_str());
    let words = words(gguf, bos)?;
    let (vocab, merges) = (vocab.into_iter().collect::<Vec<_>>(), merges(gguf)?);
    // As llama.cpp: a word that is a token is that token, whatever the merges give.
    let whole = words == Words::Llama3;
    let bpe = BPE::builder().vocab_and_merges(vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges);
    let built = bpe.ignore_merges(whole).build().map_err(|e| fail("tokenizer.ggml.merges", quoted(&e.to_string())))?;
    let mut tokenizer = tokenizers::Tokenizer::new(built);
    let words = words.pre_tokenizer().map_err(|e| fail("tokenizer.ggml.pre", quoted(&e.to_string())))?;
    tokenizer.with_pre_tokenizer(Some(words));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let added: Vec<AddedToken> = added.into_iter().map(|(_, token)| token).collect();
    tokenizer.add_tokens(added).map_err(|e| fail(key, quoted(&e.to_string())))?;
    let (bos, eos) = ends(gguf, whole)?;
    let named = |id: Option<u32>| id.and_then(|id| Some((tokenizer.id_to_token(id)?, id)));
    let template = around(named(bos), named(eos)).map_err(|e| fail("tokenizer.ggml.add_bos_token", quoted(&e)))?;
    if template.is_some() {
        tokenizer.with_post_processor(template);
    }
    Ok(tokenizer)
}

fn words(gguf: &Gguf, bos: Option<&str>) -> Result<Words> {
    let key = "tokenizer.ggml.pre";
    match gguf.text(key)? {
        // Older files of Llama 3's vocabulary, microsoft's among them, lack the name or have "default".
        None | Some("default" | "") => Ok(match bos {
            Some("<|begin_of_text|>") => Words::Llama3,
            _ => Words::Gpt2,
        }),
        Some(name) => match PRE.iter().find(|(_, names)| names.contains(&name)) {
            Some((words, _)) => Ok(*words),
            None => {
                let known: Vec<&str> = PRE.iter().flat_map(|(_, names)| names.iter().copied()).collect();
                let reason = format!("{:?} is not a pre-tokeniser known here ({})", quoted(name), known.join(", "));
                Err(Error::config(gguf.path(), key, reason))
            }
        },
    }
}

fn merges(gguf: &Gguf) -> Result<Vec<(String, String)>> {
    let key = "tokenizer.ggml.merges";
    let mut merges = Vec::with_capacity(count(gguf, key, MAX_MERGES)?);
    for merge in gguf.strings(key)?.into_iter().flatten() {
        let merge = merge?;
        // The first part has a character at least, which may be a space.
        let first = merge.chars().next().map_or(0, char::len_utf8);
        let Some((left, right)) = merge.get(first..).and_then(|rest| rest.find(' ')).and_then(|at| {
            let (left, right) = merge.split_at_checked(first + at)?;
            Some((left, right.get(1..).filter(|r| !r.is_empty())?))
        }) else {
            return Err(Error::config(gguf.path(), key, format!("{:?} are not two tokens", quoted(merge))));
        };
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(merges)
}
