//! Texts, tokenizers and recipes: what is read, and what is refused by name.

use candle_bitnet::Error;
use candle_bitnet::text::Tokenizer;
use candle_bitnet::train::corpus::{Corpus, read_documents, tokenize};
use candle_bitnet::train::{END_OF_TEXT, Recipe, train_bpe, write_tokenizer};
use std::path::PathBuf;
use tempfile::TempDir;

fn file(name: &str, content: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    (dir, path)
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: candle_bitnet::Result<T>, words: &[&str]) {
    let error = result.unwrap_err().to_string();
    words.iter().for_each(|word| assert!(error.contains(word), "no {word:?} in {error}"));
}

#[test]
fn documents_are_read_or_refused_by_line_and_byte() {
    let lines = "{\"text\": \"one\\ntwo\"}\n\n  \n{\"id\": 3, \"text\": \"Grüße 🙂\"}\r\n{\"text\": \"\"}";
    for name in ["a.jsonl", "a.JSONL"] {
        let (_dir, path) = file(name, lines);
        assert_eq!(read_documents(&path).unwrap(), ["one\ntwo", "Grüße 🙂", ""]);
    }
    let (_dir, path) = file("a.txt", lines);
    assert_eq!(read_documents(&path).unwrap(), [lines]);

    let fails = |name: &str, content: &[u8], words: &[&str]| {
        let (_dir, path) = file(name, content);
        refused(read_documents(&path), &[&[name], words].concat());
        refused(Corpus::read(&path, 0.1), &[name]);
    };
    fails("a.txt", b"", &["no text"]);
    fails("a.txt", b" \n\t\n", &["no text"]);
    fails("a.jsonl", b"", &["no text"]);
    fails("a.jsonl", b"{\"text\": \" \"}\n{\"text\": \"\"}", &["no text"]);
    fails("a.txt", b"abc\xffdef", &["UTF-8", "byte 3", "iconv"]);
    fails("a.txt", "abcé".as_bytes().split_last().unwrap().1, &["UTF-8", "byte 3"]);
    fails("a.jsonl", b"{\"text\": \"a\"}\n\n{\"text\": \"b\"\n", &["line 3", "not JSON", "EOF"]);
    fails("a.jsonl", b"{\"text\": \"a\"} x\n", &["line 1", "column 15", "trailing"]);
    fails("a.jsonl", b"{\"text\": 5}\n", &["line 1", "\"text\""]);
    fails("a.jsonl", b"[\"text\"]\n", &["line 1", "\"text\""]);
    fails("a.jsonl", b"{\"prompt\": \"a\"}\n", &["line 1", "\"text\""]);
    let deep = [vec![b'['; 100_000], b"\n".to_vec()].concat();
    fails("a.jsonl", &deep, &["line 1", "recursion"]);
    refused(read_documents("/nowhere/a.txt".as_ref()), &["/nowhere/a.txt", "No such file"]);
    let dir = tempfile::tempdir().unwrap();
    refused(read_documents(dir.path()), &[dir.path().to_str().unwrap()]);
}

#[test]
fn a_split_keeps_every_byte_once_and_cuts_after_line_ends() {
    // Lines of one to four bytes a character, so that equal pieces end inside characters.
    let line = |i: usize| format!("{}\n", ["é", "ab", "你好", "🙂", ""][i % 5].repeat(1 + i * i % 17));
    for (lines, end) in [(3, "\n"), (40, ""), (500, "tail"), (5000, "🙂"), (20_000, "\n\n")] {
        let text: String = (0..lines).map(line).chain([end.to_owned()]).collect();
        let (_dir, path) = file("a.txt", &text);
        for share in [0.0, 0.01, 0.1, 0.5] {
            let corpus = match Corpus::read(&path, share) {
                Ok(corpus) => corpus,
                // Three lines cannot be divided by a hundred.
                Err(e) => {
                    assert!(text.len() < 3000 && e.to_string().contains("set validation to 0"), "{e}");
                    continue;
                }
            };
            assert!(!corpus.separate && corpus.validation.is_empty() == (share == 0.0));
            // In turns: the end of each piece is validation's.
            let (mut train, mut validation) = (corpus.train.iter().peekable(), corpus.validation.iter().peekable());
            let mut rest = text.as_str();
            while !rest.is_empty() {
                let mut moved = false;
                for part in [&mut train, &mut validation] {
                    if let Some(next) = part.next_if(|p| rest.starts_with(p.as_str()) && !p.is_empty()) {
                        rest = &rest[next.len()..];
                        assert!(next.ends_with('\n') || rest.is_empty());
                        moved = true;
                    }
                }
                assert!(moved, "{} bytes of {} are nobody's", rest.len(), text.len());
            }
            assert!(train.next().is_none() && validation.next().is_none());
            let set_apart: usize = corpus.validation.iter().map(String::len).sum();
            let wanted = share * text.len() as f64;
            if wanted > 2000.0 {
                assert!((set_apart as f64 / wanted - 1.0).abs() < 0.2, "{set_apart} for {wanted}");
            }
        }
    }
    let (_dir, path) = file("a.txt", "one line that never ends ".repeat(1000));
    refused(Corpus::read(&path, 0.02), &["a.txt", "ends of lines", "validation to 0"]);
    assert_eq!(Corpus::read(&path, 0.0).unwrap().train.len(), 1);
}

#[test]
fn documents_are_split_evenly_and_never_lost() {
    for (count, share) in [(2, 0.02), (10, 0.3), (100, 0.02), (101, 0.5), (7, 0.0)] {
        let lines: String = (0..count).map(|i| format!("{{\"text\": \"{i}\"}}\n")).collect();
        let (_dir, path) = file("a.jsonl", lines);
        let corpus = Corpus::read(&path, share).unwrap();
        assert!(corpus.separate);
        let wanted = if share == 0.0 { 0.0 } else { (f64::from(count) * share).floor().max(1.0) };
        assert_eq!(corpus.validation.len() as f64, wanted, "{count} documents, {share}");
        let mut all: Vec<u32> = corpus.train.iter().chain(&corpus.validation).map(|d| d.parse().unwrap()).collect();
        all.sort_unstable();
        assert_eq!(all, (0..count as u32).collect::<Vec<_>>());
    }
}

const TEXT: &str = "The quick brown fox's jumps; größer als 10 Füchse, 你好世界 🙂🙂!\n  indented\tline\r\n\n\nEnd. ";

#[test]
fn a_trained_tokenizer_gives_every_text_back() {
    let documents = [TEXT.repeat(20), "another quick document, larger and larger\n".repeat(30)];
    let tokenizer = train_bpe(&documents, 340).unwrap();
    assert_eq!(tokenizer.vocab_size(), 340);
    assert_eq!(tokenizer.token_to_id(END_OF_TEXT), Some(0));
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.adds_bos()), (Some(0), Some(0), false));
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer(&tokenizer, dir.path()).unwrap();
    let loaded = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!((loaded.bos_id(), loaded.eos_id(), loaded.vocab_size()), (Some(0), Some(0), 340));
    assert_eq!(loaded.to_json().unwrap(), train_bpe(&documents, 340).unwrap().to_json().unwrap(), "the same again");

    // Also characters that were never seen, control characters, and no space at the beginning.
    for text in [TEXT, " leading", "", "a", "\u{0}\u{7f}", "naïve Ωμέγα שלום 𝒳 e\u{301}", "\n\n\n", "\u{feff}x"]
    {
        for t in [&tokenizer, &loaded] {
            let ids = t.encode(text, true).unwrap();
            assert!(ids.iter().all(|id| (1..340).contains(id)), "{text:?}");
            assert_eq!(t.decode(&ids, false).unwrap(), text);
        }
    }
    // Fewer tokens than bytes.
    assert!(tokenizer.encode(TEXT, false).unwrap().len() * 3 < TEXT.len() * 2);
}

#[test]
fn a_vocabulary_that_is_too_large_names_the_possible_one() {
    let documents = ["a small text, a small text".to_owned()];
    let error = train_bpe(&documents, 5000).unwrap_err().to_string();
    let number = error.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(error.contains("5000 were asked for") && (258..300).contains(&number), "{error}");
    assert_eq!(train_bpe(&documents, number).unwrap().vocab_size(), number);
    assert_eq!(train_bpe(&documents, 257).unwrap().vocab_size(), 257, "bytes alone");
}

#[test]
fn documents_are_tokenised_in_pieces_and_separated() {
    let tokenizer = train_bpe(&[TEXT.repeat(20)], 300).unwrap();
    // Longer than a piece of 1 MiB, with multi-byte characters at the cut, with and without empty lines.
    for text in [TEXT.repeat(12_000), "你".repeat(400_000)] {
        let ids = tokenize(&tokenizer, std::slice::from_ref(&text), None).unwrap();
        assert!(tokenizer.decode(&ids, false).unwrap() == text);
    }
    let two = ["ab".to_owned(), "c".to_owned()];
    let (joined, separate) = (tokenize(&tokenizer, &two, None).unwrap(), tokenize(&tokenizer, &two, Some(0)).unwrap());
    assert_eq!(tokenizer.decode(&joined, false).unwrap(), "abc");
    assert_eq!(tokenizer.decode(&separate, false).unwrap(), format!("ab{END_OF_TEXT}c{END_OF_TEXT}"));
}

#[test]
fn hostile_recipes_are_refused_by_line_or_setting() {
    let read = |text: &str| {
        let (_dir, path) = file("recipe.toml", text);
        Recipe::read(&path).and_then(|r| r.check().map(|()| r))
    };
    assert_eq!(read("").unwrap(), Recipe::default());
    // As many key and value heads as query heads where nobody says.
    assert_eq!(read("[model]\nheads = 8\n").unwrap().model.config(0).unwrap().num_kv_heads, 8);
    assert_eq!(read("[model]\nheads = 8\nkv_heads = 2\n").unwrap().model.config(0).unwrap().num_kv_heads, 2);
    for (text, words) in [
        ("[model]\n\nhidden = \"wide\"\n", &["recipe.toml", "line 3", "invalid type"][..]),
        ("[model]\nhidden = -4\n", &["line 2"]),
        ("[model]\nhidden = 99999999999999999999\n", &["line 2"]),
        ("[model]\nhiden = 4\n", &["line 2", "hiden", "hidden"]),
        ("[modell]\n", &["modell", "optimization"]),
        ("[model\n", &["line 1"]),
        ("[optimization]\nschedule = \"linear\"\n", &["line 2", "linear", "cosine"]),
        ("[model]\nhidden = 9223372036854775807\n", &["hidden", "out of range"]),
        ("[model]\nhidden = 0\n", &["hidden", "out of range"]),
        ("[model]\nheads = 0\n", &["heads", "out of range: 1"]),
        ("[model]\nheads = 3\n", &["hidden", "multiple of 3"]),
        ("[model]\nkv_heads = 0\n", &["kv_heads", "out of range"]),
        ("[model]\nkv_heads = 3\n", &["heads", "multiple of 3"]),
        ("[model]\nhidden = 128\nheads = 32\nkv_heads = 1\n", &["heads / kv_heads", "1 to 16"]),
        ("[model]\nhidden = 512\nheads = 1\n", &["hidden / heads", "512", "4 to 256"]),
        ("[model]\nhidden = 24\nheads = 4\n", &["hidden / heads", "multiple of 4"]),
        ("[model]\nlayers = 100000\n", &["layers", "out of range"]),
        ("[model]\nvocab = 256\n", &["vocab", "257"]),
        ("[model]\ncontext = 1\n", &["context", "2"]),
        ("[model]\nrope_theta = nan\n", &["rope_theta", "NaN"]),
        ("[batches]\nsequences = 0\n", &["sequences", "out of range"]),
        ("[batches]\nsequences = 9223372036854775807\n", &["sequences", "out of range"]),
        ("[batches]\nvalidation = 1.0\n", &["validation", "0 to 0.5"]),
        ("[batches]\nmicro = 0\n", &["micro", "1 to 16"]),
        ("[optimization]\nsteps = 9223372036854775807\n", &["steps", "1000000000"]),
        ("[optimization]\nlr = inf\n", &["lr"]),
        ("[optimization]\nclip = 0.0\n", &["clip"]),
        ("[optimization]\ndropout = 1.0\n", &["dropout"]),
        ("[optimization]\nwarmup = 2000\n", &["warmup"]),
        ("[optimization]\nlambda_warmup = 2000\n", &["lambda_warmup"]),
    ] {
        refused(read(text), words);
    }
    refused(read(&"[".repeat(100_000)), &["recipe.toml"]);
    refused(read(&format!("a = {}{}", "[".repeat(50_000), "]".repeat(50_000))), &["recipe.toml", "line 1"]);
    refused(read(&"# x\n".repeat(300_000)), &["recipe.toml", "no recipe"]);
    let (_dir, path) = file("recipe.toml", b"\xff");
    refused(Recipe::read(&path), &["recipe.toml"]);
    assert!(matches!(Recipe::read("/nowhere/r.toml".as_ref()), Err(Error::Io { .. })));
}
