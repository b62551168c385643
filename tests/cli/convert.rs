//! `convert`: one model in every form.

use crate::hostile::copy;
use crate::{model, run};
use serde_json::{Value, json};

#[test]
fn a_model_answers_the_same_in_every_form() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let answer =
        |m: &str| run(&["generate", "-m", m, "-p", "Hello, world", "-n", "8", "--greedy", "--ignore-eos"]).ok();
    let source = model("a1_bf16");
    let (multiply, divide, masters) = (path("multiply"), path("deep/divide"), path("masters"));
    let said = run(&["convert", &source, "--to", "packed", "--out", &multiply]).ok();
    for part in ["packed, multiply", "1 file", "14 ternary matrices", "same codes and scales", "10 other tensors"] {
        assert!(said.contains(part), "{part} in {said}");
    }
    assert!(said.contains("copied: generation_config.json") && !said.contains("inexact"), "{said}");
    let args = ["convert", "--model", &multiply, "--to", "packed", "--scale", "divide", "-o", &divide, "--json"];
    let json = run(&args).json();
    assert_eq!(
        [&json["form"], &json["scale"], &json["verified"], &json["inexact_scales"], &json["matrices"]],
        [&json!("packed"), &json!("divide"), &json!(true), &json!(0), &json!(14)]
    );
    assert!(json["files"].as_array().unwrap().contains(&Value::from("config.json")));
    let json = run(&["convert", &divide, "--to", "masters", "-o", &masters, "--json"]).json();
    assert_eq!((&json["form"], &json["scale"], &json["f32_masters"]), (&json!("masters"), &Value::Null, &json!(0)));
    let first = answer(&source);
    for form in [&multiply, &divide, &masters] {
        assert_eq!(answer(form), first, "{form}");
    }
    assert_eq!(run(&["inspect", &divide, "--json"]).json()["weight_scale"], "divide");
    // What the configuration says is what is written where no flag says otherwise.
    let again = path("again");
    assert!(run(&["convert", &divide, "--to", "packed", "-o", &again]).ok().contains("packed, divide"));
}

#[test]
fn what_a_form_cannot_say_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let said = run(&["convert", &model("a1_packed"), "--to", "packed", "--scale", "divide", "-o", &path("a")]).ok();
    assert!(said.contains("inexact: 3 of 14 scales have no exact inverse") && said.contains("e-8"), "{said}");
    let json = run(&["convert", &model("a1_packed"), "--to", "masters", "-o", &path("b"), "--json"]).json();
    assert_eq!(json["inexact_scales"], 3);
    assert!((1e-9..2e-7).contains(&json["largest_scale_difference"].as_f64().unwrap()));
    assert_eq!(json["not_copied"], json!(["expected.json", "expected.safetensors"]));
}

#[test]
fn a_model_answers_the_same_as_a_gguf_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let answer = |m: &str, more: &[&str]| {
        run(&[&["generate", "-m", m, "-p", "Hello, world", "-n", "8", "--greedy", "--ignore-eos"], more].concat()).ok()
    };
    let source = model("a3_llama");
    let first = answer(&source, &[]);
    for (form, layout, kind) in [
        ("i2_s", "128", "I2_S"),
        ("i2_s-64", "64", "I2_S"),
        ("i2_s-rows", "rows", "I2_S"),
        ("tq2_0", "", "TQ2_0"),
        ("tq1_0", "", "TQ1_0"),
    ] {
        let file = path(&format!("{form}.gguf"));
        let said = run(&["convert", &source, "--to", form, "--out", &file]).ok();
        for part in [form, "1 file", "14 ternary matrices with the same codes and scales", "7 other tensors"] {
            assert!(said.contains(part), "{part} in {said}");
        }
        let flags = if layout.is_empty() { vec![] } else { vec!["--i2s-layout", layout] };
        assert_eq!(answer(&file, &flags), first, "{form}");
        let json = run(&[&["inspect", &file, "--json"], &flags[..]].concat()).json();
        assert!(json["stored_bytes"][kind].as_u64() > Some(50_000), "{json}");
        assert_eq!(json["suspicious"].as_array().map(Vec::len).unwrap_or_default(), 0, "{json}");
        // And back, from the layout that the file does not tell.
        let packed = path(&format!("{form}-packed"));
        run(&[&["convert", &file, "--to", "packed", "-o", &packed], &flags[..]].concat()).ok();
        assert_eq!(answer(&packed, &[]), first, "{form}");
    }
    let q8 = path("q8.gguf");
    let said = run(&["convert", &source, "--to", "tq2_0", "--head", "q8_0", "-o", &q8]).ok();
    assert!(said.contains("rounded: 2 dense tensors") && said.contains("% off"), "{said}");
    assert_eq!(run(&["inspect", &q8, "--json"]).json()["stored_bytes"]["Q8_0"], 2 * 512 * 256 * 34 / 32);
    let dense = path("dense");
    let json = run(&["convert", &source, "--to", "dense-bf16", "--head", "f32", "-o", &dense, "--json"]).json();
    assert_eq!((&json["form"], &json["inexact_scales"]), (&json!("dense-bf16"), &json!(13)));
    assert_eq!(run(&["inspect", &dense, "--json"]).json()["quantization_mode"], "dequantized");
    assert!(!answer(&dense, &[]).is_empty());
}

#[test]
fn wrong_use_and_wrong_files_have_their_exit_codes() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let out = out.to_str().unwrap();
    let a1 = model("a1_packed");
    run(&["convert", &a1, "--out", out]).fails(2, &["--to"]);
    run(&["convert", &a1, "--to", "packed"]).fails(2, &["--out"]);
    run(&["convert", &a1, "--to", "onnx", "--out", out]).fails(2, &["onnx", "packed, masters"]);
    run(&["convert", &a1, "--to", "packed", "--scale", "x", "--out", out]).fails(2, &["multiply, divide"]);
    run(&["convert", &a1, "--to", "masters", "--scale", "divide", "--out", out]).fails(2, &["--scale", "packed"]);
    run(&["convert", &a1, "--to", "i2_s", "--out", out]).fails(2, &["output file", ".gguf"]);
    run(&["convert", &a1, "--to", "packed", "--out", "x.gguf"]).fails(2, &["output directory", "i2_s"]);
    run(&["convert", &a1, "--to", "packed", "--head", "q8_0", "--out", out]).fails(2, &["--head", "Q8_0", "GGUF"]);
    run(&["convert", &a1, "--to", "packed", "--i2s-layout", "64", "--out", out]).fails(2, &["no GGUF file"]);
    run(&["convert", &a1, "--to", "packed", "--out", &a1]).fails(2, &["already holds", "another directory"]);
    run(&["convert", "./gone", "--to", "packed", "--out", out]).fails(1, &["./gone"]);
    let damaged = copy("a1_packed");
    let weights = damaged.path().join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 100]).unwrap();
    run(&["convert", damaged.path().to_str().unwrap(), "--to", "packed", "--out", out])
        .fails(1, &["model.safetensors"]);
    assert!(!std::path::Path::new(out).exists());
}
