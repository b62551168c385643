//! `bitnet chat`: a conversation at the terminal.

use super::chat_input::{Command, HELP, Line, Lines};
use super::generate::summary;
use super::model_args::{ModelArgs, warn_of_no_replay};
use super::sampling_args::SamplingArgs;
use super::{first_line, still_open};
use anyhow::Result;
use candle_bitnet::backend::host::resident_bytes;
use candle_bitnet::generate::{
    FinishReason, GenerateOptions, GenerationParams, LanguageModel, TokenStream, common_prefix,
};
use candle_bitnet::text::{Message, Tokenizer};
use candle_bitnet::{BitNet, Error};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Talk with a model
///
/// Ctrl-C stops an answer, Ctrl-D or /exit ends the conversation, /help lists the commands. Without a terminal, every
/// line of standard input is a message.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// Instructions for the whole conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// Print tokens, speed and memory after every answer
    #[arg(long)]
    stats: bool,

    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let options = args.sampling.options()?;
    let mut model = args.model.load()?;
    // A model without a template is refused now, not after the first message.
    model.chat_template()?;
    let interrupt = Interrupt::install();
    let mut lines = Lines::open();
    let mut chat = Chat {
        options: options.cancel(interrupt.cancel.clone()),
        system: args.system,
        stats: args.stats,
        interrupt,
        history: Vec::new(),
        held: Vec::new(),
    };
    if lines.is_terminal() {
        note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the conversation");
    }
    let result = chat.run(&mut model, &mut || lines.next_line(), &mut io::stdout());
    lines.save_history();
    warn_of_no_replay(model.decoder());
    result
}

/// What a conversation needs of a model.
trait ChatModel: LanguageModel {
    fn prompt(&self, messages: &[Message]) -> candle_bitnet::Result<Vec<u32>>;
    fn tokenizer(&self) -> Tokenizer;
    fn params(&self, options: &GenerateOptions) -> candle_bitnet::Result<GenerationParams>;
}

impl ChatModel for BitNet {
    fn prompt(&self, messages: &[Message]) -> candle_bitnet::Result<Vec<u32>> {
        self.chat_prompt(messages)
    }

    fn tokenizer(&self) -> Tokenizer {
        BitNet::tokenizer(self).clone()
    }

    fn params(&self, options: &GenerateOptions) -> candle_bitnet::Result<GenerationParams> {
        options.resolve(self.defaults(), self.vocab_size())
    }
}

/// Ctrl-C outside the line editor, which reads it as a key.
#[derive(Clone, Default)]
struct Interrupt {
    /// Stops the answer.
    cancel: Arc<AtomicBool>,
    /// Whether there is an answer to stop; otherwise the program ends.
    busy: Arc<AtomicBool>,
}

impl Interrupt {
    fn install() -> Self {
        let interrupt = Self::default();
        let handler = interrupt.clone();
        let result = ctrlc::set_handler(move || {
            if handler.busy.load(Ordering::SeqCst) {
                handler.cancel.store(true, Ordering::SeqCst);
            } else {
                // As a shell expects of a program that an interrupt ended.
                std::process::exit(130);
            }
        });
        if let Err(e) = result {
            note(&format!("warning: Ctrl-C will end the program, not only the answer: {e}"));
        }
        interrupt
    }
}

struct Chat {
    options: GenerateOptions,
    system: Option<String>,
    stats: bool,
    interrupt: Interrupt,
    /// What was said, without the system message.
    history: Vec<Message>,
    /// Tokens that the model's KV cache holds.
    held: Vec<u32>,
}

impl Chat {
    /// Reads lines and answers them until there are no more, or nobody reads the answers.
    fn run<M: ChatModel>(
        &mut self,
        model: &mut M,
        next_line: &mut dyn FnMut() -> Result<Line>,
        out: &mut dyn Write,
    ) -> Result<()> {
        loop {
            let line = match next_line()? {
                Line::Text(line) => line,
                Line::Cleared => continue,
                Line::End => return Ok(()),
            };
            match Command::parse(&line) {
                Command::Nothing => (),
                Command::Say(text) => {
                    if !self.turn(model, text, out)? {
                        return Ok(());
                    }
                }
                Command::Reset => {
                    self.history.clear();
                    note("new conversation");
                }
                Command::System(text) => {
                    note(if text.is_some() { "system message set" } else { "system message removed" });
                    self.system = text;
                }
                Command::Help => note(HELP),
                Command::Exit => return Ok(()),
                Command::Unknown(name) => note(&format!("there is no command {name}; /help lists the commands")),
            }
        }
    }

    /// One message and its answer. A message that fails is forgotten, and the conversation goes on; false if nobody
    /// reads the answers.
    fn turn<M: ChatModel>(&mut self, model: &mut M, text: String, out: &mut dyn Write) -> Result<bool> {
        self.history.push(Message::user(text));
        self.interrupt.cancel.store(false, Ordering::SeqCst);
        self.interrupt.busy.store(true, Ordering::SeqCst);
        let answer = self.answer(model, out);
        self.interrupt.busy.store(false, Ordering::SeqCst);
        match answer {
            Ok(Answer::Text(text)) if !text.is_empty() => self.history.push(Message::assistant(text)),
            Ok(Answer::Text(_)) => {
                self.history.pop();
            }
            Ok(Answer::Closed) => return Ok(false),
            Err(Failure::Output(error)) => return Err(error),
            Err(Failure::Model(error)) => {
                self.history.pop();
                note(&explain(&error, self.history.is_empty()));
            }
        }
        Ok(true)
    }

    /// Writes the model's answer to the conversation.
    fn answer<M: ChatModel>(&mut self, model: &mut M, out: &mut dyn Write) -> Result<Answer, Failure> {
        let system = self.system.iter().map(Message::system);
        let messages: Vec<Message> = system.chain(self.history.iter().cloned()).collect();
        let prompt = model.prompt(&messages)?;
        let (tokenizer, params) = (model.tokenizer(), model.params(&self.options)?);
        let keep = common_prefix(&self.held, &prompt);
        let mut stream = TokenStream::resume(model, tokenizer, &prompt, keep, params)?;
        let mut text = String::new();
        let mut outcome = Ok(true);
        for piece in &mut stream {
            match piece {
                Ok(piece) => {
                    text.push_str(&piece.text);
                    outcome = still_open(out.write_all(piece.text.as_bytes()).and_then(|()| out.flush()))
                        .map_err(Failure::Output);
                }
                Err(error) => outcome = Err(error.into()),
            }
            if !matches!(outcome, Ok(true)) {
                break;
            }
        }
        self.held = stream.held_tokens().to_vec();
        let (stats, finish) = (stream.stats(), stream.finish_reason());
        // An answer that broke off still ends its line.
        let ended = still_open(writeln!(out).and_then(|()| out.flush())).map_err(Failure::Output);
        if !outcome? || !ended? {
            return Ok(Answer::Closed);
        }
        match finish {
            Some(FinishReason::ContextFull) => note("the context is full; /reset begins a new conversation"),
            Some(FinishReason::Cancelled) => note("stopped"),
            Some(FinishReason::Timeout) => note("stopped: --timeout is over"),
            Some(FinishReason::Length) => note("stopped: as many tokens as allowed (--max-tokens)"),
            Some(FinishReason::Eos | FinishReason::StopString) | None => (),
        }
        if let Some(finish) = finish.filter(|_| self.stats) {
            note(&summary(&stats, finish, resident_bytes()));
        }
        Ok(Answer::Text(text))
    }
}

enum Answer {
    Text(String),
    /// Nobody reads the output any more.
    Closed,
}

enum Failure {
    /// The conversation can go on.
    Model(Error),
    /// It cannot.
    Output(anyhow::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Model(error)
    }
}

/// An error of a turn, with what to do about it.
fn explain(error: &Error, first: bool) -> String {
    match error {
        Error::ContextFull { needed, available } if first => {
            format!("this message needs {needed} tokens, but the context holds {available}; send a shorter one")
        }
        Error::ContextFull { needed, available } => format!(
            "the conversation needs {needed} tokens, but the context holds {available}; the message was left out: send a \
             shorter one, or begin a new conversation with /reset"
        ),
        error => format!("error: {}; the message was left out", first_line(error)),
    }
}

/// Tells the user something that is not part of an answer.
fn note(text: &str) {
    // Nothing can be told if standard error is closed.
    let _ = writeln!(io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::fake::Fake;

    impl ChatModel for Fake {
        fn prompt(&self, messages: &[Message]) -> candle_bitnet::Result<Vec<u32>> {
            Ok(self.template.apply(&self.tokenizer, messages, true)?.ids)
        }

        fn tokenizer(&self) -> Tokenizer {
            self.tokenizer.clone()
        }

        fn params(&self, options: &GenerateOptions) -> candle_bitnet::Result<GenerationParams> {
            self.params(options)
        }
    }

    fn chat() -> Chat {
        let interrupt = Interrupt::default();
        Chat {
            options: GenerateOptions::new().greedy().cancel(interrupt.cancel.clone()),
            system: None,
            stats: true,
            interrupt,
            history: vec![],
            held: vec![],
        }
    }

    fn talk(chat: &mut Chat, model: &mut Fake, lines: &[&str]) -> String {
        let mut lines = lines.iter();
        let mut out = vec![];
        let mut next = || Ok(lines.next().map_or(Line::End, |l| Line::Text((*l).to_owned())));
        chat.run(model, &mut next, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_conversation_reuses_what_the_model_holds() {
        let (mut chat, mut model) = (chat(), Fake::new(&["Blue.", "Red."]));
        assert_eq!(talk(&mut chat, &mut model, &["Name a colour.", "", "Another one."]), "Blue.\nRed.\n");
        let roles: Vec<&str> = chat.history.iter().map(|m| m.role.as_str()).collect();
        assert_eq!(roles, ["user", "assistant", "user", "assistant"]);
        assert_eq!(chat.held, model.tokens);
        // The second prompt begins with the first; at least that was not read again.
        let first = model.prompt(&chat.history[..1]).unwrap();
        let second = model.prompt(&chat.history[..3]).unwrap();
        let read: usize = model.starts[1];
        assert!(read >= first.len(), "read again from position {read} of {}", second.len());
    }

    #[test]
    fn commands_change_the_conversation() {
        let (mut chat, mut model) = (chat(), Fake::new(&["A.", "B.", "C."]));
        assert_eq!(talk(&mut chat, &mut model, &["one", "/system Be brief.", "two", "/help", "/nonsense"]), "A.\nB.\n");
        assert_eq!(chat.system.as_deref(), Some("Be brief."));
        let text = chat.held.clone();
        assert!(model.tokenizer.decode(&text, false).unwrap().contains("System: Be brief.<|eot_id|>User: one"));
        assert_eq!(talk(&mut chat, &mut model, &["/reset", "/system", "three", "/exit", "never"]), "C.\n");
        assert_eq!((chat.history.len(), chat.system.as_deref()), (2, None));
    }

    #[test]
    fn a_full_context_is_explained_and_survived() {
        let (mut chat, mut model) = (chat(), Fake::new(&["A.", "B."]));
        model.context = 60;
        let long = "x".repeat(100);
        assert_eq!(talk(&mut chat, &mut model, &["hi", &long, "/reset", "ho"]), "A.\nB.\n");
        assert_eq!(chat.history.len(), 2);
        let error = Error::ContextFull { needed: 9, available: 5 };
        assert!(explain(&error, true).contains("shorter") && !explain(&error, true).contains("/reset"));
        assert!(explain(&error, false).contains("/reset"));
    }

    #[test]
    fn a_stopped_answer_stays_as_far_as_it_came() {
        let (mut chat, mut model) = (chat(), Fake::new(&["A long answer.", "B."]));
        let cancel = chat.interrupt.cancel.clone();
        let busy = chat.interrupt.busy.clone();
        model.on_decode = Some(Box::new(move |n| {
            assert!(busy.load(Ordering::SeqCst));
            if n == 3 {
                cancel.store(true, Ordering::SeqCst);
            }
        }));
        let said = talk(&mut chat, &mut model, &["hi"]);
        assert!(said.len() > 1 && "A long answer.".starts_with(said.trim_end_matches('\n')), "{said:?}");
        assert_eq!(chat.history[1].content, said.trim_end_matches('\n'));
        model.on_decode = None;
        assert_eq!(talk(&mut chat, &mut model, &["go on"]), "B.\n");
    }
}
