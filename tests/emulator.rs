//! The CUDA and Metal kernels on this CPU: their sources, built by a C++ compiler for the emulator, against their oracles.
//!
//! `kernels/emulator/run.sh` and `run_metal.sh` do the work and, run by themselves, all cases, the race detector and the planted bugs.
#![cfg(unix)]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Runs a script of `kernels/emulator` in its quick form. `None`, with a note, where `needed` cannot be started.
fn run(script: &str, needed: &str, variable: &str) -> Option<String> {
    let program = std::env::var(variable).unwrap_or_else(|_| needed.into());
    let found = |program: &str| {
        let version = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        version.is_ok_and(|status| status.success())
    };
    if !found(&program) || !found("bash") {
        // Past the test harness, which keeps what passing tests print to itself.
        let note = format!(
            "\n*** NOT RUN: kernels/emulator/{script} needs bash and '{program}', and one of them cannot be started; install \
             {needed}, or set {variable}. ***\n"
        );
        std::io::stderr().write_all(note.as_bytes()).unwrap();
        return None;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new("bash")
        .arg(root.join("kernels/emulator").join(script))
        .arg(&program)
        .env("BITNET_QUICK", "1")
        .env("BITNET_EMULATOR_BUILD", Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator"))
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    Some(out.into_owned())
}

#[test]
fn cuda_kernels_equal_their_oracles() {
    let Some(out) = run("run.sh", "g++", "CXX") else { return };
    // A suite that ran nothing would also succeed.
    for suite in ["gemv", "attention", "head", "library"] {
        assert!(out.contains(suite), "no word of {suite}:\n{out}");
    }
}

#[test]
fn metal_kernels_equal_their_oracles() {
    let Some(out) = run("run_metal.sh", "g++", "CXX") else { return };
    for suite in
        ["metal gemv", "metal decode attention", "metal head", "metal sampling", "metal whole model", "metal library"]
    {
        assert!(out.contains(suite), "no word of {suite}:\n{out}");
    }
}

#[test]
fn metal_address_spaces_are_right() {
    let Some(out) = run("address_spaces.sh", "clang", "CLANG") else { return };
    assert!(out.contains("all kernels clean"), "{out}");
}
