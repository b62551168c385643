//! The program on an NVIDIA GPU: a real one, or the emulator's (`kernels/emulator/with_driver.sh`).

use crate::gpu::{Kind, Settings, generate, run, run_where, tests_of_a_kind};

const KIND: Kind = Kind {
    device: "cuda",
    name: "CUDA",
    place: 1,
    found: candle_bitnet::backend::gpus,
    is_auto: true,
    argmax: 1.0,
    short: "are free",
    fault: &["CUDA_ERROR_LAUNCH_FAILED", "GPU 0"],
};

tests_of_a_kind! {
    answers_are_the_cpus_and_seeds_repeat_them
    bench_reports_the_device
    short_memory_and_faults_are_errors
}

#[test]
fn doctor_describes_and_checks_the_gpu() {
    let Some(gpu) = KIND.doctor_describes_and_checks_the_gpu() else { return };
    for key in ["compute_capability", "driver_cuda"] {
        assert!(!gpu[key].as_str().unwrap().is_empty(), "{key}: {gpu}");
    }
    assert!(gpu["memory_bytes"].as_u64() >= gpu["free_bytes"].as_u64() && gpu["free_bytes"].as_u64() > Some(0));
    let text = run(&["doctor", "--device", "cuda"]).ok();
    for part in ["cuda:0 ", "compute capability", "driver for CUDA", "auto         cuda:0: ", "GPU check    cuda:0 ("] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn without_a_gpu_the_cpu_runs_and_says_why() {
    if KIND.is_there() {
        KIND.without_a_gpu_the_cpu_runs_and_says_why();
    }
}

/// The libraries that the program was linked with, in a folder without the driver's.
#[cfg(target_os = "linux")]
fn libraries_without_the_driver() -> tempfile::TempDir {
    let (dir, path) = (tempfile::tempdir().unwrap(), std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default());
    let folders = std::env::split_paths(&path).filter_map(|folder| std::fs::read_dir(folder).ok());
    for file in folders.flatten().flatten() {
        if !file.file_name().to_string_lossy().starts_with("libcuda.") {
            // The first of a name is the one that counts.
            let _ = std::os::unix::fs::symlink(file.path(), dir.path().join(file.file_name()));
        }
    }
    dir
}

#[cfg(target_os = "linux")]
#[test]
fn the_program_starts_without_a_driver() {
    if !KIND.is_emulated() {
        return;
    }
    let libraries = libraries_without_the_driver();
    let hidden: Settings<'_> = &[("LD_LIBRARY_PATH", libraries.path().to_str().unwrap())];
    let json = run_where(hidden, &["doctor", "--json"]).json();
    let cuda = &json["devices"][1];
    if cuda["present"] == true {
        eprintln!("a driver is installed on this machine, where nothing hides it; nothing was run");
        return;
    }
    assert!(cuda["reason"].as_str().unwrap().contains("libcuda.so.1"), "{json}");
    assert!(
        json["auto"]["device"] == "cpu" && json["auto"]["why"].as_str().unwrap().contains("libcuda.so.1"),
        "{json}"
    );
    let auto = run_where(hidden, &generate("auto", &["--greedy"])).json();
    assert_eq!(auto["tokens"], run(&generate("cpu", &["--greedy"])).json()["tokens"]);
    run_where(hidden, &generate("cuda", &[])).fails(1, &["libcuda.so.1", "install the NVIDIA driver", "--device cpu"]);
}

#[test]
fn an_old_chip_is_named_and_left_alone() {
    if !KIND.is_emulated() {
        return;
    }
    let old: Settings<'_> = &[("BITNET_EMULATED_CHIP", "70")];
    run_where(old, &generate("cuda", &[])).fails(1, &["emulator 7.0", "7.5", "--device cpu"]);
    let auto = run_where(old, &generate("auto", &["--greedy"])).json();
    assert_eq!(auto["tokens"], run(&generate("cpu", &["--greedy"])).json()["tokens"]);
    let json = run_where(old, &["doctor", "--json"]).json();
    let gpu = &json["devices"][1]["gpus"][0];
    assert!(gpu["usable"] == false && gpu["problem"].as_str().unwrap().contains("7.5"), "{json}");
    assert!(json["auto"]["device"] == "cpu" && json["auto"]["why"].as_str().unwrap().contains("7.5"), "{json}");
    assert!(run_where(old, &["doctor"]).ok().contains("not usable: "));
}
