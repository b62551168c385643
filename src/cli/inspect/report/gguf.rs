//! What only a GGUF file has to tell.

use candle_bitnet::Result;
use candle_bitnet::checkpoint::gguf::{GgmlType, Gguf};
use candle_bitnet::checkpoint::{Checkpoint, StoredType};
use serde::Serialize;
use std::fmt;

/// Characters of the file's own text that are shown.
const SHOWN: usize = 80;

/// The file beside its tensors.
#[derive(Debug, Serialize)]
pub(super) struct GgufReport {
    version: u32,
    architecture: &'static str,
    name: Option<String>,
    metadata: usize,
    alignment: usize,
    /// Layout that I2_S tensors were read in, if there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    i2s_layout: Option<&'static str>,
    tokenizer: Option<String>,
    pre_tokenizer: Option<String>,
    tokens: Option<usize>,
    chat_template: bool,
    /// Bytes between and behind tensors that are more than alignment needs.
    unused_bytes: u64,
    /// Whether the template in the file is replaced by the documented one.
    #[serde(skip)]
    wrong_template: bool,
}

impl GgufReport {
    pub(super) fn of(file: &Gguf, checkpoint: &Checkpoint) -> Result<Self> {
        let header = file.header();
        let shown =
            |key| Ok::<_, candle_bitnet::Error>(file.text(key)?.map(|t| t.chars().take(SHOWN).collect::<String>()));
        let mut tensors: Vec<_> = header.tensors.iter().map(|t| t.range.clone()).collect();
        tensors.sort_unstable_by_key(|r| r.start);
        let (mut unused, mut end) = (0, header.data_start);
        for range in tensors.into_iter().chain(std::iter::once(file.file().bytes().len()..0)) {
            let gap = range.start.saturating_sub(end);
            unused += if gap < header.alignment { 0 } else { gap as u64 };
            end = range.end;
        }
        let stored = file.text("tokenizer.chat_template")?;
        let used = match stored {
            Some(_) => file.tokenizer_config_json()?,
            None => String::new(),
        };
        let is_i2s = checkpoint.tensors().any(|t| t.dtype == StoredType::Ggml(GgmlType::I2_S));
        Ok(Self {
            version: header.version,
            architecture: file.architecture()?.name(),
            name: shown("general.name")?,
            metadata: header.metadata.len(),
            alignment: header.alignment,
            i2s_layout: is_i2s.then(|| checkpoint.source().i2s_layout().unwrap_or_default().name()),
            tokenizer: shown("tokenizer.ggml.model")?,
            pre_tokenizer: shown("tokenizer.ggml.pre")?,
            tokens: file.tokens(),
            chat_template: stored.is_some(),
            unused_bytes: unused,
            wrong_template: stored.is_some_and(|t| t.contains("BITNETAssistant")) && !used.contains("BITNETAssistant"),
        })
    }

    pub(super) fn remarks(&self, warnings: &mut Vec<String>) {
        if self.tokenizer.is_none() {
            warnings.push("no tokenizer in the file: it can be inspected, but not run on text".into());
        } else if self.tokenizer.as_deref() == Some("gpt2")
            && self.pre_tokenizer.as_deref().is_none_or(|p| p == "default")
        {
            warnings
                .push("tokenizer.ggml.pre names no pre-tokeniser; the one that goes with its BOS token is used".into());
        }
        if self.wrong_template {
            warnings.push(
                "the chat template (\"BITNETAssistant\") is known to be wrong; the documented one is used".into(),
            );
        }
        if self.unused_bytes > 0 {
            warnings.push(format!("{} bytes of the file belong to no tensor", self.unused_bytes));
        }
    }
}

impl fmt::Display for GgufReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.as_deref().map_or(String::new(), |n| format!(" {n:?}"));
        write!(
            f,
            "GGUF            version {}, {}{name}, {} metadata entries",
            self.version, self.architecture, self.metadata
        )?;
        if let Some(layout) = self.i2s_layout {
            write!(f, "; I2_S read in layout {layout}")?;
        }
        writeln!(f)?;
        if let Some(model) = &self.tokenizer {
            let pre = self.pre_tokenizer.as_deref().map_or(String::new(), |p| format!(" ({p})"));
            let template = if self.chat_template { ", chat template" } else { "" };
            writeln!(f, "tokenizer       {model}{pre}, {} tokens{template}", self.tokens.unwrap_or_default())?;
        }
        Ok(())
    }
}
