//! Small files of a checkpoint, read with a limit: their size is untrusted like everything else in them.

use crate::{Error, Result};
use serde_json::Value;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

/// Largest `tokenizer_config.json`, `generation_config.json` or `config.json` that is read. Real ones are under 200 KiB
/// (Llama 3 lists its 256 reserved tokens).
pub(crate) const MAX_JSON_BYTES: u64 = 16 << 20;

/// Reads a file of at most `limit` bytes; `None` if there is no such file.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path, e)),
    };
    let metadata = file.metadata().map_err(|e| Error::io(path, e))?;
    if !metadata.is_file() {
        return Err(Error::file(path, "not a regular file"));
    }
    let mut bytes = Vec::new();
    // One byte beyond the limit tells a file that is too long from one that fits exactly, also if it grows meanwhile.
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > limit {
        return Err(Error::file(
            path,
            format!("{} bytes or more, but at most {limit} are read: not a file of a real checkpoint", bytes.len()),
        ));
    }
    Ok(Some(bytes))
}

/// Reads a JSON object of at most [`MAX_JSON_BYTES`]; `None` if there is no such file.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>> {
    read_bounded(path, MAX_JSON_BYTES)?.map(|bytes| parse_object(path, &bytes)).transpose()
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
        assert!(read_json(&path).unwrap().is_none());
        std::fs::write(&path, b"{\"a\": 1}").unwrap();
        assert_eq!(read_json(&path).unwrap().unwrap()["a"], 1);
        assert!(read_bounded(&path, 8).unwrap().is_some());
        assert!(matches!(read_bounded(&path, 7), Err(Error::File { .. })));
        std::fs::write(&path, b"[1]").unwrap();
        assert!(matches!(read_json(&path), Err(Error::File { .. })));
        std::fs::write(&path, b"{").unwrap();
        assert!(matches!(read_json(&path), Err(Error::File { .. })));
        std::fs::write(&path, "[".repeat(100_000)).unwrap();
        assert!(matches!(read_json(&path), Err(Error::File { .. })));
        assert!(read_json(dir.path()).is_err());
    }
}
