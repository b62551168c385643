//! Tokens and text: the tokenizer, decoding that streams without breaking a character, and chat templates.

mod clock;
mod ends;
mod gguf;
mod incremental;
mod json;
pub mod sentencepiece;
mod template;
mod template_env;
mod tokenizer;

pub use clock::today;
pub use incremental::IncrementalDecoder;
pub use template::{ChatPrompt, ChatTemplate, MAX_TEMPLATE_BYTES, Message};
pub use template_env::{MAX_RENDERED_BYTES, TEMPLATE_FUEL};
pub use tokenizer::{MAX_TOKENIZER_BYTES, Tokenizer};

pub(crate) use gguf::Written as GgufTokenizer;
pub(crate) use json::{MAX_JSON_BYTES, read_json};
