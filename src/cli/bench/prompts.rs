//! `bench --prompts`: real prompts, with success, speed and latency of each and of all.

use crate::cli::model_args::warn_of_no_replay;
use crate::cli::{first_line, on_threads, print};
use anyhow::{Context, Result, bail};
use candle_bitnet::bench::Spread;
use candle_bitnet::generate::{GenerateOptions, Generation};
use candle_bitnet::{BitNet, Error};
use serde::Serialize;
use std::path::Path;
use std::time::Instant;

/// Largest file of prompts, in bytes.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// One prompt's outcome.
#[derive(Debug, Serialize)]
struct Outcome {
    prompt: usize,
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    prompt_tokens: usize,
    tokens: usize,
    /// Decode speed.
    tokens_per_second: Option<f64>,
    time_to_first_token: Option<f64>,
    /// From the prompt's text to the last token.
    latency_seconds: f64,
}

/// All outcomes.
#[derive(Debug, Serialize)]
struct Summary {
    prompts: usize,
    succeeded: usize,
    success_rate: f64,
    tokens: usize,
    /// Generated tokens over the whole time.
    tokens_per_second: f64,
    latency_seconds_median: f64,
    latency_seconds_max: f64,
    total_seconds: f64,
    kernel: String,
    /// Of the CPU.
    threads: Option<usize>,
    results: Vec<Outcome>,
}

/// Reads the prompts: lines of text, or of JSON objects with a "prompt".
pub fn read(file: &Path) -> Result<Vec<String>> {
    let size = std::fs::metadata(file).with_context(|| file.display().to_string())?.len();
    if size > MAX_FILE_BYTES {
        bail!("{}: {size} bytes, more than the {MAX_FILE_BYTES} that are read", file.display());
    }
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let mut prompts = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        if !line.trim_start().starts_with('{') {
            prompts.push(line.to_owned());
            continue;
        }
        let object: serde_json::Value = serde_json::from_str(line)
            .with_context(|| format!("{}: line {}: begins like JSON and is none", file.display(), i + 1))?;
        match object.get("prompt").and_then(|p| p.as_str()) {
            Some(prompt) => prompts.push(prompt.to_owned()),
            None => bail!("{}: line {}: the object has no text \"prompt\"", file.display(), i + 1),
        }
    }
    if prompts.is_empty() {
        bail!("{}: holds no prompts; write one a line", file.display());
    }
    Ok(prompts)
}

/// Runs the prompts one after the other, greedily.
pub fn run(model: &mut BitNet, prompts: &[String], max_tokens: usize, json: bool) -> Result<()> {
    let options = GenerateOptions::default().greedy().max_tokens(max_tokens);
    let start = Instant::now();
    let results: Vec<Outcome> = prompts.iter().enumerate().map(|(i, p)| one(model, i, p, &options)).collect();
    let total_seconds = start.elapsed().as_secs_f64();
    let succeeded = results.iter().filter(|r| r.ok).count();
    let tokens = results.iter().map(|r| r.tokens).sum();
    let latency = Spread::of(results.iter().filter(|r| r.ok).map(|r| r.latency_seconds).collect());
    warn_of_no_replay(model.decoder());
    let about = model.report();
    let summary = Summary {
        prompts: prompts.len(),
        succeeded,
        success_rate: succeeded as f64 / prompts.len() as f64,
        tokens,
        tokens_per_second: tokens as f64 / total_seconds,
        latency_seconds_median: latency.median,
        latency_seconds_max: latency.max,
        total_seconds,
        kernel: about.kernel,
        threads: about.threads,
        results,
    };
    let text = if json { serde_json::to_string_pretty(&summary)? } else { describe(&summary) };
    print(&text)?;
    match summary.succeeded {
        0 => bail!("no prompt succeeded"),
        _ => Ok(()),
    }
}

fn answer(model: &mut BitNet, prompt: &str, options: &GenerateOptions) -> Result<Generation, Error> {
    let ids = model.encode(prompt)?;
    model.generate(&ids, options)?.collect_all()
}

fn one(model: &mut BitNet, index: usize, prompt: &str, options: &GenerateOptions) -> Outcome {
    let start = Instant::now();
    let answer = answer(model, prompt, options);
    let latency_seconds = start.elapsed().as_secs_f64();
    let outcome = Outcome {
        prompt: index + 1,
        ok: answer.is_ok(),
        error: None,
        prompt_tokens: 0,
        tokens: 0,
        tokens_per_second: None,
        time_to_first_token: None,
        latency_seconds,
    };
    match answer {
        Err(e) => Outcome { error: Some(first_line(&e)), ..outcome },
        Ok(g) => Outcome {
            prompt_tokens: g.stats.prompt_tokens,
            tokens: g.stats.generated_tokens,
            tokens_per_second: g.stats.tokens_per_second(),
            time_to_first_token: g.stats.time_to_first_token,
            ..outcome
        },
    }
}

fn describe(s: &Summary) -> String {
    let mut text = "prompt  result  prompt tokens  tokens  tokens/s  first token  latency\n".to_owned();
    for r in &s.results {
        text += &format!(
            "{:6}  {:6}  {:13}  {:6}  {:>8}  {:>11}  {:.2} s{}\n",
            r.prompt,
            if r.ok { "ok" } else { "failed" },
            r.prompt_tokens,
            r.tokens,
            r.tokens_per_second.map_or("-".into(), |v| format!("{v:.2}")),
            r.time_to_first_token.map_or("-".into(), |v| format!("{v:.3} s")),
            r.latency_seconds,
            r.error.as_ref().map(|e| format!("  {e}")).unwrap_or_default(),
        );
    }
    text + &format!(
        "{} of {} succeeded; {} tokens in {:.2} s: {:.2} tokens/s overall; latency {:.2} s median, {:.2} s at most \
         (kernel {}{})\n",
        s.succeeded,
        s.prompts,
        s.tokens,
        s.total_seconds,
        s.tokens_per_second,
        s.latency_seconds_median,
        s.latency_seconds_max,
        s.kernel,
        on_threads(s.threads),
    )
}
