//! `compare --against URL`: the same prompts here and on a server, one after the other, greedily.

use super::Args;
use crate::cli::{on_threads, print};
use anyhow::Result;
use candle_bitnet::bench::{Server, Spread, Streamed};
use candle_bitnet::generate::GenerateOptions;
use candle_bitnet::{BitNet, Error};
use serde::Serialize;
use std::time::Instant;

/// Tokens that are asked for where nobody says how many.
const DEFAULT_TOKENS: usize = 64;
/// Prompts where none is given: a short one and one that takes some reading.
const PROMPTS: [&str; 3] = [
    "The capital of France is",
    "Once upon a time, in a village at the edge of a great forest, there lived a clockmaker who",
    "A ternary weight is minus one, zero or one. A matrix of such weights needs no multiplications: what it is multiplied with \
     is added, left out or subtracted. The activations are rounded to eight bits, with one scale for each token, so that all \
     sums are exact integers. What limits the speed of such a model on an ordinary computer is therefore not arithmetic but",
];

/// An answer to a prompt, from here or from the server.
#[derive(Debug, Serialize)]
struct Answer {
    first_token_seconds: Option<f64>,
    tokens: usize,
    /// After the first.
    tokens_per_second: Option<f64>,
    seconds: f64,
    text: String,
}

/// A prompt with both answers.
#[derive(Debug, Serialize)]
struct Pair {
    prompt: String,
    here: Answer,
    server: Answer,
    /// Whether one text begins with the other.
    same_text: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    kernel: String,
    threads: Option<usize>,
    server: String,
    server_model: Option<String>,
    max_tokens: usize,
    /// Median of the prompts' ratios: how many times as many tokens a second come from here.
    speedup: Option<f64>,
    pairs: Vec<Pair>,
}

/// Runs the command.
pub fn run(args: &Args, url: &str) -> Result<()> {
    let key = std::env::var("BITNET_API_KEY").ok().filter(|key| !key.is_empty());
    let server = Server::new(url, args.against_model.clone(), key)?;
    let prompts: Vec<&str> = match args.prompt.as_slice() {
        [] => PROMPTS.to_vec(),
        given => given.iter().map(String::as_str).collect(),
    };
    let max_tokens = args.tg.unwrap_or(DEFAULT_TOKENS);
    // The server first: one that does not answer is found before a model is loaded. Both at once would share the machine.
    let mut theirs = Vec::with_capacity(prompts.len());
    for prompt in &prompts {
        theirs.push(server.complete(prompt, max_tokens)?);
    }
    let source = &args.model.source;
    let options = args.run.options()?.hub(args.hub.options()).i2s_layout(source.i2s_layout);
    let mut model = BitNet::load(&source.model, options)?;
    let mut pairs = Vec::with_capacity(prompts.len());
    for (prompt, theirs) in prompts.iter().zip(theirs) {
        let here = here(&mut model, prompt, max_tokens)?;
        let same_text = here.text.starts_with(&theirs.text) || theirs.text.starts_with(&here.text);
        pairs.push(Pair { prompt: (*prompt).to_owned(), here, server: Answer::from(theirs), same_text });
    }
    let ratios: Vec<f64> =
        pairs.iter().filter_map(|p| Some(p.here.tokens_per_second? / p.server.tokens_per_second?)).collect();
    let about = model.report();
    let report = Report {
        model: source.model.clone(),
        kernel: about.kernel,
        threads: about.threads,
        server: server.base().to_owned(),
        server_model: server.model().map(str::to_owned),
        max_tokens,
        speedup: (!ratios.is_empty()).then(|| Spread::of(ratios).median),
        pairs,
    };
    print(&if args.json { serde_json::to_string_pretty(&report)? } else { describe(&report, args.markdown) })
}

impl From<Streamed> for Answer {
    fn from(s: Streamed) -> Self {
        Self {
            first_token_seconds: Some(s.first_token_seconds),
            tokens: s.tokens,
            tokens_per_second: s.tokens_per_second(),
            seconds: s.seconds,
            text: s.text,
        }
    }
}

/// This program's answer, timed from text to text as the server's is.
fn here(model: &mut BitNet, prompt: &str, max_tokens: usize) -> Result<Answer, Error> {
    let options = GenerateOptions::default().greedy().max_tokens(max_tokens);
    let start = Instant::now();
    let ids = model.encode(prompt)?;
    let generation = model.generate(&ids, &options)?.collect_all()?;
    Ok(Answer {
        first_token_seconds: generation.stats.time_to_first_token,
        tokens: generation.stats.generated_tokens,
        tokens_per_second: generation.stats.tokens_per_second(),
        seconds: start.elapsed().as_secs_f64(),
        text: generation.text,
    })
}

fn describe(r: &Report, markdown: bool) -> String {
    let number = |value: Option<f64>, digits: usize| value.map_or("-".into(), |v| format!("{v:.digits$}"));
    let mut rows =
        vec![["prompt", "", "first token s", "tokens", "tokens/s", "total s", "same text"].map(String::from)];
    for (i, pair) in r.pairs.iter().enumerate() {
        for (who, answer, same) in
            [("here", &pair.here, ""), ("server", &pair.server, if pair.same_text { "yes" } else { "no" })]
        {
            rows.push([
                (i + 1).to_string(),
                who.into(),
                number(answer.first_token_seconds, 3),
                answer.tokens.to_string(),
                number(answer.tokens_per_second, 2),
                format!("{:.2}", answer.seconds),
                same.into(),
            ]);
        }
    }
    let asked = r.server_model.as_ref().map(|m| format!(" ({})", m.escape_debug())).unwrap_or_default();
    let mut text = format!(
        "here: {}, kernel {}{}; server: {}{asked}; at most {} tokens, greedy\n\n",
        r.model,
        r.kernel,
        on_threads(r.threads),
        r.server,
        r.max_tokens
    );
    let widths: [usize; 7] = std::array::from_fn(|c| rows.iter().map(|row| row[c].len()).max().unwrap_or_default());
    for (i, row) in rows.iter().enumerate() {
        text += &match markdown {
            true => format!("| {} |\n", row.join(" | ")),
            false => {
                let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:>width$}"));
                cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
            }
        };
        if markdown && i == 0 {
            text += "| --- | --- | ---: | ---: | ---: | ---: | --- |\n";
        }
    }
    match r.speedup {
        Some(ratio) => text + &format!("\nhere: ×{ratio:.2} the server's tokens/s (median of the prompts)\n"),
        None => text,
    }
}
