//! The façade: a checkpoint loaded onto a device, its text tools, and one sequence to generate with.

use crate::checkpoint::{BUILTIN, Checkpoint, ModelFiles};
use crate::generate::{GenerateOptions, GenerationDefaults, LanguageModel, Sampled, Sampler, TokenStream};
use crate::load::{LoadOptions, LoadedDecoder};
use crate::model::{Decoder, Logits, Sequence};
use crate::nn::KvCache;
use crate::report::Report;
use crate::text::{ChatTemplate, Message, Tokenizer};
use crate::token_draw::TokenDraw;
use crate::{Error, Result};
use candle_core::Tensor;
use std::time::Instant;

/// A chat model, for those who ask one of a model that is none.
const CHAT_MODEL: &str = "microsoft/bitnet-b1.58-2B-4T";

/// A b1.58 model with its tokenizer, ready to generate: one sequence with its KV cache.
#[derive(Debug)]
pub struct BitNet {
    loaded: LoadedDecoder,
    cache: KvCache,
    position: usize,
    draw: TokenDraw,
    drawn: Vec<Sampled>,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    defaults: GenerationDefaults,
}

impl BitNet {
    /// Loads a directory, a GGUF file, a hub id (`owner/name`, `owner/name@revision`) or the built-in model (`builtin`).
    ///
    /// # Errors
    /// As [`LoadedDecoder::load`]; for a tokenizer or generation configuration that is missing or malformed.
    pub fn load(model: impl AsRef<str>, options: LoadOptions) -> Result<Self> {
        let files = options.find(model.as_ref())?;
        // Opening reads headers only, and shows that this is a checkpoint at all. Then the small files: a bad
        // tokenizer is reported before gigabytes are packed.
        let start = Instant::now();
        let checkpoint = Checkpoint::open(&files)?;
        let opened = start.elapsed();
        let tokenizer = Tokenizer::open(&files)?;
        let template = ChatTemplate::open(&files)?;
        let defaults = GenerationDefaults::open(&files, &tokenizer, template.as_ref())?;
        let mut loaded = LoadedDecoder::from_checkpoint(&checkpoint, Instant::now(), &options)?;
        loaded.load_time += opened;
        let vocab = loaded.decoder.config().vocab_size;
        if tokenizer.vocab_size() > vocab {
            let reason = format!("has {} tokens, the model's vocabulary {vocab}", tokenizer.vocab_size());
            return Err(Error::file(files.path("tokenizer.json"), reason));
        }
        let cache = loaded.decoder.kv_cache(loaded.kv_dtype, 1)?;
        let draw = TokenDraw::new(loaded.decoder.backend(), 1, vocab)?;
        Ok(Self { loaded, cache, position: 0, draw, drawn: Vec::with_capacity(1), tokenizer, template, defaults })
    }

    /// What was loaded, and how it runs.
    pub fn report(&self) -> Report {
        self.loaded.report()
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.loaded.decoder
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The chat template.
    ///
    /// # Errors
    /// [`Error::Text`] if the checkpoint has none.
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| match &self.loaded.files {
            Some(ModelFiles::Builtin) => Error::Text {
                what: format!("the built-in model ({BUILTIN})"),
                reason: format!(
                    "continues a text and has not learnt to chat: chat with another, such as {CHAT_MODEL}, or generate \
                     from a plain prompt"
                ),
            },
            Some(files) => ChatTemplate::missing(files),
            None => ChatTemplate::missing("the model"),
        })
    }

    /// What the checkpoint says about generation.
    pub fn defaults(&self) -> &GenerationDefaults {
        &self.defaults
    }

    /// Tokens of a conversation, with the prompt for the assistant's answer.
    ///
    /// # Errors
    /// [`Error::Text`] if there is no template or it refuses the messages.
    pub fn chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        Ok(self.chat_template()?.apply(&self.tokenizer, messages, true)?.ids)
    }

    /// Tokens of a text, with what the tokenizer puts in front.
    ///
    /// # Errors
    /// [`Error::Text`] if the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(text, true)
    }

    /// Continues `prompt`; whatever the model held before is forgotten.
    ///
    /// # Errors
    /// [`Error::Request`] for options out of range, [`Error::ContextFull`] for a prompt longer than the context.
    pub fn generate(&mut self, prompt: &[u32], options: &GenerateOptions) -> Result<TokenStream<'_, Self>> {
        let params = options.resolve(&self.defaults, self.vocab_size())?;
        let tokenizer = self.tokenizer.clone();
        TokenStream::new(self, tokenizer, prompt, params)
    }
}

impl BitNet {
    /// Appends tokens and lends their logits to `read`; the position moves on unless something failed.
    fn append(
        &mut self,
        tokens: &[u32],
        wanted: Logits,
        read: impl FnOnce(&mut TokenDraw, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let sequence = Sequence { slot: 0, position: self.position, tokens };
        let Self { loaded, cache, draw, .. } = self;
        loaded.decoder.forward_with(&[sequence], cache, wanted, |logits| read(draw, logits))?;
        self.position += tokens.len();
        Ok(())
    }
}

impl LanguageModel for BitNet {
    fn vocab_size(&self) -> usize {
        self.loaded.decoder.config().vocab_size
    }

    fn context_length(&self) -> usize {
        self.loaded.decoder.context()
    }

    fn position(&self) -> usize {
        self.position
    }

    fn advance(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.append(tokens, Logits::Last, TokenDraw::read)?;
        Ok(self.draw.logits())
    }

    fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        // Nobody looks at them: as few as there can be.
        self.append(tokens, Logits::Top(1), |_, _| Ok(()))
    }

    fn draw(&mut self, tokens: &[u32], sampler: &mut Sampler) -> Result<Sampled> {
        let mut drawn = std::mem::take(&mut self.drawn);
        let samplers = std::slice::from_mut(sampler);
        let wanted = TokenDraw::wanted(samplers);
        let result = self.append(tokens, wanted, |draw, logits| draw.draw(logits, samplers, &mut drawn));
        let first = drawn.first().copied();
        self.drawn = drawn;
        result?;
        first.ok_or_else(|| Error::Shape { op: "sample", reason: "no token was drawn".into() })
    }

    fn truncate(&mut self, position: usize) {
        self.position = self.position.min(position);
    }
}
