//! `inspect`, `synth`, `bench`, `doctor` and `completions`.

use crate::common::FIXTURES;
use crate::{model, run};
use candle_bitnet::backend::cpu::KernelKind;
use serde_json::Value;

#[test]
fn inspect_shows_every_fixture() {
    for name in FIXTURES {
        let dir = model(name);
        let text = run(&["inspect", &dir]).ok();
        for part in ["family", "parameters", "self_attn.q_proj", "mlp.down_proj", "resident", "KV cache"] {
            assert!(text.contains(part), "{name}: no {part} in {text}");
        }
        assert_eq!(run(&["inspect", "--model", &dir]).ok(), text);
        let json = run(&["inspect", &dir, "--json"]).json();
        let family = if name == "a3_llama" { "LlamaForCausalLM" } else { "BitNetForCausalLM" };
        assert_eq!((&json["family"], json["projections"].as_array().unwrap().len()), (&Value::from(family), 7));
        let listed = run(&["inspect", &dir, "--tensors"]).ok();
        assert!(listed.contains("model.layers.0.self_attn.q_proj.weight") && listed.len() > text.len());
    }
    run(&["inspect", "./gone"]).fails(1, &["./gone"]);
}

#[test]
fn a_synthetic_checkpoint_is_written_once_and_runs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let out = out.to_str().unwrap();
    let synth = ["synth", "--preset", "0.7b", "--layers", "1", "--out", out];
    let said = run(&synth).ok();
    assert!(said.contains("1 file") && said.contains("parameters"), "{said}");
    run(&synth).fails(2, &["already holds", "choose another directory"]);
    run(&["synth", "--preset", "9b", "--out", out]).fails(2, &["9b", "2b4t"]);
    let json = run(&["inspect", out, "--json"]).json();
    assert_eq!((&json["layers"], &json["hidden_size"]), (&Value::from(1), &Value::from(1536)));
    let answer = run(&["generate", "-m", out, "-p", "Hello", "-n", "3", "--ignore-eos", "--json"]).json();
    assert_eq!(answer["generated_tokens"], 3);
    let bench = run(&["bench", "--model", out, "--pp", "4", "--tg", "2", "--reps", "1", "--json"]).json();
    // Where a screen reads less than half of the head, the mapped head is not resident beside it.
    assert!(bench["weight_bytes"].as_u64() > Some(100_000_000), "{bench}");
    assert!(bench["bytes_per_token"].as_u64() > Some(30_000_000), "{bench}");
    assert!(bench["resident_bytes"].as_u64() > Some(50_000_000), "{bench}");
}

#[test]
fn bench_reports_the_documented_keys() {
    let a1 = model("a1_packed");
    let args = ["bench", "--model", &a1, "--pp", "16", "--tg", "4", "--reps", "2", "--threads", "1"];
    let json = run(&[&args[..], &["--json"]].concat()).json();
    for key in [
        "prefill_tps",
        "decode_tps",
        "bytes_per_token",
        "decode_gbps",
        "read_gbps",
        "decode_share",
        "resident_bytes",
        "load_seconds",
    ] {
        assert!(json[key].as_f64() > Some(0.0), "{key}: {json}");
    }
    assert_eq!((&json["kernel"], &json["threads"]), (&Value::from(KernelKind::available()[0].name()), &Value::from(1)));
    let share = json["decode_gbps"].as_f64().unwrap() / json["read_gbps"].as_f64().unwrap();
    assert!((json["decode_share"].as_f64().unwrap() - share).abs() < 1e-9);
    assert_eq!((&json["batch"], &json["bytes_per_step"]), (&Value::from(1), &json["bytes_per_token"]));
    assert!(json["copy_gbps"].is_null() && json["device_bytes"].is_null() && json.get("profile").is_none(), "{json}");
    let text = run(&args).ok();
    for part in ["load", "prefill", "decode", "bandwidth", "1 thread reads here", "resident"] {
        assert!(text.contains(part), "{text}");
    }
    run(&["bench", "-m", &a1, "--synthetic", "2b4t"]).fails(2, &["--model", "--synthetic"]);
    run(&["bench", "--synthetic", "9b"]).fails(2, &["9b", "2b4t"]);
    run(&["bench", "-m", &a1, "--pp", "0"]).fails(2, &["--pp", "between 1 and"]);
    run(&["bench", "-m", &a1, "--pp", "600"]).fails(2, &["--pp 600 and --tg 128", "512"]);
    run(&["bench", "-m", &a1, "--reps", "0"]).fails(2, &["--reps"]);
    for batch in ["0", "33"] {
        run(&["bench", "-m", &a1, "--batch", batch]).fails(2, &["--batch", "between 1 and 32"]);
    }
    run(&["bench", "-m", &a1, "--prompts", "x", "--batch", "2"]).fails(2, &["--prompts", "--batch"]);
}

#[test]
fn bench_decodes_sequences_together_and_times_operations() {
    let a2 = model("a2_packed_gqa_untied_sharded");
    for batch in [2, 9] {
        let n = batch.to_string();
        let args = ["bench", "-m", &a2, "--pp", "12", "--tg", "3", "--reps", "1", "--batch", &n, "--profile"];
        let json = run(&[&args[..], &["--json"]].concat()).json();
        let bytes = |key: &str| json[key].as_u64().unwrap();
        let kv = (batch - 1) * bytes("bytes_per_token_kv");
        assert_eq!((bytes("batch"), bytes("bytes_per_step")), (batch, bytes("bytes_per_token") + kv));
        let profile = json["profile"].as_array().unwrap();
        let calls = |op: &str| -> f64 {
            let rows = profile.iter().filter(|o| o["name"].as_str().unwrap().split(' ').next() == Some(op));
            rows.map(|o| o["calls_per_step"].as_f64().unwrap()).sum()
        };
        let layers = run(&["inspect", &a2, "--json"]).json()["layers"].as_f64().unwrap();
        for (op, each) in [("norm-linear", 3.0), ("gated-linear", 1.0), ("attention", 1.0)] {
            assert_eq!(calls(op), each * layers, "{op}: {json}");
        }
        for op in ["embed", "rms-norm", "dense-linear"] {
            assert_eq!(calls(op), 1.0, "{op}: {json}");
        }
        let sum = |key: &str| profile.iter().map(|o| o[key].as_f64().unwrap()).sum::<f64>();
        assert!((sum("share") - 1.0).abs() < 1e-6 && sum("ms_per_step") > 0.0, "{json}");
        // Positions 12, 13 and 14 read 13, 14 and 15 keys; the report counts the mean of 12 to 15, rounded up.
        let weights = bytes("bytes_per_token") - bytes("bytes_per_token_kv");
        let read = sum("bytes_per_step") as u64;
        assert!(read >= weights && read <= bytes("bytes_per_step") + batch * 4096, "{read}: {json}");
        let text = run(&args).ok();
        for part in ["a step    ", &format!("{n} × 3 tokens"), "operation ", "gated-linear ", "without the profile"] {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
    }
}

#[test]
fn bench_runs_real_prompts_and_counts_those_that_fail() {
    let (a1, dir) = (model("a1_packed"), tempfile::tempdir().unwrap());
    let file = dir.path().join("prompts");
    let path = file.to_str().unwrap();
    let args = ["bench", "--model", &a1, "--prompts", path, "--tg", "4"];
    let long = "x ".repeat(600);
    std::fs::write(&file, format!("Hello\n\n{{\"prompt\": \"Two\\nlines\"}}\n{long}\n")).unwrap();
    let json = run(&[&args[..], &["--json"]].concat()).json();
    assert_eq!((&json["prompts"], &json["succeeded"]), (&Value::from(3), &Value::from(2)));
    let results = json["results"].as_array().unwrap();
    assert!(results[2]["error"].as_str().unwrap().contains("context full"), "{json}");
    assert!(
        results[1]["tokens_per_second"].as_f64() > Some(0.0) && json["latency_seconds_median"].as_f64() > Some(0.0)
    );
    let text = run(&args).ok();
    assert!(text.contains("2 of 3 succeeded") && text.contains("failed"), "{text}");
    std::fs::write(&file, "{\"text\": 1}\n").unwrap();
    run(&args).fails(1, &["prompts", "line 1", "\"prompt\""]);
    std::fs::write(&file, "{oops\n").unwrap();
    run(&args).fails(1, &["prompts", "line 1"]);
    std::fs::write(&file, "\n").unwrap();
    run(&args).fails(1, &["holds no prompts"]);
    std::fs::write(&file, &long).unwrap();
    let failed = run(&args);
    assert!(failed.code == Some(1) && failed.err.contains("no prompt succeeded"), "{failed:?}");
}

#[test]
fn doctor_names_the_kernel_and_why() {
    let json = run(&["doctor", "--json"]).json();
    let kernels = json["kernels"].as_array().unwrap();
    let chosen: Vec<&Value> = kernels.iter().filter(|k| k["chosen"] == true).collect();
    assert_eq!((chosen.len(), kernels.len()), (1, KernelKind::ALL.len()));
    assert_eq!(chosen[0]["name"], KernelKind::available()[0].name());
    assert_eq!(chosen[0]["reason"], "the fastest usable");
    for key in ["physical_cores", "hardware_threads", "machine_threads", "threads", "memory_bytes", "read_gbps"] {
        assert!(json[key].as_f64() > Some(0.0), "{key}: {json}");
    }
    assert!(json["numa_nodes"][0]["cores"].as_u64() > Some(0) && json["threads_seated"].is_boolean(), "{json}");
    let text = run(&["doctor", "--kernel", "generic", "--threads", "1"]).ok();
    assert!(text.contains("; 1 thread: asked for with --threads\nNUMA         "), "{text}");
    assert!(text.contains("chosen: asked for with --kernel") && text.contains("cuda"), "{text}");
    let devices = json["devices"].as_array().unwrap();
    let names: Vec<&str> = devices.iter().map(|d| d["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["cpu", "cuda", "metal"]);
    assert_eq!(devices[1]["built"], cfg!(feature = "cuda"));
    if cfg!(not(feature = "cuda")) {
        assert!(devices[1]["reason"].as_str().unwrap().contains("--features cuda"), "{json}");
        assert_eq!((&json["auto"]["device"], json.get("gpu_check")), (&Value::from("cpu"), None));
        assert!(text.contains("not in this build: ") && text.contains("\nauto         cpu: "), "{text}");
        run(&["doctor", "--device", "cuda"]).fails(1, &["cuda", "--features cuda", "--device cpu"]);
    }
}

#[test]
fn completions_are_scripts_for_the_shell() {
    for (shell, part) in [("bash", "complete -F _bitnet"), ("zsh", "#compdef bitnet"), ("fish", "complete -c bitnet")] {
        assert!(run(&["completions", shell]).ok().contains(part), "{shell}");
    }
    run(&["completions", "dos"]).fails(2, &["dos", "bash"]);
}
