//! A completion server that speaks OpenAI's interface (llama-server, ollama, vLLM): the same prompts, streamed and timed.
//!
//! A server is a stranger: what it sends is limited in size and time, and what it says is quoted in errors.

use crate::checkpoint::limits::quoted;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read};
use std::time::{Duration, Instant};
use ureq::{Agent, Body, http::Response};

/// Bytes of a line of the stream; a chunk of a token takes some hundreds.
const MAX_LINE: u64 = 1 << 20;
/// Bytes of a whole answer.
const MAX_ANSWER: u64 = 16 << 20;
/// Bytes of a list of models, or of an error, that are looked at.
const MAX_MESSAGE: u64 = 1 << 20;
/// For how long a server may not be reached.
const CONNECT: Duration = Duration::from_secs(10);
/// For how long it may be silent: it reads the prompt meanwhile.
const SILENCE: Duration = Duration::from_secs(300);
/// For how long an answer may take.
const ANSWER: Duration = Duration::from_secs(1800);

/// A server.
pub struct Server {
    agent: Agent,
    base: String,
    model: Option<String>,
    key: Option<String>,
}

impl std::fmt::Debug for Server {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("base", &self.base).field("model", &self.model).finish_non_exhaustive()
    }
}

/// What an answer took.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Streamed {
    /// The answer.
    pub text: String,
    /// Its tokens, as the server counts them; else the pieces that it came in.
    pub tokens: usize,
    /// Tokens of the prompt, where the server tells.
    pub prompt_tokens: Option<usize>,
    /// From the request to the first piece of text.
    pub first_token_seconds: f64,
    /// From the request to the last piece of text.
    pub seconds: f64,
}

impl Streamed {
    /// Tokens a second after the first; none with fewer than two.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let seconds = self.seconds - self.first_token_seconds;
        (self.tokens > 1 && seconds > 0.0).then(|| (self.tokens - 1) as f64 / seconds)
    }
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    completion_tokens: Option<usize>,
    prompt_tokens: Option<usize>,
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
}

/// What a stranger says, for an error: short, and without control characters, which a terminal would obey.
fn said(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes.get(..4096).unwrap_or(bytes));
    let plain: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    quoted(&plain)
}

impl Server {
    /// A server by its address, with or without `/v1` or `/v1/completions`. Without a `model`, the first that it lists is
    /// asked for, if it lists any. `key` is sent as a bearer token. Redirects are not followed.
    ///
    /// # Errors
    /// [`Error::Request`] for an address that is none of `http://` or `https://`.
    pub fn new(url: &str, model: Option<String>, key: Option<String>) -> Result<Self> {
        let base = url.trim_end_matches('/').trim_end_matches("/completions");
        let base = base.trim_end_matches('/').trim_end_matches("/v1").trim_end_matches('/');
        let host = base.strip_prefix("http://").or_else(|| base.strip_prefix("https://")).unwrap_or_default();
        if host.is_empty() || base.chars().any(|c| c.is_whitespace() || c.is_control()) {
            let reason = format!("{} is no address of a server; write http://HOST:PORT", said(url.as_bytes()));
            return Err(Error::request("--against", reason));
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("candle-bitnet/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .timeout_global(Some(ANSWER))
            .build()
            .into();
        let mut server = Self { agent, base: base.to_owned(), model, key };
        if server.model.is_none() {
            server.model = server.first_model();
        }
        Ok(server)
    }

    /// The model that is asked for; none if the server has not said which it has.
    pub fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    /// Its address.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The first model that the server lists. One that lists none may still answer.
    fn first_model(&self) -> Option<String> {
        let mut request = self.agent.get(format!("{}/v1/models", self.base));
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let mut response = request.call().ok().filter(|r| r.status().is_success())?;
        let text = response.body_mut().with_config().limit(MAX_MESSAGE).read_to_vec().ok()?;
        let models: Models = serde_json::from_slice(&text).ok()?;
        models.data.into_iter().next().map(|model| model.id)
    }

    /// Has the server continue `prompt` greedily with at most `max_tokens` tokens.
    ///
    /// # Errors
    /// [`Error::Unavailable`] naming the server for one that cannot be reached, refuses, breaks off, sends what is no stream
    /// of completions, or too much of it.
    pub fn complete(&self, prompt: &str, max_tokens: usize) -> Result<Streamed> {
        let mut body = serde_json::json!({
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if let (Some(model), Some(body)) = (&self.model, body.as_object_mut()) {
            body.insert("model".into(), model.as_str().into());
        }
        let mut request = self.agent.post(format!("{}/v1/completions", self.base));
        request = request.header("Content-Type", "application/json").header("Accept", "text/event-stream");
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let start = Instant::now();
        let response = request.send(body.to_string()).map_err(|e| self.refused(said(e.to_string().as_bytes())))?;
        let response = self.accepted(response)?;
        self.stream(BufReader::new(response.into_body().into_reader()), start)
    }

    fn refused(&self, reason: impl Into<String>) -> Error {
        Error::Unavailable { what: format!("server {}", self.base), reason: reason.into() }
    }

    fn accepted(&self, mut response: Response<Body>) -> Result<Response<Body>> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let mut message = Vec::new();
        // What it says of the error is of interest, and no failure of its own.
        let _ = response.body_mut().as_reader().take(MAX_MESSAGE).read_to_end(&mut message);
        let remedy = match status.as_u16() {
            404 => "; it has no /v1/completions, or no such model",
            401 | 403 => "; it wants a key: set BITNET_API_KEY",
            300..=399 => "; redirects are not followed: give the address that it redirects to",
            _ => "",
        };
        Err(self.refused(format!("status {}: {}{remedy}", status.as_u16(), said(&message))))
    }

    /// Reads server-sent events (`data: …` lines) to the end.
    fn stream(&self, mut body: impl BufRead, start: Instant) -> Result<Streamed> {
        let (mut text, mut pieces, mut usage, mut read) = (String::new(), 0, None, 0);
        let mut first: Option<f64> = None;
        let (mut last, mut ended) = (0.0, false);
        let mut line = Vec::new();
        loop {
            line.clear();
            let bytes = body.by_ref().take(MAX_LINE).read_until(b'\n', &mut line);
            let bytes =
                bytes.map_err(|e| self.refused(format!("broke off: {}", said(e.to_string().as_bytes()))))? as u64;
            read += bytes;
            if bytes == 0 {
                break;
            }
            if bytes == MAX_LINE && line.last() != Some(&b'\n') || read > MAX_ANSWER {
                return Err(
                    self.refused(format!("its answer has more than {MAX_ANSWER} bytes, or {MAX_LINE} in a line"))
                );
            }
            let Some(data) = line.strip_prefix(b"data:").map(|data| data.trim_ascii()) else {
                // Comments, names of events and empty lines are part of the protocol; a whole answer in JSON is not.
                if line.trim_ascii().starts_with(b"{") && first.is_none() {
                    return Err(self.refused(format!("does not stream: {}", said(&line))));
                }
                continue;
            };
            if data == b"[DONE]" {
                ended = true;
                break;
            }
            let chunk: Chunk = serde_json::from_slice(data)
                .map_err(|e| self.refused(format!("sends what is no completion ({e}): {}", said(data))))?;
            if let Some(error) = chunk.error {
                return Err(self.refused(said(error.to_string().as_bytes())));
            }
            usage = chunk.usage.or(usage);
            for choice in chunk.choices.into_iter().take(1) {
                ended |= choice.finish_reason.is_some();
                let Some(piece) = choice.text.filter(|t| !t.is_empty()) else { continue };
                last = start.elapsed().as_secs_f64();
                first.get_or_insert(last);
                text += &piece;
                pieces += 1;
            }
        }
        match first {
            _ if !ended => Err(self.refused(format!("its answer broke off after {pieces} tokens"))),
            None => Err(self.refused("its answer holds no text")),
            Some(first_token_seconds) => Ok(Streamed {
                text,
                tokens: usage.as_ref().and_then(|u| u.completion_tokens).unwrap_or(pieces),
                prompt_tokens: usage.and_then(|u| u.prompt_tokens),
                first_token_seconds,
                seconds: last,
            }),
        }
    }
}
