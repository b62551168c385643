//! The built-in model, which every command takes where none is named.

use crate::{Ran, bitnet, run};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;

/// Runs in a directory, with a hub that cannot be reached and a cache that does not exist.
fn run_in(dir: &Path, args: &[&str]) -> Ran {
    let gone = dir.join("no-cache");
    let mut command = bitnet(args);
    command.current_dir(dir).env_clear().envs(crate::NO_GPUS);
    if let Some(path) = std::env::var_os("LD_LIBRARY_PATH").filter(|_| cfg!(feature = "cuda")) {
        // CUDA's libraries, which the program was linked with.
        command.env("LD_LIBRARY_PATH", path);
    }
    command.env("HOME", &gone).env("HF_HOME", &gone).env("HF_ENDPOINT", "http://127.0.0.1:9");
    Ran::of(command.output().unwrap())
}

#[test]
fn the_first_command_answers_anywhere() {
    let dir = tempfile::tempdir().unwrap();
    let ran = run_in(dir.path(), &["generate", "--prompt", "ROMEO:", "--max-tokens", "16", "--seed", "3"]);
    // The closing line and nothing else.
    assert!(ran.err.lines().count() == 1 && ran.err.starts_with("prompt: "), "{ran:?}");
    let said = ran.ok();
    assert!(said.trim().len() > 8, "{said:?}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "something was written");
    // A directory of this name is another model, and has to be called so.
    std::fs::create_dir(dir.path().join("builtin")).unwrap();
    let named = ["generate", "-m", "builtin", "-p", "ROMEO:", "-n", "16", "--seed", "3"];
    assert_eq!(run_in(dir.path(), &named).ok(), said);
    run_in(dir.path(), &["generate", "-m", "./builtin", "-p", "x"]).fails(1, &["./builtin", "config.json"]);
    for command in ["generate", "chat", "bench", "perplexity", "inspect", "convert", "logits"] {
        let help = run(&[command, "--help"]).ok();
        let unwrapped = help.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(unwrapped.contains("[default: builtin]"), "{help}");
    }
}

#[test]
fn every_command_knows_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let inspected = run(&["inspect", "--json"]).json();
    assert_eq!(
        (&inspected["path"], &inspected["warnings"]),
        (&Value::from("builtin"), &Value::from(Vec::<Value>::new()))
    );
    assert_eq!(run(&["inspect", "--model", "builtin", "--json"]).json(), inspected);
    let positions = inspected["context_length"].as_u64().unwrap();

    // Without lengths, as much as the model has positions for.
    let bench = run(&["bench", "--reps", "1", "--json"]).json();
    let used = bench["prefill_tokens"].as_u64().unwrap() + bench["decode_tokens"].as_u64().unwrap();
    assert!(bench["model"] == "builtin" && (positions.min(640)..=positions).contains(&used), "{bench}");
    let prompts = path("prompts");
    std::fs::write(&prompts, "ROMEO:\n").unwrap();
    assert_eq!(run(&["bench", "--prompts", &prompts, "--tg", "4", "--json"]).json()["succeeded"], 1);

    let verse = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/texts/verse.txt");
    let score = run(&["perplexity", verse, "--json"]).json();
    assert!(score["model"] == "builtin" && score["bits_per_byte"].as_f64() < Some(4.0), "{score}");

    let (input, output) = (path("in.safetensors"), path("out.safetensors"));
    let ids = Tensor::new(&[1i64, 2, 3], &Device::Cpu).unwrap();
    candle_core::safetensors::save(&HashMap::from([("input_ids_0", ids)]), &input).unwrap();
    run(&["logits", "--input", &input, "--output", &output]).ok();
    let logits = candle_core::safetensors::load(&output, &Device::Cpu).unwrap().remove("logits_0").unwrap();
    let vocab = inspected["vocab_size"].as_u64().unwrap() as usize;
    assert_eq!((logits.dims(), logits.dtype()), ([3, vocab].as_slice(), DType::F32));

    let (masters, packed) = (path("masters"), path("packed"));
    run(&["convert", "--to", "masters", "-o", &masters]).ok();
    run(&["convert", &masters, "--to", "packed", "-o", &packed]).ok();
    let again = run(&["inspect", &packed, "--json"]).json();
    assert_eq!(
        (&again["projections"], &again["stored_bytes"]),
        (&inspected["projections"], &inspected["stored_bytes"])
    );
    let greedy = |model: &str| run(&["generate", "-m", model, "-p", "JULIET:", "-n", "8", "--greedy"]).ok();
    assert!(greedy("builtin") == greedy(&packed) && greedy(&packed) == greedy(&masters));
}

#[test]
fn what_it_cannot_do_is_said() {
    run(&["chat"]).fails(1, &["built-in", "microsoft/bitnet-b1.58-2B-4T"]);
    run(&["generate", "--chat", "-p", "Hello"]).fails(1, &["built-in", "microsoft/bitnet-b1.58-2B-4T"]);
    run(&["generate", "-p", "x", "--revision", "v1"]).fails(2, &["revision", "v1", "built-in"]);
    run(&["generate", "-p", "x", "-m", "builtin@v1"]).fails(1, &["builtin@v1", "no such directory"]);
    run(&["generate", "-p", "x", "--context", "100000"]).fails(2, &["--context", "between 1 and"]);
}
