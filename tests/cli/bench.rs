//! `bench` with `--sweep`, `--baseline` and `--preset`, and what `doctor` says of presets and energy.

use crate::{model, run};
use serde_json::Value;

/// The axis and value of each point.
fn points(json: &Value) -> Vec<(&str, u64)> {
    let points = json["points"].as_array().unwrap().iter();
    points.map(|p| (p["axis"].as_str().unwrap(), p["value"].as_u64().unwrap())).collect()
}

#[test]
fn a_sweep_measures_each_point_beside_its_bandwidth() {
    let (a2, dir) = (model("a2_packed_gqa_untied_sharded"), tempfile::tempdir().unwrap());
    let svg = dir.path().join("sweep.svg");
    let (axes, chart) = ("threads=1,2,context=24,batch=3,1", svg.to_str().unwrap());
    let args = ["bench", "-m", &a2, "--sweep", axes, "--pp", "8", "--tg", "4", "--reps", "1", "--chart", chart];
    let json = run(&[&args[..], &["--json"]].concat()).json();
    let expected = [("threads", 1), ("threads", 2), ("context", 24), ("batch", 1), ("batch", 3)];
    assert_eq!(points(&json), expected, "{json}");
    for point in json["points"].as_array().unwrap() {
        for key in ["decode_tps", "prefill_tps", "decode_gbps", "read_gbps", "decode_share", "resident_bytes"] {
            assert!(point[key].as_f64() > Some(0.0), "{key}: {point}");
        }
        assert!(point.get("skipped").is_none() && point.get("energy_unreadable").is_none(), "{point}");
    }
    let at = |i: usize, key: &str| json["points"][i][key].as_u64().unwrap();
    assert_eq!([at(0, "threads"), at(1, "threads"), at(4, "batch")], [1, 2, 3]);
    assert_eq!([at(2, "prefill_tokens"), at(2, "decode_tokens"), at(3, "prefill_tokens")], [20, 4, 8]);
    let drawn = std::fs::read_to_string(&svg).unwrap();
    assert!(drawn.starts_with("<svg ") && drawn.contains("memory gives") && !drawn.contains("NaN"), "{drawn}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "something was left behind");
    let text = run(&args).ok();
    for part in ["threads  prefill/s", "context  prefill/s", "batch  prefill/s", "resident MB", "J/token"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert_eq!(text.matches("energy ").count(), usize::from(json.get("energy_unreadable").is_some()), "{text}");
}

#[test]
fn a_sweep_chooses_its_values_and_bad_ones_are_named() {
    let a1 = model("a1_packed");
    let sweep = |axes: &'static str| vec!["bench", "-m", &a1, "--reps", "1", "--tg", "2", "--sweep", axes];
    let json = run(&[sweep("context"), vec!["--json"]].concat()).json();
    assert_eq!(points(&json), [("context", 128), ("context", 256), ("context", 512)], "{json}");
    run(&sweep("speed")).fails(2, &["--sweep", "\"speed\" is not one of threads, context, batch"]);
    run(&sweep("batch=64")).fails(2, &["--sweep", "batch 64 is not between 1 and 32"]);
    run(&sweep("context=513")).fails(2, &["--sweep", "context 513 is not between 2 and 512"]);
    run(&[sweep("batch"), vec!["--pp", "600"]].concat()).fails(2, &["--pp 600 and --tg 2", "512"]);
    run(&[sweep("batch"), vec!["--profile"]].concat()).fails(2, &["--sweep", "--profile"]);
    run(&["bench", "-m", &a1, "--chart", "x.svg"]).fails(2, &["--sweep"]);
    let gone = run(&[sweep("batch=1"), vec!["--chart", "/nonexistent/x.svg"]].concat());
    gone.fails(1, &["/nonexistent"]);
}

#[test]
#[cfg(not(feature = "baseline"))]
fn without_its_feature_the_dense_model_is_refused() {
    let a2 = model("a2_packed_gqa_untied_sharded");
    run(&["bench", "-m", &a2, "--baseline", "f32"]).fails(1, &["the dense baseline", "cargo's feature `baseline`"]);
}

#[test]
#[cfg(feature = "baseline")]
fn the_dense_model_of_the_same_shape_is_measured_too() {
    let a2 = model("a2_packed_gqa_untied_sharded");
    let args = ["bench", "-m", &a2, "--pp", "9", "--tg", "3", "--reps", "1", "--threads", "1", "--batch", "2"];
    let args = [&args[..], &["--baseline", "f32,bf16"]].concat();
    let json = run(&[&args[..], &["--json"]].concat()).json();
    let baselines = json["baselines"].as_array().unwrap();
    let parameters = run(&["inspect", &a2, "--json"]).json()["parameters"].as_u64().unwrap();
    for (baseline, (dtype, size)) in baselines.iter().zip([("f32", 4), ("bf16", 2)]) {
        assert_eq!((&baseline["dtype"], &baseline["threads"]), (&Value::from(dtype), &Value::from(1)));
        assert_eq!(baseline["weight_bytes"], size * parameters);
        let f = |key: &str| baseline[key].as_f64().unwrap();
        let ratio = f("weight_bytes") / json["weight_bytes"].as_f64().unwrap();
        assert!((f("weight_ratio") - ratio).abs() < 1e-9 && f("resident_bytes") > 0.0, "{baseline}");
        let faster = json["decode_tps"].as_f64().unwrap() / f("decode_tps");
        assert!((f("decode_speedup") - faster).abs() < 1e-9 && f("prefill_speedup") > 0.0, "{baseline}");
    }
    assert_eq!(baselines.len(), 2);
    let text = run(&args).ok();
    for part in ["against a dense model", "candle-transformers llama, f32, 1 thread", "ternary is ×", "instead of"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    run(&["bench", "-m", &a2, "--baseline", "f16"]).fails(2, &["--baseline", "f32, bf16"]);
    run(&["bench", "-m", &a2, "--baseline", "f32", "--sweep", "batch"]).fails(2, &["--baseline", "--sweep"]);
}

#[test]
fn a_preset_sets_what_no_flag_says() {
    let a1 = model("a1_packed");
    let bench = ["bench", "-m", &a1, "--pp", "4", "--tg", "2", "--reps", "1", "--json"];
    let cloud = run(&[&bench[..], &["--preset", "cloud"]].concat()).json();
    assert_eq!((&cloud["batch"], &cloud["kv_type"]), (&Value::from(32), &Value::from("f16")));
    let flags = ["--preset", "cloud", "--batch", "2", "--kv-type", "bf16", "--threads", "1"];
    let json = run(&[&bench[..], &flags].concat()).json();
    let set = (&json["batch"], &json["kv_type"], &json["threads"]);
    assert_eq!(set, (&Value::from(2), &Value::from("bf16"), &Value::from(1)));
    assert_eq!(cloud["head"], "bf16");
    let int8 = run(&[&bench[..], &["--preset", "mobile", "--head", "int8"]].concat()).json();
    assert!(int8["head"].as_str().unwrap().starts_with("int8"), "{int8}");
    // The model has 512 positions, fewer than the preset prepares for; that is no error.
    let mobile = run(&["generate", "-m", &a1, "-p", "Hello", "-n", "2", "--preset", "mobile", "--json"]).json();
    assert!(mobile["generated_tokens"].as_u64() > Some(0), "{mobile}");
    run(&["bench", "-m", &a1, "--preset", "2b4t"])
        .fails(2, &["--preset", "mobile, edge, server, cloud", "--synthetic"]);
}

#[test]
fn doctor_explains_presets_and_energy() {
    let json = run(&["doctor", "--json"]).json();
    let presets = json["presets"].as_array().unwrap();
    let fitting: Vec<&Value> = presets.iter().filter(|p| p["fits"] == true).collect();
    assert_eq!((presets.len(), fitting.len()), (4, 1));
    assert!(json["preset_that_fits"].as_str().unwrap().contains(fitting[0]["name"].as_str().unwrap()), "{json}");
    assert_ne!(json["energy_packages"].is_null(), json.get("energy_unreadable").is_none(), "{json}");
    let mobile = run(&["doctor", "--preset", "mobile", "--json"]).json();
    assert_eq!(mobile["threads"], presets[0]["threads"]);
    let text = run(&["doctor"]).ok();
    for part in ["presets (", "* ", "mobile", "cloud", "energy   "] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}
