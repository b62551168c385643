//! `bitnet generate`: one prompt, one answer.

use super::model_args::{ModelArgs, warn_of_no_replay};
use super::sampling_args::SamplingArgs;
use super::still_open;
use anyhow::{Context, Result};
use candle_bitnet::backend::host::resident_bytes;
use candle_bitnet::generate::{FinishReason, Generation, GenerationStats, LanguageModel, TokenStream};
use candle_bitnet::text::Message;
use candle_bitnet::{BitNet, Error};
use serde_json::{Value, json};
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

/// Largest prompt that is read, in bytes: more than any context holds.
const MAX_PROMPT_BYTES: u64 = 64 << 20;

/// Continue a prompt, or answer it with --chat
///
/// The prompt comes from --prompt, from a file, or from standard input; one line break at the end of a file or of
/// standard input is left out. The text goes to standard output as it is generated, and a line with the prompt's and
/// the answer's tokens, the speed and the memory to standard error.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// The prompt
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    prompt: Option<String>,

    /// A file with the prompt; - is standard input
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Wrap the prompt in the model's chat template, as a message of the user
    #[arg(long)]
    chat: bool,

    /// A system message before the prompt
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,

    /// Print one JSON object at the end instead of the text
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let source = PromptSource::choose(args.prompt, args.file, io::stdin().is_terminal())?;
    let options = args.sampling.options()?;
    let text = source.read(&mut io::stdin())?;
    let mut model = args.model.load()?;
    let prompt = if args.chat {
        let system = args.system.map(Message::system);
        model.chat_prompt(&system.into_iter().chain([Message::user(text)]).collect::<Vec<_>>())?
    } else {
        model.encode(&text)?
    };
    let mut out = io::stdout().lock();
    let mut stream: TokenStream<'_, BitNet> = model.generate(&prompt, &options)?;
    let written = write_answer(&mut stream, &mut out, !args.json)?;
    let Some(generation) = written else { return Ok(()) };
    if args.json {
        let report = serde_json::to_string(&report(&generation, resident_bytes()))?;
        if !still_open(writeln!(out, "{report}").and_then(|()| out.flush()))? {
            return Ok(());
        }
    }
    warn_of_no_replay(model.decoder());
    // Standard error may be closed as well; that is no reason to fail after the answer.
    let _ = writeln!(io::stderr(), "{}", summary(&generation.stats, generation.finish_reason, resident_bytes()));
    Ok(())
}

/// Where the prompt comes from.
#[derive(Debug, PartialEq)]
enum PromptSource {
    Text(String),
    File(PathBuf),
    Stdin,
}

impl PromptSource {
    fn choose(prompt: Option<String>, file: Option<PathBuf>, stdin_is_terminal: bool) -> Result<Self, Error> {
        match (prompt, file) {
            (Some(text), _) => Ok(Self::Text(text)),
            (None, Some(file)) if file == Path::new("-") => Ok(Self::Stdin),
            (None, Some(file)) => Ok(Self::File(file)),
            (None, None) if !stdin_is_terminal => Ok(Self::Stdin),
            (None, None) => Err(Error::request(
                "prompt",
                "none given; use --prompt TEXT, --file FILE, or pipe it to standard input (--file - to type it)",
            )),
        }
    }

    fn read(self, stdin: &mut dyn Read) -> Result<String> {
        let (name, bytes) = match self {
            Self::Text(text) => return Ok(text),
            Self::File(path) => {
                let name = path.display().to_string();
                let mut file = std::fs::File::open(&path).with_context(|| format!("prompt file {name}"))?;
                let bytes = read_limited(&mut file).with_context(|| format!("prompt file {name}"))?;
                (name, bytes)
            }
            Self::Stdin => ("standard input".into(), read_limited(stdin).context("standard input")?),
        };
        if bytes.len() as u64 > MAX_PROMPT_BYTES {
            return Err(
                Error::request(name, format!("more than {MAX_PROMPT_BYTES} bytes; give a shorter prompt")).into()
            );
        }
        let mut text = String::from_utf8(bytes).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            Error::request(&name, format!("not UTF-8 at byte {at}; convert the prompt to UTF-8"))
        })?;
        if text.ends_with('\n') {
            text.pop();
            if text.ends_with('\r') {
                text.pop();
            }
        }
        Ok(text)
    }
}

fn read_limited(input: &mut dyn Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.take(MAX_PROMPT_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Runs the generation; with `live`, writes the text as it comes, ended by a line break. `None` if nobody reads it any
/// more.
fn write_answer<M: LanguageModel>(
    stream: &mut TokenStream<'_, M>,
    out: &mut dyn Write,
    live: bool,
) -> Result<Option<Generation>> {
    let (mut text, mut tokens, mut logprobs) = (String::new(), Vec::new(), Vec::new());
    for piece in &mut *stream {
        let piece = piece?;
        if live
            && !piece.text.is_empty()
            && !still_open(out.write_all(piece.text.as_bytes()).and_then(|()| out.flush()))?
        {
            return Ok(None);
        }
        text.push_str(&piece.text);
        tokens.extend(piece.token);
        logprobs.extend(piece.logprob);
    }
    if live && !text.ends_with('\n') && !still_open(writeln!(out).and_then(|()| out.flush()))? {
        return Ok(None);
    }
    Ok(Some(Generation {
        text,
        tokens,
        logprobs,
        finish_reason: stream.finish_reason().unwrap_or(FinishReason::Cancelled),
        seed: stream.seed(),
        stats: stream.stats(),
    }))
}

/// What `--json` prints.
fn report(generation: &Generation, resident: Option<u64>) -> Value {
    let stats = &generation.stats;
    json!({
        "text": generation.text,
        "tokens": generation.tokens,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "tokens_per_second": stats.tokens_per_second(),
        "prefill_tokens_per_second": stats.prefill_tokens_per_second(),
        "time_to_first_token": stats.time_to_first_token,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "seed": generation.seed,
        "resident_bytes": resident,
    })
}

/// The closing line.
pub(super) fn summary(stats: &GenerationStats, finish: FinishReason, resident: Option<u64>) -> String {
    let speed = stats.tokens_per_second().map(|s| format!(" ({s:.1} tokens/s)")).unwrap_or_default();
    let first = stats.time_to_first_token.map(|s| format!(", first after {s:.2} s")).unwrap_or_default();
    let memory = resident.map(|b| format!(", {:.0} MiB resident", b as f64 / 1_048_576.0)).unwrap_or_default();
    let tokens = |n: usize| format!("{n} token{}", if n == 1 { "" } else { "s" });
    format!(
        "prompt: {}, answer: {}{speed}{first}{memory}, ended by {finish}",
        tokens(stats.prompt_tokens),
        tokens(stats.generated_tokens)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::fake::Fake;
    use candle_bitnet::generate::GenerateOptions;

    #[test]
    fn the_prompt_has_one_source() {
        let choose = |prompt: Option<&str>, file: Option<&str>, terminal| {
            PromptSource::choose(prompt.map(Into::into), file.map(Into::into), terminal)
        };
        assert_eq!(choose(Some("a"), None, true).unwrap(), PromptSource::Text("a".into()));
        assert_eq!(choose(Some("-"), None, true).unwrap(), PromptSource::Text("-".into()));
        assert_eq!(choose(None, Some("f"), true).unwrap(), PromptSource::File("f".into()));
        assert_eq!(choose(None, Some("-"), true).unwrap(), PromptSource::Stdin);
        assert_eq!(choose(None, None, false).unwrap(), PromptSource::Stdin);
        let error = choose(None, None, true).unwrap_err();
        assert!(matches!(error, Error::Request { .. }) && error.to_string().contains("--prompt"));
    }

    #[test]
    fn the_prompt_loses_one_line_break() {
        let read = |bytes: &[u8]| PromptSource::Stdin.read(&mut &*bytes);
        assert_eq!(read(b"a b\n").unwrap(), "a b");
        assert_eq!(read(b"a\n\r\n").unwrap(), "a\n");
        assert_eq!(read(b"a\r").unwrap(), "a\r");
        assert_eq!(read(b"").unwrap(), "");
        let error = read(b"ab\xff").unwrap_err();
        assert!(error.to_string().contains("standard input: not UTF-8 at byte 2"), "{error}");
        assert!(matches!(error.downcast_ref(), Some(Error::Request { .. })));
        let error = PromptSource::File("/nonexistent/p".into()).read(&mut io::empty()).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/p"));
        let error = PromptSource::Stdin.read(&mut io::repeat(b'x')).unwrap_err();
        assert!(error.to_string().contains("shorter"));
    }

    /// Accepts `0` writes, then has no reader.
    struct Closing(usize, io::ErrorKind);

    impl Write for Closing {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0 = self.0.checked_sub(1).ok_or(self.1)?;
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn answers_are_written_and_reported() {
        let mut model = Fake::new(&["Hello."]);
        let options = GenerateOptions::new().greedy().seed(5);
        let mut out = vec![];
        let generation = write_answer(&mut model.stream(&[1, 2], &options), &mut out, true).unwrap().unwrap();
        assert_eq!(out, b"Hello.\n");
        let report = report(&generation, Some(1 << 20));
        assert_eq!((&report["text"], &report["finish_reason"]), (&json!("Hello."), &json!("eos")));
        assert_eq!((&report["prompt_tokens"], &report["seed"]), (&json!(2), &json!(5)));
        assert_eq!(report["generated_tokens"], report["tokens"].as_array().unwrap().len());
        for key in ["tokens_per_second", "time_to_first_token", "prefill_seconds", "decode_seconds"] {
            assert!(report[key].as_f64().unwrap() > 0.0, "{key}");
        }
        let line = summary(&generation.stats, generation.finish_reason, Some(3 << 20));
        assert!(line.starts_with("prompt: 2 tokens, answer: ") && line.contains("tokens/s"), "{line}");
        assert!(line.contains("3 MiB resident") && line.ends_with("ended by eos"), "{line}");
    }

    #[test]
    fn a_closed_output_ends_quietly() {
        let options = GenerateOptions::new().greedy();
        for writes in 0..3 {
            let mut model = Fake::new(&["Hello."]);
            let mut out = Closing(writes, io::ErrorKind::BrokenPipe);
            assert!(write_answer(&mut model.stream(&[1], &options), &mut out, true).unwrap().is_none());
            let mut out = Closing(writes, io::ErrorKind::StorageFull);
            let mut model = Fake::new(&["Hello."]);
            assert!(write_answer(&mut model.stream(&[1], &options), &mut out, true).is_err());
        }
        let mut model = Fake::new(&["Hello."]);
        let mut out = Closing(0, io::ErrorKind::BrokenPipe);
        assert!(write_answer(&mut model.stream(&[1], &options), &mut out, false).unwrap().is_some());
    }
}
