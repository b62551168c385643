//! Training text: files to documents, documents to token streams, streams to batches.

use super::decoder::Batch;
use super::trainer::Data;
use crate::text::Tokenizer;
use crate::{Error, Result};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use std::io::Read;
use std::path::Path;
use std::sync::Mutex;

/// Largest text that is read.
pub const MAX_TEXT_BYTES: u64 = 4 << 30;
/// Most pieces into which a single text is cut, each of which gives its last part to validation.
const VALIDATION_PIECES: usize = 64;
/// Bytes that such a part should have at least, so that the cut at a line's end does not leave nothing of it.
const VALIDATION_PART: usize = 256;

/// Texts to train on and texts to validate with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Corpus {
    /// Training documents.
    pub train: Vec<String>,
    /// Validation documents.
    pub validation: Vec<String>,
    /// Whether they are documents of their own; otherwise pieces of one text.
    pub separate: bool,
}

impl Corpus {
    /// Reads a text file (one document) or, if the name ends in `.jsonl`, one document a line as `{"text": "…"}`, and
    /// sets `share` of it apart for validation: of a text the last lines of each of up to 64 equal pieces, of JSONL every
    /// n-th document, at least one.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] naming the byte or the line, for a file that is empty, no UTF-8 or no such JSON,
    /// and for a text whose lines leave nothing for validation or for training.
    pub fn read(path: &Path, share: f64) -> Result<Self> {
        let documents = read_documents(path)?;
        let corpus = match &documents[..] {
            [one] => split_text(one, share),
            _ => split_documents(documents, share),
        };
        if corpus.train.iter().all(String::is_empty) {
            return Err(Error::file(path, "nothing is left to train on; give more text, or set validation to 0"));
        }
        if share > 0.0 && corpus.validation.is_empty() {
            let reason = "nothing can be set apart for validation, which is cut at the ends of lines: give more text or \
                          shorter lines, or set validation to 0";
            return Err(Error::file(path, reason));
        }
        Ok(corpus)
    }
}

/// The documents of a text or JSONL file.
///
/// # Errors
/// As [`Corpus::read`].
pub fn read_documents(path: &Path) -> Result<Vec<String>> {
    let size = std::fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
    if size > MAX_TEXT_BYTES {
        return Err(Error::file(path, format!("{size} bytes; at most {MAX_TEXT_BYTES} are read: cut it into parts")));
    }
    // A pipe has no size, and a file may grow.
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
    file.take(MAX_TEXT_BYTES + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > MAX_TEXT_BYTES {
        return Err(Error::file(path, format!("more than {MAX_TEXT_BYTES} bytes; cut it into parts")));
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::file(path, format!("not UTF-8 at byte {at}; convert it, for example with iconv"))
    })?;
    let documents = match path.extension().is_some_and(|e| e.eq_ignore_ascii_case("jsonl")) {
        false => vec![text],
        true => jsonl_texts(path, &text)?,
    };
    match documents.iter().all(|d| d.trim().is_empty()) {
        true => Err(Error::file(path, "there is no text in it")),
        false => Ok(documents),
    }
}

fn jsonl_texts(path: &Path, text: &str) -> Result<Vec<String>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parse = |(i, line): (usize, &str)| {
        let bad = |reason: String| Error::file(path, format!("line {}: {reason}", i + 1));
        let value: serde_json::Value = serde_json::from_str(line).map_err(|e| {
            // The library counts lines as well, and sees one.
            let reason = e.to_string();
            let reason = reason.rsplit_once(" at line ").map_or(reason.as_str(), |(reason, _)| reason);
            bad(format!("not JSON at column {}: {reason}", e.column()))
        })?;
        match value.get("text").and_then(|t| t.as_str()) {
            Some(text) => Ok(text.to_owned()),
            None => Err(bad("expected an object with a string \"text\"".into())),
        }
    };
    lines.map(parse).collect()
}

fn split_text(text: &str, share: f64) -> Corpus {
    let mut corpus = Corpus::default();
    // Cuts lie after line ends, so that no line is torn apart.
    let cut = |at: usize| {
        let at = (at..=text.len()).find(|i| text.is_char_boundary(*i)).unwrap_or(text.len());
        text[at..].find('\n').map_or(text.len(), |n| at + n + 1)
    };
    let mut begin = 0;
    let pieces = ((text.len() as f64 * share) as usize / VALIDATION_PART).clamp(1, VALIDATION_PIECES);
    for piece in 1..=pieces {
        let end =
            if piece == pieces { text.len() } else { cut((text.len() as u64 * piece as u64 / pieces as u64) as usize) };
        let kept = (end.saturating_sub(begin) as f64 * (1.0 - share)) as usize;
        let middle = if share > 0.0 { cut(begin + kept).min(end) } else { end };
        for (list, range) in [(&mut corpus.train, begin..middle), (&mut corpus.validation, middle..end)] {
            if !range.is_empty() {
                list.push(text[range].to_owned());
            }
        }
        begin = end.max(begin);
    }
    corpus
}

fn split_documents(documents: Vec<String>, share: f64) -> Corpus {
    let mut corpus = Corpus { separate: true, ..Corpus::default() };
    for (i, document) in documents.into_iter().enumerate() {
        // The count of validation documents grows by one wherever share · i passes an integer.
        let list = match ((i + 1) as f64 * share).floor() > (i as f64 * share).floor() {
            true => &mut corpus.validation,
            false => &mut corpus.train,
        };
        list.push(document);
    }
    if share > 0.0 && corpus.validation.is_empty() && corpus.train.len() > 1 {
        corpus.validation.extend(corpus.train.pop());
    }
    corpus
}

/// Token ids of documents, each followed by the end-of-text token if there are several.
///
/// # Errors
/// [`Error::Text`] if the tokenizer fails.
pub fn tokenize(tokenizer: &Tokenizer, documents: &[String], end: Option<u32>) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for document in documents {
        // Piece by piece at line ends: the tokenizer's memory grows with the text that it is given at once.
        let mut rest = document.as_str();
        while !rest.is_empty() {
            let at = (rest.len().min(1 << 20)..=rest.len()).find(|i| rest.is_char_boundary(*i)).unwrap_or(rest.len());
            let at = rest[at..].find("\n\n").map_or(rest.len(), |n| at + n);
            let (piece, tail) = rest.split_at(at);
            ids.extend(tokenizer.encode(piece, false)?);
            rest = tail;
        }
        ids.extend(end);
    }
    Ok(ids)
}

/// Batches of a token stream: every epoch cuts it into windows at another offset and shuffles them, so each token is
/// trained on once an epoch. A batch is a function of the seed and the step alone.
#[derive(Debug)]
pub struct Stream {
    tokens: Vec<u32>,
    length: usize,
    sequences: usize,
    micro: usize,
    seed: u64,
    validation: Vec<Batch>,
    validation_bytes: usize,
    fingerprint: u64,
    /// Window order of the epoch last asked for.
    order: Mutex<(u64, Vec<u32>)>,
}

impl Stream {
    /// Windows of `length` tokens, `sequences` of them a step, `micro` at a time. `validation` is scored whole, in windows
    /// of `length`; `validation_bytes` is what it decodes to.
    ///
    /// # Errors
    /// [`Error::Request`] if there are too few tokens for two windows, or a number is 0.
    pub fn new(
        tokens: Vec<u32>,
        length: usize,
        sequences: usize,
        micro: usize,
        seed: u64,
        validation: &[u32],
        validation_bytes: usize,
    ) -> Result<Self> {
        for (name, value) in [("length", length), ("sequences", sequences), ("micro", micro)] {
            if value == 0 {
                return Err(Error::request(name, "0 is out of range: at least 1"));
            }
        }
        if tokens.len() / 2 <= length {
            let reason = format!(
                "{} tokens are too few for windows of {length}: give more text or a smaller --length",
                tokens.len()
            );
            return Err(Error::request("training text", reason));
        }
        let fingerprint = fingerprint([&tokens, validation]);
        let validation = windows(validation, length, length, micro);
        let order = Mutex::new((u64::MAX, Vec::new()));
        Ok(Self { tokens, length, sequences, micro, seed, validation, validation_bytes, fingerprint, order })
    }

    /// Tokens of the training text.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Windows of an epoch; the offset may cost one.
    fn windows(&self) -> usize {
        (self.tokens.len() - self.length) / self.length
    }

    /// The `index`-th window of the run: `length + 1` tokens.
    fn window(&self, index: u64) -> &[u32] {
        let count = self.windows() as u64;
        let epoch = index / count;
        let mut order = self.order.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(epoch);
        if order.0 != epoch {
            let mut list: Vec<u32> = (0..count as u32).collect();
            list.shuffle(&mut rng);
            *order = (epoch, list);
        }
        let at = order.1.get((index % count) as usize).copied().unwrap_or_default() as usize;
        // A golden-ratio sequence spreads the epochs' offsets evenly.
        let offset =
            (epoch as f64 * 0.618_033_988_749_895).fract() * (self.tokens.len() - count as usize * self.length) as f64;
        let begin = at * self.length + (offset as usize).min(self.tokens.len() - 1 - count as usize * self.length);
        &self.tokens[begin..begin + self.length + 1]
    }
}

/// FNV-1a's start.
pub(super) const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a, a word at a time.
pub(super) fn fnv(hash: u64, word: u64) -> u64 {
    (hash ^ word).wrapping_mul(0x0100_0000_01b3)
}

/// A hash over the tokens of several streams and their lengths.
fn fingerprint<const N: usize>(streams: [&[u32]; N]) -> u64 {
    streams.iter().fold(FNV_BASIS, |hash, tokens| {
        tokens.iter().fold(fnv(hash, tokens.len() as u64), |hash, t| fnv(hash, u64::from(*t)))
    })
}

/// A token stream as batches of sliding windows of `length` tokens, each `stride` after the one before: every token but
/// the first is a target exactly once, in the first window that holds it, as `bitnet perplexity` scores it.
pub fn windows(tokens: &[u32], length: usize, stride: usize, micro: usize) -> Vec<Batch> {
    let last = tokens.len().saturating_sub(1);
    // Inputs begin..begin + length predict the tokens up to begin + length; those up to `done` have been predicted.
    let mut done = 0;
    let mut starts = Vec::new();
    for begin in (0..last).step_by(stride.clamp(1, length.max(1))) {
        starts.push((begin, done));
        done = (begin + length).min(last);
        if done == last {
            break;
        }
    }
    let batch = |starts: &[(usize, usize)]| {
        let mut batch = Batch { length, tokens: Vec::new(), targets: Vec::new() };
        for &(begin, done) in starts {
            for i in begin..begin + length {
                batch.tokens.push(tokens.get(i).copied().unwrap_or(tokens[0]));
                batch.targets.push(tokens.get(i + 1).copied().filter(|_| i + 1 > done));
            }
        }
        batch
    };
    starts.chunks(micro.max(1)).map(batch).collect()
}

impl Data for Stream {
    fn micro_batches(&self, step: u64) -> Result<Vec<Batch>> {
        let first = step * self.sequences as u64;
        let all: Vec<u64> = (first..first + self.sequences as u64).collect();
        let batch = |indices: &[u64]| {
            let mut batch = Batch { length: self.length, tokens: Vec::new(), targets: Vec::new() };
            for index in indices {
                let window = self.window(*index);
                batch.tokens.extend(&window[..self.length]);
                batch.targets.extend(window[1..].iter().copied().map(Some));
            }
            batch
        };
        Ok(all.chunks(self.micro).map(batch).collect())
    }

    fn validation(&self) -> &[Batch] {
        &self.validation
    }

    fn validation_bytes(&self) -> usize {
        self.validation_bytes
    }

    fn epochs(&self, steps: u64) -> f64 {
        steps as f64 * self.sequences as f64 / self.windows() as f64
    }

    fn fingerprint(&self) -> Option<u64> {
        Some(self.fingerprint)
    }
}
