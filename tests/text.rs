//! Tokenizers and chat templates against transformers, and files that are not what they claim to be.

use candle_bitnet::Error;
use candle_bitnet::text::{ChatTemplate, MAX_RENDERED_BYTES, MAX_TOKENIZER_BYTES, Message, Tokenizer};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const PACKED: &str = "a1_packed";
const FIXTURES: [&str; 3] = [PACKED, "a2_packed_gqa_untied_sharded", "a3_llama"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read(path: PathBuf) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Pairs of a folder with tokenizer files and the outputs expected of it.
fn cases() -> Vec<(Tokenizer, ChatTemplate, Value)> {
    // a1_bf16 is the same model as a1_packed with the same tokenizer; its expectations are its own.
    FIXTURES
        .iter()
        .map(|name| (*name, *name))
        .chain([(PACKED, "a1_bf16")])
        .map(|(files, expected)| {
            let dir = fixture(files);
            let tokenizer = Tokenizer::from_dir(&dir).unwrap();
            let template = ChatTemplate::from_dir(&dir).unwrap().expect("a template");
            (tokenizer, template, read(fixture(expected).join("expected.json")))
        })
        .collect()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn tokenizer_equals_transformers() {
    for (tokenizer, _, expected) in cases() {
        let list = expected["tokenizer"].as_array().unwrap();
        assert!(list.len() >= 9);
        for case in list {
            let text = case["text"].as_str().unwrap();
            let with_special = ids(&case["ids_with_special"]);
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids(&case["ids"]), "{text:?}");
            assert_eq!(tokenizer.encode(text, true).unwrap(), with_special, "{text:?}");
            // `decoded*` are of the ids without the tokenizer's own special tokens.
            assert_eq!(tokenizer.decode(&ids(&case["ids"]), false).unwrap(), case["decoded"].as_str().unwrap());
            assert_eq!(
                tokenizer.decode(&ids(&case["ids"]), true).unwrap(),
                case["decoded_skip_special"].as_str().unwrap()
            );
        }
        for prompt in expected["prompts"].as_array().unwrap() {
            let greedy = ids(&prompt["greedy"]);
            assert_eq!(tokenizer.decode(&greedy, false).unwrap(), prompt["greedy_text"].as_str().unwrap());
        }
    }
}

#[test]
fn chat_equals_transformers() {
    for (tokenizer, template, expected) in cases() {
        let list = expected["chat"].as_array().unwrap();
        assert!(list.len() >= 6);
        for case in list {
            let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
            let add = case["add_generation_prompt"].as_bool().unwrap();
            let prompt = template.apply(&tokenizer, &messages, add).unwrap();
            assert_eq!(prompt.text, case["text"].as_str().unwrap());
            assert_eq!(prompt.ids, ids(&case["ids"]));
        }
    }
}

#[test]
fn special_tokens_of_a_fixture() {
    let t = Tokenizer::from_dir(fixture(PACKED)).unwrap();
    assert_eq!((t.bos_id(), t.eos_id(), t.adds_bos()), (Some(374), Some(375), true));
    assert_eq!(t.special_token("bos_token"), Some("<|begin_of_text|>"));
    assert_eq!(t.special_ids(), (374..384).collect::<Vec<u32>>());
    assert!(t.is_special(383) && !t.is_special(30) && !t.is_special(9999));
    assert_eq!(t.token_to_id("<|eot_id|>"), Some(383));
    assert_eq!(t.id_to_token(383).as_deref(), Some("<|eot_id|>"));
    assert_eq!(t.vocab_size(), 384);
}

#[test]
fn bos_comes_exactly_once() {
    let t = Tokenizer::from_dir(fixture(PACKED)).unwrap();
    let messages = [Message::user("hi")];
    let with = ChatTemplate::new("{{ bos_token }}{{ messages[0].content }}", "test");
    let without = ChatTemplate::new("{{ messages[0].content }}", "test");
    let (a, b) = (with.apply(&t, &messages, true).unwrap(), without.apply(&t, &messages, true).unwrap());
    assert_eq!(a, b);
    assert_eq!(a.ids.iter().filter(|&&id| id == 374).count(), 1);
    assert_eq!(a.ids[0], 374);
    // A tokenizer that does not add BOS gets none.
    let mut json = read(fixture(PACKED).join("tokenizer.json"));
    json["post_processor"] = Value::Null;
    let config = br#"{"bos_token": {"content": "<|begin_of_text|>"}}"#;
    let t = Tokenizer::from_json(json.to_string().as_bytes(), Some(config), "test").unwrap();
    assert_eq!(t.bos_id(), Some(374));
    assert!(!t.adds_bos());
    assert_eq!(without.apply(&t, &messages, true).unwrap().text, "hi");
}

#[test]
fn streaming_equals_decoding_at_once() {
    for (tokenizer, _, expected) in cases() {
        for case in expected["tokenizer"].as_array().unwrap() {
            for skip in [false, true] {
                let ids = ids(&case["ids_with_special"]);
                let mut decoder = tokenizer.incremental(skip);
                let mut text = String::new();
                for &id in &ids {
                    let piece = decoder.push(id).unwrap();
                    assert!(!piece.contains('\u{fffd}'), "half a character in {piece:?}");
                    text.push_str(&piece);
                }
                text.push_str(&decoder.flush().unwrap());
                assert_eq!(text, tokenizer.decode(&ids, skip).unwrap());
            }
        }
    }
}

#[test]
fn random_ids_stream_as_they_decode() {
    let tokenizer = Tokenizer::from_dir(fixture(PACKED)).unwrap();
    let mut state = 1u64;
    for round in 0..300 {
        let ids: Vec<u32> = (0..40)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                // Half of the rounds only bytes above 0x7f, where UTF-8 can break; ids beyond the vocabulary too.
                if round % 2 == 0 { 94 + (state >> 33) as u32 % 130 } else { (state >> 33) as u32 % 400 }
            })
            .collect();
        for skip in [false, true] {
            let mut decoder = tokenizer.incremental(skip);
            let mut text: String = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
            text.push_str(&decoder.flush().unwrap());
            assert_eq!(text, tokenizer.decode(&ids, skip).unwrap(), "{ids:?}");
        }
    }
}

/// A directory with the packed fixture's tokenizer and the given other files.
fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fixture(PACKED).join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    for (name, content) in files {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    dir
}

fn render(template: &ChatTemplate, dir: &Path) -> candle_bitnet::Result<String> {
    template.render(&Tokenizer::from_dir(dir)?, &[Message::system("S"), Message::user("U")], true)
}

#[test]
fn where_templates_are_found() {
    let find = |files: &[(&str, &str)]| {
        let dir = directory(files);
        ChatTemplate::from_dir(dir.path()).map(|t| t.map(|t| t.source().to_owned()))
    };
    let list = json!({"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]});
    let nameless = json!({"chat_template": [{"name": "a", "template": "T"}, {"name": "b", "template": "D"}]});
    let list = list.to_string();
    assert_eq!(find(&[]).unwrap(), None);
    assert_eq!(find(&[("tokenizer_config.json", "{}")]).unwrap(), None);
    assert_eq!(find(&[("tokenizer_config.json", r#"{"chat_template": null}"#)]).unwrap(), None);
    assert_eq!(find(&[("tokenizer_config.json", r#"{"chat_template": "S"}"#)]).unwrap().as_deref(), Some("S"));
    assert_eq!(find(&[("tokenizer_config.json", &list)]).unwrap().as_deref(), Some("D"));
    assert_eq!(find(&[("chat_template.json", r#"{"chat_template": "J"}"#)]).unwrap().as_deref(), Some("J"));
    assert_eq!(find(&[("tokenizer_config.json", &list), ("chat_template.jinja", "F")]).unwrap().as_deref(), Some("F"));
    let error = find(&[("tokenizer_config.json", &nameless.to_string())]).unwrap_err();
    assert!(matches!(&error, Error::Config { key, .. } if key == "chat_template"), "{error}");
    assert!(error.to_string().contains("a, b"));
    assert!(find(&[("tokenizer_config.json", r#"{"chat_template": 1}"#)]).is_err());
    assert!(find(&[("tokenizer_config.json", "{")]).is_err());
    assert!(ChatTemplate::missing("x/y").to_string().contains("x/y has none"));
}

#[test]
fn template_context_is_that_of_transformers() {
    let dir = directory(&[(
        "tokenizer_config.json",
        r#"{"bos_token": {"content": "<b>"}, "eos_token": "<e>", "pad_token": null, "unk_token": "<u>"}"#,
    )]);
    let template = ChatTemplate::new(
        "{{ bos_token }}{{ eos_token }}{{ unk_token }}{% if tools is not none %}!{% endif %}\n\
         {% for m in messages %}\n  {{ m.role }}={{ m['content'] | tojson }};\n{% endfor %}\n\
         {% if add_generation_prompt %}A{% endif %}",
        "test",
    );
    assert_eq!(render(&template, dir.path()).unwrap(), "<b><e><u>  system=\"S\";\n  user=\"U\";\nA");
}

#[test]
fn bad_templates_name_themselves() {
    let dir = directory(&[]);
    let fails = |source: &str, reason: &str| {
        let error = render(&ChatTemplate::new(source, "some/tokenizer_config.json"), dir.path()).unwrap_err();
        assert!(matches!(error, Error::Text { .. }));
        let text = error.to_string();
        assert!(text.contains("some/tokenizer_config.json") && text.contains(reason), "{text}");
    };
    fails("{% if %}", "line 1");
    // Found by the fuzz target: the end of a tag inside its beginning.
    fails("{%}", "line 1");
    fails("{% generation %}{%}", "line 1");
    fails("{{ raise_exception('System role not supported') }}", "System role not supported");
    fails("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "too many steps");
    fails("{{ strftime_now('%Q') }}", "%Q");
    let block = "x".repeat(64 << 10);
    let long = format!("{{% for a in range(1000) %}}{block}{{% endfor %}}");
    fails(&long, &MAX_RENDERED_BYTES.to_string());
    // Beyond what any memory can hold, the library panics.
    fails("{{ 'a\nb' | indent(9223372036854775808) }}", "panicked");
}

#[test]
fn templates_cannot_nest_values_beyond_the_stack() {
    let dir = directory(&[]);
    let rendered = |loops: usize, more: &str| {
        let source = format!(
            "{{% set ns = namespace(x=[]) %}}{{% for a in range({loops}) %}}{{% for b in range(9999) %}}\
             {{% set ns.x = [ns.x] %}}{{% endfor %}}{{% endfor %}}{more}"
        );
        render(&ChatTemplate::new(source, "nested"), dir.path())
    };
    // Dropped, as deep as the steps allow; used in every way that follows values down.
    assert!(rendered(9999, "").unwrap_err().to_string().contains("took too many steps"));
    for (more, text) in [
        ("end", "end"),
        ("{{ ns.x | string | length }}", "199982"),
        ("{{ [ns.x] == [ns.x] }}", "True"),
        ("{{ [ns.x, [ns.x]] | sort | length }}", "2"),
        ("{{ [ns.x, ns.x] | unique | list | length }}", "1"),
    ] {
        assert_eq!(rendered(10, more).unwrap(), text, "{more}");
    }
    assert!(rendered(10, "{{ ns.x | tojson }}").unwrap_err().to_string().contains("tojson: the value is too large"));
}

#[test]
fn missing_and_hostile_tokenizers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let fails = |reason: &str| {
        let text = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
        assert!(text.contains("tokenizer.json") && text.contains(reason), "{text}");
    };
    fails("not found, and no tokenizer.model either; download it");
    std::fs::write(dir.path().join("tokenizer.model"), "").unwrap();
    let text = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert!(text.contains("tokenizer.model") && text.contains("no pieces"), "{text}");
    for hostile in [
        "",
        "null",
        "{}",
        "[1, 2",
        r#"{"version": "9.9"}"#,
        r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}}"#,
        r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}"#,
        r#"{"version": "1.0", "model": {"type": "Nonesuch"}}"#,
        r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []},
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": false}}"#,
    ] {
        std::fs::write(&path, hostile).unwrap();
        fails("not a usable tokenizer");
    }
    std::fs::write(&path, "[".repeat(1 << 20)).unwrap();
    fails("not a usable tokenizer");
    std::fs::File::create(&path).unwrap().set_len(MAX_TOKENIZER_BYTES + 1).unwrap();
    fails(&MAX_TOKENIZER_BYTES.to_string());
}

#[test]
fn odd_but_readable_tokenizers_do_not_panic() {
    for odd in [
        r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}"#,
        r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 4294967295, "b": 4294967295}, "merges": []}}"#,
        r#"{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 7}, "unk_token": "z"}}"#,
        r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
            "truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}}"#,
    ] {
        if let Ok(t) = Tokenizer::from_json(odd.as_bytes(), Some(br#"{"bos_token": "a"}"#), "odd") {
            let _ = t.encode("a b é", true);
            let _ = t.decode(&[0, 7, u32::MAX], false);
            let _ = t.incremental(true).push(u32::MAX);
            let _ = (t.vocab_size(), t.special_ids());
        }
    }
}
