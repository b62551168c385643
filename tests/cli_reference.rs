//! The reference of the command line and the manual pages: what the program's own definitions give.

use std::path::Path;
use std::process::Command;

/// What `bitnet man` prints with these arguments.
fn man(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_bitnet")).arg("man").args(args).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_reference_is_that_of_the_program() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md");
    // As a checkout on Windows may have it.
    let kept = std::fs::read_to_string(path).unwrap_or_default().replace("\r\n", "\n");
    let made = man(&["--markdown"]);
    let line = kept.lines().zip(made.lines()).position(|(a, b)| a != b).unwrap_or(kept.lines().count());
    assert!(
        kept == made,
        "docs/cli.md is not what the program says, from line {} on; write it again:\n    cargo run -- man --markdown > docs/cli.md",
        line + 1
    );
}

#[test]
fn every_command_has_a_page() {
    let program = man(&[]);
    assert!(program.contains(".TH bitnet 1"), "{program}");
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("share/man1");
    assert_eq!(man(&["--dir", pages.to_str().unwrap()]), "");
    assert_eq!(std::fs::read_to_string(pages.join("bitnet.1")).unwrap().trim_end(), program.trim_end());
    // The reference has a heading for each command.
    let reference = man(&["--markdown"]);
    let mut names: Vec<_> = reference.lines().filter_map(|line| line.strip_prefix("##")).collect();
    names.push(" bitnet");
    for name in &names {
        let page = pages.join(format!("{}.1", name.trim_start_matches('#').trim().replace(' ', "-")));
        let text = std::fs::read_to_string(&page).unwrap_or_else(|e| panic!("{}: {e}", page.display()));
        assert!(text.contains(".SH SYNOPSIS"), "{}", page.display());
    }
    assert_eq!(std::fs::read_dir(&pages).unwrap().count(), names.len());
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("taken");
    std::fs::write(&file, "").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_bitnet")).args(["man", "--dir"]).arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("taken"), "{said}");
    let both = Command::new(env!("CARGO_BIN_EXE_bitnet")).args(["man", "--markdown", "--dir", "x"]).output().unwrap();
    assert_eq!(both.status.code(), Some(2));
}
