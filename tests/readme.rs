//! README and the other pages: transcripts are what the program prints or a record holds, links lead somewhere.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).replace("\r\n", "\n")
}

/// The files of a folder with this ending, in order.
fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries.filter(|path| path.extension().is_some_and(|e| e == ending)).collect();
    files.sort();
    files
}

/// The command and the output of each block of README that begins with a prompt.
fn transcripts() -> Vec<(String, String)> {
    let readme = read(&root().join("README.md"));
    let blocks = readme.split("```text\n$ ").skip(1).map(|rest| rest.split("\n```").next().unwrap().to_owned());
    blocks.map(|block| block.split_once('\n').map(|(c, o)| (c.into(), o.into())).unwrap()).collect()
}

#[test]
fn transcripts_are_real() {
    let records: Vec<_> = files("benches/record", "md").iter().map(|path| read(path)).collect();
    let (mut run, mut recorded) = (0, 0);
    for (command, shown) in transcripts() {
        if command.starts_with("bitnet generate ") {
            let args = command.split(' ').skip(1).map(|arg| arg.trim_matches('"'));
            let mut program = Command::new(env!("CARGO_BIN_EXE_bitnet"));
            program.args(args).env("CUDA_VISIBLE_DEVICES", "").env("BITNET_METAL_DEVICES", "0");
            let output = program.env("BITNET_EMULATED_DEVICES", "0").output().unwrap();
            assert!(output.status.success(), "{command}: {output:?}");
            assert_eq!(
                String::from_utf8(output.stdout).unwrap().trim(),
                shown.trim(),
                "{command}: README shows another text"
            );
            run += 1;
        } else {
            let found = records.iter().any(|record| record.contains(&format!("$ {command}\n{shown}\n")));
            assert!(found, "no record in benches/record has this output of {command}:\n{shown}");
            recorded += 1;
        }
    }
    assert!(run > 0 && recorded > 0, "README has {run} texts of the model and {recorded} recorded runs");
}

/// Where the links of a page lead, outside blocks of code.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let prose = text.split("```").step_by(2);
    prose.flat_map(|part| part.split("](").skip(1)).filter_map(|rest| rest.split(')').next())
}

/// A heading as links name it.
fn anchor(heading: &str) -> String {
    let kept =
        heading.trim().to_lowercase().chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).collect::<String>();
    kept.replace(' ', "-")
}

#[test]
fn links_lead_somewhere() {
    let mut pages = files("", "md");
    ["docs", "benches", "benches/record", "kernels", "fuzz"]
        .iter()
        .for_each(|folder| pages.extend(files(folder, "md")));
    let mut count = 0;
    for page in &pages {
        let text = read(page);
        for link in links(&text).filter(|link| !link.contains("://")) {
            let (path, wanted) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            assert!(target.exists(), "{}: {link} leads nowhere", page.display());
            let heading =
                |text: &str| text.lines().any(|l| l.starts_with('#') && anchor(l.trim_start_matches('#')) == wanted);
            assert!(wanted.is_empty() || heading(&read(&target)), "{}: {link} names no heading", page.display());
            count += 1;
        }
    }
    assert!(count > 20, "only {count} links in {} pages", pages.len());
}
