//! Compiles `kernels/cuda` for every supported chip with the `cuda` feature; otherwise does nothing.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Compute capabilities with machine code of their own, so that no driver compiles at start.
const CHIPS: [u32; 5] = [75, 80, 86, 89, 90];

/// Chips after the last one get this virtual architecture, compiled by their driver.
const PTX: u32 = 90;

/// Sources with kernels; all other files there are included by them.
const SOURCES: [&str; 8] = ["attention", "gemm", "gemv", "head", "norm", "pack", "prefill_attention", "sample"];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-changed=kernels/cuda");
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={}", message.replace('\n', "\ncargo::error="));
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let nvcc = nvcc();
    let jobs = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    for sources in SOURCES.chunks(jobs) {
        let running: Vec<_> =
            sources.iter().map(|name| Ok((name, compiler(&nvcc, name, &out)?))).collect::<Result<_, String>>()?;
        for (name, compiler) in running {
            let output = compiler.wait_with_output().map_err(|e| format!("waiting for nvcc: {e}"))?;
            if !output.status.success() {
                let text = String::from_utf8_lossy(&output.stderr);
                return Err(format!("nvcc failed on kernels/cuda/{name}.cu:\n{}", text.trim()));
            }
        }
    }
    Ok(())
}

/// Where nvcc is: `NVCC`, the toolkit that `CUDA_HOME` or `CUDA_PATH` names, or the search path.
fn nvcc() -> PathBuf {
    if let Some(path) = std::env::var_os("NVCC") {
        return path.into();
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os);
    let in_homes = homes.map(|home| Path::new(&home).join("bin/nvcc"));
    in_homes.into_iter().find(|path| path.exists()).unwrap_or_else(|| "nvcc".into())
}

fn compiler(nvcc: &Path, name: &str, out: &Path) -> Result<std::process::Child, String> {
    let mut command = Command::new(nvcc);
    // Not -use_fast_math: the kernels' results are specified to the bit.
    command.args(["-std=c++17", "-O3", "-fatbin", "-Xfatbin", "-compress-all"]);
    for chip in CHIPS {
        command.arg(format!("-gencode=arch=compute_{chip},code=sm_{chip}"));
    }
    command.arg(format!("-gencode=arch=compute_{PTX},code=compute_{PTX}"));
    command.arg("-o").arg(out.join(format!("{name}.fatbin"))).arg(format!("kernels/cuda/{name}.cu"));
    command.stderr(std::process::Stdio::piped()).spawn().map_err(|e| {
        format!(
            "the cuda feature needs nvcc of a CUDA toolkit (12.4 or later), and {} cannot be started: {e}\n\
             set NVCC or CUDA_HOME, or build without the feature",
            nvcc.display()
        )
    })
}
