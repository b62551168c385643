//! Conversations to tokens, as the model will meet them when it is asked.

use super::{Sample, TrainOn};
use crate::checkpoint::ModelFiles;
use crate::generate::GenerationDefaults;
use crate::text::{ChatTemplate, Message, Tokenizer};
use crate::{Error, Result};
use std::path::Path;

/// An encoded example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Its line in the file, from 1.
    pub line: usize,
    /// Its tokens, up to the last one that is learnt.
    pub ids: Vec<u32>,
    /// Whether each token is to be predicted; never the first.
    pub learnt: Vec<bool>,
    /// Tokens before the first answer; of a text, its first half.
    pub prompt: usize,
}

impl Example {
    /// Keeps `length` tokens; false if nothing of what is learnt would be left.
    pub(super) fn truncate(&mut self, length: usize) -> bool {
        self.ids.truncate(length);
        self.learnt.truncate(length);
        self.prompt = self.prompt.min(length.max(2) - 1);
        self.learnt.contains(&true)
    }

    /// Tokens that are learnt.
    pub fn targets(&self) -> usize {
        self.learnt.iter().filter(|learnt| **learnt).count()
    }
}

/// A model's way of writing conversations: its tokenizer and its chat template.
///
/// Without a template a conversation is one question and its answer, written `question`, line break, `answer`, end of
/// text; a system message or several turns need a template.
#[derive(Debug, Clone)]
pub struct PromptFormat {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    /// Tokens that end an answer.
    ends: Vec<u32>,
    /// The one that ends a text.
    end: Option<u32>,
}

impl PromptFormat {
    /// That of the checkpoint in `dir`.
    ///
    /// # Errors
    /// Those of [`Tokenizer::from_dir`], [`ChatTemplate::from_dir`] and [`GenerationDefaults::from_dir`].
    pub fn from_dir(dir: &Path) -> Result<Self> {
        Self::open(&ModelFiles::from(dir))
    }

    /// That of a model.
    ///
    /// # Errors
    /// As [`Self::from_dir`].
    pub fn open(files: &ModelFiles) -> Result<Self> {
        let tokenizer = Tokenizer::open(files)?;
        let template = ChatTemplate::open(files)?;
        let ends = GenerationDefaults::open(files, &tokenizer, template.as_ref())?.eos;
        Ok(Self::new(tokenizer, template, ends))
    }

    /// One whose answers end with one of `ends`.
    pub fn new(tokenizer: Tokenizer, template: Option<ChatTemplate>, ends: Vec<u32>) -> Self {
        let end = tokenizer.eos_id().or(ends.first().copied());
        Self { tokenizer, template, ends, end }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Whether there is a chat template.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Tokens of a question, up to where the answer begins.
    ///
    /// # Errors
    /// [`Error::Text`] if the template or the tokenizer refuses it.
    pub fn prompt(&self, question: &str) -> Result<Vec<u32>> {
        match &self.template {
            Some(template) => Ok(template.apply(&self.tokenizer, &[Message::user(question)], true)?.ids),
            None => self.tokenizer.encode(&format!("{question}\n"), true),
        }
    }

    /// Encodes a sample; none if there is nothing in it to learn. The line is left 0.
    ///
    /// # Errors
    /// [`Error::Text`] if the template or the tokenizer refuses it, or the template is needed and not there.
    pub fn example(&self, sample: &Sample, train_on: TrainOn) -> Result<Option<Example>> {
        let mut text = Growing { tokenizer: &self.tokenizer, text: String::new(), ids: Vec::new(), learnt: Vec::new() };
        let prompt = match sample {
            Sample::Text(content) => {
                if content.trim().is_empty() {
                    return Ok(None);
                }
                text.ids = self.tokenizer.encode(content, true)?;
                text.ids.push(self.end()?);
                text.learnt = vec![true; text.ids.len()];
                text.ids.len() / 2
            }
            Sample::Conversation(messages) => {
                let answers = || messages.iter().filter(|m| m.role == "assistant");
                if answers().all(|m| m.content.trim().is_empty()) {
                    return Ok(None);
                }
                match &self.template {
                    Some(template) => self.turns(&mut text, template, messages)?,
                    None => self.pair(&mut text, messages)?,
                }
            }
        };
        let Growing { mut ids, mut learnt, .. } = text;
        if train_on == TrainOn::All {
            learnt.fill(true);
        }
        learnt.iter_mut().take(1).for_each(|first| *first = false);
        let kept = learnt.iter().rposition(|learnt| *learnt).map_or(0, |last| last + 1);
        ids.truncate(kept);
        learnt.truncate(kept);
        Ok((kept > 0).then_some(Example { line: 0, ids, learnt, prompt: prompt.clamp(1, kept.max(2) - 1) }))
    }

    /// Renders the conversation up to and with each answer; what an answer adds is learnt, up to its end token. Returns
    /// the tokens before the first one.
    fn turns(&self, out: &mut Growing<'_>, template: &ChatTemplate, messages: &[Message]) -> Result<usize> {
        let mut prompt = None;
        for (i, message) in messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
            let asked = template.apply(&self.tokenizer, &messages[..i], true)?;
            out.extend(asked.text, &asked.ids, false)?;
            let begin = out.ids.len();
            prompt.get_or_insert(begin);
            let answered = template.apply(&self.tokenizer, &messages[..=i], false)?;
            // An empty answer among others teaches nothing but silence.
            out.extend(answered.text, &answered.ids, !message.content.trim().is_empty())?;
            // What comes after the end of the turn belongs to the next one.
            if let Some(end) = out.ids[begin..].iter().rposition(|id| self.ends.contains(id)) {
                out.learnt[begin + end + 1..].fill(false);
            }
        }
        Ok(prompt.unwrap_or(0))
    }

    fn pair(&self, out: &mut Growing<'_>, messages: &[Message]) -> Result<usize> {
        let [question, answer] = messages else {
            let reason = "it has none, which only a single question with its answer can do without; use a model tuned \
                          for chat, or put a chat_template.jinja beside tokenizer.json";
            return Err(Error::Text { what: "the model's chat template".into(), reason: reason.into() });
        };
        let asked = format!("{}\n", question.content);
        let answered = format!("{asked}{}", answer.content);
        let ids = self.tokenizer.encode(&asked, true)?;
        out.extend(asked, &ids, false)?;
        let prompt = out.ids.len();
        let ids = self.tokenizer.encode(&answered, true)?;
        out.extend(answered, &ids, true)?;
        out.ids.push(self.end()?);
        out.learnt.push(true);
        Ok(prompt)
    }

    fn end(&self) -> Result<u32> {
        self.end.ok_or_else(|| Error::Text {
            what: "tokenizer".into(),
            reason: "it names no end-of-text token; set eos_token in tokenizer_config.json".into(),
        })
    }
}

/// A text that is rendered again and again, each time longer, and its tokens.
struct Growing<'a> {
    tokenizer: &'a Tokenizer,
    text: String,
    ids: Vec<u32>,
    learnt: Vec<bool>,
}

impl Growing<'_> {
    /// Goes on to a longer rendering. Its tokens are taken as they are where they begin with those so far; where the
    /// tokenizer would join both sides of the seam, the rest is encoded by itself, as generation will meet it.
    fn extend(&mut self, text: String, ids: &[u32], learnt: bool) -> Result<()> {
        let Some(rest) = text.strip_prefix(&self.text) else {
            let reason = "it renders the beginning of this conversation otherwise when more follows, so answers cannot be \
                          told from prompts; split the conversation into one line an answer, or train on all with {\"text\"}";
            return Err(Error::Text { what: "the model's chat template".into(), reason: reason.into() });
        };
        match ids.strip_prefix(&self.ids[..]) {
            Some(more) => self.ids.extend_from_slice(more),
            None => self.ids.extend(self.tokenizer.encode(rest, false)?),
        }
        self.learnt.resize(self.ids.len(), learnt);
        self.text = text;
        Ok(())
    }
}
