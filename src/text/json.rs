//! Small files of a checkpoint, read with a limit: their size is untrusted like everything else in them.

use crate::checkpoint::ModelFiles;
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Largest `tokenizer_config.json`, `generation_config.json` or `config.json` that is read. Real ones are under 200 KiB
/// (Llama 3 lists its 256 reserved tokens).
pub(crate) const MAX_JSON_BYTES: u64 = 16 << 20;

/// Reads a JSON object of at most [`MAX_JSON_BYTES`]; `None` if there is no such file.
pub(crate) fn read_json(files: &ModelFiles, name: &str) -> Result<Option<Value>> {
    files.read(name, MAX_JSON_BYTES)?.map(|bytes| parse_object(&files.path(name), &bytes)).transpose()
}

/// Parses `bytes` as a JSON object; errors name `path`.
pub(crate) fn parse_object(path: &Path, bytes: &[u8]) -> Result<Value> {
    let value: Value = serde_json::from_slice(bytes).map_err(|e| Error::file(path, format!("not valid JSON: {e}")))?;
    if value.is_object() { Ok(value) } else { Err(Error::file(path, "expected a JSON object")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_and_kinds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let read = || read_json(&dir.path().into(), "a.json");
        assert!(read().unwrap().is_none());
        std::fs::write(&path, b"{\"a\": 1}").unwrap();
        assert_eq!(read().unwrap().unwrap()["a"], 1);
        std::fs::write(&path, b"[1]").unwrap();
        assert!(matches!(read(), Err(Error::File { .. })));
        std::fs::write(&path, b"{").unwrap();
        assert!(matches!(read(), Err(Error::File { .. })));
        std::fs::write(&path, "[".repeat(100_000)).unwrap();
        assert!(matches!(read(), Err(Error::File { .. })));
        assert!(read_json(&dir.path().into(), "").is_err());
    }
}
