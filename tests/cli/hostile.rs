//! Damaged checkpoints: refused by name, without a panic, in little time and memory.

use crate::{Ran, bitnet};
use assert_cmd::cargo::CommandCargoExt;
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A fixture's checkpoint, to be damaged.
pub fn copy(name: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(crate::common::fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap();
        if !name.to_string_lossy().starts_with("expected") {
            std::fs::copy(&path, dir.path().join(name)).unwrap();
        }
    }
    dir
}

/// Runs the program in an address space of 1 GB where the shell can limit it: far above what a fixture needs, far
/// below what its damaged numbers ask for.
fn limited(args: &[&str]) -> Ran {
    let mut command: Command = CommandCargoExt::cargo_bin("bitnet").unwrap();
    if cfg!(target_os = "linux") {
        let mut shell = Command::new("sh");
        shell.args(["-c", "ulimit -v 1000000; exec \"$0\" \"$@\""]).arg(command.get_program()).args(command.get_args());
        command = shell;
    }
    Ran::of(command.args(args).envs(crate::NO_GPUS).env("RUST_BACKTRACE", "1").output().unwrap())
}

const WEIGHTS: &str = "model.safetensors";
const QUERY: &str = "model.layers.0.self_attn.q_proj.weight";

/// Header and data of a safetensors file, changed.
fn edit(dir: &Path, change: impl FnOnce(&mut Value, &mut Vec<u8>)) {
    let path = dir.join(WEIGHTS);
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut data = bytes[8 + length..].to_vec();
    change(&mut header, &mut data);
    let header = header.to_string();
    std::fs::write(path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()).unwrap();
}

/// Overwrites a tensor's first bytes.
pub fn poke(dir: &Path, tensor: &str, bytes: &[u8]) {
    edit(dir, |header, data| {
        let begin = header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
        data[begin..begin + bytes.len()].copy_from_slice(bytes);
    });
}

/// Changes a JSON file.
fn edit_json(dir: &Path, name: &str, change: impl FnOnce(&mut Value)) {
    let path = dir.join(name);
    let mut value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

fn config(dir: &Path, key: &str, value: Value) {
    edit_json(dir, "config.json", |c| c[key] = value);
}

fn resize(dir: &Path, name: &str, bytes: u64) {
    std::fs::File::options().write(true).open(dir.join(name)).unwrap().set_len(bytes).unwrap();
}

fn write(dir: &Path, name: &str, text: impl AsRef<[u8]>) {
    std::fs::write(dir.join(name), text).unwrap();
}

/// A way to damage a checkpoint, and the words that the message must have.
type Case = (fn(&Path), &'static [&'static str]);

fn refused(fixture: &str, cases: &[Case]) {
    for (i, (damage, words)) in cases.iter().enumerate() {
        let dir = copy(fixture);
        damage(dir.path());
        let start = Instant::now();
        let ran = limited(&["generate", "-m", dir.path().to_str().unwrap(), "-p", "Hello", "-n", "2"]);
        println!("{i}: {}", ran.err.trim_end());
        ran.fails(1, words);
        assert!(start.elapsed() < Duration::from_secs(10), "{words:?}: {:?}", start.elapsed());
    }
}

#[test]
fn the_limit_lets_a_good_checkpoint_run() {
    let dir = copy("a1_packed");
    limited(&["generate", "-m", dir.path().to_str().unwrap(), "-p", "Hello", "-n", "2"]).ok();
}

#[test]
fn damaged_weights_are_refused_by_file_and_tensor() {
    let cases: &[Case] = &[
        (|d| resize(d, WEIGHTS, 100_000), &[WEIGHTS]),
        (|d| resize(d, WEIGHTS, 7), &[WEIGHTS]),
        (|d| resize(d, WEIGHTS, 0), &[WEIGHTS]),
        (|d| resize(d, WEIGHTS, 196_077), &[WEIGHTS]),
        (|d| write(d, WEIGHTS, [0xff; 64]), &[WEIGHTS, "header"]),
        (|d| edit(d, |h, _| h[QUERY]["shape"] = json!([64, 128])), &[WEIGHTS, QUERY]),
        (|d| edit(d, |h, _| h[QUERY]["shape"] = json!([1u64 << 62, 1u64 << 62])), &[WEIGHTS, QUERY]),
        (|d| edit(d, |h, _| h[QUERY]["data_offsets"] = json!([0, 1u64 << 50])), &[WEIGHTS, QUERY]),
        (|d| edit(d, |h, _| h[QUERY]["data_offsets"] = json!([0, 4096])), &[WEIGHTS, "model."]),
        (|d| edit(d, |h, _| h[QUERY]["dtype"] = json!("Q4")), &[WEIGHTS, QUERY, "Q4"]),
        (|d| edit(d, |h, _| h["model.norm.weight"]["dtype"] = json!("I16")), &[WEIGHTS, "model.norm.weight", "I16"]),
        (|d| edit(d, |h, _| h[QUERY]["shape"] = json!([128, 32])), &[WEIGHTS, QUERY, "[32, 128]"]),
        (|d| poke(d, "model.norm.weight", &[0xc0, 0x7f]), &[WEIGHTS, "model.norm.weight", "NaN"]),
        (
            |d| poke(d, "model.layers.0.self_attn.q_proj.weight_scale", &[0, 0]),
            &[WEIGHTS, "q_proj.weight_scale", "0 is no scale"],
        ),
        (
            |d| poke(d, "model.layers.1.mlp.down_proj.weight_scale", &[0xc0, 0x7f]),
            &[WEIGHTS, "layers.1.mlp.down_proj.weight_scale", "NaN"],
        ),
        (|d| poke(d, QUERY, &[0xff]), &[WEIGHTS, QUERY, "code 3", "row 0, column 0"]),
        (
            |d| {
                edit(d, |h, data| {
                    let (begin, end) = (data.len(), data.len() + 4);
                    h["model.layers.0.extra"] = json!({"dtype": "F32", "shape": [1], "data_offsets": [begin, end]});
                    data.extend([0; 4]);
                })
            },
            &[WEIGHTS, "model.layers.0.extra", "no meaning"],
        ),
        (
            |d| {
                edit(d, |h, _| {
                    let norm = h.as_object_mut().unwrap().remove("model.norm.weight").unwrap();
                    h["model.layers.0.self_attn.q_proj.rms_norm.weight"] = norm;
                })
            },
            &[WEIGHTS, "q_proj.rms_norm.weight"],
        ),
        (|d| config(d, "num_hidden_layers", json!(3)), &[WEIGHTS, "model.layers.2.", "missing"]),
        (|d| config(d, "num_hidden_layers", json!(1)), &[WEIGHTS, "model.layers.1.", "no meaning"]),
        (|d| config(d, "vocab_size", json!(4_194_304)), &[WEIGHTS, "model.embed_tokens.weight", "[384, 128]"]),
        (|d| config(d, "intermediate_size", json!(131_072)), &[WEIGHTS, "model.layers.0.mlp."]),
        (|d| std::fs::remove_file(d.join(WEIGHTS)).unwrap(), &["no weights"]),
    ];
    refused("a1_packed", cases);
}

#[test]
fn damaged_shards_are_refused() {
    const INDEX: &str = "model.safetensors.index.json";
    const SECOND: &str = "model-00002-of-00003.safetensors";
    let cases: &[Case] = &[
        (|d| std::fs::remove_file(d.join(SECOND)).unwrap(), &[SECOND]),
        (
            |d| edit_json(d, INDEX, |i| i["weight_map"]["lm_head.weight"] = json!("../x.safetensors")),
            &[INDEX, "lm_head.weight"],
        ),
        (|d| edit_json(d, INDEX, |i| i["weight_map"]["lm_head.weight"] = json!(SECOND)), &[SECOND, "lm_head.weight"]),
        (|d| drop(std::fs::copy(d.join("model-00001-of-00003.safetensors"), d.join(SECOND))), &["also in"]),
        (|d| write(d, INDEX, "{}"), &[INDEX, "weight_map"]),
    ];
    refused("a2_packed_gqa_untied_sharded", cases);
}

#[test]
fn damaged_small_files_are_refused_by_key() {
    let cases: &[Case] = &[
        (|d| std::fs::remove_file(d.join("config.json")).unwrap(), &["config.json"]),
        (|d| write(d, "config.json", "{\"architectures\": "), &["config.json", "line 1"]),
        (|d| write(d, "config.json", b"{\"a\": \"\xff\"}"), &["config.json", "UTF-8"]),
        (|d| write(d, "config.json", "[".repeat(100_000)), &["config.json"]),
        (
            |d| write(d, "config.json", format!("{{\"quantization_config\": {}", "{\"a\":".repeat(100_000))),
            &["config.json", "recursion"],
        ),
        (|d| write(d, "config.json", " ".repeat(2 << 20)), &["config.json", "at most"]),
        (|d| config(d, "num_hidden_layers", json!(1e18 as u64)), &["config.json", "num_hidden_layers", "1 to 1024"]),
        (|d| config(d, "hidden_size", json!(-1)), &["config.json", "hidden_size", "-1"]),
        (|d| config(d, "rms_norm_eps", json!("small")), &["config.json", "rms_norm_eps"]),
        (
            |d| config(d, "architectures", json!(["GPT2LMHeadModel"])),
            &["config.json", "GPT2LMHeadModel", "BitNetForCausalLM"],
        ),
        (|d| config(d, "quantization_config", Value::Null), &["config.json", "quantization_config", "b1.58"]),
        (|d| config(d, "eos_token_id", json!(384)), &["config.json", "eos_token_id"]),
        (|d| std::fs::remove_file(d.join("tokenizer.json")).unwrap(), &["tokenizer.json", "download"]),
        (|d| write(d, "tokenizer.json", "{}"), &["tokenizer.json"]),
        (
            |d| write(d, "generation_config.json", "{\"temperature\": \"hot\"}"),
            &["generation_config.json", "temperature"],
        ),
        (|d| write(d, "tokenizer_config.json", "nothing"), &["tokenizer_config.json"]),
        (
            |d| {
                edit_json(d, "tokenizer.json", |t| {
                    let token = json!({"id": 384, "content": "<|x|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
                    t["added_tokens"].as_array_mut().unwrap().push(token);
                })
            },
            &["tokenizer.json", "385", "384"],
        ),
    ];
    refused("a1_packed", cases);
}

#[test]
fn inspect_and_logits_refuse_the_same() {
    let dir = copy("a1_packed");
    poke(dir.path(), QUERY, &[0xff]);
    let path = dir.path().to_str().unwrap();
    let (input, out) =
        (format!("{}/expected.safetensors", crate::model("a1_packed")), format!("{path}/out.safetensors"));
    limited(&["logits", "-m", path, "--input", &input, "--output", &out]).fails(1, &[WEIGHTS, QUERY, "code 3"]);
    assert!(!Path::new(&out).exists());
    limited(&["bench", "-m", path, "--pp", "2", "--tg", "2"]).fails(1, &[WEIGHTS, QUERY, "code 3"]);
    resize(dir.path(), WEIGHTS, 1000);
    limited(&["inspect", path]).fails(1, &[WEIGHTS]);
}

#[test]
fn a_context_that_memory_cannot_hold_is_refused() {
    if !cfg!(target_os = "linux") {
        return; // Elsewhere nothing limits the memory.
    }
    let dir = copy("a1_packed");
    config(dir.path(), "max_position_embeddings", json!(16_777_216));
    let args = ["generate", "-m", dir.path().to_str().unwrap(), "-p", "Hello", "-n", "2"];
    limited(&args).ok();
    limited(&[&args[..], &["--context", "1000000"]].concat()).fails(1, &["not available", "memory"]);
}

#[test]
fn a_prompt_of_any_length_is_handled() {
    let a1 = crate::model("a1_packed");
    let huge = "ab ".repeat(1 << 20);
    let ran = bitnet(&["generate", "-m", &a1]).write_stdin(huge).output().unwrap();
    Ran::of(ran).fails(1, &["context full"]);
}
