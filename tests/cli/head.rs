//! `--head`.

use crate::{model, run};

#[test]
fn every_exact_head_writes_the_same_text() {
    let a1 = model("a1_packed");
    let generate = |head: &str, way: &[&str]| {
        let args =
            ["generate", "-m", &a1, "-p", "The quick", "-n", "16", "--ignore-eos", "--seed", "3", "--head", head];
        run(&[&args[..], way].concat()).ok()
    };
    for way in [&["--temperature", "0"][..], &["--temperature", "0.9", "--top-k", "20"], &["--top-p", "0.9"]] {
        let want = generate("full", way);
        for head in ["auto", "bf16", "screened", "screened-probable"] {
            assert_eq!(generate(head, way), want, "{head} {way:?}");
        }
        generate("int8", way);
    }
    run(&["generate", "-m", &a1, "-p", "x", "--head", "f8"]).fails(2, &["--head", "f8", "screened-probable"]);
}

#[test]
fn bench_tells_what_a_screened_head_read() {
    let a1 = model("a1_packed");
    let bench = |head: &str, more: &[&str]| {
        let args = ["bench", "-m", &a1, "--pp", "4", "--tg", "3", "--reps", "1", "--threads", "1", "--head", head];
        run(&[&args[..], more].concat())
    };
    let full = bench("full", &["--json"]).json();
    assert!(full["head"] == "bf16" && full["head_rows_rescored"].is_null(), "{full}");
    assert_eq!(full["bytes_per_token_head"], 384 * 128 * 2);
    for (head, least) in [("screened", 384 * 128 * 6 / 8), ("screened-probable", 384 * 128 * 4 / 8)] {
        let json = bench(head, &["--json"]).json();
        let rescored = json["head_rows_rescored"].as_f64().unwrap();
        assert!((1.0..384.0).contains(&rescored), "{json}");
        assert_eq!(json["head_rows_refined"].as_f64() >= Some(rescored), head == "screened", "{json}");
        assert!(json["bytes_per_token_head"].as_u64() >= Some(least + 384 * 16 + 256), "{json}");
        let text = bench(head, &["--profile"]).ok();
        for part in ["screened  ", "screen-head 384x128", "rescore-head 384x128", head] {
            assert!(text.contains(part), "{head}: no {part:?} in {text}");
        }
        // Four sequences are cheaper with the stored rows.
        let json = bench(head, &["--batch", "4", "--json"]).json();
        assert!(json["head_rows_rescored"].is_null(), "{json}");
        assert_eq!(json["bytes_per_token_head"], full["bytes_per_token_head"]);
    }
    let text = bench("int8", &["--profile"]).ok();
    assert!(text.contains("int8-head") && text.contains("approximate"), "{text}");
}

#[test]
fn what_needs_every_logit_has_them_with_every_head() {
    let a1 = model("a1_packed");
    let perplexity = |head: &str| {
        let args = ["perplexity", "-m", &a1, "tests/texts/verse.txt", "--max-tokens", "60", "--json", "--head", head];
        run(&args).json()["perplexity"].as_f64().unwrap()
    };
    let want = perplexity("full");
    assert_eq!([perplexity("auto"), perplexity("screened"), perplexity("screened-probable")], [want; 3]);
    let int8 = perplexity("int8");
    assert!(int8 != want && (int8 / want - 1.0).abs() < 0.05, "{int8}, not {want}");
}
