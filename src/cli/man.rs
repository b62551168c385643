//! `bitnet man`: manual pages, and the reference of the command line in `docs/cli.md`, from the definitions that parse it.

use super::{Cli, print};
use anyhow::{Context, Result};
use clap::{Arg, ArgAction, Command, CommandFactory};
use clap_mangen::Man;
use std::fmt::Write;
use std::path::PathBuf;

/// Print or write manual pages
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Write a page for each command into a directory, which is made if need be, instead of printing the program's
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Print a reference of all commands in Markdown instead
    #[arg(long, conflicts_with = "dir")]
    markdown: bool,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let program = program();
    if args.markdown {
        return print(&reference(program));
    }
    match args.dir {
        None => {
            let mut page = Vec::new();
            Man::new(program).render(&mut page)?;
            print(&String::from_utf8(page)?)
        }
        Some(dir) => {
            std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
            clap_mangen::generate_to(program, &dir).with_context(|| format!("writing pages into {}", dir.display()))
        }
    }
}

/// The program without `help`, which repeats all commands.
fn program() -> Command {
    Cli::command().disable_help_subcommand(true)
}

/// The reference: the program, then its commands in the order of its help.
fn reference(mut program: Command) -> String {
    program.build();
    let mut text = String::from(
        "# Command line\n\n\
         Written by `bitnet man --markdown` from the definitions that parse the command line; `bitnet COMMAND --help` says the \
         same. Every command takes `-h`, `--help`. Exit status: 0 done, 1 failed, 2 used wrongly.\n\n",
    );
    for command in program.get_subcommands() {
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        let name = command.get_name();
        text += &format!("- [`bitnet {name}`](#bitnet-{name}): {}\n", escaped(&about));
    }
    for command in program.get_subcommands() {
        section(command, 2, &mut text);
    }
    text
}

/// A command's usage, what it takes, and its own commands below it.
fn section(command: &Command, level: usize, text: &mut String) {
    let name = command.get_bin_name().unwrap_or(command.get_name());
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim();
    let about = command.get_long_about().or(command.get_about()).map(ToString::to_string).unwrap_or_default();
    *text += &format!("\n{} {name}\n\n{}\n\n```text\n{usage}\n```\n", "#".repeat(level), escaped(&about));
    let (named, placed): (Vec<_>, Vec<_>) =
        command.get_arguments().filter(|a| shown(a)).partition(|a| !a.is_positional());
    if !placed.is_empty() || !named.is_empty() {
        text.push('\n');
    }
    for argument in placed.into_iter().chain(named) {
        *text += &entry(argument);
    }
    if let Some(more) = command.get_after_long_help().or(command.get_after_help()) {
        *text += &format!("\n```text\n{}\n```\n", more.to_string().trim_end());
    }
    for command in command.get_subcommands() {
        section(command, level + 1, text);
    }
}

/// Whether an argument is in the reference: not what every command has.
fn shown(argument: &Arg) -> bool {
    !argument.is_hide_set() && !matches!(argument.get_action(), ArgAction::Help | ArgAction::Version)
}

/// A line for an argument: how it is written, what it does, what holds without it.
fn entry(argument: &Arg) -> String {
    let short = argument.get_short().map(|c| format!("-{c}")).filter(|_| !argument.is_positional());
    let written = match short {
        // An argument displays as its long form with its value.
        Some(short) if argument.get_long().is_some() => format!("{short}, {argument}"),
        _ => argument.to_string(),
    };
    let help = argument.get_long_help().or(argument.get_help()).map(ToString::to_string).unwrap_or_default();
    let mut line = format!("- `{written}`: {}", escaped(&help.split_whitespace().collect::<Vec<_>>().join(" ")));
    let values: Vec<_> =
        argument.get_possible_values().iter().filter(|v| !v.is_hide_set()).map(|v| v.get_name().to_owned()).collect();
    if !values.is_empty() && !argument.is_hide_possible_values_set() {
        let _ = write!(line, " [possible values: {}]", values.join(", "));
    }
    let defaults: Vec<_> = argument.get_default_values().iter().map(|v| v.to_string_lossy()).collect();
    if !defaults.is_empty() && argument.get_action().takes_values() && !argument.is_hide_default_value_set() {
        let _ = write!(line, " [default: {}]", defaults.join(" "));
    }
    line.push('\n');
    line
}

/// A text in which Markdown finds nothing to format; underscores within words are none.
fn escaped(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        if matches!(c, '\\' | '<' | '*' | '`') {
            out.push('\\');
        }
        out.push(c);
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_names_every_command_and_flag() {
        fn each(command: &Command, text: &str) {
            assert!(text.contains(&format!("# {}\n", command.get_bin_name().unwrap())), "{}", command.get_name());
            for argument in command.get_arguments().filter(|a| shown(a)) {
                let flag = argument.get_long().map_or(argument.to_string(), |long| format!("--{long}"));
                assert!(text.contains(&flag), "{} {flag}", command.get_name());
                assert!(argument.get_help().is_some(), "{} {flag} has no help", command.get_name());
            }
            command.get_subcommands().for_each(|c| each(c, text));
        }
        let mut program = program();
        program.build();
        let text = reference(program.clone());
        program.get_subcommands().for_each(|c| each(c, &text));
    }

    #[test]
    fn an_entry_has_both_names_its_help_and_its_default() {
        let kind =
            Arg::new("kind").short('k').long("kind").value_name("KIND").help("What <it>\n is").default_value("a");
        let all = Arg::new("all").long("all").action(ArgAction::SetTrue).help("All");
        let mut command = Command::new("test").disable_help_flag(true).args([kind.value_parser(["a", "b"]), all]);
        command.build();
        let entries: Vec<_> = command.get_arguments().map(entry).collect();
        let kind = "- `-k, --kind <KIND>`: What \\<it> is [possible values: a, b] [default: a]\n";
        assert_eq!(entries, [kind, "- `--all`: All\n"]);
    }
}
