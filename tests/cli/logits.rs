//! `bitnet logits`.

use crate::common::{Expected, FIXTURES, fixture};
use crate::{model, run};
use candle_bitnet::backend::cpu::KernelKind;
use candle_core::{DType, Device, safetensors};
use std::path::Path;

/// The bytes of the output for a fixture's prompts.
fn logits(name: &str, out: &Path, flags: &[&str]) -> Vec<u8> {
    let input = fixture(name).join("expected.safetensors");
    let (model, out_path) = (model(name), out.to_str().unwrap());
    let args = ["logits", "-m", &model, "--input", input.to_str().unwrap(), "--output", out_path, "--greedy", "32"];
    assert_eq!(run(&[&args, flags].concat()).ok(), "");
    std::fs::read(out).unwrap()
}

#[test]
fn logits_are_those_of_transformers_and_the_same_bytes_on_every_kernel() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("logits.safetensors");
    for name in FIXTURES {
        let expected = Expected::load(name);
        let first = logits(name, &out, &[]);
        let got = safetensors::load_buffer(&first, &Device::Cpu).unwrap();
        assert_eq!(got.len(), 2 * expected.prompts());
        let rows = (0..expected.prompts()).map(|i| got[&format!("logits_{i}")].to_vec2::<f32>().unwrap());
        expected.judge(&rows.collect::<Vec<_>>()).unwrap_or_else(|e| panic!("{name}: {e}"));
        for prompt in 0..expected.prompts() {
            let greedy = got[&format!("greedy_{prompt}")].to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap();
            assert_eq!(greedy.len(), 32);
            if expected.greedy_firm(prompt) {
                assert_eq!(greedy, expected.greedy(prompt), "{name}, prompt {prompt}");
            }
        }
        for kernel in KernelKind::available() {
            for threads in ["1", "2"] {
                let again = logits(name, &out, &["--kernel", kernel.name(), "--threads", threads]);
                assert!(again == first, "{name}: other bytes with {kernel} on {threads} threads");
            }
        }
    }
}

#[test]
fn tensors_at_odd_addresses_give_the_same_bytes() {
    for name in ["a1_bf16", "a3_llama"] {
        let dir = crate::hostile::copy(name);
        let out = dir.path().join("logits.out");
        let path = dir.path().join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        // A space behind the header moves every tensor by a byte, as files of other writers have it.
        let moved =
            [&(length as u64 + 1).to_le_bytes()[..], &bytes[8..8 + length], b" ", &bytes[8 + length..]].concat();
        std::fs::write(&path, moved).unwrap();
        let input = fixture(name).join("expected.safetensors");
        let args = ["logits", "-m", dir.path().to_str().unwrap(), "--input", input.to_str().unwrap(), "--output"];
        run(&[&args[..], &[out.to_str().unwrap(), "--greedy", "32"]].concat()).ok();
        let moved = std::fs::read(&out).unwrap();
        assert!(moved == logits(name, &out, &[]), "{name}");
    }
}

#[test]
fn a_run_that_fails_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let a1 = model("a1_packed");
    let (input, out) = (format!("{a1}/expected.safetensors"), path("out.safetensors"));
    let fails = |input: &str, out: &str, greedy: &str, code, words: &[&str]| {
        let args = ["logits", "-m", &a1, "--input", input, "--output", out, "--greedy", greedy];
        run(&args).fails(code, words);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{args:?} left something");
    };
    fails(&input, &out, "0", 2, &["--greedy", "between 1"]);
    // Fails after the first prompts were computed.
    fails(&input, &out, "100000", 1, &["input_ids_0", "context full", "512"]);
    fails(&format!("{a1}/model.safetensors"), &out, "1", 1, &["model.safetensors", "input_ids_X"]);
    fails(&format!("{a1}/config.json"), &out, "1", 1, &["config.json", "not a safetensors file"]);
    fails(&path("gone"), &out, "1", 1, &["gone", "No such file"]);
    fails(&input, &path("no/out"), "1", 1, &["--output", "no directory", "create it"]);
    fails(&input, dir.path().to_str().unwrap(), "1", 1, &["--output", "name a file"]);
}
