//! `bitnet generate`.

use crate::{NO_GPU, bitnet, model, run, run_with};
use candle_bitnet::backend::cpu::KernelKind;
use serde_json::Value;

fn generate<'a>(model: &'a str, flags: &[&'a str]) -> Vec<&'a str> {
    [&["generate", "-m", model, "--max-tokens", "8"], flags].concat()
}

#[test]
fn the_prompt_comes_from_a_flag_a_file_or_standard_input() {
    let a1 = model("a1_packed");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    std::fs::write(&file, "Hello, how are you?\n").unwrap();
    let file = file.to_str().unwrap();
    let said = run(&generate(&a1, &["--greedy", "--prompt", "Hello, how are you?"]));
    let line = said.err.trim_end();
    assert_eq!(line.lines().count(), 1, "{line}");
    for part in
        ["prompt: ", " tokens, answer: 8 tokens (", " tokens/s), first after ", " MiB resident", "ended by length"]
    {
        assert!(line.contains(part), "no {part:?} in {line}");
    }
    let said = said.ok();
    assert!(said.ends_with('\n') && said.len() > 1);
    assert_eq!(run(&generate(&a1, &["--greedy", "--file", file])).ok(), said);
    assert_eq!(run_with(&generate(&a1, &["--greedy"]), "Hello, how are you?\n").ok(), said);
    assert_eq!(run_with(&generate(&a1, &["--greedy", "--file", "-"]), "Hello, how are you?").ok(), said);
    assert_eq!(run_with(&generate(&a1, &["--greedy", "--temperature", "1"]), "").code, Some(2));
}

#[test]
fn json_tells_everything_and_a_seed_repeats_it() {
    let a1 = model("a1_packed");
    let json = |flags: &[&str]| run(&generate(&a1, &[&["-p", "Hello", "--json"], flags].concat())).json();
    let first = json(&["--seed", "7", "--temperature", "1"]);
    assert_eq!((&first["seed"], &first["finish_reason"]), (&Value::from(7), &Value::from("length")));
    assert_eq!((first["tokens"].as_array().unwrap().len(), &first["generated_tokens"]), (8, &Value::from(8)));
    assert!(first["text"].is_string() && first["prompt_tokens"].as_u64() > Some(1));
    for key in [
        "tokens_per_second",
        "prefill_tokens_per_second",
        "time_to_first_token",
        "prefill_seconds",
        "decode_seconds",
        "resident_bytes",
    ] {
        assert!(first[key].as_f64() > Some(0.0), "{key}: {first}");
    }
    assert_eq!(json(&["--seed", "7", "--temperature", "1"])["tokens"], first["tokens"]);
    assert_eq!(
        json(&["--seed", "7", "--temperature", "1", "--threads", "1", "--kernel", "generic"])["tokens"],
        first["tokens"]
    );
    // Without a seed one is drawn, and told, so that any answer can be had again.
    let drawn = json(&["--temperature", "1"]);
    let again = json(&["--temperature", "1", "--seed", &drawn["seed"].to_string()]);
    assert_eq!(again["tokens"], drawn["tokens"]);
    let greedy = json(&["--greedy"]);
    assert_eq!(json(&["--temperature", "0"])["tokens"], greedy["tokens"]);
    let banned = format!("{}=-inf", greedy["tokens"][0]);
    assert_ne!(json(&["--greedy", "--logit-bias", &banned])["tokens"][0], greedy["tokens"][0]);
}

#[test]
fn an_answer_ends_at_a_stop_string_a_number_of_tokens_or_a_time() {
    let a1 = model("a1_packed");
    let json = |flags: &[&str]| {
        run(&[&["generate", "-m", &a1, "-p", "Hello", "--json", "--greedy", "--ignore-eos"], flags].concat()).json()
    };
    let whole = json(&["-n", "12"]);
    let text = whole["text"].as_str().unwrap();
    // A character that the answer does not begin with ends it there.
    let (at, stop) = text.char_indices().skip(1).find(|(_, c)| c.is_ascii_alphabetic()).unwrap();
    let stopped = json(&["-n", "12", "--stop", &stop.to_string()]);
    let first = text.find(stop).unwrap().min(at);
    assert_eq!(
        (&stopped["text"], &stopped["finish_reason"]),
        (&Value::from(&text[..first]), &Value::from("stop_string"))
    );
    let full = json(&["--context", "64"]);
    assert_eq!(full["finish_reason"], "context_full");
    let timeout = json(&["--timeout", "0.000001", "-n", "400"]);
    assert_eq!(timeout["finish_reason"], "timeout");
    assert!(timeout["generated_tokens"].as_u64() < Some(400));
}

#[test]
fn chat_wraps_the_prompt_in_the_models_template() {
    for name in ["a1_packed", "a3_llama"] {
        let dir = model(name);
        let tokens = |flags: &[&str]| {
            run(&generate(&dir, &[&["-p", "Hello", "--json"], flags].concat())).json()["prompt_tokens"]
                .as_u64()
                .unwrap()
        };
        let (plain, chat, system) = (tokens(&[]), tokens(&["--chat"]), tokens(&["--chat", "--system", "Be brief."]));
        assert!(plain < chat && chat < system, "{name}: {plain} {chat} {system}");
    }
    run(&generate(&model("a1_packed"), &["-p", "x", "--system", "Be brief."])).fails(2, &["--chat"]);
}

#[test]
fn bad_usage_is_exit_2_and_says_what_is_accepted() {
    let a1 = model("a1_packed");
    let cases: &[(&[&str], &[&str])] = &[
        (&["--frobnicate"], &["--frobnicate"]),
        (&["--temperature", "-1"], &["temperature", "-1", "accepted"]),
        (&["--top-p", "2"], &["top_p", "accepted"]),
        (&["--logit-bias", "384=1"], &["logit_bias", "384", "0 to 383"]),
        (&["--kernel", "sse9"], &["sse9", "generic"]),
        (&["--device", "tpu"], &["tpu", "auto"]),
        (&["--kv-type", "q4"], &["q4", "bf16"]),
        (&["--threads", "0"], &["--threads", "between 1 and"]),
        (&["--threads", "100000"], &["--threads", "between 1 and"]),
        (&["--context", "0"], &["--context", "between 1 and 512"]),
        (&["--context", "513"], &["--context", "between 1 and 512"]),
        (&["--timeout", "0"], &["--timeout"]),
        (&["--seed", "-1"], &["--seed", "'-1'"]),
        (&["--threads", "-1"], &["--threads", "'-1'"]),
        (&["--stop", ""], &["stop"]),
        (&["--file", "x"], &["--prompt", "--file"]),
    ];
    for (flags, words) in cases {
        run(&[&["generate", "-m", &a1, "-p", "x"], *flags].concat()).fails(2, words);
    }
    run(&["generate", "-m", "", "-p", "x"]).fails(2, &["empty", "hub id"]);
    let bytes = bitnet(&["generate", "-m", &a1]).write_stdin(b"ab\xff".to_vec()).output().unwrap();
    crate::Ran::of(bytes).fails(2, &["standard input", "not UTF-8 at byte 2"]);
}

#[test]
fn failures_are_exit_1_and_say_what_to_do() {
    let a1 = model("a1_packed");
    run(&["generate", "-m", "no-such-model", "-p", "x"]).fails(1, &["no-such-model", "no such directory", "hub id"]);
    run(&["generate", "-m", "./gone/model", "-p", "x"]).fails(1, &["./gone/model", "no such directory"]);
    run(&["generate", "-m", &format!("{a1}/config.json"), "-p", "x"]).fails(1, &["config.json", "name the directory"]);
    let empty = tempfile::tempdir().unwrap();
    run(&["generate", "-m", empty.path().to_str().unwrap(), "-p", "x"])
        .fails(1, &["config.json", "not found", "*.safetensors"]);
    run(&["generate", "-m", "nobody/nothing", "--offline", "-p", "x"]).fails(1, &["nobody/nothing", "--offline"]);
    run(&generate(&a1, &["--file", "gone.txt"])).fails(1, &["gone.txt", "No such file"]);
    run(&generate(&a1, &["-p", "x", "--device", "cuda"])).fails(1, &[NO_GPU, "--device cpu"]);
    let long = "a b ".repeat(600);
    run(&generate(&a1, &["-p", &long])).fails(1, &["context full", "512 available", "shorten the prompt"]);
    let available = KernelKind::available();
    for kernel in KernelKind::ALL.into_iter().filter(|k| !available.contains(k)) {
        run(&generate(&a1, &["-p", "x", "--kernel", kernel.name()]))
            .fails(1, &[kernel.name(), kernel.needs(), "generic"]);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_closed_pipe_is_quiet_and_a_full_disk_is_told() {
    let a1 = model("a1_packed");
    let script = |line: &str| {
        let exe = assert_cmd::cargo::cargo_bin("bitnet");
        let ran = std::process::Command::new("sh")
            .args(["-c", line])
            .arg(exe)
            .arg(&a1)
            .envs(crate::NO_GPUS)
            .output()
            .unwrap();
        crate::Ran::of(ran)
    };
    for command in ["generate -m \"$1\" -p x -n 3", "inspect \"$1\"", "completions bash"] {
        // The reader is gone before anything is written.
        let ran = script(&format!("{{ sleep 0.2; \"$0\" {command}; echo $? >&2; }} | true"));
        assert!(ran.err.ends_with("0\n") && !ran.err.contains("error"), "{command}: {ran:?}");
        let ran = script(&format!("\"$0\" {command} > /dev/full"));
        assert!(ran.code == Some(1) && ran.err.contains("standard output: No space left"), "{command}: {ran:?}");
    }
}
