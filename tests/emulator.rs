//! The CUDA kernels on this CPU: their sources, built by a C++ compiler for the emulator, against their oracles.
//!
//! `kernels/emulator/run.sh` does the work and, run by itself, adds the race detector and the planted bugs.
#![cfg(unix)]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

#[test]
fn cuda_kernels_equal_their_oracles() {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    let found = |program: &str| {
        let version = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        version.is_ok_and(|status| status.success())
    };
    if !found(&compiler) || !found("bash") {
        // Past the test harness, which keeps what passing tests print to itself.
        let note = format!(
            "\n*** NOT RUN: the CUDA kernels' tests need bash and a C++20 compiler, and '{compiler}' or bash cannot be \
             started; install g++ 12 or later, or set CXX. ***\n"
        );
        std::io::stderr().write_all(note.as_bytes()).unwrap();
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new("bash")
        .arg(root.join("kernels/emulator/run.sh"))
        .arg(&compiler)
        .env("BITNET_QUICK", "1")
        .env("BITNET_EMULATOR_BUILD", Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator"))
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    // A suite that ran nothing would also succeed.
    for suite in ["gemv", "attention", "head", "library"] {
        assert!(out.contains(suite), "no word of {suite}:\n{out}");
    }
}
