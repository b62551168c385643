//! `compare`: the devices and kernels of this machine, and a server.

use crate::{Ran, bitnet, model, run};
use candle_bitnet::backend::cpu::KernelKind;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;

/// A short comparison on the fixture.
fn compare<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["compare", "-m", model, "--pp", "8", "--tg", "4", "--reps", "1"], more].concat()
}

#[test]
fn all_kernels_of_this_cpu_choose_the_same_tokens() {
    let (a1, dir) = (model("a1_packed"), tempfile::tempdir().unwrap());
    let svg = dir.path().join("devices.svg");
    let json = run(&compare(&a1, &["--json", "--chart", svg.to_str().unwrap()])).json();
    let entries = json["entries"].as_array().unwrap();
    let kernels: Vec<&str> = entries.iter().filter_map(|e| e["kernel"].as_str()).collect();
    for kernel in KernelKind::available() {
        assert!(kernels.contains(&kernel.name()), "{kernel}: {json}");
    }
    for entry in entries {
        for key in ["prefill_tps", "decode_tps", "first_token_seconds", "decode_gbps", "read_gbps", "resident_bytes"] {
            assert!(entry[key].as_f64() > Some(0.0), "{key}: {entry}");
        }
        assert_eq!((&entry["tokens"], &entry["differs_at"]), (&entries[0]["tokens"], &Value::Null));
        assert_eq!(entry["tokens"].as_array().unwrap().len(), 4);
    }
    assert_eq!(json["same_tokens"], true);
    let flags: Vec<&str> = entries.iter().map(|e| e["flags"].as_str().unwrap()).collect();
    assert!(flags.iter().any(|f| json["recommendation"].as_str().unwrap().starts_with(f)), "{json}");
    let drawn = std::fs::read_to_string(&svg).unwrap();
    assert!(drawn.starts_with("<svg ") && flags.iter().all(|f| drawn.contains(f)), "{drawn}");
}

#[test]
fn a_comparison_is_printed_in_every_form_and_recorded() {
    let (a1, dir) = (model("a1_packed"), tempfile::tempdir().unwrap());
    let one = ["--kernel", "generic", "--threads", "1"];
    let said = |form: &[&str]| run(&[&compare(&a1, &one)[..], form].concat()).ok();
    let text = said(&["--record", dir.path().to_str().unwrap()]);
    for part in
        ["first token s", "generic", "reference", "all 1 chose the same 4 greedy tokens", "recommended: --device cpu"]
    {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let markdown = said(&["--markdown", "--record", dir.path().to_str().unwrap()]);
    assert!(markdown.contains("| device | kernel |") && markdown.contains("- recommended: "), "{markdown}");
    let csv = said(&["--csv"]);
    assert!(csv.starts_with("device,kernel,threads,") && csv.lines().count() == 2, "{csv}");
    let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    let [record] = &files[..] else { panic!("{files:?}") };
    assert!(record.to_str().unwrap().ends_with("-compare.md"), "{record:?}");
    let record = std::fs::read_to_string(record).unwrap();
    let command = "`bitnet compare --model PATH --pp 8 --tg 4 --reps 1`";
    assert!(record.matches(command).count() == 2 && record.matches("recommended: ").count() == 2, "{record}");
    // A prompt of text.
    let prompted = ["compare", "-m", &a1, "-p", "Hello", "--tg", "2", "--reps", "1", "--json"];
    let json = run(&[&prompted[..], &one].concat()).json();
    assert!(json["prompt_tokens"].as_u64() < Some(8) && json["same_tokens"] == true, "{json}");
}

#[test]
fn comparisons_that_make_no_sense_are_refused() {
    let a1 = model("a1_packed");
    let with = |more: &[&'static str]| run(&[&["compare", "-m", &a1], more].concat());
    with(&["--pp", "600"]).fails(2, &["--pp", "512"]);
    with(&["--tg", "0"]).fails(2, &["--tg", "between 1 and"]);
    with(&["-p", "a", "-p", "b"]).fails(2, &["--prompt", "one prompt"]);
    with(&["--record", "/nonexistent"]).fails(2, &["--record", "/nonexistent"]);
    with(&["--json", "--csv"]).fails(2, &["--json", "--csv"]);
    with(&["--against-model", "m"]).fails(2, &["--against"]);
    with(&["--against", "localhost:8080"]).fails(2, &["--against", "http://HOST:PORT"]);
    with(&["--against", "http://127.0.0.1:1", "--tg", "2"]).fails(1, &["server http://127.0.0.1:1 "]);
    if cfg!(not(feature = "cuda")) {
        with(&["--device", "cuda"]).fails(1, &["cuda", "--features cuda"]);
    }
    run(&["compare", "--synthetic", "9b"]).fails(2, &["9b", "2b4t"]);
}

#[test]
fn a_server_is_set_beside_this_program() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    // Ends with the test's process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut length, mut line) = (0, String::new());
            while reader.read_line(&mut line).unwrap() > 0 && !line.ends_with("\r\n\r\n") {
                let last = line.lines().last().unwrap_or_default().to_ascii_lowercase();
                length = last.strip_prefix("content-length:").map_or(length, |v| v.trim().parse().unwrap());
            }
            reader.read_exact(&mut vec![0; length]).unwrap();
            let models = "{\"data\":[{\"id\":\"peer\"}]}";
            let event = |text| format!("data: {{\"choices\":[{{\"text\":\"{text}\"}}]}}\n\n");
            let events = format!(
                "{}{}data: {{\"choices\":[{{\"text\":\"c\",\"finish_reason\":\"stop\"}}]}}\n\ndata: [DONE]\n\n",
                event("a"),
                event("b")
            );
            let body = if line.starts_with("GET") { models } else { &events };
            let _ =
                write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
        }
    });
    let a1 = model("a1_packed");
    let args = ["compare", "-m", &a1, "--against", &address, "--tg", "3", "-p", "Hello", "-p", "Good day"];
    let said = |more: &[&str]| Ran::of(bitnet(&[&args[..], more].concat()).env("NO_PROXY", "*").output().unwrap());
    let json = said(&["--json"]).json();
    assert_eq!((&json["server"], &json["server_model"]), (&Value::from(address.as_str()), &Value::from("peer")));
    let pairs = json["pairs"].as_array().unwrap();
    assert_eq!(pairs.len(), 2);
    for pair in pairs {
        assert_eq!((&pair["server"]["tokens"], &pair["server"]["text"]), (&Value::from(3), &Value::from("abc")));
        assert!(pair["here"]["tokens"].as_u64() > Some(0), "{pair}");
        assert!(pair["here"]["first_token_seconds"].as_f64() > Some(0.0), "{pair}");
    }
    let text = said(&[]).ok();
    for part in ["first token s", "here", "server", "(peer)", "same text"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert!(said(&["--markdown"]).ok().contains("| prompt |"));
}
