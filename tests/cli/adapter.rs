//! `--adapter`.

use crate::common::{Expected, fixture};
use crate::{model, run, run_with};
use candle_bitnet::checkpoint::Checkpoint;
use candle_bitnet::checkpoint::adapter::{AdapterConfig, AdapterMatrices, CONFIG_FILE, write_adapter};
use candle_bitnet::model::config::ModelConfig;
use std::path::Path;
use tempfile::TempDir;

/// An adapter of every projection of a fixture, strong enough to change what it says.
fn adapter(name: &str, base: Option<&str>) -> TempDir {
    let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
    let (path, text) = checkpoint.config();
    let model = ModelConfig::parse(path, text).unwrap();
    let mut config =
        AdapterConfig::new(4, 8.0, ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"].map(String::from).to_vec());
    config.base_model = base.map(str::to_owned);
    let values = |n: usize, m: usize| (0..n).map(|i| ((i * m % 41) as f32 - 20.0) / 100.0).collect();
    let linears = (0..model.num_layers).flat_map(|layer| model.linears(layer));
    let matrices = linears.filter(|(module, ..)| config.targets(module)).map(|(module, rows, cols)| AdapterMatrices {
        module,
        rows,
        cols,
        a: values(4 * cols, 17),
        b: values(4 * rows, 29),
    });
    let dir = tempfile::tempdir().unwrap();
    write_adapter(dir.path(), &config, matrices.collect()).unwrap();
    dir
}

#[test]
fn every_command_with_a_model_runs_it_and_no_base_weight_changes() {
    for name in ["a1_packed", "a3_llama"] {
        let (dir, m) = (adapter(name, Some(&format!("someone/{name}"))), model(name));
        let adapter = dir.path().to_str().unwrap();
        let weights = fixture(name).join("model.safetensors");
        let before = std::fs::read(&weights).unwrap();
        let generate = ["generate", "-m", &m, "-p", "Hello, how are you?", "--greedy", "-n", "12"];
        let plain = run(&generate);
        let with = run(&[&generate[..], &["--adapter", adapter]].concat());
        assert!(!with.err.contains("warning"), "{with:?}");
        assert_ne!(with.ok(), plain.ok());
        let json = |flags: &[&str]| run(&[&generate[..], &["--json"], flags].concat()).json();
        let first = json(&["--adapter", adapter]);
        assert_ne!(first["tokens"], json(&[])["tokens"]);
        let again = json(&["--adapter", adapter, "--threads", "1", "--kernel", "generic"]);
        assert_eq!(again["tokens"], first["tokens"]);

        let chat = |flags: &[&str]| {
            run_with(&[&["chat", "-m", &m, "--greedy", "--max-tokens", "16"], flags].concat(), "Hello\n").ok()
        };
        assert_ne!(chat(&["--adapter", adapter]), chat(&[]));

        let out = dir.path().join("logits.out");
        let input = fixture(name).join("expected.safetensors");
        let args = ["logits", "-m", &m, "--input", input.to_str().unwrap(), "--output", out.to_str().unwrap()];
        run(&[&args[..], &["--adapter", adapter]].concat()).ok();
        let got = candle_core::safetensors::load(&out, &candle_core::Device::Cpu).unwrap();
        let rows = (0..Expected::load(name).prompts()).map(|i| got[&format!("logits_{i}")].to_vec2::<f32>().unwrap());
        Expected::load(name).judge(&rows.collect::<Vec<_>>()).unwrap_err();

        let bench = ["bench", "-m", &m, "--pp", "8", "--tg", "4", "--reps", "1", "--json"];
        let (with, plain) = (run(&[&bench[..], &["--adapter", adapter]].concat()).json(), run(&bench).json());
        let bytes = |report: &serde_json::Value, key: &str| report[key].as_u64().unwrap();
        assert_eq!(bytes(&plain, "bytes_per_token_adapter"), 0);
        let more = bytes(&with, "bytes_per_token") - bytes(&plain, "bytes_per_token");
        assert!(more > 0 && bytes(&with, "bytes_per_token_adapter") == more, "{with}");
        assert!(before == std::fs::read(&weights).unwrap());
    }
}

#[test]
fn an_adapter_of_another_model_is_warned_of_or_refused() {
    let a1 = model("a1_packed");
    let generate =
        |adapter: &Path| run(&["generate", "-m", &a1, "-p", "x", "-n", "2", "--adapter", adapter.to_str().unwrap()]);
    // Its shapes fit, so it may be right.
    let renamed = generate(adapter("a1_packed", Some("owner/other\u{1b}[2J")).path());
    assert!(renamed.err.starts_with("warning: the adapter was trained on \"owner/other\\u{1b}[2J\""), "{renamed:?}");
    renamed.ok();
    generate(adapter("a3_llama", None).path())
        .fails(1, &["adapter_model.safetensors", "lora_", "it adapts another base"]);
    let dir = adapter("a1_packed", None);
    let path = dir.path().join(CONFIG_FILE);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"LORA\"", "\"LOHA\"")).unwrap();
    generate(dir.path()).fails(1, &[CONFIG_FILE, "peft_type", "\"LOHA\" is not LORA"]);
    std::fs::write(&path, text.replace("\"use_dora\": false", "\"use_dora\": true")).unwrap();
    generate(dir.path()).fails(1, &[CONFIG_FILE, "use_dora", "DoRA is not supported"]);
    generate(&dir.path().join("gone")).fails(1, &["gone", "no such directory", "adapter_config.json"]);
    generate(&fixture("a1_packed")).fails(1, &["adapter_config.json", "not found"]);
    run(&["bench", "--synthetic", "0.7b", "--adapter", dir.path().to_str().unwrap()])
        .fails(2, &["--adapter", "--synthetic"]);
}
