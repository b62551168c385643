//! Chat templates: from messages to the prompt that a model was trained on.

use super::json::{MAX_JSON_BYTES, read_json};
use super::template_env::{MAX_RENDERED_BYTES, TEMPLATE_FUEL, environment, without_generation_tags};
use super::{Tokenizer, json};
use crate::checkpoint::ModelFiles;
use crate::{Error, Result};
use minijinja::{Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// Largest chat template that is read, in bytes. Known ones have under 20 KiB.
pub const MAX_TEMPLATE_BYTES: u64 = 1 << 20;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`, or whatever else the model's template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of the given role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    /// What the user says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// Instructions for the whole conversation; first of all messages.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// What the model said.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }
}

/// A conversation as the model reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatPrompt {
    /// The rendered text, which begins with BOS exactly once if the tokenizer adds BOS.
    pub text: String,
    /// Its token ids.
    pub ids: Vec<u32>,
}

/// A checkpoint's chat template. Cloning it is cheap.
#[derive(Clone)]
pub struct ChatTemplate {
    shared: Arc<Shared>,
}

struct Shared {
    source: String,
    name: String,
    fuel: u64,
    /// The environment with the compiled template, or why it does not compile: a template that is never rendered
    /// must not keep a model from loading.
    env: std::result::Result<Environment<'static>, String>,
}

/// Stack for macros that call each other, which minijinja allows 500 deep.
const LEAST_STACK: usize = 16 << 20;
/// Stack for each instruction; it takes several to nest a value once more.
const STACK_PER_STEP: usize = 256;

/// Name of the only template in its environment.
const TEMPLATE: &str = "chat_template";

impl ChatTemplate {
    /// [`Self::open`] for the directory `dir`.
    ///
    /// # Errors
    /// The same.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Option<Self>> {
        Self::open(&dir.as_ref().into())
    }

    /// Finds a model's template: the file `chat_template.jinja` or else the key `chat_template` of
    /// `tokenizer_config.json` (a string, or a list of `{name, template}` of which `default` or the only one is taken)
    /// or of `chat_template.json`. `None` if there is none; [`Self::missing`] is the error for that.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] naming the file. Syntax errors are reported by [`Self::render`].
    pub fn open(files: &ModelFiles) -> Result<Option<Self>> {
        if let Some(bytes) = files.read("chat_template.jinja", MAX_TEMPLATE_BYTES)? {
            let path = files.path("chat_template.jinja");
            let source = String::from_utf8(bytes.into_owned()).map_err(|_| Error::file(&path, "not UTF-8"))?;
            return Ok(Some(Self::new(source, path.display().to_string())));
        }
        for name in ["tokenizer_config.json", "chat_template.json"] {
            let path = files.path(name);
            if let Some(source) = read_json(files, name)?.map(|config| select(&path, &config)).transpose()?.flatten() {
                return Ok(Some(Self::new(source, path.display().to_string())));
            }
        }
        Ok(None)
    }

    /// Finds the template in the bytes of a `tokenizer_config.json`; `source` names them in errors.
    ///
    /// # Errors
    /// [`Error::File`] if they are not what they should be.
    pub fn from_json(config: &[u8], source: impl AsRef<Path>) -> Result<Option<Self>> {
        let source = source.as_ref();
        if config.len() as u64 > MAX_JSON_BYTES {
            return Err(Error::file(source, format!("{} bytes, but at most {MAX_JSON_BYTES} are read", config.len())));
        }
        let template = select(source, &json::parse_object(source, config)?)?;
        Ok(template.map(|template| Self::new(template, source.display().to_string())))
    }

    /// A template from its source; `name` names it in errors.
    pub fn new(source: impl Into<String>, name: impl Into<String>) -> Self {
        Self::with_fuel(source, name, TEMPLATE_FUEL)
    }

    /// [`ChatTemplate::new`] with another limit than [`super::TEMPLATE_FUEL`], for the fuzz target.
    #[doc(hidden)]
    pub fn with_fuel(source: impl Into<String>, name: impl Into<String>, fuel: u64) -> Self {
        let source = source.into();
        let compile = || {
            let mut env = environment(fuel)?;
            env.add_template_owned(TEMPLATE, without_generation_tags(&source))?;
            Ok(env)
        };
        let env = on_own_stack(0, compile).and_then(|env| env.map_err(|e| describe(&e)));
        Self { shared: Arc::new(Shared { source, name: name.into(), fuel, env }) }
    }

    /// The error for a checkpoint without a template; `checkpoint` names it.
    pub fn missing(checkpoint: impl std::fmt::Display) -> Error {
        Error::Text {
            what: "chat template".into(),
            reason: format!(
                "{checkpoint} has none; use a model tuned for chat, put its chat_template.jinja beside tokenizer.json, \
                 or generate from a plain prompt"
            ),
        }
    }

    /// The template's source.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.shared.source
    }

    /// Renders `messages`; `add_generation_prompt` ends the text where the model's answer begins. BOS is as the template
    /// has it. Templates see `messages`, `add_generation_prompt`, the special tokens (`bos_token`, …), `tools` and
    /// `documents` (none), `raise_exception`, `strftime_now` (UTC) and `tojson`, as in transformers.
    ///
    /// # Errors
    /// [`Error::Text`] if the template is malformed, refuses the messages, needs more than [`super::TEMPLATE_FUEL`] or
    /// renders more than [`MAX_RENDERED_BYTES`].
    pub fn render(&self, tokenizer: &Tokenizer, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let error = |reason: String| Error::Text { what: format!("chat template of {}", self.shared.name), reason };
        let env = self.shared.env.as_ref().map_err(|e| error(e.clone()))?;
        let template = env.get_template(TEMPLATE).map_err(|e| error(describe(&e)))?;
        let messages: Vec<Value> = messages
            .iter()
            .map(|m| Value::from_pairs([("role", Value::from(&m.role)), ("content", Value::from(&m.content))]))
            .collect();
        let mut context = vec![
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        context.extend(tokenizer.special_tokens().map(|(key, text)| (key, Value::from(text))));
        let mut out = Bounded(Vec::new());
        let rendered = on_own_stack(self.shared.fuel, || {
            // The values that it made are dropped there as well.
            template.render_captured_to(Value::from_pairs(context), &mut out).map(drop).map_err(|e| describe(&e))
        });
        rendered.and_then(|result| result).map_err(error)?;
        String::from_utf8(out.0).map_err(|_| error("rendered text is not UTF-8".into()))
    }

    /// Renders and encodes `messages`. If the tokenizer begins texts with BOS, the result begins with exactly one,
    /// whether or not the template writes it.
    ///
    /// # Errors
    /// As [`Self::render`] and [`Tokenizer::encode`].
    pub fn apply(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<ChatPrompt> {
        let mut text = self.render(tokenizer, messages, add_generation_prompt)?;
        let bos = tokenizer.special_token("bos_token").filter(|bos| tokenizer.adds_bos() && !bos.is_empty());
        if let Some(bos) = bos.filter(|bos| !text.starts_with(bos)) {
            text.insert_str(0, bos);
        }
        let ids = tokenizer.encode(&text, false)?;
        Ok(ChatPrompt { text, ids })
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("name", &self.shared.name).field("source", &self.shared.source).finish()
    }
}

/// The template among the values that the key `chat_template` can have.
fn select(path: &Path, config: &serde_json::Value) -> Result<Option<String>> {
    let bad = |reason: String| Error::config(path, "chat_template", reason);
    let source = match config.get("chat_template") {
        None | Some(serde_json::Value::Null) => return Ok(None),
        Some(serde_json::Value::String(source)) => source,
        Some(serde_json::Value::Array(list)) => {
            let named = |entry: &serde_json::Value| entry.get("name")?.as_str().map(str::to_owned);
            let entry = match list.as_slice() {
                [] => return Ok(None),
                [only] => only,
                list => list.iter().find(|entry| named(entry).as_deref() == Some("default")).ok_or_else(|| {
                    let names: Vec<String> = list.iter().filter_map(named).take(16).collect();
                    bad(format!("none of the templates is named `default` (found: {})", names.join(", ")))
                })?,
            };
            let template = entry.get("template").and_then(serde_json::Value::as_str);
            template.ok_or_else(|| bad("an entry of the list has no string `template`".into()))?
        }
        Some(_) => return Err(bad("expected a string or a list of {name, template}".into())),
    };
    if source.len() as u64 > MAX_TEMPLATE_BYTES {
        return Err(bad(format!("{} bytes, but at most {MAX_TEMPLATE_BYTES} are read", source.len())));
    }
    Ok(Some(source.to_owned()))
}

/// Runs `work` on a thread whose stack holds what a template of so much fuel can nest: minijinja prints, compares and drops
/// values by recursion. A panic there becomes an error.
fn on_own_stack<T: Send>(fuel: u64, work: impl FnOnce() -> T + Send) -> std::result::Result<T, String> {
    let bytes = LEAST_STACK + usize::try_from(fuel).unwrap_or(usize::MAX).saturating_mul(STACK_PER_STEP);
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(bytes).spawn_scoped(scope, work);
        let thread = thread.map_err(|e| format!("no thread to render it on: {e}"))?;
        thread.join().map_err(|_| "the template library panicked; the template cannot be used".into())
    })
}

fn describe(error: &minijinja::Error) -> String {
    let detail = match error.kind() {
        ErrorKind::OutOfFuel => "took too many steps".to_owned(),
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    let cause = std::error::Error::source(error).map(|e| format!(": {e}")).unwrap_or_default();
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    format!("{detail}{cause}{line}")
}

/// A buffer that refuses to grow beyond [`MAX_RENDERED_BYTES`].
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.0.len() + data.len() > MAX_RENDERED_BYTES {
            return Err(io::Error::other(format!("rendered text exceeds {MAX_RENDERED_BYTES} bytes")));
        }
        self.0.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
