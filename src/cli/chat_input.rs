//! What is typed in `bitnet chat`: lines and commands.

use anyhow::{Context, Result};
use rustyline::config::Config;
use rustyline::error::ReadlineError;
use rustyline::{DefaultEditor, history::DefaultHistory};
use std::env;
use std::ffi::OsString;
use std::io::{self, BufRead, IsTerminal, Read};
use std::path::{Path, PathBuf};

/// Lines that the history file keeps.
const MAX_HISTORY: usize = 1000;

/// Longest line of standard input, in bytes.
const MAX_LINE_BYTES: u64 = 16 << 20;

/// The answer to `/help`.
pub const HELP: &str = "\
/reset         begin a new conversation
/system TEXT   set the system message (without TEXT: remove it)
/help          this list
/exit          end (also Ctrl-D)
//TEXT         a message that begins with /
Ctrl-C         stop the answer, or clear the line";

/// A line of input, taken apart.
#[derive(Debug, PartialEq)]
pub enum Command {
    Nothing,
    Say(String),
    Reset,
    System(Option<String>),
    Help,
    Exit,
    /// The name of a command that does not exist.
    Unknown(String),
}

impl Command {
    pub fn parse(line: &str) -> Self {
        let line = line.trim();
        if line.is_empty() {
            return Self::Nothing;
        }
        let Some(command) = line.strip_prefix('/') else { return Self::Say(line.to_owned()) };
        if command.starts_with('/') {
            return Self::Say(command.to_owned());
        }
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        match (name, rest.trim()) {
            ("system", "") => Self::System(None),
            ("system", text) => Self::System(Some(text.to_owned())),
            ("reset", "") => Self::Reset,
            ("help", "") => Self::Help,
            ("exit" | "quit", "") => Self::Exit,
            _ => Self::Unknown(line.to_owned()),
        }
    }
}

/// What one attempt to read a line gave.
#[derive(Debug, PartialEq)]
pub enum Line {
    Text(String),
    /// Ctrl-C: the line is gone.
    Cleared,
    End,
}

/// The line editor on a terminal, plain lines otherwise.
pub enum Lines {
    Terminal { editor: Box<DefaultEditor>, history: Option<PathBuf> },
    Plain,
}

impl Lines {
    /// Opens standard input. A history that cannot be read is only warned of.
    pub fn open() -> Self {
        if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
            return Self::Plain;
        }
        let config = Config::builder().max_history_size(MAX_HISTORY).and_then(|c| c.history_ignore_dups(true));
        let config = config.map(|c| c.history_ignore_space(true).auto_add_history(true).build());
        let editor = config.and_then(|c| DefaultEditor::with_history(c, DefaultHistory::new()));
        let Ok(mut editor) = editor else { return Self::Plain };
        let history = history_path(|name| env::var_os(name));
        if let Some(path) = history.as_deref().filter(|path| path.is_file())
            && let Err(e) = editor.load_history(path)
        {
            eprintln!("warning: the history {} cannot be read: {e}", path.display());
        }
        Self::Terminal { editor: Box::new(editor), history }
    }

    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal { .. })
    }

    /// Waits for the next line.
    pub fn next_line(&mut self) -> Result<Line> {
        match self {
            Self::Terminal { editor, .. } => match editor.readline("> ") {
                Ok(line) => Ok(Line::Text(line)),
                Err(ReadlineError::Interrupted) => Ok(Line::Cleared),
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(e) => Err(e).context("reading the terminal"),
            },
            Self::Plain => plain_line(&mut io::stdin().lock()),
        }
    }

    /// Writes the history; a failure is only warned of.
    pub fn save_history(&mut self) {
        let Self::Terminal { editor, history: Some(path) } = self else { return };
        let parent = path.parent().unwrap_or(Path::new("."));
        let saved =
            std::fs::create_dir_all(parent).map_err(ReadlineError::from).and_then(|()| editor.save_history(path));
        if let Err(e) = saved {
            eprintln!("warning: the history {} cannot be written: {e}", path.display());
        }
    }
}

fn plain_line(input: &mut dyn BufRead) -> Result<Line> {
    let mut bytes = Vec::new();
    let read = input.take(MAX_LINE_BYTES).read_until(b'\n', &mut bytes).context("standard input")?;
    if read == 0 {
        return Ok(Line::End);
    }
    Ok(Line::Text(String::from_utf8_lossy(&bytes).into_owned()))
}

/// The history file: `candle-bitnet/chat_history` in the user's data directory (XDG), if there is one.
fn history_path(env: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    // A relative XDG_DATA_HOME is to be ignored (XDG Base Directory Specification).
    let absolute = |name| env(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let data = absolute("XDG_DATA_HOME")
        .or_else(|| if cfg!(windows) { absolute("LOCALAPPDATA") } else { None })
        .or_else(|| absolute("HOME").map(|home| home.join(".local").join("share")))?;
    Some(data.join("candle-bitnet").join("chat_history"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands() {
        let parse = Command::parse;
        assert_eq!(parse("  \n"), Command::Nothing);
        assert_eq!(parse(" hi there \n"), Command::Say("hi there".into()));
        assert_eq!(parse("//etc is"), Command::Say("/etc is".into()));
        assert_eq!(parse("/reset"), Command::Reset);
        assert_eq!(parse("/system  Be brief. "), Command::System(Some("Be brief.".into())));
        assert_eq!(parse("/system"), Command::System(None));
        assert_eq!(parse("/help"), Command::Help);
        assert_eq!((parse("/exit"), parse("/quit")), (Command::Exit, Command::Exit));
        assert_eq!(parse("/rest"), Command::Unknown("/rest".into()));
        assert_eq!(parse("/reset now"), Command::Unknown("/reset now".into()));
    }

    #[test]
    fn plain_lines_end_with_the_input() {
        let mut input = &b"a\n\xffb"[..];
        assert_eq!(plain_line(&mut input).unwrap(), Line::Text("a\n".into()));
        assert_eq!(plain_line(&mut input).unwrap(), Line::Text("\u{fffd}b".into()));
        assert_eq!(plain_line(&mut input).unwrap(), Line::End);
    }

    #[cfg(unix)]
    #[test]
    fn history_follows_xdg() {
        let path = |xdg: Option<&str>, home: Option<&str>| {
            history_path(|name| match name {
                "XDG_DATA_HOME" => xdg.map(Into::into),
                "HOME" => home.map(Into::into),
                _ => None,
            })
        };
        assert_eq!(path(Some("/d"), Some("/h")).unwrap(), Path::new("/d/candle-bitnet/chat_history"));
        assert_eq!(path(Some("d"), Some("/h")).unwrap(), Path::new("/h/.local/share/candle-bitnet/chat_history"));
        assert_eq!(path(None, None), None);
    }
}
