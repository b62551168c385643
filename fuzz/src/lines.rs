//! GGUF files made of lines of text: a mutated line is another value or tensor in a file that still has its counts, lengths
//! and offsets right, so that inputs get past the header to what it means.

const U8: u32 = 0;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Bytes of a tensor's data, at most: larger files would take most of the time to write.
const MOST_DATA: usize = 1 << 13;

fn text(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat()
}

fn array<T: AsRef<[u8]>>(kind: u32, elements: &[T]) -> Vec<u8> {
    let mut out = [&kind.to_le_bytes()[..], &(elements.len() as u64).to_le_bytes()].concat();
    elements.iter().for_each(|e| out.extend_from_slice(e.as_ref()));
    out
}

fn number<T: std::str::FromStr + Default>(bytes: &[u8]) -> T {
    std::str::from_utf8(bytes).ok().and_then(|s| s.trim().parse().ok()).unwrap_or_default()
}

#[derive(Default)]
struct Writer {
    entries: Vec<u8>,
    count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

impl Writer {
    fn entry(&mut self, key: &[u8], kind: u32, value: &[u8]) {
        self.entries.extend(text(key));
        self.entries.extend(kind.to_le_bytes());
        self.entries.extend_from_slice(value);
        self.count += 1;
    }

    fn tensor(&mut self, name: &[u8], kind: u32, dims: &[u64], fill: &[u8]) {
        self.tensors.extend(text(name));
        self.tensors.extend((dims.len() as u32).to_le_bytes());
        dims.iter().rev().for_each(|d| self.tensors.extend(d.to_le_bytes()));
        self.tensors.extend(kind.to_le_bytes());
        self.tensors.extend((self.data.len() as u64).to_le_bytes());
        // Enough for the type; what a tensor does not need is padding.
        let elements = dims.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).unwrap_or(u64::MAX);
        let ternary = (34..=36).contains(&kind);
        let room = if ternary { elements / 128 * 33 } else { elements.saturating_mul(8) };
        let room = room.saturating_add(64).min(MOST_DATA as u64) as usize;
        let fill = if fill.is_empty() { &[0] } else { fill };
        let end = self.data.len() + room;
        self.data.extend(fill.repeat(room.div_ceil(fill.len())));
        self.data.truncate(end);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self.tensor_count += 1;
    }

    fn finish(self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(self.tensor_count.to_le_bytes());
        out.extend(self.count.to_le_bytes());
        out.extend(self.entries);
        out.extend(self.tensors);
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(self.data);
        out
    }
}

/// A model's file. A line `key type value` is an entry (types u8 to f64, bool, str, and [str], [i32], [f32] separated by
/// commas); a line `@name type 2x3 fill` is a tensor of that ggml type, whose data repeats the bytes `fill`.
pub fn checkpoint(input: &[u8]) -> Vec<u8> {
    let mut out = Writer::default();
    for line in input.split(|b| *b == b'\n') {
        let mut words = line.splitn(4, |b| *b == b' ');
        let (name, kind) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if let Some(name) = name.strip_prefix(b"@") {
            let dims: Vec<u64> = words.next().unwrap_or_default().split(|b| *b == b'x').take(6).map(number).collect();
            out.tensor(name, number(kind), &dims, words.next().unwrap_or_default());
            continue;
        }
        let value = line.get(name.len() + kind.len() + 2..).unwrap_or_default();
        let items = || value.split(|b| *b == b',');
        match kind {
            b"u8" => out.entry(name, U8, &[number(value)]),
            b"i8" => out.entry(name, 1, &number::<i8>(value).to_le_bytes()),
            b"u16" => out.entry(name, 2, &number::<u16>(value).to_le_bytes()),
            b"i16" => out.entry(name, 3, &number::<i16>(value).to_le_bytes()),
            b"u32" => out.entry(name, 4, &number::<u32>(value).to_le_bytes()),
            b"i32" => out.entry(name, I32, &number::<i32>(value).to_le_bytes()),
            b"f32" => out.entry(name, F32, &number::<f32>(value).to_le_bytes()),
            b"bool" => out.entry(name, BOOL, &[number(value)]),
            b"str" => out.entry(name, TEXT, &text(value)),
            b"u64" => out.entry(name, 10, &number::<u64>(value).to_le_bytes()),
            b"i64" => out.entry(name, 11, &number::<i64>(value).to_le_bytes()),
            b"f64" => out.entry(name, 12, &number::<f64>(value).to_le_bytes()),
            b"[str]" => out.entry(name, ARRAY, &array(TEXT, &items().map(text).collect::<Vec<_>>())),
            b"[i32]" => out.entry(
                name,
                ARRAY,
                &array(I32, &items().map(|b| number::<i32>(b).to_le_bytes()).collect::<Vec<_>>()),
            ),
            b"[f32]" => out.entry(
                name,
                ARRAY,
                &array(F32, &items().map(|b| number::<f32>(b).to_le_bytes()).collect::<Vec<_>>()),
            ),
            _ => {}
        }
    }
    out.finish()
}

/// A tokenizer's metadata, one thing a line, told by its first byte:
///
/// | line | what |
/// | --- | --- |
/// | `Mname` | `tokenizer.ggml.model` |
/// | `Pname` | `tokenizer.ggml.pre` |
/// | `Tk score text` | a token of the type with digit `k`; a score and a space come first |
/// | `Jleft right` | a merge |
/// | `Sname id` | `tokenizer.ggml.{name}_token_id` |
/// | `Fname 1` | the flag `tokenizer.ggml.{name}` |
/// | `Cbytes` | `precompiled_charsmap` |
/// | `Ytext` | the chat template |
/// | `Xtext` | a text to encode |
/// | `Bn` | `n` tokens for single bytes: `<0x00>` and on |
/// | `D` | no types, `d`: no scores |
pub struct Tokenizer {
    /// The file.
    pub file: Vec<u8>,
    /// The text to encode.
    pub text: Vec<u8>,
    /// Whether the name of a pre-tokeniser takes long to compile.
    pub slow: bool,
}

impl Tokenizer {
    /// Reads the lines.
    pub fn new(input: &[u8]) -> Self {
        let mut out = Writer::default();
        out.entry(b"general.architecture", TEXT, &text(b"bitnet-b1.58"));
        let (mut tokens, mut kinds, mut scores, mut merges) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut with_kinds, mut with_scores, mut slow, mut sample) = (true, true, false, Vec::new());
        for line in input.split(|b| *b == b'\n') {
            let Some((what, rest)) = line.split_first() else { continue };
            match what {
                b'M' => out.entry(b"tokenizer.ggml.model", TEXT, &text(rest)),
                b'P' => {
                    slow |= !["gpt-2", "gpt2", "phi-2", "default", "starcoder", "falcon", ""]
                        .map(str::as_bytes)
                        .contains(&rest);
                    out.entry(b"tokenizer.ggml.pre", TEXT, &text(rest));
                }
                b'T' => {
                    let (kind, rest) = rest.split_first().unwrap_or((&b'1', &[]));
                    let mut parts = rest.splitn(2, |b| *b == b' ');
                    kinds.push(i32::from(kind.wrapping_sub(b'0')).to_le_bytes());
                    scores.push(number::<f32>(parts.next().unwrap_or_default()).to_le_bytes());
                    tokens.push(text(parts.next().unwrap_or_default()));
                }
                b'J' => merges.push(text(rest)),
                b'S' | b'F' => {
                    let mut parts = rest.splitn(2, |b| *b == b' ');
                    let (name, value) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
                    match what {
                        b'S' => {
                            let key = [b"tokenizer.ggml.", name, b"_token_id"].concat();
                            out.entry(&key, 4, &number::<u32>(value).to_le_bytes());
                        }
                        _ => out.entry(&[b"tokenizer.ggml.", name].concat(), BOOL, &[number(value)]),
                    }
                }
                b'C' => {
                    let bytes: Vec<[u8; 1]> = rest.iter().map(|b| [*b]).collect();
                    out.entry(b"tokenizer.ggml.precompiled_charsmap", ARRAY, &array(U8, &bytes));
                }
                b'Y' => out.entry(b"tokenizer.chat_template", TEXT, &text(rest)),
                b'X' => sample = rest.to_vec(),
                b'B' => {
                    for byte in 0..number::<u16>(rest).min(256) {
                        kinds.push(6i32.to_le_bytes());
                        scores.push(0f32.to_le_bytes());
                        tokens.push(text(format!("<0x{byte:02X}>").as_bytes()));
                    }
                }
                b'D' => with_kinds = false,
                b'd' => with_scores = false,
                _ => {}
            }
        }
        out.entry(b"tokenizer.ggml.tokens", ARRAY, &array(TEXT, &tokens));
        out.entry(b"tokenizer.ggml.merges", ARRAY, &array(TEXT, &merges));
        if with_kinds {
            out.entry(b"tokenizer.ggml.token_type", ARRAY, &array(I32, &kinds));
        }
        if with_scores {
            out.entry(b"tokenizer.ggml.scores", ARRAY, &array(F32, &scores));
        }
        Self { file: out.finish(), text: sample, slow }
    }
}
