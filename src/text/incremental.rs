//! Decoding a stream of tokens without ever showing half a character.
//!
//! The concatenation of all pieces, with the final flush, is exactly what decoding all ids at once gives. Each token
//! costs constant time (amortised): byte-level tokenizers are decoded here, from bytes; all others through the
//! tokenizer's own decoder, over a window that begins shortly before the undecoded tokens.

use super::Tokenizer;
use crate::Result;
use tokenizers::decoders::DecoderWrapper;

/// Tokens without visible progress after which a decoder other than byte-level stops waiting for a character's end.
/// A character has at most four bytes and every token at least one.
const MAX_PENDING: usize = 16;

/// Turns a stream of token ids into text, piece by piece.
#[derive(Debug, Clone)]
pub struct IncrementalDecoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    mode: Mode,
}

#[derive(Debug, Clone)]
enum Mode {
    /// Every character of a token's spelling stands for one byte. `pending` holds the bytes of an unfinished character.
    ByteLevel { pending: Vec<u8> },
    /// Any other decoder.
    Window(Window),
}

/// The last decoded tokens (`ids[..done]`, context for what follows: leading spaces depend on it), which decode to
/// `context`, and the tokens after them.
#[derive(Debug, Clone, Default)]
struct Window {
    ids: Vec<u32>,
    done: usize,
    context: String,
    byte_fallback: bool,
}

impl IncrementalDecoder {
    pub(super) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        let decoder = tokenizer.inner().get_decoder();
        let mode = if decoder.is_some_and(is_byte_level) {
            Mode::ByteLevel { pending: Vec::new() }
        } else {
            Mode::Window(Window { byte_fallback: decoder.is_some_and(has_byte_fallback), ..Window::default() })
        };
        Self { tokenizer, skip_special, mode }
    }

    /// Appends one token and returns the text that is now certain; empty while a character is unfinished.
    ///
    /// # Errors
    /// [`crate::Error::Text`] if the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let tokenizer = &self.tokenizer;
        // Unknown ids and skipped special tokens take no part in decoding at all.
        let Some(token) = tokenizer.id_to_token(id) else { return Ok(String::new()) };
        if self.skip_special && tokenizer.inner().get_added_vocabulary().is_special_token(&token) {
            return Ok(String::new());
        }
        match &mut self.mode {
            Mode::ByteLevel { pending } => {
                push_bytes(pending, &token);
                Ok(take_utf8(pending))
            }
            Mode::Window(window) => {
                window.ids.push(id);
                // A run of byte tokens decodes as a whole, so its end must be seen first.
                if window.byte_fallback && is_byte_token(&token) {
                    return Ok(String::new());
                }
                window.advance(tokenizer, self.skip_special, false)
            }
        }
    }

    /// Returns what was held back, an unfinished character as U+FFFD, and begins anew.
    ///
    /// # Errors
    /// [`crate::Error::Text`] if the tokenizer's decoder fails.
    pub fn flush(&mut self) -> Result<String> {
        match &mut self.mode {
            Mode::ByteLevel { pending } => Ok(String::from_utf8_lossy(&std::mem::take(pending)).into_owned()),
            Mode::Window(window) => {
                let text = window.advance(&self.tokenizer, self.skip_special, true)?;
                *window = Window { byte_fallback: window.byte_fallback, ..Window::default() };
                Ok(text)
            }
        }
    }
}

impl Window {
    /// Text that `ids` have beyond `context`, unless more tokens could still change it.
    fn advance(&mut self, tokenizer: &Tokenizer, skip_special: bool, last: bool) -> Result<String> {
        if self.ids.len() == self.done {
            return Ok(String::new());
        }
        let text = tokenizer.decode(&self.ids, skip_special)?;
        let pending = self.ids.len() - self.done;
        // With byte fallback this token is no byte token, so nothing before it is open any more.
        let open = !self.byte_fallback && text.ends_with(char::REPLACEMENT_CHARACTER) && pending < MAX_PENDING;
        if !last && (open || text.len() <= self.context.len()) {
            return Ok(String::new());
        }
        let common = common_prefix(&text, &self.context);
        let new = text.get(common..).unwrap_or_default().to_owned();
        self.ids.drain(..self.done);
        self.done = self.ids.len();
        self.context = tokenizer.decode(&self.ids, skip_special)?;
        Ok(new)
    }
}

/// Length of the common prefix, at a character boundary of both.
fn common_prefix(a: &str, b: &str) -> usize {
    if a.starts_with(b) {
        return b.len();
    }
    a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y).map_or(a.len().min(b.len()), |((i, _), _)| i)
}

fn is_byte_level(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteLevel(_) => true,
        DecoderWrapper::Sequence(sequence) => match sequence.get_decoders() {
            [only] => is_byte_level(only),
            [first, DecoderWrapper::Fuse(_)] => is_byte_level(first),
            _ => false,
        },
        _ => false,
    }
}

fn has_byte_fallback(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteFallback(_) => true,
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(has_byte_fallback),
        _ => false,
    }
}

/// Whether a token is spelt like `<0xE4>`.
fn is_byte_token(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && u8::from_str_radix(d, 16).is_ok())
}

/// Appends the bytes that a byte-level token stands for; a token with any other character stands for itself.
fn push_bytes(out: &mut Vec<u8>, token: &str) {
    let start = out.len();
    for c in token.chars() {
        let Some(byte) = byte_of(c) else {
            out.truncate(start);
            out.extend_from_slice(token.as_bytes());
            return;
        };
        out.push(byte);
    }
}

/// GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other 68 bytes, in ascending order, for
/// U+0100 and up.
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Takes everything from `pending` but an unfinished character at its end, as `String::from_utf8_lossy` would show it.
fn take_utf8(pending: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(pending.len());
    let mut keep = 0;
    let mut chunks = pending.utf8_chunks().peekable();
    while let Some(chunk) = chunks.next() {
        text.push_str(chunk.valid());
        if chunk.invalid().is_empty() {
            continue;
        }
        let unfinished = std::str::from_utf8(chunk.invalid()).is_err_and(|e| e.error_len().is_none());
        if chunks.peek().is_none() && unfinished {
            keep = chunk.invalid().len();
        } else {
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
    pending.drain(..pending.len() - keep);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn gpt2_alphabet_is_a_bijection() {
        let mut seen = [false; 256];
        for code in 0..0x200 {
            if let Some(byte) = char::from_u32(code).and_then(byte_of) {
                assert!(!std::mem::replace(&mut seen[byte as usize], true), "byte {byte:#x} twice");
            }
        }
        assert!(seen.iter().all(|s| *s));
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
    }

    proptest! {
        #[test]
        fn utf8_in_pieces_equals_lossy(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..5), 0..12)) {
            let (mut pending, mut text) = (Vec::new(), String::new());
            for piece in &pieces {
                pending.extend_from_slice(piece);
                text.push_str(&take_utf8(&mut pending));
                prop_assert!(pending.len() < 4);
            }
            text.push_str(&String::from_utf8_lossy(&pending));
            prop_assert_eq!(text, String::from_utf8_lossy(&pieces.concat()).into_owned());
        }
    }

    /// A sentencepiece-like tokenizer: leading-space stripping, byte fallback.
    fn sentencepiece() -> Tokenizer {
        let words = ["<unk>", "<s>", "▁", "▁Hello", "▁world", "lo", "�"];
        let mut vocab: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
        vocab.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
        let vocab: serde_json::Map<_, _> =
            vocab.into_iter().enumerate().map(|(i, t)| (t, serde_json::Value::from(i))).collect();
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": [{"id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                              "normalized": false, "special": true}],
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "byte_fallback": true}
        });
        Tokenizer::from_json(json.to_string().as_bytes(), None, "test").unwrap()
    }

    fn check(tokenizer: &Tokenizer, ids: &[u32], skip: bool) {
        let mut decoder = tokenizer.incremental(skip);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&decoder.push(id).unwrap());
        }
        text.push_str(&decoder.flush().unwrap());
        assert_eq!(text, tokenizer.decode(ids, skip).unwrap(), "{ids:?}");
    }

    #[test]
    fn sentencepiece_spaces_and_bytes() {
        let t = sentencepiece();
        let byte = |b: u8| 7 + u32::from(b);
        assert_eq!(t.decode(&[3, 4], true).unwrap(), "Hello world");
        let mut decoder = t.incremental(true);
        let mut pieces = Vec::new();
        for id in [1, 3, 4, byte(0xe4), byte(0xbd), byte(0xa0), 5] {
            pieces.push(decoder.push(id).unwrap());
        }
        assert_eq!(pieces, ["", "Hello", " world", "", "", "", "你lo"]);
        check(&t, &[2, 3, 2, 2, 1, 4, byte(0xff), 1, byte(0xe4), 5, 5, 6, 6, 6], true);
        check(&t, &[1, 1, 2, 3], false);
    }

    #[test]
    fn a_long_run_of_replacement_characters_is_not_held_forever() {
        let t = sentencepiece();
        let mut decoder = t.incremental(true);
        let held: usize = (0..100).map(|_| decoder.push(6).unwrap().chars().count()).sum();
        assert_eq!(held, 100);
    }

    proptest! {
        #[test]
        fn any_sentencepiece_stream_equals_the_whole(
            ids in prop::collection::vec(prop_oneof![0u32..7, Just(7 + 0xe4), Just(7 + 0xbd), Just(7 + 0xa0), 7u32..263, 260u32..300], 0..40),
            skip: bool,
        ) {
            check(&sentencepiece_cached(), &ids, skip);
        }
    }

    fn sentencepiece_cached() -> Tokenizer {
        static T: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
        T.get_or_init(sentencepiece).clone()
    }
}
