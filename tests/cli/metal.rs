//! The program on an Apple GPU: a real one, or the emulator's (`kernels/emulator/with_metal.sh`), whose memory and faults these
//! tests choose. Without either they say so and pass.

use crate::{NO_GPUS, Ran, program};
use serde_json::Value;

/// What is set for the emulator.
type Settings<'a> = &'a [(&'a str, &'a str)];

fn run_where(settings: Settings<'_>, args: &[&str]) -> Ran {
    Ran::of(program(args).envs(settings.iter().copied()).output().unwrap())
}

fn run(args: &[&str]) -> Ran {
    run_where(&[], args)
}

/// Whether there is a GPU to run on.
fn is_there() -> bool {
    let there = candle_bitnet::backend::metal_gpus().is_ok_and(|gpus| gpus.iter().any(|g| g.problem.is_none()));
    assert!(there || std::env::var_os("BITNET_REQUIRE_GPU").is_none(), "no Metal device");
    if !there {
        eprintln!("there is no Metal device here, nothing was run");
    }
    there
}

/// Whether the GPU is the emulator's, which can be told to fail.
fn is_emulated() -> bool {
    is_there() && cfg!(not(target_os = "macos"))
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
    let greedy = tokens("metal", &["--greedy"]);
    assert_eq!(greedy, tokens("cpu", &["--greedy"]));
    assert_eq!(greedy, tokens("metal:0", &["--greedy", "--no-graph"]));
    let drawn = tokens("metal", &["--temperature", "1.2", "--seed", "5"]);
    assert_eq!(drawn, tokens("auto", &["--temperature", "1.2", "--seed", "5"]));
    assert_ne!(drawn, tokens("metal", &["--temperature", "1.2", "--seed", "6"]));
    let penalties =
        ["--greedy", "--repetition-penalty", "1.5", "--presence-penalty", "1", "--frequency-penalty", "0.5"];
    assert_eq!(tokens("metal", &penalties), tokens("cpu", &penalties));
    // What a GPU does not draw, the host draws from its logits.
    let banned = format!("{}=-inf", greedy[0]);
    let biased = ["--greedy", "--logit-bias", &banned];
    assert_eq!(tokens("metal", &biased), tokens("cpu", &biased));
    let said = run(&["generate", "-p", "ROMEO:", "-n", "4", "--greedy", "--device", "metal"]);
    assert!(said.err.contains("ended by length") && !said.err.contains("warning"), "{said:?}");
}

#[test]
fn bench_reports_the_device() {
    if !is_there() {
        return;
    }
    let bench = ["bench", "--device", "metal", "--pp", "9", "--tg", "3", "--reps", "1"];
    let both = [&bench[..], &["--batch", "2", "--profile"]].concat();
    let json = run(&[&both[..], &["--json"]].concat()).json();
    for key in
        ["prefill_tps", "decode_tps", "bytes_per_token", "decode_gbps", "copy_gbps", "decode_share", "device_bytes"]
    {
        assert!(json[key].as_f64() > Some(0.0), "{key}: {json}");
    }
    assert!(json["threads"].is_null() && json["read_gbps"].is_null(), "{json}");
    assert!(json["device_total_bytes"].as_u64() > json["device_bytes"].as_u64(), "{json}");
    assert!(json["device"].as_str().unwrap().starts_with("metal:0 ("), "{json}");
    let share = json["decode_gbps"].as_f64().unwrap() / json["copy_gbps"].as_f64().unwrap();
    assert!((json["decode_share"].as_f64().unwrap() - share).abs() < 1e-9, "{json}");
    let profile = json["profile"].as_array().unwrap();
    let calls = |kernel: &str| {
        let of = |o: &&Value| o["name"].as_str().unwrap().starts_with(kernel);
        profile.iter().filter(of).map(|o| o["calls_per_step"].as_f64().unwrap()).sum::<f64>()
    };
    let layers = run(&["inspect", "builtin", "--json"]).json()["layers"].as_f64().unwrap();
    assert_eq!((calls("bitnet_gemv"), calls("bitnet_argmax")), (4.0 * layers, 2.0), "{json}");
    assert!(profile.iter().all(|o| o["ms_per_step"].as_f64() > Some(0.0)), "{json}");
    let text = run(&bench).ok();
    for part in ["metal:0 (", "that a copy in its memory moves here", "device "] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert!(!text.contains("thread"), "{text}");
}

#[test]
fn doctor_describes_and_checks_the_gpu() {
    if !is_there() {
        return;
    }
    let json = run(&["doctor", "--json", "--device", "metal"]).json();
    let metal = &json["devices"][2];
    assert_eq!((&metal["name"], &metal["built"], &metal["present"]), (&"metal".into(), &true.into(), &true.into()));
    let gpu = &metal["gpus"][0];
    assert_eq!((&gpu["device"], &gpu["usable"]), (&Value::from("metal:0"), &Value::from(true)));
    assert!(!gpu["architecture"].as_str().unwrap().is_empty() && gpu.get("compute_capability").is_none(), "{json}");
    assert!(gpu["memory_bytes"].as_u64() > Some(0), "{json}");
    assert!(json["gpu_check"]["copy_gbps"].as_f64() > Some(0.0), "{json}");
    assert!(json["gpu_check"].get("self_test").is_none(), "{json}");
    if cfg!(not(feature = "cuda")) {
        assert_eq!(json["auto"]["device"], "metal:0");
        assert!(json["auto"]["why"].as_str().unwrap().contains(gpu["name"].as_str().unwrap()), "{json}");
    }
    let text = run(&["doctor", "--device", "metal", "--self-test"]).ok();
    for part in ["metal:0 ", "recommended working set", "GPU check    metal:0 (", "self-test", "gemv ", " equal\n"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert!(!text.contains("WRONG"), "{text}");
    run(&["doctor", "--device", "cpu", "--self-test"]).fails(2, &["--self-test", "--device metal"]);
}

#[test]
fn without_a_gpu_the_cpu_runs_and_says_why() {
    run_where(&NO_GPUS, &generate("metal", &[])).fails(1, &["Metal", "--device cpu"]);
    run_where(&NO_GPUS, &["doctor", "--device", "metal"]).fails(1, &["Metal", "--device cpu"]);
    let auto = run_where(&NO_GPUS, &generate("auto", &["--greedy"])).json();
    assert_eq!(auto["tokens"], run(&generate("cpu", &["--greedy"])).json()["tokens"]);
    let json = run_where(&NO_GPUS, &["doctor", "--json"]).json();
    let metal = &json["devices"][2];
    assert_eq!((&metal["built"], &metal["present"]), (&Value::from(true), &Value::from(false)));
    assert!(!metal["reason"].as_str().unwrap().is_empty() && metal.get("gpus").is_none(), "{json}");
    assert_eq!((&json["auto"]["device"], json.get("gpu_check")), (&Value::from("cpu"), None));
    if is_there() {
        run(&generate("metal:7", &[])).fails(1, &["GPU 7", "--device cpu"]);
    }
}

#[test]
fn without_metal_its_device_is_refused() {
    if cfg!(target_os = "macos") {
        return;
    }
    let none: Settings<'_> = &[("BITNET_METAL_EMULATOR", "/nonexistent")];
    run_where(none, &generate("metal", &[])).fails(1, &["Metal is not available", "cannot be loaded"]);
    let mut unset = program(&generate("metal", &[]));
    Ran::of(unset.env_remove("BITNET_METAL_EMULATOR").output().unwrap()).fails(1, &["macOS", "--device cpu"]);
}

#[test]
fn short_memory_and_faults_are_errors() {
    if !is_emulated() {
        return;
    }
    for bytes in ["1000000", "3000000"] {
        let little: Settings<'_> = &[("BITNET_EMULATED_MEMORY", bytes)];
        run_where(little, &generate("metal", &[])).fails(1, &["memory for", "recommended working set", "GPU 0"]);
    }
    for launch in ["1", "9", "60"] {
        let lost: Settings<'_> = &[("BITNET_EMULATED_FAULT", launch)];
        for command in
            [generate("metal", &[]), vec!["bench", "--device", "metal", "--pp", "8", "--tg", "3", "--reps", "1"]]
        {
            run_where(lost, &command).fails(1, &["kernel bitnet_", "BITNET_EMULATED_FAULT", "Metal device"]);
        }
    }
    // Nobody asked for that GPU, so the rest is told, and what is wrong with it.
    let lost: Settings<'_> = &[("BITNET_EMULATED_FAULT", "1")];
    run_where(lost, &["doctor", "--device", "metal"]).fails(1, &["BITNET_EMULATED_FAULT"]);
    if cfg!(not(feature = "cuda")) {
        let json = run_where(lost, &["doctor", "--json"]).json();
        assert!(json["gpu_check"]["self_check"].as_str().unwrap().contains("failed: "), "{json}");
    }
    let wrong: Settings<'_> = &[("BITNET_EMULATED_FAULT", "300")];
    let tested = run_where(wrong, &["doctor", "--device", "metal", "--self-test"]);
    assert!(
        tested.code == Some(1) && tested.out.contains("WRONG: ") && tested.err.contains("error: self-test"),
        "{tested:?}"
    );
}
