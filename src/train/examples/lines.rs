//! JSONL lines to conversations and texts.

use crate::text::Message;
use crate::train::corpus::MAX_TEXT_BYTES;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// Messages of one conversation.
pub const MAX_MESSAGES: usize = 1024;

/// What a line holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sample {
    /// A conversation: perhaps a system message, then user and assistant in turn, the assistant last.
    Conversation(Vec<Message>),
    /// A text to continue.
    Text(String),
}

/// The samples of a JSONL file with their line numbers, from 1. Blank lines are passed over.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] naming the line.
pub fn read_samples(path: &Path) -> Result<Vec<(usize, Sample)>> {
    let size = std::fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
    if size > MAX_TEXT_BYTES {
        return Err(Error::file(path, format!("{size} bytes; at most {MAX_TEXT_BYTES} are read: cut it into parts")));
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let text = std::str::from_utf8(&bytes).map_err(|e| {
        let line = bytes.iter().take(e.valid_up_to()).filter(|b| **b == b'\n').count() + 1;
        Error::file(path, format!("line {line}: not UTF-8; convert the file, for example with iconv"))
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut samples = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let bad = |reason: String| Error::file(path, format!("line {}: {reason}", i + 1));
        let value: Value = serde_json::from_str(line).map_err(|e| bad(format!("no JSON: {e}; one object a line")))?;
        samples.push((i + 1, sample(&value).map_err(bad)?));
    }
    match samples.is_empty() {
        true => Err(Error::file(path, "empty: there is no example in it")),
        false => Ok(samples),
    }
}

const FORMS: &str = "{\"messages\"}, {\"instruction\", \"output\"}, {\"input\", \"output\"} or {\"text\"}";

fn sample(value: &Value) -> Result<Sample, String> {
    let Value::Object(map) = value else {
        return Err(format!("{} where an object is expected: {FORMS}", kind(value)));
    };
    let text = |key: &str| match map.get(key) {
        Some(Value::String(text)) => Ok(text.as_str()),
        other => Err(format!("\"{key}\" is {} where a string is expected", other.map_or("missing", kind))),
    };
    let has = |key: &str| map.contains_key(key);
    if let Some(messages) = map.get("messages") {
        return conversation(messages).map(Sample::Conversation);
    }
    let pair = |prompt: String, answer: &str| {
        Ok(Sample::Conversation(vec![Message::user(prompt), Message::assistant(answer)]))
    };
    if has("instruction") && has("output") {
        let mut prompt = text("instruction")?.to_owned();
        for key in ["input", "context"].into_iter().filter(|key| map.get(*key).is_some_and(|v| !v.is_null())) {
            let more = text(key)?;
            if !more.trim().is_empty() {
                prompt.push_str("\n\n");
                prompt.push_str(more);
            }
        }
        return pair(prompt, text("output")?);
    }
    if has("input") && has("output") {
        return pair(text("input")?.to_owned(), text("output")?);
    }
    if has("text") {
        return text("text").map(|t| Sample::Text(t.to_owned()));
    }
    Err(format!("expected {FORMS}, found {}", keys(map)))
}

fn conversation(value: &Value) -> Result<Vec<Message>, String> {
    let Value::Array(list) = value else {
        return Err(format!("\"messages\" is {} where a list is expected", kind(value)));
    };
    if list.len() > MAX_MESSAGES {
        return Err(format!("{} messages; at most {MAX_MESSAGES} are read", list.len()));
    }
    let mut messages: Vec<Message> = Vec::with_capacity(list.len());
    for (i, value) in list.iter().enumerate() {
        let bad = |reason: String| format!("message {}: {reason}", i + 1);
        let Value::Object(map) = value else {
            return Err(bad(format!("{} where {{\"role\", \"content\"}} is expected", kind(value))));
        };
        let text = |key: &str| match map.get(key) {
            Some(Value::String(text)) => Ok(text.clone()),
            other => Err(bad(format!("\"{key}\" is {} where a string is expected", other.map_or("missing", kind)))),
        };
        // A key such as "weight" or "tool_calls" would change what is to be learnt.
        if let Some(key) = map.keys().find(|key| !["role", "content"].contains(&key.as_str())) {
            return Err(bad(format!("key {:?} has no meaning here; expected role and content", shown(key))));
        }
        let message = Message::new(text("role")?, text("content")?);
        let before = messages.last().map(|m| m.role.as_str());
        match (message.role.as_str(), before) {
            ("system", None) | ("user", None | Some("system" | "assistant")) | ("assistant", Some("user")) => {}
            ("system" | "user" | "assistant", _) => {
                let place = before.map_or("first".into(), |role| format!("after {role}"));
                return Err(bad(format!(
                    "{} {place}: expected at most one system message first, then user and assistant in turn",
                    message.role
                )));
            }
            (other, _) => {
                return Err(bad(format!("role {:?} is not system, user or assistant", shown(other))));
            }
        }
        messages.push(message);
    }
    match messages.last().map(|m| m.role.as_str()) {
        Some("assistant") => Ok(messages),
        None => Err("\"messages\" is empty".into()),
        Some(role) => Err(format!("the last message is of the {role}: there is no answer to learn")),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn keys(map: &Map<String, Value>) -> String {
    let mut names: Vec<String> = map.keys().take(8).map(|key| format!("{:?}", shown(key))).collect();
    if map.len() > names.len() {
        names.push("…".into());
    }
    if names.is_empty() { "no keys".into() } else { format!("the keys {}", names.join(", ")) }
}

/// The beginning of a text of the file, for messages.
fn shown(text: &str) -> String {
    text.chars().take(40).collect()
}
