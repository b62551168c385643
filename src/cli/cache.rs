//! `bitnet cache`: what the hub's cache holds, and how to make room.

use super::print;
use anyhow::{Context, Result};
use candle_bitnet::Error;
use candle_bitnet::checkpoint::hub::HubOptions;
use candle_bitnet::checkpoint::hub::cache::{self, CachedModel, Removal};
use indicatif::HumanBytes;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;

/// Show or remove models that were downloaded from the hub
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List the models in the cache, with their revisions and sizes
    List {
        /// Write JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove models, or single revisions of them
    Rm {
        /// owner/name, or owner/name@revision (a branch, tag or commit)
        #[arg(required = true, value_name = "MODEL")]
        models: Vec<String>,

        /// Do not ask
        #[arg(long, short)]
        yes: bool,

        /// Write JSON
        #[arg(long)]
        json: bool,
    },
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let Some(dir) = HubOptions::from_env().cache_dir else {
        return Err(Error::request("HF_HOME", "no cache directory: set HF_HOME or HF_HUB_CACHE").into());
    };
    match args.command {
        Command::List { json } => {
            let models = cache::list(&dir)?;
            match json {
                true => print(&serde_json::to_string_pretty(&list_json(&dir.display().to_string(), &models))?),
                false => print(&table(&dir.display().to_string(), &models)),
            }
        }
        Command::Rm { models, yes, json } => remove(dir, &models, yes, json),
    }
}

fn list_json(dir: &str, models: &[CachedModel]) -> serde_json::Value {
    let model = |m: &CachedModel| {
        let revision = |r: &cache::CachedRevision| serde_json::json!({ "commit": r.commit, "refs": r.refs, "files": r.files, "bytes": r.bytes });
        serde_json::json!({
            "id": m.id,
            "path": m.path.display().to_string(),
            "bytes": m.bytes,
            "incomplete_bytes": m.incomplete_bytes,
            "revisions": m.revisions.iter().map(revision).collect::<Vec<_>>(),
        })
    };
    let total: u64 = models.iter().map(|m| m.bytes).sum();
    serde_json::json!({ "dir": dir, "bytes": total, "models": models.iter().map(model).collect::<Vec<_>>() })
}

fn table(dir: &str, models: &[CachedModel]) -> String {
    let size = |bytes: u64| HumanBytes(bytes).to_string();
    let mut text = String::new();
    for m in models {
        let part = match m.incomplete_bytes {
            0 => String::new(),
            bytes => format!(", {} of them of interrupted downloads", size(bytes)),
        };
        text += &format!("{:>12}  {}{part}\n", size(m.bytes), m.id);
        for r in &m.revisions {
            let (commit, refs) = (r.commit.get(..12).unwrap_or(&r.commit), r.refs.join(", "));
            let refs = if refs.is_empty() { String::new() } else { format!(" ({refs})") };
            text += &format!("{:>12}    @{commit}{refs}, {} files, {}\n", "", r.files, size(r.bytes));
        }
    }
    let total: u64 = models.iter().map(|m| m.bytes).sum();
    let models = if models.len() == 1 { "1 model".to_owned() } else { format!("{} models", models.len()) };
    text + &format!("{:>12}  {models} in {dir}\n", size(total))
}

fn remove(dir: PathBuf, models: &[String], yes: bool, json: bool) -> Result<()> {
    // All of them first: nothing is removed if one cannot be.
    let plans: Vec<Removal> = models.iter().map(|m| cache::plan(&dir, m)).collect::<Result<_, _>>()?;
    let name = |r: &Removal| match &r.commit {
        Some(commit) => format!("{}@{commit}", r.id),
        None => r.id.clone(),
    };
    if !yes && !confirmed(&plans.iter().map(|r| format!("{} ({})", name(r), HumanBytes(r.bytes))).collect::<Vec<_>>())?
    {
        return print(if json { "[]" } else { "nothing removed" });
    }
    for plan in &plans {
        plan.run()?;
    }
    if json {
        let done = |r: &Removal| serde_json::json!({ "id": r.id, "commit": r.commit, "bytes": r.bytes });
        return print(&serde_json::to_string_pretty(&plans.iter().map(done).collect::<Vec<_>>())?);
    }
    let line = |r: &Removal| format!("removed {} ({})\n", name(r), HumanBytes(r.bytes));
    print(&plans.iter().map(line).collect::<String>())
}

/// Asks on the terminal; anything but a yes means no.
fn confirmed(what: &[String]) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        let reason = format!("nobody can be asked here whether to remove {}: give --yes", what.join(", "));
        return Err(Error::request("--yes", reason).into());
    }
    eprint!("Remove {}? [y/N] ", what.join(", "));
    std::io::stderr().flush().context("standard error")?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("standard input")?;
    Ok(["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()))
}
