//! Limits on checkpoint files. Each is far above what any published model needs, and far below what could hurt.

/// Bytes of `config.json`.
pub const MAX_CONFIG_SIZE: u64 = 1 << 20;

/// Bytes of the JSON header of a safetensors file.
pub const MAX_HEADER_SIZE: usize = 16 << 20;

/// Bytes of `model.safetensors.index.json`.
pub const MAX_INDEX_SIZE: usize = 8 << 20;

/// Tensors in a checkpoint, all shards together. 126 layers with every optional norm have 3,150.
pub const MAX_TENSORS: usize = 4096;

/// Bytes of a tensor's name, which must be printable ASCII without spaces.
pub const MAX_NAME_LENGTH: usize = 256;

/// Dimensions of a tensor.
pub const MAX_DIMS: usize = 4;

/// Shards of a checkpoint.
pub const MAX_SHARDS: usize = 1024;

/// Values (scalars, lists and objects) under the known keys of a configuration file.
pub const MAX_CONFIG_VALUES: usize = 8192;

/// Bytes of a GGUF file before its tensors. 128k tokens and 280k merges take 8 MB.
pub const MAX_GGUF_HEADER_SIZE: usize = 128 << 20;

/// Metadata entries of a GGUF file; published ones have some dozens.
pub const MAX_GGUF_METADATA: usize = 4096;

/// Bytes of a metadata key.
pub const MAX_GGUF_KEY_LENGTH: usize = 1024;

/// Arrays inside each other; none is known to be nested at all.
pub const MAX_GGUF_ARRAY_DEPTH: usize = 4;

/// Bytes that a GGUF file may align its tensors to.
pub const MAX_GGUF_ALIGNMENT: usize = 1 << 16;

/// Bytes of untrusted text that an error message repeats.
pub(crate) const MAX_QUOTED: usize = 200;

/// Shortens text from a file for an error message.
pub(crate) fn quoted(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
