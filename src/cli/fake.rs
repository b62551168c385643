//! A model for the tests of commands: it says what it is told to, with the tokenizer and template of a fixture.

use candle_bitnet::Result;
use candle_bitnet::generate::{GenerateOptions, GenerationDefaults, GenerationParams, LanguageModel, TokenStream};
use candle_bitnet::text::{ChatTemplate, Tokenizer};
use std::path::Path;

pub struct Fake {
    pub tokenizer: Tokenizer,
    pub template: ChatTemplate,
    pub context: usize,
    /// What the sequence holds.
    pub tokens: Vec<u32>,
    /// Positions at which reading began, one per answer.
    pub starts: Vec<usize>,
    /// Called with the number of tokens of the answer so far.
    pub on_decode: Option<Box<dyn FnMut(usize)>>,
    answers: Vec<Vec<u32>>,
    /// Tokens of the present answer that were given.
    given: usize,
    logits: Vec<f32>,
}

impl Fake {
    pub fn new(answers: &[&str]) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/a1_packed");
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        let eos = tokenizer.token_to_id("<|eot_id|>");
        let answers = answers.iter().map(|a| tokenizer.encode(a, false).unwrap().into_iter().chain(eos).collect());
        Self {
            answers: answers.rev().collect(),
            template: ChatTemplate::from_dir(&dir).unwrap().unwrap(),
            context: 512,
            tokens: vec![],
            starts: vec![],
            on_decode: None,
            given: 0,
            logits: vec![0.0; tokenizer.vocab_size()],
            tokenizer,
        }
    }

    pub fn params(&self, options: &GenerateOptions) -> Result<GenerationParams> {
        let mut defaults = GenerationDefaults::default();
        defaults.add_text_eos(&self.tokenizer, Some(&self.template));
        options.resolve(&defaults, self.vocab_size())
    }

    pub fn stream(&mut self, prompt: &[u32], options: &GenerateOptions) -> TokenStream<'_, Self> {
        let (tokenizer, params) = (self.tokenizer.clone(), self.params(options).unwrap());
        TokenStream::new(self, tokenizer, prompt, params).unwrap()
    }
}

impl LanguageModel for Fake {
    fn vocab_size(&self) -> usize {
        self.logits.len()
    }

    fn context_length(&self) -> usize {
        self.context
    }

    fn position(&self) -> usize {
        self.tokens.len()
    }

    fn advance(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.tokens.extend_from_slice(tokens);
        let answer = self.answers.last().expect("another answer");
        self.logits.fill(0.0);
        self.logits[answer[self.given] as usize] = 9.0;
        self.given += 1;
        if let Some(f) = &mut self.on_decode {
            f(self.given);
        }
        Ok(&self.logits)
    }

    /// Every generation begins with this.
    fn truncate(&mut self, position: usize) {
        self.tokens.truncate(position);
        self.starts.push(position);
        if self.given > 0 {
            self.answers.pop();
            self.given = 0;
        }
    }
}
