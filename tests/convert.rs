//! One model in every form: the same codes, the same scales, the same logits, or an error and nothing written.

mod common;

use candle_bitnet::backend::DenseType;
use candle_bitnet::checkpoint::write::{Entry, write_checkpoint};
use candle_bitnet::checkpoint::{Checkpoint, ScaleStyle, StoredType};
use candle_bitnet::model::config::{Mode, ModelConfig, Projection};
use candle_bitnet::model::convert::{Form, Phase, Progress, Summary, Verified, convert, verify};
use candle_bitnet::model::{CheckpointWeights, Logits, Sequence};
use candle_bitnet::ternary::PackedTernary;
use candle_bitnet::{Error, LoadOptions, LoadedDecoder, Result};
use candle_core::Device;
use common::{Expected, FIXTURES, fixture};
use half::bf16;
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

const FORMS: [Form; 3] = [Form::Packed(ScaleStyle::Multiply), Form::Packed(ScaleStyle::Divide), Form::Masters];

fn to(source: &Path, target: &Path, form: Form) -> Result<Summary> {
    convert(source, target, form, &mut |_| ControlFlow::Continue(()))
}

fn config(dir: &Path) -> ModelConfig {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let (path, text) = checkpoint.config();
    ModelConfig::parse(path, text).unwrap()
}

/// All ternary weights, as loading sees them.
fn ternary(dir: &Path) -> Vec<PackedTernary> {
    let (checkpoint, config) = (Checkpoint::open(dir).unwrap(), config(dir));
    let weights = CheckpointWeights::new(&checkpoint, &config).unwrap();
    let all = (0..config.num_layers).flat_map(|layer| Projection::ALL.map(|which| (layer, which)));
    all.filter_map(|(layer, which)| weights.ternary(layer, which).unwrap()).collect()
}

fn bits(weights: &[PackedTernary]) -> Vec<u32> {
    weights.iter().map(|w| w.scale().multiplier().to_bits()).collect()
}

fn codes(weights: &[PackedTernary]) -> Vec<&[u8]> {
    weights.iter().map(PackedTernary::codes).collect()
}

/// Logits of every position of some tokens.
fn logits(dir: &Path, tokens: &[u32]) -> Vec<u32> {
    let options = LoadOptions::new(&Device::Cpu).threads(Some(2)).context(Some(128));
    let model = LoadedDecoder::load(dir.to_str().unwrap(), &options).unwrap().decoder;
    let cache = model.kv_cache(DenseType::F32, 1).unwrap();
    let sequence = Sequence { slot: 0, position: 0, tokens };
    let logits = model.forward(&[sequence], &cache, Logits::All).unwrap();
    logits.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// A tensor on its way into a changed checkpoint: name, type, shape, bytes.
type Stored = (String, StoredType, Vec<usize>, Vec<u8>);

/// A checkpoint with its tensors and its configuration changed.
fn changed(source: &Path, tensors: impl FnOnce(&mut Vec<Stored>), config: impl FnOnce(&mut Value)) -> TempDir {
    let checkpoint = Checkpoint::open(source).unwrap();
    let read = |name: &str| {
        let t = checkpoint.tensor(name).unwrap();
        (name.to_owned(), t.info.dtype, t.info.shape.clone(), t.bytes().to_vec())
    };
    let mut all: Vec<Stored> = checkpoint.names().map(read).collect();
    tensors(&mut all);
    let entries = all.into_iter().map(|(name, dtype, shape, bytes)| Entry::from_bytes(name, dtype, shape, bytes));
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), entries.collect(), u64::MAX, &mut |_| {}).unwrap();
    let mut json = serde_json::from_str(checkpoint.config().1).unwrap();
    config(&mut json);
    std::fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    dir
}

fn find<'a>(tensors: &'a mut [Stored], name: &str) -> &'a mut Stored {
    tensors.iter_mut().find(|t| t.0 == name).unwrap()
}

fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn every_form_of_every_fixture_is_the_same_model() {
    for name in FIXTURES {
        let source = fixture(name);
        let want = ternary(&source);
        let tokens = Expected::load(name).ids(1);
        let first = logits(&source, &tokens);
        // Only a multiplier that was rounded to bf16 as such can be one that no divisor and no masters give.
        let arbitrary = matches!(name, "a1_packed" | "a2_packed_gqa_untied_sharded");
        for form in FORMS {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("new/model");
            let summary = to(&source, &target, form).unwrap();
            let context = format!("{name} as {form:?}");
            let got = ternary(&target);
            assert_eq!(codes(&got), codes(&want), "{context}");
            let exact = !arbitrary || form == FORMS[0];
            assert_eq!(summary.verified.inexact_scales == 0, exact, "{context}: {summary:?}");
            if exact {
                assert_eq!(bits(&got), bits(&want), "{context}");
                assert_eq!(logits(&target, &tokens), first, "{context}");
            }
            assert_eq!((summary.verified.matrices, summary.f32_masters), (want.len(), 0));
            let config = config(&target).quantization;
            match form {
                Form::Packed(style) => assert_eq!((config.mode, config.scale_style), (Mode::Offline, style)),
                _ => assert_eq!(config.mode, Mode::Online),
            }
            let mut there = summary.files.clone();
            there.sort();
            assert_eq!(listing(&target), there);
        }
    }
}

#[test]
fn what_came_from_masters_is_exact_through_any_chain_of_forms() {
    for name in ["a1_bf16", "a3_llama"] {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Expected::load(name).ids(2);
        let (want, first) = (ternary(&fixture(name)), logits(&fixture(name), &tokens));
        let mut from = fixture(name);
        for (i, form) in [1, 0, 2, 1, 2, 2, 0, 0, 1, 1].map(|i| FORMS[i]).into_iter().enumerate() {
            let target = dir.path().join(i.to_string());
            let summary = to(&from, &target, form).unwrap();
            let got = ternary(&target);
            assert_eq!((codes(&got), bits(&got)), (codes(&want), bits(&want)), "{name}, step {i}");
            assert_eq!((summary.verified.inexact_scales, summary.f32_masters), (0, 0), "{name}, step {i}");
            if form != Form::Masters {
                assert_eq!(verify(&fixture(name), &target).unwrap(), summary.verified, "{name}, step {i}");
            }
            from = target;
        }
        assert_eq!(logits(&from, &tokens), first, "{name}");
    }
}

#[test]
fn a_rounded_scale_changes_once_and_by_one_unit() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b, c) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
    let first = to(&fixture("a1_packed"), &a, Form::Masters).unwrap().verified;
    assert!(first.inexact_scales > 0 && first.largest_difference < 1.2e-7, "{first:?}");
    let divide = to(&fixture("a1_packed"), &b, FORMS[1]).unwrap().verified;
    assert_eq!(divide, first, "masters and divisors reach the same multipliers");
    assert_eq!(bits(&ternary(&a)), bits(&ternary(&b)));
    assert_eq!(to(&b, &c, FORMS[0]).unwrap().verified.inexact_scales, 0);
}

#[test]
fn the_configuration_keeps_its_keys_and_the_other_files_come_along() {
    let source = changed(&fixture("a3_llama"), |_| (), |c| c["x_custom"] = json!({"z": [1, 2.5], "a": "é"}));
    let path = |name: &str| source.path().join(name);
    for (name, text) in [
        ("README.md", "read me"),
        ("LICENSE", "licence"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "{\"a\":1}"),
        ("chat_template.jinja", "{{ x }}"),
        ("modeling_x.py", "code"),
        (".hidden", "x"),
    ] {
        std::fs::write(path(name), text).unwrap();
    }
    std::fs::create_dir(path("original")).unwrap();
    std::fs::create_dir(path("LICENSES")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (i, form) in FORMS.into_iter().enumerate() {
        let target = dir.path().join(i.to_string());
        let summary = to(source.path(), &target, form).unwrap();
        let along = ["LICENSE", "README.md", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"];
        assert_eq!(summary.copied, along);
        assert_eq!(summary.left, ["LICENSES", "modeling_x.py", "original"]);
        for name in along {
            assert_eq!(std::fs::read(target.join(name)).unwrap(), std::fs::read(path(name)).unwrap());
        }
        let read =
            |dir: &Path| -> Value { serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap() };
        let (mut old, mut new) = (read(source.path()), read(&target));
        let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&old), keys(&new));
        let want = match i {
            0 => json!({"quant_method": "bitnet", "modules_to_not_convert": null, "linear_class": "autobitlinear"}),
            1 => json!({"quant_method": "bitnet", "modules_to_not_convert": null}),
            _ => json!({"quant_method": "bitnet", "modules_to_not_convert": null, "linear_class": "autobitlinear",
                        "quantization_mode": "online"}),
        };
        assert_eq!(new["quantization_config"].take(), want);
        old["quantization_config"].take();
        assert_eq!(old, new);
    }
    // A text that needs no change stays as it is.
    let text = |dir: &Path| std::fs::read(dir.join("config.json")).unwrap();
    assert_eq!(text(&dir.path().join("1")), text(source.path()));
}

#[test]
fn unconverted_layers_inner_norms_and_unpacked_codes_are_kept() {
    let down = "model.layers.0.mlp.down_proj";
    let add_norms = |tensors: &mut Vec<Stored>| {
        let weights: Vec<(String, usize)> =
            tensors.iter().filter(|t| t.0.ends_with("_proj.weight")).map(|t| (t.0.clone(), t.2[1])).collect();
        for (name, cols) in weights {
            let bytes = (0..cols).flat_map(|i| bf16::from_f32(0.8 + 0.001 * i as f32).to_le_bytes()).collect();
            let name = name.replace("_proj.weight", "_proj.rms_norm.weight");
            tensors.push((name, StoredType::BF16, vec![cols], bytes));
        }
        // The norm of a layer that is not converted would have no meaning.
        tensors.retain(|t| t.0 != format!("{down}.rms_norm.weight"));
    };
    let source = changed(&fixture("a1_bf16"), add_norms, |c| {
        c["quantization_config"]["modules_to_not_convert"] = json!([down, "lm_head"]);
        c["quantization_config"]["use_rms_norm"] = json!(true);
    });
    let dir = tempfile::tempdir().unwrap();
    let tokens = Expected::load("a1_bf16").ids(1);
    let first = logits(source.path(), &tokens);
    for (i, form) in FORMS.into_iter().enumerate() {
        let target = dir.path().join(i.to_string());
        let summary = to(source.path(), &target, form).unwrap();
        assert_eq!(summary.verified.matrices, 13);
        let kept = Checkpoint::open(&target).unwrap();
        assert_eq!(kept.tensor(&format!("{down}.weight")).unwrap().info.dtype, StoredType::BF16);
        assert!(!kept.contains(&format!("{down}.weight_scale")));
        assert!(kept.contains("model.layers.1.self_attn.q_proj.rms_norm.weight"));
        assert_eq!(logits(&target, &tokens), first, "{form:?}");
    }
    // Codes as plain numbers with a scale.
    let packed = ternary(&fixture("a1_packed"));
    let names = (0..2).flat_map(|layer| config(&fixture("a1_packed")).linears(layer));
    let unpack = |tensors: &mut Vec<Stored>| {
        for ((name, rows, cols), w) in names.zip(&packed) {
            let all = (0..rows * cols).map(|i| f32::from(w.weight(i / cols, i % cols)));
            let t = find(tensors, &format!("{name}.weight"));
            (t.1, t.2, t.3) =
                (StoredType::BF16, vec![rows, cols], all.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect());
        }
    };
    let unpacked = changed(&fixture("a1_packed"), unpack, |_| ());
    let target = dir.path().join("packed");
    to(unpacked.path(), &target, FORMS[0]).unwrap();
    assert_eq!(ternary(&target), packed);
}

#[test]
fn dense_values_are_the_same_model_as_far_as_their_type_holds_the_scale() {
    for name in FIXTURES {
        let source = fixture(name);
        let want = ternary(&source);
        let tokens = Expected::load(name).ids(1);
        let first = logits(&source, &tokens);
        let dir = tempfile::tempdir().unwrap();
        for (dtype, most) in [(DenseType::F32, 0.0), (DenseType::BF16, 1.0 / 256.0), (DenseType::F16, 1.0 / 2048.0)] {
            let context = format!("{name} as {dtype}");
            let target = dir.path().join(dtype.name());
            let v = to(&source, &target, Form::Dense(dtype)).unwrap().verified;
            assert_eq!(codes(&ternary(&target)), codes(&want), "{context}");
            assert!(v.largest_difference <= most && (v.inexact_scales == 0) == (v.largest_difference == 0.0), "{v:?}");
            assert_eq!(config(&target).quantization.mode, Mode::Dequantized, "{context}");
            let json: Value = serde_json::from_slice(&std::fs::read(target.join("config.json")).unwrap()).unwrap();
            assert!(json.get("quantization_config").is_none(), "{context}");
            let types = ["float32", "bfloat16", "float16"];
            let said = json.get("dtype").or(json.get("torch_dtype")).unwrap().as_str().unwrap();
            assert!(types.contains(&said), "{said}");
            let checkpoint = Checkpoint::open(&target).unwrap();
            let weight = checkpoint.tensor("model.layers.0.mlp.up_proj.weight").unwrap();
            assert_eq!((weight.info.dtype, weight.info.shape.len()), (dtype.stored(), 2), "{context}");
            if v.inexact_scales == 0 {
                assert_eq!(bits(&ternary(&target)), bits(&want), "{context}");
                assert_eq!(logits(&target, &tokens), first, "{context}");
            }
            // From values back to codes.
            let again = dir.path().join(format!("{dtype}-packed"));
            to(&target, &again, FORMS[0]).unwrap();
            assert_eq!(bits(&ternary(&again)), bits(&ternary(&target)), "{context}");
        }
    }
}

#[test]
fn dense_values_that_would_be_another_model_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |source: &Path, form: Form, words: &[&str]| {
        let err = to(source, &dir.path().join("out"), form).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(err.contains(word), "no {word:?} in {err}"));
        assert!(listing(dir.path()).is_empty());
    };
    let dense = Form::Dense(DenseType::F16);
    // 2⁻²⁰ is no normal f16.
    let small = |t: &mut Vec<Stored>| find(t, "model.layers.0.mlp.up_proj.weight_scale").3 = vec![0x80, 0x35];
    let source = changed(&fixture("a1_packed"), small, |_| ());
    refused(source.path(), dense, &["up_proj.weight", "out of range for f16"]);
    let unconverted = |c: &mut Value| {
        c["quantization_config"]["modules_to_not_convert"] = json!(["model.layers.0.mlp.down_proj"]);
    };
    let source = changed(&fixture("a1_bf16"), |_| (), unconverted);
    refused(source.path(), dense, &["config.json", "modules_to_not_convert", "down_proj", "safetensors"]);
    // Masters without a configuration are no ternary values.
    let bare = |c: &mut Value| drop(c.as_object_mut().unwrap().remove("quantization_config"));
    let source = changed(&fixture("a1_bf16"), |_| (), bare);
    refused(source.path(), FORMS[0], &["q_proj.weight", "not ternary", "quantization_config"]);
}

#[test]
fn matrices_of_zeros_and_almost_of_zeros_are_the_same_model() {
    let edit = |tensors: &mut Vec<Stored>| {
        find(tensors, "model.layers.0.self_attn.q_proj.weight").3.fill(0x55);
        let few = &mut find(tensors, "model.layers.1.mlp.down_proj.weight").3;
        few.fill(0x55);
        few[1000] = 0x56;
        // Every weight ±1, in a matrix of 8192: nothing of bf16 has room for the exact mean.
        find(tensors, "model.layers.0.self_attn.k_proj.weight").3.fill(0x82);
    };
    let dir = tempfile::tempdir().unwrap();
    let packed = dir.path().join("packed");
    to(&fixture("a1_bf16"), &packed, FORMS[1]).unwrap();
    let source = changed(&packed, edit, |_| ());
    let tokens = Expected::load("a1_packed").ids(1);
    let first = logits(source.path(), &tokens);
    let masters = dir.path().join("masters");
    let summary = to(source.path(), &masters, Form::Masters).unwrap();
    assert_eq!(summary.verified.inexact_scales, 0);
    assert_eq!(summary.f32_masters, 1, "{summary:?}");
    assert_eq!(codes(&ternary(&masters)), codes(&ternary(source.path())));
    assert_eq!(logits(&masters, &tokens), first);
}

#[test]
fn damage_is_found_by_reading_back() {
    let dir = tempfile::tempdir().unwrap();
    let (good, source) = (dir.path().join("good"), fixture("a1_bf16"));
    let made = to(&source, &good, FORMS[0]).unwrap();
    assert_eq!(verify(&source, &good).unwrap(), made.verified);
    assert_eq!(made.verified, Verified { matrices: 14, tensors: 10, ..Verified::default() });
    type Damage = fn(&mut Vec<Stored>);
    let query = "model.layers.0.self_attn.q_proj.weight";
    let cases: &[(Damage, &[&str])] = &[
        (
            // Row 96 + 3 of column 5: the highest two bits.
            |t| {
                let byte = &mut find(t, "model.layers.0.self_attn.q_proj.weight").3[3 * 128 + 5];
                *byte = *byte & 0x3f | if *byte >> 6 == 0 { 0x40 } else { 0 };
            },
            &[query, "row 99, column 5"],
        ),
        (|t| find(t, "model.layers.1.mlp.up_proj.weight_scale").3[2] ^= 1, &["up_proj.weight", "scaled by"]),
        (|t| find(t, "model.norm.weight").3[40] ^= 1, &["model.norm.weight", "byte 40"]),
        (|t| find(t, "model.embed_tokens.weight").3[98_000] ^= 4, &["model.embed_tokens.weight", "byte 98000"]),
        (|t| t.retain(|t| t.0 != "model.norm.weight"), &["model.norm.weight", "missing"]),
        (
            |t| {
                let mut extra = t[0].clone();
                extra.0 = "lm_head.weight".into();
                t.push(extra);
            },
            &["lm_head.weight", "not in the source"],
        ),
    ];
    for (damage, words) in cases {
        let bad = changed(&good, damage, |_| ());
        let err = verify(&source, bad.path()).unwrap_err().to_string();
        for word in *words {
            assert!(err.contains(word), "no {word:?} in {err}");
        }
        assert!(err.contains(bad.path().to_str().unwrap()), "{err}");
    }
    let other = changed(&good, |_| (), |c| c["rope_theta"] = json!(10_000.0));
    let err = verify(&source, other.path()).unwrap_err().to_string();
    assert!(err.contains("config.json") && err.contains("another model"), "{err}");
    // Masters on both sides are compared byte by byte: there is more in them than codes.
    let masters = changed(&source, |t| find(t, "model.layers.0.mlp.up_proj.weight").3[0] ^= 1, |_| ());
    assert!(verify(&source, masters.path()).is_err());
}

#[test]
fn bad_sources_are_refused_and_leave_nothing() {
    type Damage = fn(&mut Vec<Stored>);
    let cases: &[(&str, Form, Damage, &[&str])] = &[
        (
            "a1_packed",
            FORMS[1],
            |t| find(t, "model.layers.1.mlp.gate_proj.weight").3[7] = 0xff,
            &["gate_proj", "code 3"],
        ),
        (
            "a1_packed",
            FORMS[0],
            |t| t.retain(|t| t.0 != "model.layers.1.mlp.down_proj.weight_scale"),
            &["down_proj.weight_scale", "missing"],
        ),
        ("a1_packed", FORMS[0], |t| t.retain(|t| t.0 != "model.norm.weight"), &["model.norm.weight", "missing"]),
        (
            "a1_packed",
            FORMS[0],
            |t| find(t, "model.norm.weight").0 = "model.other".into(),
            &["model.other", "no meaning"],
        ),
        (
            "a1_bf16",
            FORMS[0],
            |t| find(t, "model.layers.0.mlp.up_proj.weight").3[..2].copy_from_slice(&[0xc0, 0x7f]),
            &["up_proj.weight", "NaN"],
        ),
        (
            "a1_packed",
            FORMS[2],
            // 2⁻²⁰, below what the quantiser of masters gives.
            |t| find(t, "model.layers.0.mlp.up_proj.weight_scale").3 = vec![0x80, 0x35],
            &["up_proj.weight", "no masters", "packed"],
        ),
    ];
    for (name, form, damage, words) in cases {
        let source = changed(&fixture(name), damage, |_| ());
        let dir = tempfile::tempdir().unwrap();
        let err = to(source.path(), &dir.path().join("out"), *form).unwrap_err();
        assert!(matches!(err, Error::Tensor { .. }), "{err}");
        for word in *words {
            assert!(err.to_string().contains(word), "no {word:?} in {err}");
        }
        assert!(listing(dir.path()).is_empty());
    }
    let source = changed(&fixture("a1_packed"), |_| (), |_| ());
    let weights = source.path().join("model.safetensors");
    std::fs::write(&weights, &std::fs::read(&weights).unwrap()[..150_000]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let err = to(source.path(), &dir.path().join("out"), FORMS[0]).unwrap_err().to_string();
    assert!(err.contains("model.safetensors") && listing(dir.path()).is_empty(), "{err}");
}

#[test]
fn features_that_cannot_be_packed_are_named() {
    let narrow = |tensors: &mut Vec<Stored>| {
        for t in tensors {
            let (rows, cols) = (t.2[0], t.2.get(1).copied());
            if t.0.contains("gate_proj") || t.0.contains("up_proj") || t.0.contains("ffn_sub_norm") {
                t.3.truncate(2 * 342 * cols.unwrap_or(1));
                t.2[0] = 342;
            } else if t.0.contains("down_proj") {
                t.3 = (0..rows).flat_map(|r| t.3[2 * 344 * r..][..2 * 342].to_vec()).collect();
                t.2[1] = 342;
            }
        }
    };
    let source = changed(&fixture("a1_bf16"), narrow, |c| c["intermediate_size"] = json!(342));
    let dir = tempfile::tempdir().unwrap();
    let err = to(source.path(), &dir.path().join("a"), FORMS[0]).unwrap_err().to_string();
    assert!(err.contains("gate_proj.weight") && err.contains("342") && err.contains("multiple of 4"), "{err}");
    to(source.path(), &dir.path().join("b"), Form::Masters).unwrap();
}

#[test]
fn what_is_there_already_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |target: &Path, word: &str| {
        let before = std::fs::read_dir(target).map(|_| listing(target)).unwrap_or_default();
        let err = to(&fixture("a1_packed"), target, FORMS[0]).unwrap_err();
        assert!(matches!(err, Error::Request { .. }) && err.to_string().contains(word), "{err}");
        assert_eq!(std::fs::read_dir(target).map(|_| listing(target)).unwrap_or_default(), before);
    };
    for name in ["config.json", "model-00001-of-00002.safetensors", "x.gguf"] {
        let target = dir.path().join(name.replace('.', "_"));
        std::fs::create_dir(&target).unwrap();
        std::fs::write(target.join(name), "x").unwrap();
        refused(&target, name);
    }
    refused(&fixture("a1_packed"), "already holds");
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    refused(&file, "not a directory");
    // A file of the user's that would be replaced.
    let source = changed(&fixture("a1_packed"), |_| (), |_| ());
    std::fs::write(source.path().join("README.md"), "theirs").unwrap();
    let target = dir.path().join("mine");
    std::fs::create_dir(&target).unwrap();
    std::fs::write(target.join("README.md"), "mine").unwrap();
    let err = to(source.path(), &target, FORMS[0]).unwrap_err();
    assert!(matches!(&err, Error::Request { .. }) && err.to_string().contains("README.md"), "{err}");
    assert_eq!(
        (listing(&target), std::fs::read_to_string(target.join("README.md")).unwrap()),
        (vec!["README.md".to_owned()], "mine".to_owned())
    );
    // Anything else may be there.
    std::fs::rename(target.join("README.md"), target.join("notes.txt")).unwrap();
    to(source.path(), &target, FORMS[0]).unwrap();
    assert!(target.join("notes.txt").exists());
}

#[test]
fn a_conversion_that_is_stopped_leaves_nothing() {
    let mut steps = Vec::new();
    let dir = tempfile::tempdir().unwrap();
    convert(&fixture("a1_packed"), &dir.path().join("all"), Form::Masters, &mut |p: Progress| {
        steps.push(p);
        ControlFlow::Continue(())
    })
    .unwrap();
    for phase in [Phase::Reading, Phase::Writing, Phase::Verifying] {
        let of: Vec<&Progress> = steps.iter().filter(|p| p.phase == phase).collect();
        assert!(of.is_sorted_by_key(|p| p.done) && of[0].done == 0 && of[0].total > 50_000, "{phase:?}");
        assert_eq!(of.last().unwrap().done, of[0].total, "{phase:?}");
        assert!(of.iter().all(|p| p.total == of[0].total));
    }
    for stop in [0, 5, steps.len() / 3, steps.len() / 2, steps.len() - 3, steps.len() - 1] {
        let mut left = stop;
        let target = dir.path().join("stopped");
        let result = convert(&fixture("a1_packed"), &target, Form::Masters, &mut |_| match left.checked_sub(1) {
            Some(less) => {
                left = less;
                ControlFlow::Continue(())
            }
            None => ControlFlow::Break(()),
        });
        let err = result.unwrap_err();
        assert!(matches!(err, Error::Io { .. }) && err.to_string().contains("stopped"), "{stop}: {err}");
        assert!(!target.exists(), "{stop}");
    }
}

/// Not a test of its own: the process that the next one starts, and that kills itself.
#[test]
fn killed_in_the_middle() {
    let Ok(at) = std::env::var("CONVERT_ABORTS_AT") else { return };
    let mut left: usize = at.parse().unwrap();
    let target = std::env::var("CONVERT_TARGET").unwrap();
    let _ = convert(&fixture("a1_packed"), Path::new(&target), Form::Masters, &mut |_| {
        left = left.checked_sub(1).unwrap_or_else(|| std::process::abort());
        ControlFlow::Continue(())
    });
}

#[test]
fn a_killed_conversion_leaves_no_checkpoint_and_can_be_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out");
    for at in [1, 3, 20, 40] {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "killed_in_the_middle"])
            .env("CONVERT_ABORTS_AT", at.to_string())
            .env("CONVERT_TARGET", &target)
            .output()
            .unwrap()
            .status;
        assert!(!status.success(), "{at}");
        let left = if target.exists() { listing(&target) } else { Vec::new() };
        assert!(left.iter().all(|name| name.starts_with('.')), "{left:?}");
        assert!(Checkpoint::open(&target).is_err());
    }
    assert!(!listing(&target).is_empty(), "a killed process cannot clean up");
    to(&fixture("a1_packed"), &target, FORMS[0]).unwrap();
    assert_eq!(ternary(&target), ternary(&fixture("a1_packed")));
}
