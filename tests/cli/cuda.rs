//! The program on a GPU: a real one, or the emulator's (`kernels/emulator/with_driver.sh`), whose chip, memory and faults these
//! tests choose. Without either they say so and pass.

use crate::{NO_GPUS, Ran, common, program};
use serde_json::Value;

/// What is set for the emulated driver.
type Settings<'a> = &'a [(&'a str, &'a str)];

fn run_where(settings: Settings<'_>, args: &[&str]) -> Ran {
    Ran::of(program(args).envs(settings.iter().copied()).output().unwrap())
}

fn run(args: &[&str]) -> Ran {
    run_where(&[], args)
}

/// Whether there is a GPU to run on.
fn is_there() -> bool {
    let there = !common::gpus().is_empty();
    if !there {
        eprintln!("there is no CUDA device here, nothing was run");
    }
    there
}

/// Whether the GPU is the emulator's, which can be told to fail.
fn is_emulated() -> bool {
    is_there()
        && run(&["doctor", "--json"]).json()["devices"][1]["gpus"][0]["name"].as_str().unwrap().contains("emulator")
}

fn generate<'a>(device: &'a str, flags: &[&'a str]) -> Vec<&'a str> {
    [&["generate", "-p", "ROMEO:", "-n", "6", "--json", "--device", device], flags].concat()
}

#[test]
fn answers_are_the_cpus_and_seeds_repeat_them() {
    if !is_there() {
        return;
    }
    let tokens = |device: &str, flags: &[&str]| run(&generate(device, flags)).json()["tokens"].clone();
    let greedy = tokens("cuda", &["--greedy"]);
    assert_eq!(greedy, tokens("cpu", &["--greedy"]));
    assert_eq!(greedy, tokens("cuda:0", &["--greedy", "--no-graph"]), "replayed steps differ from those computed anew");
    let drawn = tokens("cuda", &["--temperature", "1.2", "--seed", "5"]);
    assert_eq!(drawn, tokens("auto", &["--temperature", "1.2", "--seed", "5"]));
    assert_ne!(drawn, tokens("cuda", &["--temperature", "1.2", "--seed", "6"]));
    let penalties =
        ["--greedy", "--repetition-penalty", "1.5", "--presence-penalty", "1", "--frequency-penalty", "0.5"];
    assert_eq!(tokens("cuda", &penalties), tokens("cpu", &penalties));
    // What a GPU does not draw, the host draws from its logits.
    let banned = format!("{}=-inf", greedy[0]);
    let biased = ["--greedy", "--logit-bias", &banned];
    assert_eq!(tokens("cuda", &biased), tokens("cpu", &biased));
    let said = run(&["generate", "-p", "ROMEO:", "-n", "4", "--greedy", "--device", "cuda"]);
    assert!(said.err.contains("ended by length") && !said.err.contains("warning"), "{said:?}");
}

#[test]
fn bench_reports_the_device() {
    if !is_there() {
        return;
    }
    let bench = ["bench", "--device", "cuda", "--pp", "8", "--tg", "3", "--reps", "1"];
    let json = run(&[&bench[..], &["--json"]].concat()).json();
    for key in
        ["prefill_tps", "decode_tps", "bytes_per_token", "decode_gbps", "copy_gbps", "decode_share", "device_bytes"]
    {
        assert!(json[key].as_f64() > Some(0.0), "{key}: {json}");
    }
    assert!(json["threads"].is_null() && json["read_gbps"].is_null() && json.get("profile").is_none(), "{json}");
    assert!(json["device_total_bytes"].as_u64() > json["device_bytes"].as_u64(), "{json}");
    assert!(json["device"].as_str().unwrap().starts_with("cuda:0 ("), "{json}");
    let share = json["decode_gbps"].as_f64().unwrap() / json["copy_gbps"].as_f64().unwrap();
    assert!((json["decode_share"].as_f64().unwrap() - share).abs() < 1e-9, "{json}");

    let both = [&bench[..], &["--batch", "2", "--profile"]].concat();
    let json = run(&[&both[..], &["--json"]].concat()).json();
    let bytes = |key: &str| json[key].as_u64().unwrap();
    assert_eq!((bytes("batch"), bytes("bytes_per_step")), (2, bytes("bytes_per_token") + bytes("bytes_per_token_kv")));
    let profile = json["profile"].as_array().unwrap();
    let calls = |kernel: &str| {
        let of = |o: &&Value| o["name"].as_str().unwrap().starts_with(kernel);
        profile.iter().filter(of).map(|o| o["calls_per_step"].as_f64().unwrap()).sum::<f64>()
    };
    let layers = run(&["inspect", "builtin", "--json"]).json()["layers"].as_f64().unwrap();
    assert_eq!((calls("bitnet_gemv"), calls("bitnet_argmax")), (4.0 * layers, 1.0), "{json}");
    assert!(profile.iter().all(|o| o["ms_per_step"].as_f64() > Some(0.0)), "{json}");
    assert!(profile[0]["gbps"].as_f64() > Some(0.0), "{json}");
    let text = run(&[&both[..], &["--no-graph"]].concat()).ok();
    for part in ["cuda:0 (", "that a copy in its memory moves here", "a step", "2 × 3 tokens", "bitnet_gemv", "device "]
    {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert!(!text.contains("thread"), "{text}");
}

#[test]
fn doctor_describes_and_checks_the_gpu() {
    if !is_there() {
        return;
    }
    for asked in ["auto", "cuda:0"] {
        let json = run(&["doctor", "--json", "--device", asked]).json();
        let cuda = &json["devices"][1];
        assert_eq!((&cuda["name"], &cuda["built"], &cuda["present"]), (&"cuda".into(), &true.into(), &true.into()));
        let gpu = &cuda["gpus"][0];
        assert_eq!((&gpu["device"], &gpu["usable"]), (&Value::from("cuda:0"), &Value::from(true)));
        for key in ["name", "compute_capability", "driver_cuda"] {
            assert!(!gpu[key].as_str().unwrap().is_empty(), "{key}: {json}");
        }
        assert!(gpu["memory_bytes"].as_u64() >= gpu["free_bytes"].as_u64() && gpu["free_bytes"].as_u64() > Some(0));
        assert_eq!(json["auto"]["device"], "cuda:0");
        assert!(json["auto"]["why"].as_str().unwrap().contains(gpu["name"].as_str().unwrap()), "{json}");
        assert!(json["gpu_check"]["copy_gbps"].as_f64() > Some(0.0), "{json}");
        assert!(json["gpu_check"]["self_check"].as_str().unwrap().contains("equal the reference"), "{json}");
    }
    assert!(run(&["doctor", "--json", "--device", "cpu"]).json().get("gpu_check").is_none());
    let text = run(&["doctor", "--device", "cuda"]).ok();
    for part in ["cuda:0 ", "compute capability", "driver for CUDA", "auto         cuda:0: ", "GPU check    cuda:0 ("] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn without_a_gpu_the_cpu_runs_and_says_why() {
    if !is_there() {
        return;
    }
    run_where(&NO_GPUS, &generate("cuda", &[])).fails(1, &["CUDA", "--device cpu"]);
    run_where(&NO_GPUS, &["doctor", "--device", "cuda"]).fails(1, &["CUDA", "--device cpu"]);
    let auto = run_where(&NO_GPUS, &generate("auto", &["--greedy"])).json();
    assert_eq!(auto["tokens"], run(&generate("cpu", &["--greedy"])).json()["tokens"]);
    let json = run_where(&NO_GPUS, &["doctor", "--json"]).json();
    let cuda = &json["devices"][1];
    assert_eq!((&cuda["built"], &cuda["present"]), (&Value::from(true), &Value::from(false)));
    assert!(!cuda["reason"].as_str().unwrap().is_empty() && cuda.get("gpus").is_none(), "{json}");
    assert_eq!((&json["auto"]["device"], json.get("gpu_check")), (&Value::from("cpu"), None));
    run(&generate("cuda:7", &[])).fails(1, &["GPU 7", "--device cpu"]);
    run(&["doctor", "--device", "cuda:7"]).fails(1, &["GPU 7"]);
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
    if !is_emulated() {
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
    if !is_emulated() {
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

#[test]
fn short_memory_and_lost_devices_are_errors() {
    if !is_emulated() {
        return;
    }
    for bytes in ["1000000", "3000000"] {
        let little: Settings<'_> = &[("BITNET_EMULATED_MEMORY", bytes)];
        run_where(little, &generate("cuda", &[])).fails(1, &["memory for", "are free", "GPU 0"]);
    }
    for launch in ["1", "9", "60"] {
        let lost: Settings<'_> = &[("BITNET_EMULATED_FAULT", launch)];
        for command in
            [generate("cuda", &[]), vec!["bench", "--device", "cuda", "--pp", "8", "--tg", "3", "--reps", "1"]]
        {
            run_where(lost, &command).fails(1, &["CUDA_ERROR_LAUNCH_FAILED", "GPU 0"]);
        }
    }
    // Nobody asked for that GPU, so the rest is told, and what is wrong with it.
    let lost: Settings<'_> = &[("BITNET_EMULATED_FAULT", "1")];
    run_where(lost, &["doctor", "--device", "cuda"]).fails(1, &["CUDA_ERROR_LAUNCH_FAILED"]);
    let json = run_where(lost, &["doctor", "--json"]).json();
    assert!(json["gpu_check"]["self_check"].as_str().unwrap().contains("failed: "), "{json}");
}
