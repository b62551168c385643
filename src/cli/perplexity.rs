//! `bitnet perplexity`: how well a model predicts a text.

use super::model_args::ModelArgs;
use super::{on_threads, print};
use anyhow::Result;
use candle_bitnet::evaluate::{MAX_BATCH, Windows, score};
use candle_bitnet::text::Tokenizer;
use candle_bitnet::{BitNet, Error};
use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use serde::Serialize;
use std::fmt::Write;
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Largest text that is read, in bytes: its tokens take some hundred times as much memory while they are made.
const MAX_TEXT_BYTES: u64 = 64 << 20;
/// Most tokens that a character is looked for in: it has at most four bytes, and every token at least one.
const CHARACTER_TOKENS: usize = 16;

/// Measure how well a model predicts a text
///
/// Perplexity and bits per byte over a sliding window of --context tokens, as transformers' guide does it: each window
/// begins --stride tokens after the one before, and the tokens that are new in it are scored, so that every token of
/// the text is scored once. The model's beginning-of-sequence token comes before the text and is not scored itself;
/// where there is none, the first token is only read, and its bytes are not counted.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// UTF-8 text to predict; - is standard input
    #[arg(value_name = "FILE", required_unless_present = "text")]
    file: Option<PathBuf>,

    /// The same, as a flag
    #[arg(long, value_name = "FILE", conflicts_with = "file")]
    text: Option<PathBuf>,

    /// Tokens from one window to the next [default: half of the context]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    stride: Option<usize>,

    /// Windows that are computed together [default: as many as make 512 tokens]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    batch: Option<usize>,

    /// Score at most N tokens, from the text's begin, and no half characters
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    max_tokens: Option<usize>,

    /// Put no beginning-of-sequence token before the text
    #[arg(long)]
    no_bos: bool,

    /// Write JSON
    #[arg(long)]
    json: bool,
}

/// What was measured, and with what settings.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    text: String,
    perplexity: f64,
    bits_per_byte: f64,
    /// Scored tokens, and the bytes of text that they stand for.
    tokens: usize,
    bytes: usize,
    nats_per_token: f64,
    context: usize,
    stride: usize,
    batch: usize,
    windows: usize,
    /// The token before the text.
    bos: Option<u32>,
    device: String,
    kernel: String,
    /// Of the CPU.
    threads: Option<usize>,
    kv_type: &'static str,
    seconds: f64,
    tokens_per_second: f64,
    load_seconds: f64,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let most = usize::MAX;
    for (flag, value, most) in
        [("--stride", args.stride, most), ("--batch", args.batch, MAX_BATCH), ("--max-tokens", args.max_tokens, most)]
    {
        if let Some(value) = value.filter(|n| !(1..=most).contains(n)) {
            let range = if most == usize::MAX { "at least 1".into() } else { format!("between 1 and {most}") };
            return Err(Error::request(flag, format!("{value} is not {range}")).into());
        }
    }
    let path = args.file.or(args.text).unwrap_or_default();
    let (name, text) = read(&path)?;
    let model = args.model.clone().for_all_logits().load()?;
    let context = model.decoder().context();
    let mut windows = Windows::new(context);
    windows.stride = args.stride.unwrap_or(windows.stride);
    windows.batch = args.batch.unwrap_or(windows.batch);
    if windows.stride > context {
        let reason = format!("{} tokens would skip some of the text; at most {context}, the context", windows.stride);
        return Err(Error::request("--stride", reason).into());
    }
    let bos = if args.no_bos { None } else { bos(&model) };
    let ids = model.tokenizer().encode(&text, false)?;
    let part = Part::choose(model.tokenizer(), &text, &ids, bos.is_none(), args.max_tokens)
        .map_err(|reason| Error::file(&name, reason))?;
    let (read_only, scored) = ids[..part.end].split_at(part.begin);
    let prefix: Vec<u32> = bos.iter().chain(read_only).copied().collect();

    let about = model.report();
    let bar = bar(scored.len());
    let start = Instant::now();
    let result =
        score(model.decoder(), about.kv_dtype, &prefix, scored, &windows, &mut |done| bar.set_position(done as u64));
    let seconds = start.elapsed().as_secs_f64();
    bar.finish_and_clear();
    let result = result?;
    let report = Report {
        model: args.model.source.model,
        text: name.display().to_string(),
        perplexity: result.perplexity(),
        bits_per_byte: result.bits_per_byte(part.bytes),
        tokens: result.tokens,
        bytes: part.bytes,
        nats_per_token: result.nll_nats / result.tokens as f64,
        context,
        stride: windows.stride,
        batch: windows.batch.min(result.windows),
        windows: result.windows,
        bos,
        device: about.device,
        kernel: about.kernel,
        threads: about.threads,
        kv_type: about.kv_dtype.name(),
        seconds,
        tokens_per_second: result.tokens as f64 / seconds,
        load_seconds: about.load_time.as_secs_f64(),
    };
    print(&if args.json { serde_json::to_string_pretty(&report)? } else { describe(&report) })
}

/// A text and the name that errors call it by.
fn read(path: &Path) -> Result<(PathBuf, String), Error> {
    let (name, input): (PathBuf, Box<dyn Read>) = match path == Path::new("-") {
        true => ("standard input".into(), Box::new(io::stdin())),
        false => (path.to_owned(), Box::new(File::open(path).map_err(|e| Error::io(path, e))?)),
    };
    let mut bytes = Vec::new();
    input.take(MAX_TEXT_BYTES + 1).read_to_end(&mut bytes).map_err(|e| Error::io(&name, e))?;
    if bytes.is_empty() {
        return Err(Error::file(name, "is empty; give a text to predict"));
    }
    if bytes.len() as u64 > MAX_TEXT_BYTES {
        return Err(Error::file(name, format!("more than {MAX_TEXT_BYTES} bytes; give a part of it")));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok((name, text)),
        Err(e) => {
            let at = e.utf8_error().valid_up_to();
            Err(Error::file(name, format!("not UTF-8 at byte {at}; convert the text to UTF-8")))
        }
    }
}

/// What the model expects before a text: what its tokenizer puts there, or what its configuration names.
fn bos(model: &BitNet) -> Option<u32> {
    let (tokenizer, config) = (model.tokenizer(), model.decoder().config());
    match tokenizer.adds_bos() {
        true => tokenizer.bos_id(),
        false => config.bos_token.or(tokenizer.bos_id()).filter(|id| (*id as usize) < config.vocab_size),
    }
}

/// The tokens `begin..end` of a text, which are scored, and the bytes that they stand for.
#[derive(Debug, PartialEq)]
struct Part {
    begin: usize,
    end: usize,
    bytes: usize,
}

impl Part {
    /// All tokens, or `most` of them; without those of the first character if there is `nothing_before` it. A part
    /// begins and ends between characters, so that its bytes can be counted.
    fn choose(
        tokenizer: &Tokenizer,
        text: &str,
        ids: &[u32],
        nothing_before: bool,
        most: Option<usize>,
    ) -> Result<Self, String> {
        let bytes_of = |n| Some((n, bytes_of(tokenizer, text, ids.get(..n)?)?));
        let (begin, skipped) = match nothing_before {
            false => (0, 0),
            true => (1..=CHARACTER_TOKENS.min(ids.len())).find_map(bytes_of).unwrap_or((ids.len(), 0)),
        };
        if begin == ids.len() {
            let reason = "nothing to predict after the first character, or the tokenizer changes it; give a longer text, or \
                          one that begins otherwise";
            return Err(reason.into());
        }
        let end = most.map_or(ids.len(), |most| begin.saturating_add(most).min(ids.len()));
        if end == ids.len() {
            return Ok(Self { begin, end, bytes: text.len() - skipped });
        }
        let earliest = end.saturating_sub(CHARACTER_TOKENS).max(begin + 1);
        let (end, bytes) = (earliest..=end).rev().find_map(bytes_of).ok_or(
            "cannot be cut by --max-tokens: its first tokens hold no whole character, or the tokenizer changes the \
             text; raise --max-tokens, or cut the file instead",
        )?;
        Ok(Self { begin, end, bytes: bytes - skipped })
    }
}

/// Bytes of the text's first tokens; none if they end within a character.
fn bytes_of(tokenizer: &Tokenizer, text: &str, ids: &[u32]) -> Option<usize> {
    let decoded = tokenizer.decode(ids, false).ok()?;
    text.starts_with(&decoded).then_some(decoded.len())
}

/// A bar of the tokens that are scored, on a terminal.
fn bar(tokens: usize) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("scoring {bar:20} {pos}/{len} tokens, {rate} tokens/s, {eta} left");
    let rate = |state: &ProgressState, out: &mut dyn Write| {
        let _ = write!(out, "{:.1}", state.per_sec());
    };
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).with_key("rate", rate);
    ProgressBar::new(tokens as u64).with_style(style)
}

fn describe(r: &Report) -> String {
    let bos = r.bos.map_or("no BOS".into(), |id| format!("BOS {id} before the text"));
    format!(
        "{} on {}\n\
         perplexity     {:.4}\n\
         bits per byte  {:.4}\n\
         tokens         {}, {:.4} nats each\n\
         bytes          {}, {:.2} a token\n\
         windows        {} of {} tokens, stride {}, {} at once; {bos}\n\
         speed          {:.1} tokens/s, {:.2} s; {} kernel {}{}, KV {}\n",
        r.model,
        r.text,
        r.perplexity,
        r.bits_per_byte,
        r.tokens,
        r.nats_per_token,
        r.bytes,
        r.bytes as f64 / r.tokens as f64,
        r.windows,
        r.context,
        r.stride,
        r.batch,
        r.tokens_per_second,
        r.seconds,
        r.device,
        r.kernel,
        on_threads(r.threads),
        r.kv_type,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte-level tokenizer that knows no character beyond ASCII; `normalizer` is its JSON.
    fn tokenizer(normalizer: &str) -> Tokenizer {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/a1_packed/tokenizer.json");
        let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(fixture).unwrap()).unwrap();
        json["normalizer"] = serde_json::from_str(normalizer).unwrap();
        Tokenizer::from_json(json.to_string().as_bytes(), None, "tokenizer.json").unwrap()
    }

    #[test]
    fn a_part_of_a_text_is_whole_characters() {
        let tokenizer = tokenizer("null");
        let text = "\u{1f642}a\u{1f642}\u{fffd}b<|eot_id|>\n";
        let ids = tokenizer.encode(text, false).unwrap();
        let choose = |nothing_before, most| Part::choose(&tokenizer, text, &ids, nothing_before, most);
        let all = Part { begin: 0, end: ids.len(), bytes: text.len() };
        assert_eq!(choose(false, None).unwrap(), all);
        assert_eq!(choose(false, Some(usize::MAX)).unwrap(), all);
        let rest = choose(true, None).unwrap();
        assert!(rest.begin > 1, "one token for a character of four bytes: {rest:?}");
        assert_eq!((rest.end, rest.bytes), (ids.len(), text.len() - 4));
        for nothing_before in [false, true] {
            let begin = if nothing_before { rest.begin } else { 0 };
            for most in 1..=ids.len() {
                match choose(nothing_before, Some(most)) {
                    Ok(part) => {
                        assert!(part.begin == begin && (1..=most).contains(&(part.end - begin)), "{part:?}");
                        let decoded = tokenizer.decode(&ids[begin..part.end], false).unwrap();
                        assert_eq!(decoded.len(), part.bytes, "{decoded:?}");
                        assert!(text.contains(&decoded));
                    }
                    Err(reason) => assert!(!nothing_before && most < 4 && reason.contains("--max-tokens"), "{reason}"),
                }
            }
        }
        let alone = tokenizer.encode("\u{1f642}", false).unwrap();
        assert!(Part::choose(&tokenizer, "\u{1f642}", &alone, true, None).unwrap_err().contains("nothing to predict"));
        assert!(Part::choose(&tokenizer, "", &[], true, None).unwrap_err().contains("nothing to predict"));
    }

    #[test]
    fn bytes_that_cannot_be_known_are_not_guessed() {
        let tokenizer = tokenizer(r#"{"type": "Lowercase"}"#);
        let text = "HELLO there";
        let ids = tokenizer.encode(text, false).unwrap();
        let choose = |nothing_before, most| Part::choose(&tokenizer, text, &ids, nothing_before, most);
        assert_eq!(choose(false, None).unwrap().bytes, text.len());
        assert!(choose(true, None).unwrap_err().contains("nothing to predict"));
        assert!(choose(false, Some(ids.len() - 1)).unwrap_err().contains("changes the text"));
    }
}
