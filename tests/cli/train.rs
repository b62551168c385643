//! `bitnet train`.

use crate::{Ran, bitnet, run};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const TINY: [&str; 24] = [
    "--hidden",
    "16",
    "--intermediate",
    "20",
    "--layers",
    "1",
    "--heads",
    "2",
    "--vocab",
    "280",
    "--length",
    "16",
    "--batch",
    "4",
    "--micro-batch",
    "1",
    "--validation",
    "0.05",
    "--warmup",
    "2",
    "--eval-every",
    "10",
    "--threads",
    "2",
];

/// A directory with a text of a few kilobytes in it.
fn folder() -> (TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let words = ["the", "cat", "größe", "sat", "on", "a", "mat", "and", "saw", "dogs"];
    let line = |i: usize| (0..6).map(|j| words[(i * i + j * (i % 7 + 1)) % 10]).collect::<Vec<_>>().join(" ") + ".\n";
    let path = dir.path().join("text.txt");
    std::fs::write(&path, (0..400).map(line).collect::<String>()).unwrap();
    (dir, path.to_str().unwrap().to_owned())
}

fn at(dir: &TempDir, name: &str) -> String {
    dir.path().join(name).to_str().unwrap().to_owned()
}

/// [`TINY`] but for what `flags` say otherwise, and then those.
fn tiny<'a>(flags: &[&'a str]) -> Vec<&'a str> {
    let kept = TINY.chunks(2).filter(|pair| !flags.contains(&pair[0])).flatten();
    kept.chain(flags).copied().collect()
}

fn train(text: &str, out: &str, flags: &[&str]) -> Ran {
    run(&[&["train", text, "--out", out], &tiny(flags)[..]].concat())
}

fn masters(out: &str) -> Vec<u8> {
    std::fs::read(Path::new(out).join("masters/model.safetensors")).unwrap()
}

#[test]
fn a_run_leaves_a_model_that_runs() {
    let (dir, text) = folder();
    let out = at(&dir, "run");
    let ran = train(&text, &out, &["--steps", "20", "--save-every", "10", "--schedule", "cosine", "--kv-heads", "1"]);
    assert!(ran.err.contains("20 steps of 64 tokens") && ran.err.contains("step 20: validation"), "{ran:?}");
    let printed = ran.ok();
    for part in ["finished after 20 steps, 1280 tokens", "tokens/s", "GFLOP/s", "bits per byte", "bitnet generate -m"] {
        assert!(printed.contains(part), "no {part:?} in {printed}");
    }
    for name in ["recipe.toml", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl", "state.safetensors"] {
        assert!(Path::new(&out).join(name).is_file(), "{name}");
    }
    let recipe = std::fs::read_to_string(Path::new(&out).join("recipe.toml")).unwrap();
    assert!(recipe.contains("schedule = \"cosine\"") && recipe.contains("kv_heads = 1"), "{recipe}");
    let model = format!("{out}/masters");
    let json = run(&["perplexity", "-m", &model, &text, "--json"]).json();
    assert!(json["bits_per_byte"].as_f64().unwrap() < 8.0, "{json}");
    run(&["generate", "-m", &model, "-p", "the cat", "-n", "4"]).ok();
    let packed = at(&dir, "packed");
    run(&["convert", &model, "--to", "packed", "--out", &packed]).ok();

    // The recipe it wrote gives the same model again; a flag overrides it.
    let again = at(&dir, "again");
    let config = format!("{out}/recipe.toml");
    let flags = ["train", &text, "--out", &again, "--config", &config, "--threads", "1", "--json"];
    let json = run(&flags).json();
    assert_eq!(masters(&again), masters(&out), "another number of threads, the same bytes");
    for (key, value) in [("outcome", json!("finished")), ("steps", json!(20)), ("tokens", json!(1280))] {
        assert_eq!(json[key], value, "{json}");
    }
    assert_eq!((&json["skipped_steps"], &json["masters"]), (&json!(0), &json!(format!("{again}/masters"))));
    for key in ["seconds", "tokens_per_second", "gflops", "parameters"] {
        assert!(json[key].as_f64() > Some(0.0), "{key}: {json}");
    }
    assert!(json["validation"]["bits_per_byte"].as_f64() > Some(0.0) && json["validation"]["best"] == json!(true));
    let other = at(&dir, "other");
    run(&[&flags[..2], &["--out", &other, "--config", &config, "--seed", "1"]].concat()).ok();
    assert_ne!(masters(&other), masters(&out));

    let dense =
        train(&text, &at(&dir, "dense"), &["--steps", "3", "--dense", "--masters", "bf16", "--blocks", "llama"]);
    assert!(dense.err.contains("dense"), "{dense:?}");
    assert!(dense.ok().contains("a dense model"));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (dir, text) = folder();
    let out = at(&dir, "run");
    let bad = |flags: &[&str], code: i32, words: &[&str]| train(&text, &out, flags).fails(code, words);
    bad(&["--steps", "0"], 2, &["steps", "1 to"]);
    bad(&["--lr", "nan"], 2, &["lr"]);
    bad(&["--batch", "0"], 2, &["--batch", "1 to"]);
    bad(&["--micro-batch", "5"], 2, &["--micro-batch", "1 to 4"]);
    bad(&["--length", "1"], 2, &["--length", "2 to"]);
    bad(&["--heads", "3"], 2, &["hidden", "multiple of 3"]);
    bad(&["--warmup", "30", "--steps", "20"], 2, &["warmup", "number of steps"]);
    bad(&["--lambda-warmup", "30", "--steps", "20"], 2, &["lambda_warmup"]);
    bad(&["--vocab", "4000"], 1, &["4000 were asked for", "set vocab to"]);
    bad(&["--length", "16384", "--batch", "1", "--micro-batch", "1"], 2, &["too few for windows of 16384", "--length"]);
    bad(&["--threads", "0"], 2, &["--threads", "1 to 1024"]);
    bad(&["--device", "cuda"], 1, &[crate::NO_GPU]);
    bad(&["--config", "/nowhere.toml"], 1, &["/nowhere.toml"]);
    bad(&["--resume"], 2, &["--resume"]);
    assert!(!Path::new(&out).exists(), "nothing was begun");
    run(&["train", &text]).fails(2, &["--out"]);
    run(&["train", &at(&dir, "gone.txt"), "--out", &out]).fails(1, &["gone.txt", "No such file"]);
    let broken = at(&dir, "broken.jsonl");
    std::fs::write(&broken, "{\"text\": \"a\"}\n{\"text\": }\n").unwrap();
    run(&["train", &broken, "--out", &out]).fails(1, &["broken.jsonl", "line 2", "not JSON"]);

    // No flag of the recipe may stand beside --resume; the others may.
    run(&["train", &text, "--out", &out, "--resume", "--threads", "1"]).fails(1, &["recipe.toml", "No such file"]);
    let help = run(&["train", "--help"]).ok();
    let (_, recipe) = help.split_once("\nModel:").unwrap();
    let flags: Vec<&str> = recipe.lines().filter_map(|l| l.trim().strip_prefix("--")).collect();
    assert!(flags.len() >= 28, "{flags:?}");
    for flag in flags.iter().copied().chain(["config <FILE>"]) {
        let mut words = flag.split_whitespace();
        let name = format!("--{}", words.next().unwrap());
        let value: &[&str] = match (words.next(), name.as_str()) {
            (None, _) => &[],
            (_, "--blocks") => &["llama"],
            (_, "--masters" | "--precision") => &["f32"],
            (_, "--schedule") => &["cosine"],
            _ => &["1"],
        };
        let ran = run(&[&["train", &text, "--out", &out, "--resume", &name], value].concat());
        ran.fails(2, &["cannot be used with", &name, "--resume"]);
    }

    train(&text, &out, &["--steps", "2"]).ok();
    bad(&["--steps", "2"], 2, &["output directory", "holds a run", "resume"]);
    std::fs::write(&text, "another text, line by line\n".repeat(300)).unwrap();
    let ran = run(&["train", &text, "--out", &out, "--resume"]);
    assert!(ran.code == Some(2) && ran.out.is_empty(), "{ran:?}");
    for part in ["error: training data", "state.safetensors", "it was changed", "new run"] {
        assert!(ran.err.contains(part), "no {part:?} in {ran:?}");
    }
}

const LONG: [&str; 6] = ["--steps", "600", "--save-every", "7", "--eval-every", "50"];

fn spawn(text: &str, out: &str, flags: &[&str]) -> Child {
    let program: PathBuf = assert_cmd::cargo::cargo_bin("bitnet");
    let mut command = Command::new(program);
    command.args(["train", text, "--out", out]).args(tiny(&[&LONG[..], flags].concat())).envs(crate::NO_GPUS);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    while !Path::new(out).join("state.safetensors").exists() {
        assert!(
            begun.elapsed() < Duration::from_secs(100) && child.try_wait().unwrap().is_none(),
            "no state was saved"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    child
}

fn last_step(out: &str) -> u64 {
    let log = std::fs::read_to_string(Path::new(out).join("metrics.jsonl")).unwrap();
    let mut steps = log.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok()?["step"].as_u64());
    steps.next_back().unwrap()
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let (dir, text) = folder();
    let (whole, killed) = (at(&dir, "whole"), at(&dir, "killed"));
    let mut child = spawn(&text, &killed, &[]);
    std::thread::sleep(Duration::from_millis(30));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(last_step(&killed) < 600, "killed in the middle");
    let json = run(&["train", &text, "--out", &killed, "--resume", "--threads", "1", "--json"]).json();
    assert_eq!((&json["outcome"], &json["steps"]), (&json!("finished"), &json!(600)));

    let output = spawn(&text, &whole, &[]).wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(masters(&killed), masters(&whole));
    let left: Vec<String> =
        std::fs::read_dir(&killed).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!left.iter().any(|name| name.starts_with(".writing-")), "{left:?}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_ends_well() {
    let (dir, text) = folder();
    let out = at(&dir, "run");
    let child = spawn(&text, &out, &["--json"]);
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["outcome"], json!("interrupted"), "{json}");
    let steps = json["steps"].as_u64().unwrap();
    assert!(steps < 600 && steps == last_step(&out), "{json}");
    // What was saved is the very step after which it stopped.
    let mut resumed = bitnet(&["train", &text, "--out", &out, "--resume", "--threads", "2"]);
    let ran = Ran::of(resumed.output().unwrap());
    assert!(ran.ok().contains("finished after 600 steps"));
    let log = std::fs::read_to_string(Path::new(&out).join("metrics.jsonl")).unwrap();
    assert_eq!(log.lines().filter(|l| l.contains("\"lr\"")).count(), 600, "every step once");
}
