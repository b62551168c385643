//! The model that is compiled in: `models/shakespeare`, trained by this crate.

/// Bytes where tensors can be read in place, as in a mapped file.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static WEIGHTS: &Aligned<[u8]> = &Aligned(*include_bytes!("../../models/shakespeare/model.safetensors"));

/// Its files, by name.
static FILES: [(&str, &[u8]); 5] = [
    ("config.json", include_bytes!("../../models/shakespeare/config.json")),
    ("generation_config.json", include_bytes!("../../models/shakespeare/generation_config.json")),
    ("tokenizer.json", include_bytes!("../../models/shakespeare/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../models/shakespeare/tokenizer_config.json")),
    ("model.safetensors", &WEIGHTS.0),
];

/// Names and bytes of its files.
pub(super) fn files() -> impl Iterator<Item = (&'static str, &'static [u8])> {
    FILES.iter().copied()
}
