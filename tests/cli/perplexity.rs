//! `bitnet perplexity`.

use crate::common::FIXTURES;
use crate::{model, run, run_with};
use candle_bitnet::evaluate::{Windows, score};
use candle_bitnet::{BitNet, LoadOptions};
use candle_core::Device;
use serde_json::{Value, json};
use std::path::Path;

/// Some hundred characters, of one to four bytes.
fn text() -> String {
    (0..40).map(|i| format!("Line {i}: schöne Grüße, 你好 🙂 and so on.\n")).collect()
}

fn write(dir: &Path, text: impl AsRef<[u8]>) -> String {
    let path = dir.join("text.txt");
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn near(got: &Value, want: f64) {
    let got = got.as_f64().unwrap();
    assert!((got / want - 1.0).abs() < 1e-12, "{got}, not {want}");
}

#[test]
fn figures_are_those_of_the_library() {
    let dir = tempfile::tempdir().unwrap();
    let (text, file) = (text(), write(dir.path(), text()));
    for name in FIXTURES {
        let folder = model(name);
        let bitnet = BitNet::load(&folder, LoadOptions::new(&Device::Cpu).context(Some(96))).unwrap();
        let ids = bitnet.encode(&text).unwrap();
        let kv = bitnet.report().kv_dtype;
        let windows = Windows { context: 96, stride: 40, batch: 1 };
        let want = score(bitnet.decoder(), kv, &ids[..1], &ids[1..], &windows, &mut |_| ()).unwrap();

        let args = ["perplexity", "-m", &folder, &file, "--context", "96", "--stride", "40"];
        let json = run(&[&args[..], &["--json"]].concat()).json();
        near(&json["perplexity"], want.perplexity());
        near(&json["bits_per_byte"], want.bits_per_byte(text.len()));
        assert_eq!((&json["tokens"], &json["bytes"]), (&json!(ids.len() - 1), &json!(text.len())));
        assert_eq!((&json["windows"], &json["bos"]), (&json!(want.windows), &json!(ids[0])));
        assert_eq!((&json["context"], &json["stride"], &json["batch"]), (&json!(96), &json!(40), &json!(5)));
        assert!(json["tokens_per_second"].as_f64() > Some(0.0) && json["text"] == json!(file), "{json}");

        let plain = run(&args).ok();
        let figures =
            format!("perplexity     {:.4}\nbits per byte  {:.4}\n", want.perplexity(), want.bits_per_byte(text.len()));
        for part in [figures.as_str(), "stride 40, 5 at once", "tokens/s", "of 96 tokens", "BOS"] {
            assert!(plain.contains(part), "no {part:?} in {plain}");
        }
    }
}

#[test]
fn the_batch_and_the_threads_change_no_digit() {
    let dir = tempfile::tempdir().unwrap();
    let (a1, file) = (model("a1_packed"), write(dir.path(), text()));
    let figures = |flags: &[&str]| {
        let json =
            run(&[&["perplexity", "-m", &a1, "--text", &file, "--json", "--context", "100"], flags].concat()).json();
        ["perplexity", "bits_per_byte", "tokens", "bytes", "windows"].map(|key| json[key].clone())
    };
    let first = figures(&[]);
    for flags in [&["--batch", "1"][..], &["--batch", "4", "--threads", "1"], &["--batch", "1000"], &["--stride", "50"]]
    {
        assert_eq!(figures(flags), first, "{flags:?}");
    }
    assert_ne!(figures(&["--stride", "100"]), first);
}

#[test]
fn a_text_comes_from_a_pipe_and_may_be_cut() {
    let (a1, text) = (model("a1_packed"), text());
    let bitnet = BitNet::load(&a1, LoadOptions::new(&Device::Cpu)).unwrap();
    let ids = bitnet.tokenizer().encode(&text, false).unwrap();
    let json = |flags: &[&str]| run_with(&[&["perplexity", "-m", &a1, "-", "--json"], flags].concat(), &text).json();
    let all = json(&[]);
    assert_eq!((&all["tokens"], &all["bytes"]), (&json!(ids.len()), &json!(text.len())));
    assert_eq!((&all["context"], &all["stride"], &all["batch"]), (&json!(512), &json!(256), &json!(1)));
    assert_eq!(all["text"], json!("standard input"));
    // "L" or more is the first token: ASCII, so its spelling is its bytes.
    let first = bitnet.tokenizer().decode(&ids[..1], false).unwrap().len();
    let bare = json(&["--no-bos"]);
    assert_eq!((&bare["tokens"], &bare["bytes"]), (&json!(ids.len() - 1), &json!(text.len() - first)));
    assert_eq!(bare["bos"], Value::Null);
    for most in [1, 3, 77, 5000] {
        let some = json(&["--max-tokens", &most.to_string()]);
        let (tokens, bytes) = (some["tokens"].as_u64().unwrap() as usize, some["bytes"].as_u64().unwrap() as usize);
        assert!(tokens <= most && tokens + 16 > most.min(ids.len()), "{some}");
        assert_eq!(bitnet.tokenizer().decode(&ids[..tokens], false).unwrap(), text[..bytes]);
    }
}

#[test]
fn what_cannot_be_measured_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let a1 = model("a1_packed");
    let fails = |content: &[u8], flags: &[&str], code: i32, words: &[&str]| {
        let file = write(dir.path(), content);
        run(&[&["perplexity", "-m", &a1, &file], flags].concat()).fails(code, words);
    };
    let ok = b"some text";
    fails(b"", &[], 1, &["text.txt", "is empty"]);
    fails(b"abc\xffd", &[], 1, &["text.txt", "not UTF-8 at byte 3"]);
    fails("é".as_bytes(), &["--no-bos"], 1, &["text.txt", "nothing to predict", "longer text"]);
    fails("é".as_bytes(), &["--max-tokens", "1"], 1, &["text.txt", "no whole character", "--max-tokens"]);
    fails(ok, &["--stride", "0"], 2, &["--stride", "at least 1"]);
    fails(ok, &["--stride", "513"], 2, &["--stride", "513", "512"]);
    fails(ok, &["--context", "8", "--stride", "9"], 2, &["--stride", "at most 8"]);
    fails(ok, &["--context", "513"], 2, &["--context", "between 1 and 512"]);
    fails(ok, &["--context", "0"], 2, &["--context"]);
    fails(ok, &["--batch", "0"], 2, &["--batch", "between 1 and 1024"]);
    fails(ok, &["--batch", "1025"], 2, &["--batch", "1024"]);
    fails(ok, &["--max-tokens", "0"], 2, &["--max-tokens", "at least 1"]);
    fails(ok, &["--stride", "-1"], 2, &["--stride"]);
    fails(ok, &["--text", "b"], 2, &["--text", "FILE"]);
    run(&["perplexity", "-m", &a1]).fails(2, &["FILE"]);
    run(&["perplexity", "-m", &a1, "./gone.txt"]).fails(1, &["gone.txt", "No such file"]);
    run(&["perplexity", "-m", "./gone", &write(dir.path(), ok)]).fails(1, &["./gone"]);
    run_with(&["perplexity", "-m", &a1, "-"], "").fails(1, &["standard input", "is empty"]);
}

#[test]
fn a_damaged_model_has_no_perplexity() {
    let dir = crate::hostile::copy("a1_packed");
    crate::hostile::poke(dir.path(), "model.embed_tokens.weight", &[0xc0, 0x7f]);
    let file = write(dir.path(), "some text");
    let folder = dir.path().to_str().unwrap();
    run(&["perplexity", "-m", folder, &file]).fails(1, &["token 0", "not finite", "damaged"]);
}
