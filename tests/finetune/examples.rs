//! Lines to examples, examples to batches.

use crate::common::fixture;
use candle_bitnet::Error;
use candle_bitnet::text::{ChatTemplate, Message, Tokenizer};
use candle_bitnet::train::Data;
use candle_bitnet::train::examples::{
    Example, ExampleBatches, ExampleOptions, Examples, PromptFormat, Sample, TrainOn, read_samples,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn file(dir: &Path, lines: &[&str]) -> PathBuf {
    let path = dir.join("data.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

#[test]
fn lines_of_every_form_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(
        dir.path(),
        &[
            "\u{feff}{\"messages\":[{\"role\":\"system\",\"content\":\"S\"},{\"role\":\"user\",\"content\":\"Q\"},{\"role\":\"assistant\",\"content\":\"A\"}],\"id\":7}",
            "",
            r#"{"instruction":"Do","input":"this","output":"done"}"#,
            r#"{"instruction":"Do","context":" ","input":null,"output":"done","text":"not this"}"#,
            "{\"input\":\"I\",\"output\":\"O\"}\r",
            r#"{"text":"Once\nupon"}"#,
        ],
    );
    let pair = |q: &str, a: &str| Sample::Conversation(vec![Message::user(q), Message::assistant(a)]);
    let want = vec![
        (1, Sample::Conversation(vec![Message::system("S"), Message::user("Q"), Message::assistant("A")])),
        (3, pair("Do\n\nthis", "done")),
        (4, pair("Do", "done")),
        (5, pair("I", "O")),
        (6, Sample::Text("Once\nupon".into())),
    ];
    assert_eq!(read_samples(&path).unwrap(), want);
}

#[test]
fn bad_lines_are_errors_that_name_them() {
    let dir = tempfile::tempdir().unwrap();
    for (line, reason) in [
        (r#"{"text":"cut off"#, "line 2: no JSON: EOF while parsing a string"),
        (r#"{"text":"a"} {"text":"b"}"#, "line 2: no JSON: trailing characters"),
        (r#"["text"]"#, "line 2: a list where an object is expected: {\"messages\"}, {\"instruction\""),
        ("null", "line 2: null where an object is expected"),
        ("{}", "found no keys"),
        (r#"{"prompt":"a","completion":"b"}"#, "line 2: expected {\"messages\"}"),
        (r#"{"prompt":"a","completion":"b"}"#, "found the keys \"prompt\", \"completion\""),
        (r#"{"text":3}"#, "\"text\" is a number where a string is expected"),
        (r#"{"instruction":"a","output":null}"#, "\"output\" is null where a string is expected"),
        (r#"{"instruction":"a","output":"b","input":["c"]}"#, "\"input\" is a list where a string is expected"),
        (r#"{"messages":"hello"}"#, "\"messages\" is a string where a list is expected"),
        (r#"{"messages":[]}"#, "line 2: \"messages\" is empty"),
        (r#"{"messages":["hi"]}"#, "message 1: a string where {\"role\", \"content\"} is expected"),
        (r#"{"messages":[{"role":"user"}]}"#, "message 1: \"content\" is missing where a string is expected"),
        (r#"{"messages":[{"role":"user","content":"q"}]}"#, "the last message is of the user: there is no answer"),
        (r#"{"messages":[{"role":"assistant","content":"a"}]}"#, "message 1: assistant first: expected at most one"),
        (
            r#"{"messages":[{"role":"user","content":"q"},{"role":"user","content":"q"}]}"#,
            "line 2: message 2: user after user: expected at most one system message first, then user and assistant",
        ),
        (
            r#"{"messages":[{"role":"user","content":"q"},{"role":"system","content":"s"}]}"#,
            "message 2: system after user",
        ),
        (r#"{"messages":[{"role":"tool","content":"t"}]}"#, "role \"tool\" is not system, user or assistant"),
        (
            r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a","weight":0}]}"#,
            "message 2: key \"weight\" has no meaning here",
        ),
    ] {
        let path = file(dir.path(), &[r#"{"text":"good"}"#, line]);
        let e = read_samples(&path).unwrap_err();
        assert!(matches!(e, Error::File { .. }) && e.to_string().contains(reason), "{line}: {e}");
    }
    let path = dir.path().join("other.jsonl");
    let fails = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        read_samples(&path).unwrap_err().to_string()
    };
    assert!(fails(b"").ends_with("other.jsonl: empty: there is no example in it"));
    assert!(fails(b"\n \n").contains("empty: there is no example"));
    assert!(fails(b"{\"text\":\"a\"}\n{\"text\":\"\xff\"}\n").contains("line 2: not UTF-8"));
    let many = vec![r#"{"role":"user","content":"q"}"#; 1025].join(",");
    assert!(fails(format!("{{\"messages\":[{many}]}}").as_bytes()).contains("1025 messages; at most 1024"));
    assert!(matches!(read_samples(&dir.path().join("none.jsonl")), Err(Error::Io { .. })));
}

fn chat(turns: &[(&str, &str)]) -> Sample {
    let both = |(q, a): &(&str, &str)| [Message::user(*q), Message::assistant(*a)];
    Sample::Conversation(turns.iter().flat_map(both).collect())
}

/// The text of each run of tokens that is learnt.
fn learnt(tokenizer: &Tokenizer, e: &Example) -> Vec<String> {
    let mut runs: Vec<Vec<u32>> = Vec::new();
    for (i, id) in e.ids.iter().enumerate().filter(|(i, _)| e.learnt[*i]) {
        match runs.last_mut().filter(|_| e.learnt[i - 1]) {
            Some(run) => run.push(*id),
            None => runs.push(vec![*id]),
        }
    }
    runs.iter().map(|ids| tokenizer.decode(ids, false).unwrap()).collect()
}

#[test]
fn what_is_learnt_is_the_assistants_part_up_to_the_end_of_its_turn() {
    let format = PromptFormat::from_dir(&fixture("a3_llama")).unwrap();
    let text = |e: &Example| format.tokenizer().decode(&e.ids, false).unwrap();
    let example = |sample: &Sample, on| format.example(sample, on).unwrap().unwrap();
    let one = example(&chat(&[("Why?", " Because. ")]), TrainOn::Assistant);
    let head = |role: &str| format!("<|start_header_id|>{role}<|end_header_id|>\n\n");
    let asked = format!("<|begin_of_text|>{}Why?<|eot_id|>{}", head("user"), head("assistant"));
    assert_eq!(text(&one), format!("{asked}Because.<|eot_id|>"));
    assert_eq!(learnt(format.tokenizer(), &one), ["Because.<|eot_id|>"]);
    assert_eq!(one.ids[..one.prompt], format.prompt("Why?").unwrap());
    assert_eq!(one.targets(), one.ids.len() - one.prompt);

    let two = example(&chat(&[("a", "b"), ("c", "d e")]), TrainOn::Assistant);
    assert_eq!(learnt(format.tokenizer(), &two), ["b<|eot_id|>", "d e<|eot_id|>"]);
    assert_eq!(two.ids[..two.prompt], format.prompt("a").unwrap());
    let system = Sample::Conversation(vec![Message::system("s"), Message::user("a"), Message::assistant("b")]);
    let system = example(&system, TrainOn::Assistant);
    assert_eq!(learnt(format.tokenizer(), &system), ["b<|eot_id|>"]);
    assert!(text(&system).starts_with(&format!("<|begin_of_text|>{}s<|eot_id|>", head("system"))));
    // An empty answer among others teaches nothing.
    let silent = example(&chat(&[("a", " "), ("c", "d")]), TrainOn::Assistant);
    assert_eq!(learnt(format.tokenizer(), &silent), ["d<|eot_id|>"]);
    assert_eq!(format.example(&chat(&[("a", " ")]), TrainOn::Assistant).unwrap(), None);

    let all = example(&chat(&[("a", "b")]), TrainOn::All);
    assert_eq!(all.learnt, [vec![false], vec![true; all.ids.len() - 1]].concat());
    let plain = example(&Sample::Text("to be".into()), TrainOn::Assistant);
    assert_eq!(text(&plain), "<|begin_of_text|>to be<|eot_id|>");
    assert_eq!(learnt(format.tokenizer(), &plain), ["to be<|eot_id|>"]);
    assert_eq!(format.example(&Sample::Text(" \n".into()), TrainOn::All).unwrap(), None);
}

#[test]
fn a_seam_that_the_tokenizer_would_join_is_cut_as_generation_will_meet_it() {
    // "Assistant: " ends with a space that would be one token with the answer's first letters.
    for name in ["a1_bf16", "a2_packed_gqa_untied_sharded"] {
        let format = PromptFormat::from_dir(&fixture(name)).unwrap();
        let e =
            format.example(&chat(&[("Why?", "the cat"), ("And?", "the dog")]), TrainOn::Assistant).unwrap().unwrap();
        assert_eq!(e.ids[..e.prompt], format.prompt("Why?").unwrap());
        assert_eq!(learnt(format.tokenizer(), &e), ["the cat<|eot_id|>", "the dog<|eot_id|>"]);
    }
}

#[test]
fn what_follows_the_end_of_a_turn_is_not_learnt_and_other_templates_are_refused() {
    let dir = fixture("a1_bf16");
    let with = |source: &str| {
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        PromptFormat::new(tokenizer, Some(ChatTemplate::new(source, "test")), vec![383])
    };
    let format = with(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|eot_id|>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    );
    let e = format.example(&chat(&[("q", "a"), ("r", "b")]), TrainOn::Assistant).unwrap().unwrap();
    assert_eq!(learnt(format.tokenizer(), &e), ["a<|eot_id|>", "b<|eot_id|>"]);
    assert_eq!(format.tokenizer().decode(e.ids.last_chunk::<1>().unwrap(), false).unwrap(), "<|eot_id|>");
    let format = with("{% for m in messages %}{{ m.content }}{% if loop.last %}<|eot_id|>{% endif %}{% endfor %}");
    let e = format.example(&chat(&[("q", "a")]), TrainOn::Assistant).unwrap_err().to_string();
    assert!(e.contains("renders the beginning of this conversation otherwise when more follows"), "{e}");
}

#[test]
fn without_a_template_a_pair_is_two_lines_and_more_is_refused() {
    let tokenizer = Tokenizer::from_dir(fixture("a1_bf16")).unwrap();
    let format = PromptFormat::new(tokenizer.clone(), None, vec![375]);
    let e = format.example(&chat(&[("What?", "This.")]), TrainOn::Assistant).unwrap().unwrap();
    assert_eq!(tokenizer.decode(&e.ids, false).unwrap(), "<|begin_of_text|>What?\nThis.<|end_of_text|>");
    assert_eq!(learnt(&tokenizer, &e), ["This.<|end_of_text|>"]);
    assert_eq!(e.ids[..e.prompt], format.prompt("What?").unwrap());
    let refused = format.example(&chat(&[("a", "b"), ("c", "d")]), TrainOn::Assistant).unwrap_err().to_string();
    assert!(refused.contains("only a single question with its answer can do without"), "{refused}");
    let system = Sample::Conversation(vec![Message::system("s"), Message::user("a"), Message::assistant("b")]);
    assert!(format.example(&system, TrainOn::Assistant).is_err());
}

#[test]
fn what_is_left_out_or_cut_is_counted() {
    let (dir, format) = (tempfile::tempdir().unwrap(), PromptFormat::from_dir(&fixture("a1_bf16")).unwrap());
    let long = format!(r#"{{"input":"q","output":"{}"}}"#, "word ".repeat(40));
    let prompt = format!(r#"{{"input":"{}","output":"a"}}"#, "word ".repeat(40));
    let short = r#"{"input":"q","output":"a"}"#;
    let path =
        file(dir.path(), &[short, &long, r#"{"input":"q","output":" "}"#, &prompt, short, r#"{"text":""}"#, short]);
    let options = ExampleOptions { context: 40, validation: 0.34, ..ExampleOptions::default() };
    let read = |options: &ExampleOptions| Examples::read(&path, None, &format, options).unwrap();
    let kept = read(&options);
    let counts = |e: &Examples| {
        let c = e.counts;
        (c.lines, c.used, c.too_long, c.empty, c.truncated)
    };
    assert_eq!(counts(&kept), (7, 3, 2, 2, 0));
    assert_eq!(kept.train.iter().map(|e| e.line).collect::<Vec<_>>(), [1, 5]);
    assert_eq!(kept.validation.iter().map(|e| e.line).collect::<Vec<_>>(), [7]);
    // Cut where something to learn is left: one position a token, and the last one is only predicted.
    let cut = read(&ExampleOptions { truncate: true, ..options });
    assert_eq!(counts(&cut), (7, 4, 1, 2, 1));
    let lengths = cut.train.iter().chain(&cut.validation).map(|e| e.ids.len());
    assert_eq!(lengths.max(), Some(41));
    assert_eq!(read(&ExampleOptions { max_samples: 5, validation: 0.0, ..options }).counts.lines, 5);
    let both = Examples::read(&path, Some(&path), &format, &options).unwrap();
    assert_eq!((both.train.len(), both.validation.len(), both.counts.lines), (3, 3, 14));
    assert_ne!(kept.fingerprint(), cut.fingerprint());
    assert_eq!(kept.fingerprint(), read(&options).fingerprint());

    let path = file(dir.path(), &[&long, r#"{"text":""}"#]);
    let e = Examples::read(&path, None, &format, &options).unwrap_err().to_string();
    assert!(e.contains("no example is left of 2 lines: 1 longer than 40 positions, 1 without anything"), "{e}");
    let bad = Examples::read(&path, None, &format, &ExampleOptions { validation: 0.9, ..options });
    assert!(bad.unwrap_err().to_string().starts_with("validation: 0.9 is out of range"));
    let path = file(dir.path(), &[short, r#"{"messages":[{"role":"user","content":"q"}]}"#]);
    let e = Examples::read(&path, None, &format, &options).unwrap_err().to_string();
    assert!(e.contains("data.jsonl: line 2: "), "{e}");
}

fn example(tag: u32, length: usize, prompt: usize) -> Example {
    let ids = (0..length as u32).map(|i| 10 * tag + i).collect();
    Example { line: 1, ids, learnt: (0..length).map(|i| i >= prompt).collect(), prompt }
}

#[test]
fn batches_pad_at_the_end_and_see_every_example_once_an_epoch() {
    let train: Vec<Example> = (1..=10).map(|i| example(i, 3 + (i as usize) % 4, 2)).collect();
    let validation = vec![example(11, 5, 2), example(12, 3, 1)];
    let examples = Examples { train: train.clone(), validation, ..Examples::default() };
    let data = |seed| ExampleBatches::new(examples.clone(), 4, 2, seed).unwrap();
    let (one, none) = (data(1), None::<u32>);
    assert_eq!(one.validation().len(), 1);
    let v = &one.validation()[0];
    assert_eq!((v.length, &v.tokens[..]), (4, &[120, 121, 0, 0, 110, 111, 112, 113][..]));
    assert_eq!(v.targets, [Some(121), Some(122), none, none, none, Some(112), Some(113), Some(114)]);
    assert_eq!((one.validation_bytes(), one.epochs(5)), (0, 2.0));

    // Which examples a step is made of, by their first tokens.
    let tags = |data: &ExampleBatches, step: u64| -> Vec<u32> {
        let batches = data.micro_batches(step).unwrap();
        assert!(batches.iter().all(|b| b.tokens.len() == 2 * b.length && b.targets.len() == b.tokens.len()));
        batches.iter().flat_map(|b| b.tokens.chunks(b.length).map(|t| t[0] / 10).collect::<Vec<_>>()).collect()
    };
    let epochs: Vec<u32> = (0..5).flat_map(|step| tags(&one, step)).collect();
    let mut seen: BTreeMap<u32, usize> = BTreeMap::new();
    epochs.iter().for_each(|tag| *seen.entry(*tag).or_default() += 1);
    assert!(seen.len() == 10 && seen.values().all(|n| *n == 2), "{seen:?}");
    let again = data(1);
    assert_eq!(
        (0..5).rev().map(|s| tags(&again, s)).collect::<Vec<_>>(),
        (0..5).rev().map(|s| tags(&one, s)).collect::<Vec<_>>()
    );
    assert_ne!(tags(&data(2), 0), tags(&one, 0));
    for (sequences, micro) in [(0, 1), (2, 0), (2, 3)] {
        assert!(ExampleBatches::new(examples.clone(), sequences, micro, 0).is_err());
    }
    assert!(ExampleBatches::new(Examples::default(), 2, 1, 0).is_err());
}
