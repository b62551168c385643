//! GGUF files that this crate writes: the same model, the same tokenizer, the same texts; byte by byte what ggml documents
//! (scripts/gguf_check.py compares with its own package).

use super::{decoder, logits};
use crate::common::{Expected, fixture};
use candle_bitnet::Error;
use candle_bitnet::backend::cpu::KernelKind;
use candle_bitnet::checkpoint::gguf::{GgmlType, Gguf, Value};
use candle_bitnet::checkpoint::{Checkpoint, ModelFiles, ScaleStyle, StoredType};
use candle_bitnet::generate::GenerationDefaults;
use candle_bitnet::model::convert::{Form, GgufType, Options, Summary, convert};
use candle_bitnet::ternary::I2sLayout;
use candle_bitnet::text::{ChatTemplate, Message, Tokenizer};
use serde_json::{Value as Json, json};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

const I2_S: GgufType = GgufType::I2_S(I2sLayout::Blocks128);
const TYPES: [GgufType; 5] =
    [I2_S, GgufType::I2_S(I2sLayout::Blocks64), GgufType::I2_S(I2sLayout::Rows4), GgufType::TQ2_0, GgufType::TQ1_0];

fn to(source: &ModelFiles, target: &Path, options: impl Into<Options>) -> candle_bitnet::Result<Summary> {
    convert(source, target, options, &mut |_| ControlFlow::Continue(()))
}

/// The file, with the layout that it does not tell.
fn files(path: &Path, kind: GgufType) -> ModelFiles {
    let layout = match kind {
        GgufType::I2_S(layout) => Some(layout),
        _ => None,
    };
    ModelFiles::from(path).with_i2s_layout(layout).unwrap()
}

fn some_logits(files: &ModelFiles) -> Vec<Vec<f32>> {
    logits(&decoder(files, KernelKind::available()[0]).unwrap(), &[1, 5, 200, 3, 77, 12, 300, 9])
}

/// A checkpoint whose files can be changed.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        if !path.file_name().unwrap().to_str().unwrap().starts_with("expected") {
            std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    dir
}

fn edit(path: PathBuf, change: impl FnOnce(&mut Json)) {
    let mut json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

#[test]
fn every_type_of_every_family_is_the_same_model_and_back() {
    for (name, arch) in [("a1_packed", "bitnet-b1.58"), ("a1_bf16", "bitnet-b1.58"), ("a3_llama", "llama")] {
        let source = ModelFiles::from(&fixture(name));
        let want = some_logits(&source);
        for kind in TYPES {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("model.gguf");
            let blocks = !matches!(kind, GgufType::I2_S(_));
            if blocks && name.starts_with("a1") {
                // 128 columns.
                let err = to(&source, &file, Form::Gguf(kind)).unwrap_err();
                assert!(matches!(err, Error::Tensor { .. }), "{err}");
                for part in ["q_proj.weight", "128 columns", "256", "i2_s"] {
                    assert!(err.to_string().contains(part), "{part}: {err}");
                }
                assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
                continue;
            }
            let summary = to(&source, &file, Form::Gguf(kind)).unwrap();
            let v = summary.verified;
            assert_eq!((v.matrices, v.inexact_scales, v.rounded_tensors), (14, 0, 0), "{name} {kind:?}");
            assert_eq!((summary.files, summary.f32_masters), (vec!["model.gguf".to_owned()], 0));
            let written = files(&file, kind);
            assert_eq!(written.gguf().unwrap().unwrap().architecture().unwrap().name(), arch);
            assert!(some_logits(&written) == want, "{name} {kind:?}");
            // From there to any other type, and to safetensors.
            for again in TYPES {
                if matches!(again, GgufType::I2_S(_)) || !name.starts_with("a1") {
                    let other = dir.path().join("again.gguf");
                    assert_eq!(to(&written, &other, Form::Gguf(again)).unwrap().verified, v);
                    assert!(some_logits(&files(&other, again)) == want, "{name} {kind:?} to {again:?}");
                    std::fs::remove_file(other).unwrap();
                }
            }
            let packed = dir.path().join("packed");
            to(&written, &packed, Form::Packed(ScaleStyle::Multiply)).unwrap();
            assert!(some_logits(&ModelFiles::from(&packed)) == want, "{name} {kind:?} to packed");
        }
    }
}

#[test]
fn files_of_others_keep_their_metadata_and_pass() {
    let expected = Expected::load("gguf_a1");
    let source = ModelFiles::from(&fixture("gguf_a1").join(super::FILES[0]));
    let before = source.gguf().unwrap().unwrap();
    for kind in TYPES {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        to(&source, &path, Form::Gguf(kind)).unwrap();
        let written = files(&path, kind);
        let model = decoder(&written, KernelKind::available()[0]).unwrap();
        let got: Vec<_> = (0..expected.prompts()).map(|i| logits(&model, &expected.ids(i))).collect();
        expected.judge(&got).unwrap_or_else(|e| panic!("{kind:?}: {e}"));
        let after = Gguf::open(&path).unwrap();
        for (key, value) in &before.header().metadata {
            let storage = ["general.file_type", "general.quantization_version", "general.alignment"];
            if storage.contains(&key.as_str()) {
                continue;
            }
            match (value, after.get(key).unwrap()) {
                (Value::Text(_), _) => assert_eq!(before.text(key).unwrap(), after.text(key).unwrap()),
                (Value::Array(a), Value::Array(b)) => {
                    assert_eq!(before.file().bytes()[a.range.clone()], after.file().bytes()[b.range.clone()]);
                }
                (a, b) => assert_eq!(a, b, "{key}"),
            }
        }
        // The types that files of this kind have, and those tensors that the source repeats for nothing.
        let types: Vec<StoredType> = after.header().tensors.iter().map(|t| t.dtype).collect();
        assert!(types.contains(&StoredType::Ggml(kind.ggml())) && types.contains(&StoredType::F16));
        // llama.cpp numbers them.
        let number = match kind {
            GgufType::TQ1_0 => 36,
            GgufType::TQ2_0 => 37,
            GgufType::I2_S(_) => 40,
        };
        assert_eq!(after.get("general.file_type"), Some(&Value::Unsigned(number)));
    }
}

#[test]
fn tokenizer_template_and_defaults_come_along() {
    let messages = [Message::user("Why is the sky blue?"), Message::assistant("It is."), Message::user("Yes")];
    let shakespeare = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/shakespeare");
    for dir in [fixture("a1_packed"), fixture("a3_llama"), shakespeare] {
        let source = ModelFiles::from(&dir);
        let out = tempfile::tempdir().unwrap();
        let path = out.path().join("m.gguf");
        let summary = to(&source, &path, Form::Gguf(I2_S)).unwrap();
        let absorbed = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"];
        assert!(
            summary.copied.is_empty() && !summary.left.iter().any(|f| absorbed.contains(&f.as_str())),
            "{summary:?}"
        );
        let written = ModelFiles::from(&path);
        let [had, has] = [&source, &written].map(|f| Tokenizer::open(f).unwrap());
        for text in ["Hello, <|eot_id|> wörld 123", "I'll  go\n\nto 12345", "<|begin_of_text|>x"] {
            for special in [false, true] {
                assert_eq!(has.encode(text, special).unwrap(), had.encode(text, special).unwrap(), "{text:?}");
            }
        }
        assert_eq!((has.bos_id(), has.eos_id(), has.adds_bos()), (had.bos_id(), had.eos_id(), had.adds_bos()));
        let [old, new] = [(&source, &had), (&written, &has)].map(|(files, tokenizer)| {
            let template = ChatTemplate::open(files).unwrap();
            let prompt = template.as_ref().map(|t| t.apply(tokenizer, &messages, true).unwrap());
            (prompt, GenerationDefaults::open(files, tokenizer, template.as_ref()).unwrap())
        });
        assert_eq!(old.0, new.0);
        let (old, new) = (old.1, new.1);
        assert_eq!((&old.eos, old.do_sample, old.temperature), (&new.eos, new.do_sample, new.temperature));
        assert_eq!((old.top_k, old.top_p, old.min_p), (new.top_k, new.top_p, new.min_p));
        assert_eq!(old.repetition_penalty, new.repetition_penalty);
    }
}

#[test]
fn vocabularies_that_are_larger_than_the_tokenizer_are_filled_up() {
    let dir = copy("a1_packed");
    edit(dir.path().join("tokenizer.json"), |t| {
        t["added_tokens"].as_array_mut().unwrap().retain(|a| a["id"] != 383);
    });
    edit(dir.path().join("generation_config.json"), |c| c["eos_token_id"] = json!(375));
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("m.gguf");
    to(&ModelFiles::from(dir.path()), &path, Form::Gguf(I2_S)).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    let tokens: Vec<String> =
        gguf.strings("tokenizer.ggml.tokens").unwrap().unwrap().map(|t| t.unwrap().to_owned()).collect();
    assert_eq!((tokens.len(), tokens[383].as_str()), (384, "[PAD383]"));
    assert_eq!(gguf.numbers("tokenizer.ggml.token_type").unwrap().unwrap()[383], 5.0);
}

/// What a GGUF file cannot say is refused by name, and nothing is written.
#[test]
fn what_gguf_cannot_say_is_named() {
    type Change = fn(&mut Json);
    let cases: &[(&str, Change, &[&str])] = &[
        ("config.json", |c| c["hidden_act"] = json!("silu"), &[]),
        ("config.json", |c| c["rope_theta"] = json!(16_777_217.0), &["rope_theta", "16777217", "f32"]),
        (
            "config.json",
            |c| c["quantization_config"]["modules_to_not_convert"] = json!(["mlp.down_proj"]),
            &["down_proj", "modules_to_not_convert"],
        ),
        ("generation_config.json", |c| c["eos_token_id"] = json!([375, 376, 377, 378]), &["eos_token_id", "4 tokens"]),
        ("tokenizer.json", |t| t["normalizer"] = json!({"type": "NFC"}), &["tokenizer.json", "normalises"]),
        (
            "tokenizer.json",
            |t| t["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("a+"),
            &["tokenizer.json", "cuts words"],
        ),
        ("tokenizer.json", |t| t["added_tokens"][3]["lstrip"] = json!(true), &["tokenizer.json", "lstrip"]),
        (
            "tokenizer.json",
            |t| {
                let mut more = t["added_tokens"][9].clone();
                (more["id"], more["content"]) = (json!(384), json!("<|more|>"));
                t["added_tokens"].as_array_mut().unwrap().push(more);
            },
            &["tokenizer.json", "384"],
        ),
        ("tokenizer.json", |t| t["post_processor"] = Json::Null, &[]),
    ];
    for (file, change, words) in cases {
        let dir = copy("a1_packed");
        edit(dir.path().join(file), change);
        let out = tempfile::tempdir().unwrap();
        let path = out.path().join("m.gguf");
        let result = to(&ModelFiles::from(dir.path()), &path, Form::Gguf(I2_S));
        if words.is_empty() {
            result.unwrap();
            continue;
        }
        let err = result.unwrap_err().to_string();
        for word in *words {
            assert!(err.contains(word), "no {word:?} in {err}");
        }
        assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0, "{err}");
    }
}

#[test]
fn targets_are_new_files_that_end_in_gguf() {
    let source = ModelFiles::from(&fixture("a1_packed"));
    let dir = tempfile::tempdir().unwrap();
    let refused = |target: &Path, form: Form, word: &str| {
        let err = to(&source, target, form).unwrap_err();
        assert!(matches!(err, Error::Request { .. }) && err.to_string().contains(word), "{err}");
    };
    let path = |name: &str| dir.path().join(name);
    refused(&path("model"), Form::Gguf(I2_S), ".gguf");
    refused(&path("model.gguf"), Form::Masters, "directory");
    refused(&path("gone/model.gguf"), Form::Gguf(I2_S), "no directory");
    std::fs::write(path("there.gguf"), "mine").unwrap();
    refused(&path("there.gguf"), Form::Gguf(I2_S), "already there");
    assert_eq!(std::fs::read(path("there.gguf")).unwrap(), b"mine");
    // One that is stopped leaves nothing, wherever it is.
    let mut steps = 0;
    convert(&source, &path("all.gguf"), Form::Gguf(I2_S), &mut |_| {
        steps += 1;
        ControlFlow::Continue(())
    })
    .unwrap();
    for stop in [0, 1, steps / 3, steps / 2, steps - 2] {
        let mut left = stop;
        let err = convert(&source, &path("stopped.gguf"), Form::Gguf(I2_S), &mut |_| {
            left -= 1;
            if left < 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap_err();
        assert!(err.to_string().contains("stopped"), "{err}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "{stop} of {steps}");
    }
}

#[test]
fn heads_of_every_type_are_written_and_read() {
    let source = ModelFiles::from(&fixture("a3_llama"));
    let dense = |head| Options { form: Form::Gguf(GgufType::TQ2_0), head: Some(head) };
    let want = some_logits(&source);
    let rms = |got: &[Vec<f32>]| {
        let pairs = || want.iter().flatten().zip(got.iter().flatten());
        let error: f64 = pairs().map(|(a, b)| f64::from(a - b).powi(2)).sum();
        (error / pairs().map(|(a, _)| f64::from(*a).powi(2)).sum::<f64>()).sqrt()
    };
    for (head, rounded, most) in [
        (StoredType::F32, 0, 0.0),
        (StoredType::BF16, 0, 0.0),
        (StoredType::F16, 2, 1e-3),
        (StoredType::Ggml(GgmlType::Q8_0), 2, 0.02),
        (StoredType::Ggml(GgmlType::Q6_K), 2, 0.05),
        (StoredType::Ggml(GgmlType::Q4_0), 2, 0.3),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let v = to(&source, &path, dense(head)).unwrap().verified;
        // F16 holds what is not tiny.
        assert!(v.rounded_tensors <= rounded && v.largest_error <= most, "{head}: {v:?}");
        assert!((v.rounded_tensors > 0) == (v.largest_error > 0.0), "{head}: {v:?}");
        let written = ModelFiles::from(&path);
        for name in ["model.embed_tokens.weight", "lm_head.weight"] {
            assert_eq!(Checkpoint::open(&written).unwrap().tensor(name).unwrap().info.dtype, head);
        }
        let got = some_logits(&written);
        assert!(rms(&got) <= most, "{head}: {}", rms(&got));
        // In safetensors, a block type is what loading makes of it: the same logits.
        let packed = dir.path().join("packed");
        let summary = to(&written, &packed, Form::Packed(ScaleStyle::Multiply)).unwrap();
        let kept = Checkpoint::open(&packed).unwrap().tensor("lm_head.weight").unwrap().info.dtype;
        let is_block = matches!(head, StoredType::Ggml(_));
        assert_eq!(kept, if is_block { StoredType::BF16 } else { head });
        assert_eq!(summary.verified.rounded_tensors, if is_block { 2 } else { 0 });
        assert!(some_logits(&ModelFiles::from(&packed)) == got, "{head}");
    }
    let out = tempfile::tempdir().unwrap();
    let bad = |options: Options, name: &str| to(&source, &out.path().join(name), options).unwrap_err().to_string();
    let q8 = StoredType::Ggml(GgmlType::Q8_0);
    let err = bad(Options { form: Form::Masters, head: Some(q8) }, "m");
    assert!(err.contains("--head") && err.contains("Q8_0"), "{err}");
    let err = bad(dense(StoredType::Ggml(GgmlType::IQ2_S)), "m.gguf");
    assert!(err.contains("--head") && err.contains("IQ2_S"), "{err}");
    // Rows of 128 are half a block.
    let a1 = ModelFiles::from(&fixture("a1_packed"));
    let options = Options { form: Form::Gguf(I2_S), head: Some(StoredType::Ggml(GgmlType::Q6_K)) };
    let err = to(&a1, &out.path().join("m.gguf"), options).unwrap_err().to_string();
    assert!(err.contains("embed_tokens") && err.contains("128") && err.contains("--head"), "{err}");
}

#[test]
fn values_beyond_f16_are_refused_and_not_made_infinite() {
    let dir = copy("a1_packed");
    let weights = dir.path().join("model.safetensors");
    let at = Checkpoint::open(dir.path()).unwrap().tensor("model.embed_tokens.weight").unwrap().info.range.start;
    let mut bytes = std::fs::read(&weights).unwrap();
    bytes[at + 6..at + 8].copy_from_slice(&half::bf16::from_f32(1e6).to_le_bytes());
    std::fs::write(&weights, bytes).unwrap();
    let out = tempfile::tempdir().unwrap();
    let options = |head| Options { form: Form::Packed(ScaleStyle::Multiply), head: Some(head) };
    let source = ModelFiles::from(dir.path());
    let err = to(&source, &out.path().join("a"), options(StoredType::F16)).unwrap_err();
    assert!(matches!(err, Error::Tensor { .. }), "{err}");
    assert!(err.to_string().contains("embed_tokens") && err.to_string().contains("too large for F16"), "{err}");
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
    to(&source, &out.path().join("b"), options(StoredType::F32)).unwrap();
}
