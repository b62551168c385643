//! The token stream, driven by a model that says what it is told to.

use candle_bitnet::generate::{
    FinishReason, GenerateOptions, GenerationDefaults, LanguageModel, MarksHeld, PREFILL_CHUNK, Piece, Sampled,
    Sampler, TokenStream, common_prefix,
};
use candle_bitnet::text::{ChatTemplate, Tokenizer};
use candle_bitnet::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const VOCAB: usize = 384;
const EOT: u32 = 383;

/// Says `script` after any prompt of `prompt` tokens: the logits after position p favour the token at p - prompt + 1.
struct Scripted {
    script: Vec<u32>,
    prompt: usize,
    context: usize,
    tokens: Vec<u32>,
    /// Lengths of all calls.
    calls: Vec<usize>,
    logits: Vec<f32>,
    on_advance: Box<dyn FnMut(usize)>,
    fail_at: Option<usize>,
    noise: bool,
}

impl Scripted {
    fn new(script: &[u32], prompt: usize) -> Self {
        Self {
            script: script.to_vec(),
            prompt,
            context: 4096,
            tokens: vec![],
            calls: vec![],
            logits: vec![0.0; VOCAB],
            on_advance: Box::new(|_| ()),
            fail_at: None,
            noise: false,
        }
    }
}

impl LanguageModel for Scripted {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn context_length(&self) -> usize {
        self.context
    }

    fn position(&self) -> usize {
        self.tokens.len()
    }

    fn advance(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        assert!(!tokens.is_empty());
        if self.tokens.len() + tokens.len() > self.context {
            return Err(Error::ContextFull { needed: self.tokens.len() + tokens.len(), available: self.context });
        }
        if self.fail_at == Some(self.calls.len()) {
            return Err(Error::request("test", "the device is gone"));
        }
        self.calls.push(tokens.len());
        self.tokens.extend_from_slice(tokens);
        (self.on_advance)(self.tokens.len());
        if self.noise {
            let last = u64::from(self.tokens.iter().sum::<u32>());
            for (i, logit) in self.logits.iter_mut().enumerate() {
                *logit = ((i as u64 * 7919 + last * 104_729) % 1009) as f32 / 200.0;
            }
        } else {
            self.logits.fill(0.0);
            let step = self.tokens.len().saturating_sub(self.prompt);
            let token = self.script.get(step).copied().unwrap_or(64);
            self.logits[token as usize] = 10.0;
        }
        Ok(&self.logits)
    }

    fn truncate(&mut self, position: usize) {
        self.tokens.truncate(position);
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir(fixture("a1_packed")).unwrap()
}

/// Greedy, ending at the end of turn.
fn options() -> GenerateOptions {
    GenerateOptions::new().greedy().eos([EOT])
}

fn stream<'a>(model: &'a mut Scripted, prompt: &[u32], options: &GenerateOptions) -> Result<TokenStream<'a, Scripted>> {
    TokenStream::new(model, tokenizer(), prompt, options.resolve(&GenerationDefaults::default(), VOCAB)?)
}

/// Text and finish reason of what the model says to a prompt of one token.
fn say(script: &[u32], options: GenerateOptions) -> (String, FinishReason) {
    let generation = stream(&mut Scripted::new(script, 1), &[5], &options).unwrap().collect_all().unwrap();
    (generation.text, generation.finish_reason)
}

fn script(text: &str) -> Vec<u32> {
    let mut ids = tokenizer().encode(text, false).unwrap();
    ids.push(EOT);
    ids
}

#[test]
fn ends_at_an_end_of_sequence_token() {
    let ids = script("Hello, world!");
    let mut model = Scripted::new(&ids, 3);
    let mut s = stream(&mut model, &[374, 5, 6], &options()).unwrap();
    let pieces: Vec<Piece> = s.by_ref().collect::<Result<_>>().unwrap();
    assert_eq!(pieces.iter().filter_map(|p| p.token).collect::<Vec<_>>(), ids);
    assert_eq!(pieces.iter().map(|p| p.text.as_str()).collect::<String>(), "Hello, world!");
    assert!(pieces.iter().rev().skip(1).all(|p| p.finish.is_none()));
    assert_eq!(pieces.last().unwrap().finish, Some(FinishReason::Eos));
    assert!(s.next().is_none() && s.next().is_none());
    let stats = s.stats();
    assert_eq!((stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens), (3, 0, ids.len()));
    assert!(stats.prefill_seconds > 0.0 && stats.decode_seconds > 0.0);
    assert!(stats.time_to_first_token.unwrap() >= stats.prefill_seconds);
    assert!(stats.tokens_per_second().unwrap() > 0.0 && stats.prefill_tokens_per_second().unwrap() > 0.0);
    assert_eq!(s.finish_reason(), Some(FinishReason::Eos));
    // The last token was drawn and never read.
    assert_eq!(s.held_tokens().len(), 3 + ids.len() - 1);
    assert_eq!(model.tokens.len(), 3 + ids.len() - 1);
}

#[test]
fn ends_at_the_token_limit() {
    assert_eq!(say(&script("Hello"), options().max_tokens(2)), ("He".into(), FinishReason::Length));
    let (text, reason) = say(&[], options().ignore_eos(true).max_tokens(1));
    assert_eq!((text.as_str(), reason), ("a", FinishReason::Length));
    let mut looped = vec![EOT, EOT];
    looped.extend(script("x"));
    assert_eq!(say(&looped, options().ignore_eos(true).max_tokens(3)), ("x".into(), FinishReason::Length));
}

#[test]
fn recommended_lengths_hold_unless_overridden() {
    let defaults = GenerationDefaults { max_length: Some(8), ..GenerationDefaults::default() };
    let run = |options: GenerateOptions, prompt: &[u32]| {
        let mut model = Scripted::new(&[], prompt.len());
        let params = options.resolve(&defaults, VOCAB)?;
        TokenStream::new(&mut model, tokenizer(), prompt, params)?.collect_all()
    };
    let generation = run(options(), &[1; 5]).unwrap();
    assert_eq!((generation.tokens.len(), generation.finish_reason), (3, FinishReason::Length));
    assert_eq!(run(options().max_tokens(7), &[1; 5]).unwrap().tokens.len(), 7);
    let error = run(options(), &[1; 8]).unwrap_err();
    assert!(error.to_string().contains("max_length of 8"), "{error}");
}

#[test]
fn ends_when_the_context_is_full() {
    let mut model = Scripted::new(&[], 4);
    model.context = 10;
    let generation = stream(&mut model, &[1; 4], &options()).unwrap().collect_all().unwrap();
    // Ten positions: four of the prompt, six of the answer; the seventh token needs no position.
    assert_eq!((generation.tokens.len(), generation.finish_reason), (7, FinishReason::ContextFull));
    let generation = stream(&mut model, &[1; 10], &options()).unwrap().collect_all().unwrap();
    assert_eq!((generation.tokens.len(), generation.finish_reason), (1, FinishReason::ContextFull));
    let error = stream(&mut model, &[1; 11], &options()).err().unwrap();
    assert!(matches!(error, Error::ContextFull { needed: 11, available: 10 }));
}

#[test]
fn refuses_prompts_that_make_no_sense() {
    let mut model = Scripted::new(&[], 1);
    assert!(stream(&mut model, &[], &options()).err().unwrap().to_string().contains("no tokens"));
    assert!(stream(&mut model, &[384], &options()).err().unwrap().to_string().contains("token 384"));
    assert!(stream(&mut model, &[1], &options().temperature(f32::NAN)).is_err());
}

#[test]
fn stop_strings_span_tokens() {
    let ids = script("one two three");
    assert!(ids.len() > 6, "the stop string must span tokens");
    assert_eq!(say(&ids, options().stop("two th")), ("one ".into(), FinishReason::StopString));
    assert_eq!(say(&ids, options().stop("zzz").stop(" three")), ("one two".into(), FinishReason::StopString));
    // Never complete: all held text comes out in the end.
    assert_eq!(say(&ids, options().stop("three!")), ("one two three".into(), FinishReason::Eos));
    assert_eq!(say(&ids, options().stop("one two thrii")), ("one two three".into(), FinishReason::Eos));
    // Nothing that may begin a stop string is shown before it is certain.
    let mut model = Scripted::new(&ids, 1);
    let mut shown = String::new();
    for piece in stream(&mut model, &[5], &options().stop("two three?")).unwrap() {
        let piece = piece.unwrap();
        if piece.finish.is_none() {
            shown.push_str(&piece.text);
            assert!("one ".starts_with(&shown), "{shown:?}");
        } else {
            shown.push_str(&piece.text);
        }
    }
    assert_eq!(shown, "one two three");
}

#[test]
fn characters_are_never_split() {
    let text = "naïve 你好 🙂!";
    let ids = script(text);
    let mut model = Scripted::new(&ids, 1);
    let pieces: Vec<Piece> = stream(&mut model, &[5], &options()).unwrap().collect::<Result<_>>().unwrap();
    assert!(pieces.iter().any(|p| p.text == "🙂") && pieces.iter().any(|p| p.text.is_empty()));
    assert!(pieces.iter().all(|p| !p.text.contains('\u{fffd}')));
    assert_eq!(pieces.into_iter().map(|p| p.text).collect::<String>(), text);
    // Cut off in the middle of a character: what is there is shown as such.
    let bytes = tokenizer().encode("🙂", false).unwrap();
    assert_eq!(bytes.len(), 4);
    assert_eq!(say(&bytes, options().max_tokens(3)), ("\u{fffd}".into(), FinishReason::Length));
    assert_eq!(say(&script("a🙂b"), options().stop("🙂")), ("a".into(), FinishReason::StopString));
}

#[test]
fn a_timeout_ends_prefill_and_decode() {
    let slow = |_| std::thread::sleep(Duration::from_millis(20));
    let mut model = Scripted::new(&[], 4000);
    model.on_advance = Box::new(slow);
    let pieces: Vec<Piece> = stream(&mut model, &[1; 4000], &options().timeout(Duration::from_millis(30)))
        .unwrap()
        .collect::<Result<_>>()
        .unwrap();
    assert_eq!(pieces.len(), 1);
    assert_eq!((pieces[0].token, pieces[0].finish), (None, Some(FinishReason::Timeout)));
    assert!(model.calls.len() < 4);
    let mut model = Scripted::new(&[], 1);
    model.on_advance = Box::new(slow);
    let generation =
        stream(&mut model, &[1], &options().timeout(Duration::from_millis(100))).unwrap().collect_all().unwrap();
    assert_eq!(generation.finish_reason, FinishReason::Timeout);
    assert!((1..=5).contains(&generation.tokens.len()));
    assert_eq!(generation.text, "a".repeat(generation.tokens.len()));
}

#[test]
fn a_flag_cancels_prefill_and_decode() {
    for (at, tokens) in [(PREFILL_CHUNK, 0), (1500, 1), (1503, 4)] {
        let flag = Arc::new(AtomicBool::new(false));
        let mut model = Scripted::new(&[], 1500);
        let set = flag.clone();
        model.on_advance = Box::new(move |position| set.store(position >= at, Ordering::Relaxed));
        let options = options().cancel(flag.clone());
        let generation = stream(&mut model, &[1; 1500], &options).unwrap().collect_all().unwrap();
        assert_eq!((generation.tokens.len(), generation.finish_reason), (tokens, FinishReason::Cancelled));
        let calls: usize = model.calls.iter().sum();
        assert_eq!(calls, at);
    }
}

#[test]
fn the_prompt_is_read_in_chunks() {
    let prompt = vec![7; 2 * PREFILL_CHUNK + 3];
    let mut model = Scripted::new(&script("hi"), prompt.len());
    stream(&mut model, &prompt, &options()).unwrap().collect_all().unwrap();
    assert_eq!(model.calls, [PREFILL_CHUNK, PREFILL_CHUNK, 3, 1, 1]);
}

#[test]
fn a_cached_prefix_is_not_read_again() {
    let ids = script("hi");
    let mut model = Scripted::new(&ids, 5);
    let first = [374, 1, 2, 3, 4];
    let held = {
        let mut s = stream(&mut model, &first, &options()).unwrap();
        while s.next().is_some() {}
        s.held_tokens().to_vec()
    };
    assert_eq!(held.len(), 5 + ids.len() - 1);
    let next = [374, 1, 2, 9, 9, 9];
    let keep = common_prefix(&held, &next);
    assert_eq!(keep, 3);
    model.calls.clear();
    model.prompt = next.len();
    let params = options().resolve(&GenerationDefaults::default(), VOCAB).unwrap();
    let s = TokenStream::resume(&mut model, tokenizer(), &next, keep, params.clone()).unwrap();
    let generation = s.collect_all().unwrap();
    assert_eq!((generation.text.as_str(), generation.stats.cached_tokens), ("hi", 3));
    assert_eq!(model.calls[0], 3);
    assert_eq!(model.tokens[..6], next);
    // Even a prompt that is held completely is read from its last token on.
    let held = model.tokens.clone();
    model.calls.clear();
    model.prompt = held.len();
    let s = TokenStream::resume(&mut model, tokenizer(), &held, held.len(), params.clone()).unwrap();
    assert_eq!(s.collect_all().unwrap().text, "hi");
    assert_eq!(model.calls[0], 1);
    assert!(TokenStream::resume(&mut model, tokenizer(), &[1; 30], 29, params).is_err());
}

#[test]
fn same_seed_same_tokens() {
    let run = |seed: u64| {
        let mut model = Scripted::new(&[], 1);
        model.noise = true;
        let options = GenerateOptions::new()
            .temperature(0.9)
            .top_k(50)
            .top_p(0.95)
            .repetition_penalty(1.1)
            .frequency_penalty(0.2)
            .ignore_eos(true)
            .max_tokens(60)
            .logprobs(true)
            .seed(seed);
        let generation = stream(&mut model, &[5, 6], &options).unwrap().collect_all().unwrap();
        assert_eq!((generation.seed, generation.logprobs.len()), (seed, 60));
        assert!(generation.logprobs.iter().all(|l| *l < 0.0));
        (generation.text, generation.tokens, generation.logprobs)
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

/// A model that draws far away, where the logits are: it follows the sequence's marks and gives back ids.
struct Device {
    far: Scripted,
    marks: Vec<u32>,
    held: MarksHeld,
    fed: Vec<usize>,
    drawn: Vec<usize>,
    fetched: usize,
    unsound: bool,
}

impl Device {
    fn new(script: &[u32], prompt: usize) -> Self {
        Self {
            far: Scripted::new(script, prompt),
            marks: vec![7; VOCAB],
            held: MarksHeld::default(),
            fed: vec![],
            drawn: vec![],
            fetched: 0,
            unsound: false,
        }
    }
}

impl LanguageModel for Device {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn context_length(&self) -> usize {
        self.far.context
    }

    fn position(&self) -> usize {
        self.far.position()
    }

    fn advance(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.fetched += 1;
        self.far.advance(tokens)
    }

    fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        self.fed.push(tokens.len());
        self.far.feed(tokens)
    }

    fn draw(&mut self, tokens: &[u32], sampler: &mut Sampler) -> Result<Sampled> {
        let Some(plan) = sampler.on_device() else {
            return sampler.sample(self.advance(tokens)?);
        };
        assert_eq!(plan.draw, self.drawn.len() as u64);
        self.drawn.push(tokens.len());
        if plan.has_penalties() {
            let mut changed = vec![];
            if sampler.marks_since(&mut self.held, &mut changed) {
                self.marks.fill(0);
            }
            changed.iter().for_each(|m| self.marks[m.token as usize] = m.mark);
        }
        let logits = self.far.advance(tokens)?;
        let best = (0..VOCAB).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0) as i32;
        match sampler.drawn(if self.unsound { -1 } else { best }) {
            Some(sampled) => Ok(sampled),
            None => sampler.sample(&[f32::NAN; VOCAB]),
        }
    }

    fn truncate(&mut self, position: usize) {
        self.far.truncate(position);
    }
}

#[test]
fn a_device_draws_in_the_samplers_place() {
    let ids = script("hi, hi!");
    let prompt = vec![7; PREFILL_CHUNK + 3];
    let mut model = Device::new(&ids, prompt.len());
    let start = |model: &mut Device, options: GenerateOptions| {
        let params = options.resolve(&GenerationDefaults::default(), VOCAB).unwrap();
        TokenStream::new(model, tokenizer(), &prompt, params).unwrap().collect_all()
    };
    let generation = start(&mut model, options().repetition_penalty(1.1)).unwrap();
    assert_eq!((generation.text.as_str(), generation.tokens.as_slice()), ("hi, hi!", ids.as_slice()));
    assert_eq!(model.fed, [PREFILL_CHUNK]);
    assert_eq!(model.drawn, [&[3][..], &vec![1; ids.len() - 1]].concat());
    assert_eq!(model.fetched, 0, "no logits travel");
    // At the last draw the device knew the prompt and the answer but its last token.
    let mut want = vec![0u32; VOCAB];
    want[7] = 1 << 31;
    for &id in &ids[..ids.len() - 1] {
        want[id as usize] = (want[id as usize] | 1 << 31) + 1;
    }
    assert_eq!(model.marks, want);
    // What only the host can do, it does; long prompts are still fed without logits.
    (model.drawn, model.fed) = (vec![], vec![]);
    assert_eq!(start(&mut model, options().logprobs(true)).unwrap().logprobs.len(), ids.len());
    assert_eq!((model.fetched, model.drawn.len(), model.fed.len()), (ids.len(), 0, 1));
    // A device that finds no sound maximum says so, and the sampler names it.
    model.unsound = true;
    let error = start(&mut model, options()).unwrap_err();
    assert!(error.to_string().contains("token 0 is NaN"), "{error}");
}

#[test]
fn an_error_ends_the_stream() {
    let mut model = Scripted::new(&[], 1);
    model.fail_at = Some(2);
    let mut s = stream(&mut model, &[5], &options()).unwrap();
    assert!(s.next().unwrap().is_ok());
    assert!(s.next().unwrap().is_ok());
    assert!(s.next().unwrap().unwrap_err().to_string().contains("the device is gone"));
    assert!(s.next().is_none());
    assert_eq!(s.finish_reason(), None);
}

#[test]
fn a_generation_is_a_flat_json_object() {
    let generation = stream(&mut Scripted::new(&script("hi"), 1), &[5], &options().seed(3)).unwrap().collect_all();
    let json = serde_json::to_value(generation.unwrap()).unwrap();
    assert_eq!((&json["text"], &json["finish_reason"], &json["seed"]), (&"hi".into(), &"eos".into(), &3.into()));
    assert_eq!((&json["prompt_tokens"], &json["generated_tokens"]), (&1.into(), &3.into()));
}

#[test]
fn defaults_of_the_fixtures() {
    let dir = fixture("a1_packed");
    let template = ChatTemplate::from_dir(&dir).unwrap();
    let defaults = GenerationDefaults::from_dir(&dir, &tokenizer(), template.as_ref()).unwrap();
    assert_eq!(defaults.eos, [375, 383]);
    assert_eq!((defaults.do_sample, defaults.temperature, defaults.top_p), (true, Some(0.6), Some(0.9)));
    // The file names no top-k: transformers takes 50.
    assert_eq!((defaults.top_k, defaults.max_length), (Some(50), Some(512)));
    // The end of turn counts because the template writes it, even if no file lists it.
    let empty = tempfile::tempdir().unwrap();
    let defaults = GenerationDefaults::from_dir(&empty, &tokenizer(), template.as_ref()).unwrap();
    assert_eq!(defaults.eos, [375, 383]);
    assert_eq!(GenerationDefaults::from_dir(&empty, &tokenizer(), None).unwrap().eos, [375]);
    std::fs::write(empty.path().join("config.json"), r#"{"eos_token_id": [9, 375]}"#).unwrap();
    assert_eq!(GenerationDefaults::from_dir(&empty, &tokenizer(), None).unwrap().eos, [9, 375]);
    std::fs::write(empty.path().join("generation_config.json"), r#"{"top_p": "x"}"#).unwrap();
    let error = GenerationDefaults::from_dir(&empty, &tokenizer(), None).unwrap_err();
    assert!(matches!(&error, Error::Config { key, .. } if key == "top_p"), "{error}");
}
