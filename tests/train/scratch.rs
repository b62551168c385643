//! Runs in a directory: started, killed, resumed, and what they refuse.

use crate::CPU;
use candle_bitnet::train::scratch::{MASTERS, METRICS, RECIPE, STATE, Scratch};
use candle_bitnet::train::{Batching, Event, MetricsLog, Optimization, Outcome, Recipe, Shape};
use candle_bitnet::{BitNet, Error, LoadOptions};
use serde_json::Value;
use std::ops::ControlFlow::Continue;
use std::path::{Path, PathBuf};

fn text(dir: &Path) -> PathBuf {
    let path = dir.join("text.txt");
    let words = ["the", "cat", "größe", "sat", "on", "a", "mat", "and", "saw", "dogs"];
    let line = |i: usize| (0..6).map(|j| words[(i * i + j * (i % 7 + 1)) % 10]).collect::<Vec<_>>().join(" ") + ".\n";
    std::fs::write(&path, (0..400).map(line).collect::<String>()).unwrap();
    path
}

fn recipe() -> Recipe {
    Recipe {
        model: Shape { hidden: 16, intermediate: 20, layers: 1, heads: 2, vocab: 280, context: 16, ..Shape::default() },
        batches: Batching { validation: 0.05, sequences: 4, micro: 1 },
        optimization: Optimization {
            steps: 14,
            warmup: 2,
            eval_every: 3,
            save_every: 4,
            dropout: 0.1,
            lambda_warmup: 5,
            ..Optimization::default()
        },
    }
}

/// The log without the clock's part.
fn metrics(dir: &Path) -> Vec<Value> {
    let line = |line: &str| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        value.as_object_mut().unwrap().remove("tokens_per_second");
        value
    };
    std::fs::read_to_string(dir.join(METRICS)).unwrap().lines().map(line).collect()
}

fn masters(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let read = |name: &str| (name.to_owned(), std::fs::read(dir.join(MASTERS).join(name)).unwrap());
    ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        .map(read)
        .to_vec()
}

fn finish(run: &Scratch, threads: usize) -> Outcome {
    run.run(&CPU, threads, &mut |_| Ok(Continue(()))).unwrap().outcome
}

#[test]
fn a_killed_run_ends_as_if_nothing_had_happened() {
    let dir = tempfile::tempdir().unwrap();
    let (text, whole) = (text(dir.path()), dir.path().join("whole"));
    assert_eq!(finish(&Scratch::start(&text, &whole, &recipe()).unwrap(), 1), Outcome::Finished);
    let lines = metrics(&whole);
    assert_eq!(lines.len(), 14 + 5, "{lines:?}");
    assert_eq!(lines.iter().filter(|l| l["validation_bits_per_byte"].is_f64()).count(), 5);
    let model = BitNet::load(whole.join(MASTERS).to_str().unwrap(), LoadOptions::new(&CPU)).unwrap();
    assert_eq!(model.tokenizer().vocab_size(), 280);

    // An observer's error ends a run as a kill does: nothing is saved. Before the first state, and after the second.
    for (killed, saved) in [(2, 0), (4, 0), (10, 8)] {
        let broken = dir.path().join(format!("killed at {killed}"));
        let run = Scratch::start(&text, &broken, &recipe()).unwrap();
        let error = run.run(&CPU, 2, &mut |event| match event {
            Event::Step(m) if m.step == killed => Err(Error::Training("killed".into())),
            _ => Ok(Continue(())),
        });
        assert!(error.is_err() && broken.join(STATE).exists() == (saved > 0));
        // While one process trains, no other may.
        let error = Scratch::resume(&text, &broken).unwrap_err();
        assert!(error.to_string().contains("another process"), "{error}");
        drop(run);
        // What the last moment left: a torn line, bytes that are no text, files that were being written.
        let mut log = std::fs::read(broken.join(METRICS)).unwrap();
        log.extend(b"{\"step\": 1, \"loss\": 3.\xff\0\0");
        std::fs::write(broken.join(METRICS), log).unwrap();
        std::fs::write(broken.join(".writing-abc"), "half").unwrap();
        let run = Scratch::resume(&text, &broken).unwrap();
        assert!(!broken.join(".writing-abc").exists());
        let mut first = None;
        let summary = run.run(&CPU, 1, &mut |event| {
            if let Event::Step(m) = event {
                first.get_or_insert(m.step);
            }
            Ok(Continue(()))
        });
        let summary = summary.unwrap();
        assert_eq!((first, summary.outcome, summary.steps), (Some(saved + 1), Outcome::Finished, 14));
        assert_eq!(metrics(&broken), lines, "killed at {killed}");
        assert!(masters(&broken) == masters(&whole), "killed at {killed}");
        drop(run);
        // A finished run has nothing left to do.
        assert_eq!(finish(&Scratch::resume(&text, &broken).unwrap(), 3), Outcome::Finished);
        assert!(metrics(&broken) == lines && masters(&broken) == masters(&whole));
    }
}

#[test]
fn a_run_goes_on_with_its_own_text_only() {
    let dir = tempfile::tempdir().unwrap();
    let (text, out) = (text(dir.path()), dir.path().join("run"));
    let run = Scratch::start(&text, &out, &recipe()).unwrap();
    let stop = |event: Event<'_>| match event {
        Event::Step(m) if m.step == 5 => Ok(std::ops::ControlFlow::Break(())),
        _ => Ok(Continue(())),
    };
    assert_eq!(run.run(&CPU, 1, &mut { stop }).unwrap().outcome, Outcome::Interrupted);
    drop(run);
    let original = std::fs::read_to_string(&text).unwrap();
    let state = std::fs::read(out.join(STATE)).unwrap();
    let last = original.rfind("sat").unwrap();
    for changed in [original.replacen("cat", "dog", 1), format!("{}SAT{}", &original[..last], &original[last + 3..])] {
        std::fs::write(&text, changed).unwrap();
        let error = Scratch::resume(&text, &out).unwrap().run(&CPU, 1, &mut |_| Ok(Continue(()))).unwrap_err();
        assert!(matches!(&error, Error::Request { what, .. } if what == "training data"), "{error}");
        assert!(error.to_string().contains("it was changed") && error.to_string().contains(STATE), "{error}");
    }
    assert_eq!(std::fs::read(out.join(STATE)).unwrap(), state);
    std::fs::write(&text, original).unwrap();
    assert_eq!(finish(&Scratch::resume(&text, &out).unwrap(), 2), Outcome::Finished);
}

#[test]
fn without_validation_the_last_parameters_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (text, out) = (text(dir.path()), dir.path().join("run"));
    let mut recipe = recipe();
    recipe.batches.validation = 0.0;
    recipe.optimization.quantize = false;
    let run = Scratch::start(&text, &out, &recipe).unwrap();
    let summary = run.run(&CPU, 2, &mut |_| Ok(Continue(()))).unwrap();
    assert!(summary.best.is_none() && summary.steps == 14 && summary.tokens == 14 * 4 * 16);
    assert_eq!(masters(&out).len(), 5);
    assert_eq!(Recipe::read(&out.join(RECIPE)).unwrap(), recipe);
}

#[test]
fn bits_per_byte_count_the_bytes_of_the_text() {
    let dir = tempfile::tempdir().unwrap();
    let (text, out) = (text(dir.path()), dir.path().join("run"));
    let run = Scratch::start(&text, &out, &recipe()).unwrap();
    let summary = run.run(&CPU, 2, &mut |_| Ok(Continue(()))).unwrap();
    let best = summary.best.unwrap();
    let corpus = candle_bitnet::train::corpus::Corpus::read(&text, 0.05).unwrap();
    let ids = candle_bitnet::train::corpus::tokenize(run.tokenizer(), &corpus.validation, None).unwrap();
    let first = run.tokenizer().decode(&ids[..1], false).unwrap().len();
    let bytes = corpus.validation.concat().len() - first;
    let want = best.loss * (ids.len() - 1) as f64 / std::f64::consts::LN_2 / bytes as f64;
    assert!((best.bits_per_byte.unwrap() / want - 1.0).abs() < 1e-9, "{best:?} instead of {want}");
}

#[test]
fn nothing_of_anybodys_is_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    for name in [RECIPE, METRICS, STATE, "tokenizer.json", "config.json", "weights.gguf"] {
        let out = dir.path().join(format!("with {name}"));
        std::fs::create_dir(&out).unwrap();
        std::fs::write(out.join(name), "mine").unwrap();
        let error = Scratch::start(&text, &out, &recipe()).unwrap_err();
        assert!(matches!(error, Error::Request { .. }) && error.to_string().contains("directory"), "{error}");
        assert_eq!(std::fs::read(out.join(name)).unwrap(), b"mine");
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 1);
    }
    let out = dir.path().join("masters only");
    std::fs::create_dir_all(out.join(MASTERS)).unwrap();
    assert!(Scratch::start(&text, &out, &recipe()).is_err());
    let error = Scratch::resume(&text, &out).unwrap_err().to_string();
    assert!(error.contains(RECIPE) && error.contains("No such file"), "{error}");
    let mut large = recipe();
    large.model =
        Shape { hidden: 1 << 17, intermediate: 1 << 17, layers: 1000, heads: 1024, vocab: 280, ..large.model };
    let run = Scratch::start(&text, &dir.path().join("large"), &large).unwrap();
    let error = run.run(&CPU, 1, &mut |_| Ok(Continue(()))).unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }) && error.to_string().contains("GB of memory"), "{error}");
}

#[test]
fn a_log_is_cut_back_to_its_state() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let log = "{\"step\":1}\n{\"step\":2}\n{\"step\":2,\"validation_loss\":1.5}\nnonsense\n{\"step\":3}\n{\"st";
    for (step, kept) in [(0, 0), (1, 1), (2, 3), (3, 4), (9, 4)] {
        std::fs::write(&path, log).unwrap();
        drop(MetricsLog::open(&path, step).unwrap());
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.lines().count() == kept && (text.is_empty() || text.ends_with('\n')), "{step}: {text}");
    }
    let mut log = MetricsLog::open(&path, 9).unwrap();
    log.record(&Event::Skipped { step: 10, loss: f64::NAN }).unwrap();
    drop(log);
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().last(), Some("{\"step\":10,\"skipped\":\"NaN\"}"));
}
