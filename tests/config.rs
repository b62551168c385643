//! `config.json`: what the fixtures say, and hostile or unsupported files, each refused by the key at fault.

use candle_bitnet::Error;
use candle_bitnet::checkpoint::ScaleStyle;
use candle_bitnet::model::config::{Activation, Family, Mode, ModelConfig, Projection};
use std::path::Path;

fn parse(text: &str) -> candle_bitnet::Result<ModelConfig> {
    ModelConfig::parse(Path::new("dir/config.json"), text)
}

fn fixture(name: &str) -> ModelConfig {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name).join("config.json");
    ModelConfig::parse(&path, &std::fs::read_to_string(&path).unwrap()).unwrap()
}

#[test]
fn fixtures_are_understood() {
    let a1 = fixture("a1_packed");
    assert_eq!((a1.family, a1.activation, a1.sub_norms), (Family::BitNet, Activation::Relu2, true));
    assert_eq!((a1.hidden_size, a1.intermediate_size, a1.num_layers), (128, 344, 2));
    assert_eq!((a1.num_heads, a1.num_kv_heads, a1.head_dim, a1.vocab_size), (4, 2, 32, 384));
    assert_eq!((a1.rms_norm_eps, a1.rope_theta, a1.tied_embeddings, a1.max_positions), (1e-5, 500_000.0, true, 512));
    assert_eq!((a1.quantization.mode, a1.quantization.scale_style), (Mode::Offline, ScaleStyle::Multiply));
    assert_eq!((a1.bos_token, &a1.eos_tokens[..]), (Some(374), &[375][..]));
    assert_eq!(fixture("a1_bf16").quantization.mode, Mode::Online);

    let a2 = fixture("a2_packed_gqa_untied_sharded");
    assert_eq!((a2.rope_theta, a2.tied_embeddings, a2.num_kv_heads), (500_000.0, false, 1), "rope_parameters");

    let a3 = fixture("a3_llama");
    assert_eq!((a3.family, a3.activation, a3.sub_norms), (Family::Llama, Activation::Silu, false));
    assert_eq!(a3.quantization.scale_style, ScaleStyle::Divide);
    for config in [a1, a2, a3] {
        assert_eq!(parse(&config.to_json()).unwrap(), config);
    }
}

/// A minimal valid configuration with `edits` (key, JSON text or "" to remove) applied at the top level.
fn with(edits: &[(&str, &str)]) -> String {
    let mut fields: Vec<(&str, &str)> = vec![
        ("architectures", r#"["BitNetForCausalLM"]"#),
        ("hidden_size", "128"),
        ("intermediate_size", "256"),
        ("num_hidden_layers", "2"),
        ("num_attention_heads", "4"),
        ("num_key_value_heads", "2"),
        ("vocab_size", "512"),
        ("max_position_embeddings", "1024"),
        ("quantization_config", r#"{"quant_method": "bitnet", "linear_class": "autobitlinear"}"#),
    ];
    for (key, value) in edits {
        fields.retain(|(k, _)| k != key);
        if !value.is_empty() {
            fields.push((key, value));
        }
    }
    let fields: Vec<_> = fields.iter().map(|(k, v)| format!("{k:?}: {v}")).collect();
    format!("{{{}}}", fields.join(", "))
}

#[test]
fn defaults_are_those_of_transformers() {
    let c = parse(&with(&[("max_position_embeddings", ""), ("num_key_value_heads", "")])).unwrap();
    assert_eq!((c.rms_norm_eps, c.rope_theta, c.max_positions, c.num_kv_heads), (1e-5, 500_000.0, 2048, 4));
    assert_eq!((c.tied_embeddings, c.bos_token, c.eos_tokens.len()), (false, None, 0));
    assert_eq!((c.quantization.use_rms_norm, c.quantization.rms_norm_eps), (false, 1e-6));
    let llama = parse(&with(&[("architectures", r#"["LlamaForCausalLM"]"#)])).unwrap();
    assert_eq!((llama.rms_norm_eps, llama.rope_theta, llama.activation), (1e-6, 10_000.0, Activation::Silu));
}

#[test]
fn explicit_values_win_and_unknown_keys_are_ignored() {
    let c = parse(&with(&[
        ("head_dim", "256"),
        ("eos_token_id", "[1, 2]"),
        ("rope_parameters", r#"{"rope_type": "default", "rope_theta": 1000042}"#),
        ("rope_scaling", r#"{"type": "default"}"#),
        ("something_new", r#"{"deep": [[[{}]]]}"#),
        (
            "quantization_config",
            r#"{"quant_method": "bitnet", "use_rms_norm": true, "rms_norm_eps": 1e-5,
                "quantization_mode": "online", "modules_to_not_convert": ["model.layers.1", "k_proj"]}"#,
        ),
    ]))
    .unwrap();
    assert_eq!((c.head_dim, c.rope_theta, &c.eos_tokens[..]), (256, 1_000_042.0, &[1, 2][..]));
    assert_eq!(c.linears(0)[0], ("model.layers.0.self_attn.q_proj".into(), 1024, 128));
    assert_eq!(c.projection_shape(Projection::Output), (128, 1024));
    let q = &c.quantization;
    assert_eq!((q.mode, q.scale_style, q.use_rms_norm, q.rms_norm_eps), (Mode::Online, ScaleStyle::Divide, true, 1e-5));
    let converted: Vec<_> = c.linears(0).iter().map(|(n, ..)| c.is_converted(n)).collect();
    assert_eq!(converted, [true, false, true, true, true, true, true]);
    assert!(!c.is_converted("model.layers.1.mlp.up_proj") && !c.is_converted("lm_head"));
    assert_eq!(parse(&c.to_json()).unwrap(), c);
}

#[test]
fn every_tensor_has_to_have_a_meaning() {
    let c = fixture("a1_packed");
    let known = [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.weight_scale",
        "model.layers.0.mlp.ffn_sub_norm.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ];
    assert!(c.unexplained(known.into_iter()).is_empty());
    let strange = [
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.01.self_attn.q_proj.weight",
        "model.layers.+1.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.rms_norm.weight",
        "model.layers.0.mlp.router.weight",
        "model.layers.0",
        "vision.weight",
    ];
    assert_eq!(c.unexplained(strange.into_iter()), strange);
    assert_eq!(fixture("a3_llama").unexplained(["model.layers.0.mlp.ffn_sub_norm.weight"].into_iter()).len(), 1);
}

#[test]
fn hostile_and_unsupported_configs_name_their_key() {
    let q = |text: &'static str| ("quantization_config", text);
    // (edit, key in the error, text in the error)
    let cases: &[((&str, &str), &str, &str)] = &[
        (("architectures", ""), "architectures", "missing"),
        (("architectures", r#"["Bitnet"]"#), "architectures", "1bitLLM"),
        (("architectures", r#"["MistralForCausalLM"]"#), "architectures", "LlamaForCausalLM"),
        (("architectures", "[]"), "architectures", "not supported"),
        (("architectures", "7"), "architectures", "not supported"),
        (("hidden_size", ""), "hidden_size", "missing"),
        (("hidden_size", "0"), "hidden_size", "whole number"),
        (("hidden_size", "-128"), "hidden_size", "-128"),
        (("hidden_size", "1e3"), "hidden_size", "whole number"),
        (("hidden_size", "18446744073709551615"), "hidden_size", "whole number"),
        (("hidden_size", r#""128""#), "hidden_size", "\"128\""),
        (("hidden_size", "130"), "head_dim", "130"),
        (("hidden_size", "8192"), "head_dim", "2048 where"),
        (("head_dim", "31"), "head_dim", "odd"),
        (("head_dim", "1000000"), "head_dim", "1024"),
        (("intermediate_size", "9223372036854775807"), "intermediate_size", "131072"),
        (("num_hidden_layers", "0"), "num_hidden_layers", "from 1"),
        (("num_hidden_layers", "1000000000"), "num_hidden_layers", "1024"),
        (("num_attention_heads", "4.5"), "num_attention_heads", "4.5"),
        (("num_key_value_heads", "3"), "num_key_value_heads", "divide"),
        (("num_key_value_heads", "0"), "num_key_value_heads", "from 1"),
        (("vocab_size", "4294967296"), "vocab_size", "4194304"),
        (("max_position_embeddings", "99999999999"), "max_position_embeddings", "16777216"),
        (("rms_norm_eps", "0"), "rms_norm_eps", "epsilon"),
        (("rms_norm_eps", "1e-300"), "rms_norm_eps", "epsilon"),
        (("rope_theta", "-1"), "rope_theta", "range"),
        (("rope_theta", "1e300"), "rope_theta", "range"),
        (("rope_theta", r#""many""#), "rope_theta", "number"),
        (("rope_scaling", r#"{"type": "linear", "factor": 2.0}"#), "rope_scaling.type", "linear"),
        (("rope_scaling", r#"{"rope_type": "llama3"}"#), "rope_scaling.rope_type", "llama3"),
        (("rope_parameters", r#"{"rope_type": "yarn"}"#), "rope_parameters.rope_type", "yarn"),
        (("rope_parameters", r#"{"partial_rotary_factor": 0.5}"#), "rope_parameters.partial_rotary_factor", "0.5"),
        (("rope_parameters", "[]"), "rope_parameters", "object"),
        (("tie_word_embeddings", "1"), "tie_word_embeddings", "true or false"),
        (("hidden_act", r#""gelu""#), "hidden_act", "relu2"),
        (("attention_bias", "true"), "attention_bias", "not supported"),
        (("mlp_bias", "true"), "mlp_bias", "not supported"),
        (("num_local_experts", "8"), "num_local_experts", "experts"),
        (("bos_token_id", "512"), "bos_token_id", "vocab_size"),
        (("eos_token_id", "[1, -1]"), "eos_token_id", "-1"),
        (("eos_token_id", "[[1]]"), "eos_token_id", "token id"),
        (("quantization_config", r#""bitnet""#), "quantization_config", "object"),
        (q("{}"), "quantization_config.quant_method", "not a b1.58 checkpoint"),
        (q(r#"{"quant_method": "gptq"}"#), "quantization_config.quant_method", "gptq"),
        (q(r#"{"quant_method": "bitnet", "linear_class": "x"}"#), "quantization_config.linear_class", "\"x\""),
        (
            q(r#"{"quant_method": "bitnet", "quantization_mode": "x"}"#),
            "quantization_config.quantization_mode",
            "online",
        ),
        (q(r#"{"quant_method": "bitnet", "use_rms_norm": "yes"}"#), "quantization_config.use_rms_norm", "yes"),
        (
            q(r#"{"quant_method": "bitnet", "modules_to_not_convert": ["(a|b)"]}"#),
            "quantization_config.modules_to_not_convert",
            "(a|b)",
        ),
        (
            q(r#"{"quant_method": "bitnet", "modules_to_not_convert": [""]}"#),
            "quantization_config.modules_to_not_convert",
            "empty",
        ),
    ];
    for (edit, key, reason) in cases {
        let err = parse(&with(&[*edit])).expect_err(&format!("{edit:?}"));
        let Error::Config { file, key: found, .. } = &err else { panic!("{edit:?}: {err:?}") };
        assert_eq!((file.to_str(), found.as_str()), (Some("dir/config.json"), *key), "{edit:?}: {err}");
        assert!(err.to_string().contains(reason), "{edit:?}: {err}");
    }
}

#[test]
fn what_does_not_apply_is_not_kept() {
    let with_eps = |more: &str| {
        let quantization = format!("{{\"quant_method\": \"bitnet\", \"rms_norm_eps\": 1e-4{more}}}");
        parse(&with(&[("quantization_config", &quantization)])).unwrap()
    };
    let (without, used) = (with_eps(""), with_eps(", \"use_rms_norm\": true"));
    assert_eq!((without.quantization.rms_norm_eps, used.quantization.rms_norm_eps), (1e-6, 1e-4));
    // Found by the fuzz target: it was kept, and gone after being written and read.
    for config in [without, used] {
        assert_eq!(parse(&config.to_json()).unwrap(), config);
    }
}

#[test]
fn malformed_json_is_refused_as_a_file() {
    let deep = format!("{}{}", r#"{"quantization_config": "#, "[".repeat(100_000));
    let ignored_deep = format!("{}{}", r#"{"x": "#, "[".repeat(100_000));
    let many = with(&[("eos_token_id", &format!("[{}]", "1,".repeat(100_000) + "1"))]);
    let twice = r#"{"hidden_size": 1, "hidden_size": 2}"#.to_owned();
    for text in [String::new(), "[]".into(), "{".into(), "nul".into(), with(&[]) + "x", deep, ignored_deep, many, twice]
    {
        let err = parse(&text).expect_err(&text[..text.len().min(60)]);
        assert!(matches!(err, Error::File { .. }), "{err:?}");
        assert!(err.to_string().starts_with("dir/config.json: ") && err.to_string().len() < 500, "{err}");
    }
}

#[test]
fn corrupted_configs_never_panic_and_what_is_accepted_is_consistent() {
    let seeds = ["a1_packed", "a2_packed_gqa_untied_sharded", "a3_llama"].map(|name| {
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name).join("config.json"))
            .unwrap()
    });
    let mut state = 1u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let mut accepted = 0;
    for round in 0..6000 {
        let mut bytes = seeds[round % 3].clone();
        for _ in 0..=next(3) {
            // Digits, structure and anything: the first two are likelier to be accepted.
            let with = [b'0' + next(10) as u8, b"{}[]\",:.-e"[next(10)], next(256) as u8][next(3)];
            let at = next(bytes.len());
            bytes[at] = with;
        }
        let Ok(text) = String::from_utf8(bytes) else { continue };
        let Ok(config) = parse(&text) else { continue };
        accepted += 1;
        assert!(config.num_heads % config.num_kv_heads == 0 && config.head_dim % 2 == 0 && config.parameters() > 0);
        assert!(Projection::ALL.iter().all(|p| config.projection_shape(*p) > (0, 0)));
        assert_eq!(parse(&config.to_json()).unwrap(), config);
    }
    assert!(accepted > 100, "{accepted}");
}
