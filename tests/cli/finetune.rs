//! `bitnet finetune`.

use crate::{Ran, model, run};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn data(dir: &Path, lines: &[&str]) -> String {
    let path = dir.join("data.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Eight questions, a line that is empty of answer, and one that is too long.
fn pairs(dir: &Path) -> String {
    let mut lines: Vec<String> =
        ["red", "green", "blue", "black", "white", "brown", "grey", "pink"].map(|c| {
            format!("{{\"messages\":[{{\"role\":\"user\",\"content\":\"{c}?\"}},{{\"role\":\"assistant\",\"content\":\"{}\"}}]}}", c.to_uppercase())
        }).to_vec();
    lines.push(r#"{"instruction":"nothing","output":""}"#.into());
    lines.push(format!(r#"{{"input":"long","output":"{}"}}"#, "and so on ".repeat(30)));
    data(dir, &lines.iter().map(String::as_str).collect::<Vec<_>>())
}

fn finetune(data: &str, out: &Path, flags: &[&str]) -> Ran {
    run(&[&["finetune", data, "--out", out.to_str().unwrap()], flags].concat())
}

#[test]
fn an_adapter_is_trained_and_the_base_is_left_alone() {
    let (dir, base) = (tempfile::tempdir().unwrap(), model("a1_packed"));
    let (data, out) = (pairs(dir.path()), dir.path().join("out"));
    let before = std::fs::read(format!("{base}/model.safetensors")).unwrap();
    let flags = ["-m", &base, "--rank", "4", "--target-modules", "q_proj,o_proj,down_proj", "--lr", "0.01"];
    let common = ["--context", "64", "--epochs", "40", "--batch", "4", "--validation", "0", "--threads", "2"];
    let ran = finetune(&data, &out, &[&flags[..], &common, &["--test-prompt", "blue?"]].concat());
    for words in [
        "an adapter of rank 4 and alpha 8 on q_proj, o_proj, down_proj: ",
        "trainable parameters, ",
        "8 examples of 10 lines, 1 longer than 64 tokens and left out (--truncate cuts them), 1 without anything",
        "8 to train on, 0 to validate with; 80 steps of 4, 40.0 epochs, 2 threads",
    ] {
        assert!(ran.err.contains(words), "no {words:?} in {ran:?}");
    }
    let text = ran.ok();
    let answer = |prefix: &str| text.lines().find_map(|l| l.strip_prefix(prefix)).unwrap().trim().to_owned();
    assert!(text.starts_with("finished after 80 steps, ") && answer("prompt: ").contains("blue?"), "{text}");
    assert!(answer("before: ") != "BLUE" && answer("after:  ") == "BLUE", "{text}");
    assert!(text.contains(&format!("try it with: bitnet chat -m {base} --adapter {}", out.display())), "{text}");
    assert!(before == std::fs::read(format!("{base}/model.safetensors")).unwrap());

    // generate runs what was trained.
    let generate = ["generate", "-m", &base, "--adapter", out.to_str().unwrap(), "--chat", "-p", "red?", "--greedy"];
    assert_eq!(run(&[&generate[..], &["-n", "16"]].concat()).ok().trim(), "RED");

    // A finished run has nothing left to do; another needs a directory of its own.
    let again = finetune(&data, &out, &["--resume", "--json"]).json();
    assert_eq!((&again["outcome"], &again["steps"]), (&"finished".into(), &80.into()));
    assert_eq!(again["test"]["after"], "RED");
    assert_eq!(again["examples"]["too_long"], 1);
    assert_eq!(again["output"], out.to_str().unwrap());
    assert!(again["trainable_share"].as_f64().unwrap() < 0.2 && again["validation"].is_null());
    finetune(&data, &out, &["-m", &base]).fails(2, &["output directory", "holds a run; resume it"]);
    finetune(&data, &out, &["--resume", "--lr", "1"]).fails(2, &["--lr", "--resume"]);
    finetune(&data, dir.path(), &["--resume"]).fails(2, &["holds no run of finetune to go on with"]);
}

#[test]
fn full_training_writes_masters_and_refuses_a_packed_base() {
    let (dir, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (data, out) = (pairs(data.path()), dir.path().join("out"));
    let flags = ["--full", "--context", "64", "--steps", "2", "--batch", "2", "--validation", "0.25"];
    let json = finetune(&data, &out, &[&flags[..], &["-m", &model("a1_bf16"), "--json"]].concat()).json();
    assert_eq!((&json["trainable_share"], &json["training_examples"]), (&1.0.into(), &6.into()));
    assert!(json["validation"]["loss"].as_f64() > Some(0.0), "{json}");
    let masters = json["output"].as_str().unwrap();
    run(&["generate", "-m", masters, "-p", "red", "-n", "2"]).ok();
    let other = dir.path().join("other");
    finetune(&data, &other, &[&flags[..], &["-m", &model("a1_packed")]].concat())
        .fails(2, &["is packed; full training needs masters", "microsoft/bitnet-b1.58-2B-4T-bf16", "leave --full out"]);
    assert!(!other.exists());
}

#[test]
fn bad_data_and_flags_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (model("a1_packed"), dir.path().join("out"));
    let good = r#"{"input":"q","output":"a"}"#;
    let fails = |lines: &[&str], flags: &[&str], code: i32, words: &[&str]| {
        let data = data(dir.path(), lines);
        finetune(&data, &out, &[&["-m", &base], flags].concat()).fails(code, words);
        assert!(!out.exists());
    };
    fails(&[], &[], 1, &["data.jsonl: empty: there is no example"]);
    fails(&[good, "{\"input\":"], &[], 1, &["data.jsonl: line 2: no JSON"]);
    fails(&[good, r#"{"question":"q"}"#], &[], 1, &["line 2: expected {\"messages\"}", "found the keys \"question\""]);
    fails(&[good], &["--context", "4"], 1, &["no example is left of 1 lines: 1 longer than 4 positions"]);
    fails(&[good], &["--context", "9999"], 2, &["context: 9999 is more than the model's 512 positions"]);
    fails(&[good], &["--rank", "0"], 2, &["rank: 0 is out of range"]);
    fails(&[good], &["--target-modules", "q_proj,lm_head"], 2, &["'lm_head' is no projection"]);
    fails(&[good], &["--epochs", "0"], 2, &["--epochs: 0 is out of range"]);
    fails(&[good], &["--batch", "2", "--micro-batch", "3"], 2, &["batch: 3 at a time of 2 a step"]);
    fails(&[good], &["--dropout", "1"], 2, &["dropout: 1 is out of range"]);
    fails(&[good], &["--full", "--rank", "4"], 2, &["--full", "--rank"]);
    fails(&[good], &["--device", "cuda"], 1, &[crate::NO_GPU]);
    let data = data(dir.path(), &[good]);
    finetune(&data, &out, &["-m", "no/such/model/here"]).fails(1, &["no/such/model/here"]);
}

#[test]
fn a_model_without_a_template_learns_pairs_as_two_lines() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (dir.path().join("base"), dir.path().join("out"));
    std::fs::create_dir(&base).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "special_tokens_map.json"] {
        std::fs::copy(crate::common::fixture("a1_packed").join(name), base.join(name)).unwrap();
    }
    let base = base.to_str().unwrap();
    let data = pairs(dir.path());
    let flags = ["-m", base, "--lr", "0.01", "--context", "64", "--epochs", "40", "--batch", "4", "--validation", "0"];
    let text = finetune(&data, &out, &flags).ok();
    assert!(text.contains("after:  RED\n"), "{text}");
    assert!(text.contains(&format!("bitnet generate -m {base} --adapter {} -p $'...\\n'", out.display())), "{text}");
    let generate =
        ["generate", "-m", base, "--adapter", out.to_str().unwrap(), "-p", "grey?\n", "--greedy", "-n", "16"];
    assert_eq!(run(&generate).ok().trim(), "GREY");
    let turns = r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}"#;
    let other = dir.path().join("other");
    let refused = finetune(&self::data(dir.path(), &[turns]), &other, &["-m", base]);
    refused.fails(1, &["line 1: the model's chat template", "only a single question with its answer can do without"]);
}

/// Ctrl-C saves and stops; a killed run loses what came after its last saved state, and no file is torn.
#[cfg(unix)]
#[test]
fn an_interrupted_run_goes_on() {
    let (dir, base) = (tempfile::tempdir().unwrap(), model("a1_packed"));
    let (data, out) = (pairs(dir.path()), dir.path().join("out"));
    let out_flag = out.to_str().unwrap();
    let fresh =
        ["-m", &base, "--rank", "2", "--context", "64", "--steps", "3000", "--save-every", "3", "--threads", "1"];
    let steps = || std::fs::read_to_string(out.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
    let run_until = |flags: &[&str], lines: usize, signal: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
        command.args(["finetune", &data, "--out", out_flag]).args(flags).envs(crate::NO_GPUS);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let begun = Instant::now();
        while steps() < lines && begun.elapsed() < Duration::from_secs(100) {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        child.wait_with_output().unwrap()
    };
    let killed = run_until(&fresh, 5, "-KILL");
    assert_eq!(killed.status.code(), None);
    let lines = steps();
    let stopped = Ran::of(run_until(&["--resume"], lines + 4, "-INT"));
    assert!(stopped.err.contains("saving and stopping after this step"), "{stopped:?}");
    let text = stopped.ok();
    assert!(text.starts_with("interrupted after "), "{text}");
    assert!(text.contains(&format!("go on with: bitnet finetune {data} --out {out_flag} --resume")), "{text}");
    // Every step is in the log once, in order.
    let log = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let numbers = log.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["step"].as_u64().unwrap());
    assert!(numbers.enumerate().all(|(i, step)| step == i as u64 + 1), "{log}");
}
