//! Writes GGUF files for tests, good ones and bad ones, without any of the crate's own code for that.

pub const U32: u32 = 4;
pub const F32: u32 = 6;
pub const BOOL: u32 = 7;
pub const TEXT: u32 = 8;
pub const ARRAY: u32 = 9;

#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    /// Outermost first.
    pub shape: Vec<u64>,
    pub kind: u32,
    pub bytes: Vec<u8>,
    /// Instead of where it is put.
    pub offset: Option<u64>,
}

#[derive(Clone)]
pub struct Builder {
    pub version: u32,
    /// Key, then type and value as they are written.
    pub entries: Vec<(Vec<u8>, Vec<u8>)>,
    pub tensors: Vec<Tensor>,
    /// Instead of the numbers there are.
    pub counts: Option<(u64, u64)>,
}

pub fn text(s: &[u8]) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s].concat()
}

fn typed(kind: u32, value: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], value].concat()
}

/// An array's value: type, length, elements.
pub fn array(kind: u32, len: u64, elements: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &len.to_le_bytes(), elements].concat()
}

impl Builder {
    pub fn new() -> Self {
        Self { version: 3, entries: Vec::new(), tensors: Vec::new(), counts: None }
    }

    pub fn raw(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.entries.retain(|(k, _)| k != key.as_bytes());
        self.entries.push((key.into(), typed(kind, value)));
        self
    }

    pub fn without(mut self, key: &str) -> Self {
        self.entries.retain(|(k, _)| k != key.as_bytes());
        self
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, U32, &value.to_le_bytes())
    }

    pub fn f32(self, key: &str, value: f32) -> Self {
        self.raw(key, F32, &value.to_le_bytes())
    }

    pub fn flag(self, key: &str, value: bool) -> Self {
        self.raw(key, BOOL, &[value.into()])
    }

    pub fn text(self, key: &str, value: &str) -> Self {
        self.raw(key, TEXT, &text(value.as_bytes()))
    }

    pub fn strings<S: AsRef<str>>(self, key: &str, values: &[S]) -> Self {
        let elements: Vec<u8> = values.iter().flat_map(|s| text(s.as_ref().as_bytes())).collect();
        self.raw(key, ARRAY, &array(TEXT, values.len() as u64, &elements))
    }

    pub fn i32s(self, key: &str, values: &[i32]) -> Self {
        let elements: Vec<u8> = values.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.raw(key, ARRAY, &array(5, values.len() as u64, &elements))
    }

    pub fn f32s(self, key: &str, values: &[f32]) -> Self {
        let elements: Vec<u8> = values.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.raw(key, ARRAY, &array(F32, values.len() as u64, &elements))
    }

    pub fn tensor(mut self, name: &str, shape: &[u64], kind: u32, bytes: Vec<u8>) -> Self {
        self.tensors.retain(|t| t.name != name);
        self.tensors.push(Tensor { name: name.into(), shape: shape.into(), kind, bytes, offset: None });
        self
    }

    /// The whole file.
    pub fn build(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        let (tensors, entries) = self.counts.unwrap_or((self.tensors.len() as u64, self.entries.len() as u64));
        out.extend(self.version.to_le_bytes());
        out.extend(tensors.to_le_bytes());
        out.extend(entries.to_le_bytes());
        for (key, value) in &self.entries {
            out.extend(text(key));
            out.extend(value);
        }
        let mut at = 0u64;
        for t in &self.tensors {
            out.extend(text(t.name.as_bytes()));
            out.extend((t.shape.len() as u32).to_le_bytes());
            t.shape.iter().rev().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(t.kind.to_le_bytes());
            out.extend(t.offset.unwrap_or(at).to_le_bytes());
            at = (at + t.bytes.len() as u64).next_multiple_of(32);
        }
        for t in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&t.bytes);
        }
        out
    }

    pub fn write(&self, dir: &std::path::Path) -> std::path::PathBuf {
        let path = dir.join("test.gguf");
        std::fs::write(&path, self.build()).unwrap();
        path
    }
}
