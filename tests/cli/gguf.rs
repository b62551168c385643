//! Every command from a `.gguf` file.

use crate::common::{Expected, fixture};
use crate::{bitnet, model, run, run_with};
use candle_core::{Device, safetensors};
use serde_json::Value;

const FILES: [&str; 3] = ["gguf_a1/model-i2_s.gguf", "gguf_a1/model-tq1_0.gguf", "gguf_a1/model-tq2_0.gguf"];

#[test]
fn text_goes_in_and_comes_out() {
    let mut first: Option<(String, String)> = None;
    for file in FILES {
        let file = model(file);
        let said = run(&["generate", "-m", &file, "-p", "Hello", "--greedy", "-n", "8"]).ok();
        let chat = run_with(&["chat", "-m", &file, "--greedy", "-n", "4"], "one\ntwo\n").ok();
        assert!(said.len() > 1 && chat.len() > 1);
        assert_eq!(first.get_or_insert((said.clone(), chat.clone())), &(said, chat), "{file}");
    }
    let file = model(FILES[0]);
    let args = ["generate", "-m", &file, "-p", "Hello", "--greedy", "-n", "8", "--i2s-layout"];
    let first = first.unwrap().0;
    assert_eq!(run(&[&args[..], &["128"]].concat()).ok(), first);
    assert!(run(&[&args[..], &["64"]].concat()).ok() != first, "another order of the same codes");
    run(&[&args[..], &["32"]].concat()).fails(2, &["--i2s-layout", "128"]);
    let dir = model("a1_packed");
    run(&["generate", "-m", &dir, "-p", "x", "--i2s-layout", "64"]).fails(2, &["--i2s-layout", "no GGUF file"]);
    run(&["generate", "-m", "gone.gguf", "-p", "x"]).fails(1, &["gone.gguf", "no such file"]);
}

#[test]
fn logits_and_figures_are_those_of_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("logits.safetensors");
    let (input, expected) = (fixture("gguf_a1").join("expected.safetensors"), Expected::load("gguf_a1"));
    let text = dir.path().join("text.txt");
    std::fs::write(&text, "Some text of a few dozen tokens, over and over again. ".repeat(8)).unwrap();
    let mut perplexity = Value::Null;
    for file in FILES {
        let file = model(file);
        let args = ["logits", "-m", &file, "--input", input.to_str().unwrap(), "--output", out.to_str().unwrap()];
        run(&args).ok();
        let got = safetensors::load(&out, &Device::Cpu).unwrap();
        let rows = (0..expected.prompts()).map(|i| got[&format!("logits_{i}")].to_vec2::<f32>().unwrap());
        expected.judge(&rows.collect::<Vec<_>>()).unwrap_or_else(|e| panic!("{file}: {e}"));
        let json = run(&["perplexity", "-m", &file, text.to_str().unwrap(), "--context", "64", "--json"]).json();
        if perplexity.is_null() {
            perplexity = json["perplexity"].clone();
        }
        assert!(json["perplexity"].as_f64() > Some(1.0) && json["perplexity"] == perplexity, "{json}");
        let bench = run(&["bench", "--model", &file, "--pp", "4", "--tg", "2", "--reps", "1", "--json"]).json();
        assert!(bench["decode_tps"].as_f64() > Some(0.0), "{bench}");
    }
}

#[test]
fn inspect_tells_what_is_in_the_file() {
    for (file, kind) in FILES.iter().zip(["I2_S", "TQ1_0", "TQ2_0"]) {
        let file = model(file);
        let text = run(&["inspect", &file, "--tensors"]).ok();
        for part in [
            "GGUF",
            "version 3",
            "bitnet-b1.58",
            "gpt2 (llama-bpe), 384 tokens",
            kind,
            "blk.0.attn_q.weight",
            "token_embd.weight",
        ] {
            assert!(text.contains(part), "no {part} in {text}");
        }
        assert!(!text.contains("suspicious"), "{text}");
        let json = run(&["inspect", &file, "--json", "--tensors"]).json();
        assert_eq!((&json["gguf"]["version"], &json["quantization_mode"]), (&Value::from(3), &Value::from("offline")));
        assert!(json["stored_bytes"][kind].as_u64() > Some(100_000));
        assert!(json["projections"][0]["zeros"].as_f64() > Some(0.1));
        let tensor = json["tensor_list"].as_array().unwrap().iter().find(|t| t["stored_name"] == "blk.1.ffn_up.weight");
        assert_eq!(tensor.unwrap()["name"], "model.layers.1.mlp.up_proj.weight");
        assert_eq!(json["gguf"]["i2s_layout"].is_string(), kind == "I2_S");
    }
    // A hole, and bytes that belong to nothing.
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path().join("bad.gguf");
    let mut bytes = std::fs::read(model(FILES[0])).unwrap();
    bytes.extend([0; 100]);
    std::fs::write(&bad, &bytes).unwrap();
    let text = run(&["inspect", bad.to_str().unwrap()]).ok();
    assert!(text.contains("100 bytes of the file belong to no tensor"), "{text}");
    let end = bytes.len() - 100;
    bytes[end - 4096..end - 32].fill(0);
    std::fs::write(&bad, &bytes).unwrap();
    run(&["inspect", bad.to_str().unwrap()]).fails(1, &["blk.1.attn_v.weight", "damaged"]);
    let cut = dir.path().join("cut.gguf");
    std::fs::write(&cut, &bytes[..100_000]).unwrap();
    for command in ["inspect", "generate", "chat"] {
        let mut args = vec![command, "-m", cut.to_str().unwrap()];
        if command == "generate" {
            args.extend(["-p", "x"]);
        }
        crate::Ran::of(bitnet(&args).output().unwrap()).fails(1, &["cut.gguf", "past the end"]);
    }
}
