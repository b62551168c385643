//! The training loop: the same bits whatever happens on the way.

use crate::oracle::negative_log_likelihood;
use crate::{CPU, flat, parameters, snapshot, tiny};
use candle_bitnet::train::corpus::{Stream, windows};
use candle_bitnet::train::{
    Batch, Data, Decoder, Event, MAX_BAD_STEPS, Masters, Optimization, Outcome, Parameters, Trainer,
};
use candle_bitnet::{Error, Result};
use candle_core::{Tensor, safetensors};
use std::collections::HashMap;
use std::ops::ControlFlow::{self, Break, Continue};
use std::path::Path;

/// Some tokens of a small vocabulary.
fn tokens(count: usize) -> Vec<u32> {
    let (mut a, mut b) = (1u32, 2u32);
    let next = |i: usize| {
        (a, b) = (b, (a * 3 + b + u32::from(i.is_multiple_of(11))) % 23);
        b
    };
    (0..count).map(next).collect()
}

fn stream(micro: usize) -> Stream {
    Stream::new(tokens(700), 16, 6, micro, 3, &tokens(100)[50..], 61).unwrap()
}

fn settings() -> Optimization {
    Optimization {
        steps: 12,
        lr: 5e-3,
        warmup: 3,
        dropout: 0.1,
        lambda_warmup: 4,
        eval_every: 5,
        save_every: 4,
        seed: 9,
        ..Optimization::default()
    }
}

fn go_on(_: Event<'_>) -> Result<ControlFlow<()>> {
    Ok(Continue(()))
}

/// Everything that training changes, without the clock.
fn state(path: &Path) -> HashMap<String, Vec<u8>> {
    let bytes = |t: &Tensor| flat(t).iter().flat_map(|v| v.to_bits().to_le_bytes()).collect::<Vec<u8>>();
    let tensors = safetensors::load(path, &CPU).unwrap();
    let mut all: HashMap<String, Vec<u8>> =
        tensors.iter().filter(|(name, _)| *name != "progress").map(|(name, t)| (name.clone(), bytes(t))).collect();
    let mut progress = progress(path);
    progress["seconds"] = 0.into();
    all.insert("progress".into(), progress.to_string().into_bytes());
    all
}

fn progress(path: &Path) -> serde_json::Value {
    let json = safetensors::load(path, &CPU).unwrap()["progress"].to_vec1::<u8>().unwrap();
    serde_json::from_slice(&json).unwrap()
}

#[test]
fn threads_and_interruptions_change_no_bit() {
    let (config, data) = (tiny(), stream(1));
    let decoder = Decoder::new(&config).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for masters in [Masters::F32, Masters::BF16] {
        let first = parameters(&config, masters, 5);
        let untouched = snapshot(&first);
        let whole = dir.path().join("whole");
        let mut metrics = Vec::new();
        for threads in [1, 2, 3] {
            let path = dir.path().join(format!("{threads}"));
            let mut trainer = Trainer::new(&decoder, &data, first.clone(), settings(), threads).unwrap();
            let mut seen = Vec::new();
            let outcome = trainer.run(Some(&path), &mut |event| {
                if let Event::Step(m) = event {
                    seen.push((m.step, m.loss.to_bits(), m.gradient_norm.to_bits(), m.tokens));
                }
                Ok(Continue(()))
            });
            assert_eq!(outcome.unwrap(), Outcome::Finished);
            if threads == 1 {
                std::fs::rename(&path, &whole).unwrap();
                metrics = seen;
            } else {
                assert_eq!((state(&path), seen), (state(&whole), metrics.clone()), "{masters:?}, {threads} threads");
            }
        }
        assert_eq!(snapshot(&first), untouched, "training has parameters of its own");
        assert_eq!((metrics.len(), metrics[11].3), (12, 12 * 6 * 16));

        // Stopped after a step that is none of the settings', by each kind of event, and continued from other values.
        for stop in [1, 4, 5, 7, 11] {
            let path = dir.path().join(format!("stopped at {stop}"));
            let mut trainer = Trainer::new(&decoder, &data, first.clone(), settings(), 2).unwrap();
            let outcome = trainer.run(Some(&path), &mut |event| {
                let now = match event {
                    Event::Step(m) => m.step == stop && stop != 4 && stop != 5,
                    Event::Saved { step } => step == stop && stop == 4,
                    Event::Validated(v) => v.step == stop,
                    _ => false,
                };
                Ok(if now { Break(()) } else { Continue(()) })
            });
            assert_eq!((outcome.unwrap(), trainer.progress().step), (Outcome::Interrupted, stop));
            let other = parameters(&config, masters, 1234);
            let mut trainer = Trainer::new(&decoder, &data, other, settings(), 1).unwrap().resume(&path).unwrap();
            assert_eq!(trainer.run(Some(&path), &mut go_on).unwrap(), Outcome::Finished);
            assert_eq!(state(&path), state(&whole), "{masters:?}, stopped after {stop}");
        }
    }
}

#[test]
fn the_loss_falls_in_either_type_of_master() {
    let config = tiny();
    let decoder = Decoder::new(&config).unwrap();
    // What follows is a function of the token before, but for every eleventh.
    let step = |b: &mut u32, i: usize| {
        *b = (*b * 5 + 1 + u32::from(i.is_multiple_of(11))) % 23;
        Some(*b)
    };
    let text: Vec<u32> = (0..3000).scan(1, step).collect();
    let data = Stream::new(text[..2800].to_vec(), 16, 8, 4, 1, &text[2800..], 0).unwrap();
    let optimization = Optimization { steps: 150, lr: 2e-2, warmup: 10, eval_every: 0, ..Optimization::default() };
    for masters in [Masters::F32, Masters::BF16] {
        let start = Parameters::random(&config, masters, &CPU, 1).unwrap();
        let mut trainer = Trainer::new(&decoder, &data, start, optimization, 2).unwrap();
        let (mut losses, mut validated) = (Vec::new(), None);
        let outcome = trainer.run(None, &mut |event| {
            match event {
                Event::Step(m) => losses.push(m.loss),
                Event::Validated(v) => validated = Some(*v),
                Event::Saved { .. } => panic!("nowhere to save to"),
                _ => {}
            }
            Ok(Continue(()))
        });
        assert_eq!(outcome.unwrap(), Outcome::Finished);
        // The 23 tokens are about equally frequent: 3.1 nats for who knows nothing else.
        assert!((losses[0] - 257f64.ln()).abs() < 0.3, "{}", losses[0]);
        let validated = validated.unwrap();
        assert!(losses[149] < 2.0 && validated.loss < 2.0, "{masters:?}: {} {validated:?}", losses[149]);
        assert_eq!((validated.step, validated.bits_per_byte, validated.best), (150, None, true));
    }
}

#[test]
fn validation_is_the_plain_mean_at_full_quantisation() {
    let (config, data) = (tiny(), stream(2));
    let decoder = Decoder::new(&config).unwrap();
    let start = parameters(&config, Masters::F32, 8);
    for quantize in [true, false] {
        let settings = Optimization { quantize, lambda_warmup: 12, ..settings() };
        let trainer = Trainer::new(&decoder, &data, start.clone(), settings, 2).unwrap();
        let got = trainer.validate().unwrap().unwrap();
        let prepared = decoder.prepare(&start, if quantize { 1.0 } else { 0.0 }).unwrap();
        let text = &tokens(100)[50..];
        let (mut nats, mut count) = (0.0, 0);
        for begin in (0..text.len() - 1).step_by(16) {
            let end = (begin + 16).min(text.len() - 1);
            let rows: Vec<Vec<f32>> = prepared.logits(&text[begin..end], end - begin).unwrap().to_vec2().unwrap();
            for (row, target) in rows.iter().zip(&text[begin + 1..]) {
                let row: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
                nats += negative_log_likelihood(&row, *target as usize);
                count += 1;
            }
        }
        assert_eq!(count, 49);
        assert!((got.loss / (nats / 49.0) - 1.0).abs() < 1e-6, "{got:?} instead of {}", nats / 49.0);
        let bits = nats / std::f64::consts::LN_2 / 61.0;
        assert!((got.bits_per_byte.unwrap() / bits - 1.0).abs() < 1e-6, "{got:?} instead of {bits}");
    }
}

#[test]
fn quantisers_are_mixed_in_linearly() {
    let o = Optimization { lambda_warmup: 4, ..Optimization::default() };
    assert_eq!([0, 1, 2, 3, 4, 5].map(|s| o.lambda(s)), [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]);
    assert_eq!(Optimization::default().lambda(0), 1.0);
    assert_eq!(Optimization { quantize: false, ..o }.lambda(100), 0.0);
    for (name, bad) in [
        ("lambda_warmup", Optimization { lambda_warmup: 1001, ..o }),
        ("warmup", Optimization { warmup: 1001, ..o }),
        ("steps", Optimization { steps: 0, ..o }),
        ("steps", Optimization { steps: u64::MAX, ..o }),
        ("clip", Optimization { clip: 0.0, ..o }),
        ("beta1", Optimization { beta1: 1.0, ..o }),
        ("beta2", Optimization { beta2: f64::NAN, ..o }),
        ("eps", Optimization { eps: 0.0, ..o }),
        ("weight_decay", Optimization { weight_decay: -0.1, ..o }),
    ] {
        let error = bad.check().unwrap_err();
        assert!(matches!(&error, Error::Request { what, .. } if what == name), "{name}: {error}");
    }
}

#[test]
fn patience_ends_a_run_for_good() {
    let (config, data) = (tiny(), stream(3));
    let decoder = Decoder::new(&config).unwrap();
    // A learning rate that destroys whatever was there.
    let settings =
        Optimization { lr: 10.0, warmup: 0, patience: 2, eval_every: 1, save_every: 0, steps: 50, ..settings() };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let start = Parameters::random(&config, Masters::F32, &CPU, 1).unwrap();
    let mut trainer = Trainer::new(&decoder, &data, start.clone(), settings, 2).unwrap();
    let (mut best, mut validated) = (0, 0);
    let outcome = trainer.run(Some(&path), &mut |event| {
        best += u32::from(matches!(event, Event::Best(_)));
        validated += u32::from(matches!(event, Event::Validated(_)));
        Ok(Continue(()))
    });
    assert_eq!(outcome.unwrap(), Outcome::Stopped);
    let p = trainer.progress().clone();
    assert!(best >= 1 && validated > best && p.since_best == 2 && p.step < 50, "{p:?}");
    assert_eq!(p.best.unwrap().step, p.step - 2);
    let resume = |settings| Trainer::new(&decoder, &data, start.clone(), settings, 2).unwrap().resume(&path).unwrap();
    let mut again = resume(settings);
    assert_eq!(again.run(Some(&path), &mut |_| panic!("nothing is left to happen")).unwrap(), Outcome::Stopped);
    let mut patient = resume(Optimization { patience: 0, steps: p.step + 1, ..settings });
    assert_eq!(patient.run(None, &mut go_on).unwrap(), Outcome::Finished);
}

#[test]
fn a_loss_that_stays_nan_ends_a_run_and_spoils_nothing() {
    let (config, data) = (tiny(), stream(3));
    let decoder = Decoder::new(&config).unwrap();
    let good = parameters(&config, Masters::F32, 1);
    let poisoned = Parameters::from_values(&config, Masters::F32, &CPU, |name, dims| {
        let value = good.list()[good.index(name)?].value.clone();
        Ok(if name == "model.norm.weight" { (value * f64::NAN)?.reshape(dims)? } else { value })
    });
    let poisoned = poisoned.unwrap();
    let settings = Optimization { eval_every: 2, save_every: 0, steps: 40, ..settings() };
    let mut trainer = Trainer::new(&decoder, &data, poisoned.clone(), settings, 2).unwrap();
    let mut skipped = Vec::new();
    let error = trainer.run(None, &mut |event| {
        match event {
            Event::Skipped { step, loss } => skipped.push((step, loss.is_nan())),
            Event::Validated(v) => assert!(v.loss.is_nan() && !v.best),
            other => panic!("{other:?}"),
        }
        Ok(Continue(()))
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("no finite loss in 10 steps") && error.contains("learning rate"), "{error}");
    assert_eq!(skipped, (1..MAX_BAD_STEPS).map(|s| (s, true)).collect::<Vec<_>>());
    assert_eq!((trainer.progress().skipped, trainer.progress().updates, trainer.progress().tokens), (10, 0, 0));
    assert_eq!(snapshot(trainer.parameters()), snapshot(&poisoned));
}

#[test]
fn a_state_of_something_else_is_refused() {
    let (config, data) = (tiny(), stream(3));
    let decoder = Decoder::new(&config).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.safetensors");
    let start = parameters(&config, Masters::F32, 1);
    let new = || Trainer::new(&decoder, &data, start.clone(), settings(), 1).unwrap();
    new().save(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    new().resume(&path).unwrap();
    let fails = |trainer: Trainer<'_, Decoder, Stream>, words: &[&str]| {
        let Err(error) = trainer.resume(&path) else { panic!("resumed: {words:?}") };
        let error = error.to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "no {word:?} in {error}"));
    };

    // One that was saved before states knew their data; one of which a part is missing.
    let mut tensors = safetensors::load(&path, &CPU).unwrap();
    let mut before = progress(&path);
    assert!(before.as_object_mut().unwrap().remove("data").unwrap().is_u64());
    let text = before.to_string().into_bytes();
    tensors.insert("progress".into(), Tensor::from_slice(&text, text.len(), &CPU).unwrap());
    safetensors::save(&tensors, &path).unwrap();
    new().resume(&path).unwrap();
    tensors.remove("second_moment.model.norm.weight").unwrap();
    safetensors::save(&tensors, &path).unwrap();
    fails(new(), &["second_moment.model.norm.weight", "missing", "another model"]);
    std::fs::write(&path, &whole).unwrap();

    // Another text, another validation text, another type, another model.
    for (train, validation) in [(tokens(701), tokens(100)[50..].to_vec()), (tokens(700), tokens(100)[49..].to_vec())] {
        let other = Stream::new(train, 16, 6, 3, 3, &validation, 61).unwrap();
        let trainer = Trainer::new(&decoder, &other, start.clone(), settings(), 1).unwrap();
        fails(trainer, &["training data", "state.safetensors", "same data", "new run"]);
    }
    let bf16 = Trainer::new(&decoder, &data, parameters(&config, Masters::BF16, 1), settings(), 1).unwrap();
    fails(bf16, &["state.safetensors", "master.model.embed_tokens", "F32", "BF16", "another model"]);
    let mut wide = config.clone();
    wide.intermediate_size = 24;
    let wide_decoder = Decoder::new(&wide).unwrap();
    let wide = Trainer::new(&wide_decoder, &data, parameters(&wide, Masters::F32, 1), settings(), 1).unwrap();
    fails(wide, &["state.safetensors", "[20]", "[24]", "another model"]);
    let mut deep = config.clone();
    deep.num_layers = 2;
    let deep_decoder = Decoder::new(&deep).unwrap();
    let deep = Trainer::new(&deep_decoder, &data, parameters(&deep, Masters::F32, 1), settings(), 1).unwrap();
    fails(deep, &["model.layers.1.", "missing", "another model"]);

    // Damage: cut anywhere, and a progress that is none.
    for len in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..len]).unwrap();
        fails(new(), &["state.safetensors"]);
    }
    let key = b"\"updates\"";
    let at = whole.windows(key.len()).position(|w| w == key).unwrap();
    let mut broken = whole.clone();
    broken[at + 1] = b'U';
    std::fs::write(&path, &broken).unwrap();
    fails(new(), &["tensor progress", "Updates"]);
    std::fs::remove_file(&path).unwrap();
    fails(new(), &["state.safetensors", "No such file"]);
}

#[test]
fn every_window_of_an_epoch_is_seen_once() {
    for length in 1..=6 {
        for count in 2 * (length + 1)..2 * (length + 1) + 3 * length + 2 {
            for seed in 0..3 {
                // Tokens are their own positions.
                let all: Vec<u32> = (0..count as u32).collect();
                let stream = Stream::new(all.clone(), length, 1, 1, seed, &[], 0).unwrap();
                let windows = (count - length) / length;
                assert!((stream.epochs(windows as u64) - 1.0).abs() < 1e-12);
                let mut offsets = Vec::new();
                for epoch in 0..4 {
                    let mut starts = Vec::new();
                    for step in epoch * windows..(epoch + 1) * windows {
                        let [batch] = &stream.micro_batches(step as u64).unwrap()[..] else { panic!() };
                        let start = batch.tokens[0];
                        let expected = start..start + length as u32;
                        assert!(batch.tokens.iter().copied().eq(expected.clone()));
                        assert!(batch.targets.iter().copied().eq(expected.map(|t| Some(t + 1))));
                        assert!((start as usize) + length < count);
                        starts.push(start);
                    }
                    starts.sort_unstable();
                    let apart = starts.windows(2).all(|w| w[1] - w[0] == length as u32);
                    assert!(apart, "length {length}, {count} tokens: {starts:?}");
                    offsets.push(starts[0]);
                }
                assert!(length < 3 || offsets.iter().any(|o| *o != offsets[0]), "every epoch cuts at the same places");
            }
        }
    }
    for (count, length, sequences, micro, word) in [
        (9, 4, 1, 1, "too few"),
        (0, 4, 1, 1, "too few"),
        (9, 0, 1, 1, "length"),
        (9, 2, 0, 1, "sequences"),
        (9, 2, 1, 0, "micro"),
    ] {
        let error = Stream::new(vec![1; count], length, sequences, micro, 0, &[], 0).unwrap_err();
        assert!(error.to_string().contains(word) && matches!(error, Error::Request { .. }), "{error}");
    }
    assert!(Stream::new(vec![1; 9], usize::MAX, 1, 1, 0, &[], 0).is_err());
}

#[test]
fn micro_batches_only_group_what_a_step_has() {
    let of = |micro| {
        let stream = Stream::new(tokens(700), 16, 7, micro, 3, &[], 0).unwrap();
        // Steps on both sides of an epoch's end, in an order of their own.
        let join = |step| {
            let batches: Vec<Batch> = stream.micro_batches(step).unwrap();
            assert!(batches.iter().all(|b| b.length == 16 && b.counted() == b.tokens.len()));
            assert_eq!(batches.len(), 7usize.div_ceil(micro));
            batches.iter().flat_map(|b| b.tokens.iter().copied()).collect::<Vec<u32>>()
        };
        [6, 0, 5, 100, 6].map(join)
    };
    let one = of(1);
    assert_eq!(one[0], one[4], "a function of the step alone");
    assert_eq!((of(2), of(3), of(7)), (one.clone(), one.clone(), one));
}

#[test]
fn validation_windows_have_every_target_once() {
    for (count, length, micro) in [(0, 4, 2), (1, 4, 2), (2, 4, 2), (5, 4, 1), (6, 4, 3), (41, 7, 2), (41, 50, 1)] {
        let all: Vec<u32> = (0..count).collect();
        let batches = windows(&all, length, length, micro);
        let targets: Vec<u32> = batches.iter().flat_map(|b| b.targets.iter().flatten().copied()).collect();
        assert_eq!(targets, all.get(1..).unwrap_or_default());
        for b in &batches {
            assert!(b.tokens.len() == b.targets.len() && b.tokens.len().is_multiple_of(length));
            assert!(b.tokens.len() <= length * micro);
            assert!(b.tokens.iter().zip(&b.targets).all(|(t, next)| next.is_none_or(|n| n == t + 1)));
        }
    }
}

#[test]
fn sliding_windows_score_every_target_once_with_the_context_of_the_first_that_holds_it() {
    for (count, length, stride) in [(0, 4, 2), (2, 4, 2), (41, 8, 4), (41, 8, 3), (41, 50, 25), (9, 8, 1), (30, 6, 6)] {
        let all: Vec<u32> = (0..count).collect();
        let batches = windows(&all, length, stride, 2);
        let targets: Vec<u32> = batches.iter().flat_map(|b| b.targets.iter().flatten().copied()).collect();
        assert_eq!(targets, all.get(1..).unwrap_or_default(), "{count} {length} {stride}");
        for b in &batches {
            assert!(b.tokens.iter().zip(&b.targets).all(|(t, next)| next.is_none_or(|n| n == t + 1)));
            for (i, row) in b.targets.chunks(length).enumerate() {
                let begin = b.tokens[i * length];
                let first = row.iter().position(Option::is_some);
                // After the first window, what has a target has at least length − stride tokens before it.
                assert!(begin == 0 || first.is_none_or(|at| at >= length - stride), "{count} {length} {stride}");
            }
        }
    }
}
