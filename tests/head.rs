//! The output head's forms: whichever is chosen, the same tokens, but for the one that is approximate.

mod common;

use candle_bitnet::generate::{
    GenerateOptions, GenerationDefaults, LanguageModel, Sampler, TokenStream, common_prefix,
};
use candle_bitnet::model::{Logits, Sequence};
use candle_bitnet::nn::{HeadChoice, HeadKind};
use candle_bitnet::{BitNet, DeviceChoice, Error, LoadOptions, LoadedDecoder, TokenDraw, select_device};
use common::{FIXTURES, fixture, gpus};
use std::collections::HashMap;
use std::time::Instant;

const EXACT: [HeadKind; 2] = [HeadKind::Screened, HeadKind::ScreenedProbable];

fn options(kind: HeadKind) -> LoadOptions {
    LoadOptions::new(&select_device(DeviceChoice::Cpu).unwrap()).threads(Some(2)).head(kind)
}

fn bitnet(name: &str, kind: HeadKind) -> BitNet {
    BitNet::load(fixture(name).to_str().unwrap(), options(kind)).unwrap()
}

fn decoder(name: &str, kind: HeadKind) -> LoadedDecoder {
    LoadedDecoder::load(fixture(name).to_str().unwrap(), &options(kind)).unwrap()
}

/// Ways to draw, and whether the largest logits decide.
fn ways() -> Vec<(&'static str, GenerateOptions, bool)> {
    let base = || GenerateOptions::new().seed(7).max_tokens(24).ignore_eos(true);
    let hot = || base().temperature(1.3).top_p(1.0);
    vec![
        ("greedy", base().greedy(), true),
        ("greedy with top-p", base().greedy().top_p(0.5), true),
        ("top-1", hot().top_k(1), true),
        ("top-5", hot().top_k(5), true),
        ("top-64 and top-p", hot().top_k(64).top_p(0.8), true),
        ("top-40 and min-p", base().temperature(0.7).top_k(40).min_p(0.05), true),
        ("top-65", hot().top_k(65), false),
        ("as the checkpoint says", base(), true),
        ("all", hot().top_k(0), false),
        ("top-p", base().temperature(0.8).top_k(0).top_p(0.9), false),
        ("min-p", hot().top_k(0).min_p(0.1), false),
        ("repetition", base().greedy().repetition_penalty(1.3), false),
        ("presence", hot().top_k(5).presence_penalty(1.0), false),
        ("bias", base().greedy().logit_bias(70, f32::NEG_INFINITY), false),
        ("log-probabilities", base().greedy().logprobs(true), false),
    ]
}

#[test]
fn generation_is_the_same_with_every_exact_head() {
    for name in FIXTURES {
        let mut full = bitnet(name, HeadKind::Full);
        let mut others = EXACT.map(|kind| (kind, bitnet(name, kind)));
        let prompt = full.encode("The quick brown fox").unwrap();
        for (way, options, few) in ways() {
            let want = full.generate(&prompt, &options).unwrap().collect_all().unwrap();
            assert_eq!(want.tokens.len(), 24);
            for (kind, model) in &mut others {
                let before = model.decoder().head().reads();
                let got = model.generate(&prompt, &options).unwrap().collect_all().unwrap();
                let context = format!("{name}, {kind}, {way}");
                assert_eq!((&got.tokens, &got.text), (&want.tokens, &want.text), "{context}");
                assert_eq!(got.logprobs, want.logprobs, "{context}");
                let reads = model.decoder().head().reads().since(before);
                assert_eq!((reads.passes, reads.screened), (24, if few { 24 } else { 0 }), "{context}");
            }
        }
        assert_eq!(full.decoder().head().reads().screened, 0);
    }
}

#[test]
fn a_conversation_goes_on_with_a_screened_head() {
    let run = |kind| {
        let mut model = bitnet("a1_packed", kind);
        let tokenizer = model.tokenizer().clone();
        let (mut held, mut said) = (Vec::new(), Vec::new());
        for (turn, k) in [(0, 1), (1, 8), (2, 0), (3, 64)] {
            let mut prompt = held.clone();
            prompt.extend(model.encode(&format!("turn {turn} of the talk")).unwrap());
            let options = GenerateOptions::new().temperature(0.9).top_k(k).top_p(1.0).seed(turn).max_tokens(12);
            let params = options.resolve(model.defaults(), model.vocab_size()).unwrap();
            let kept = common_prefix(&held, &prompt);
            let mut stream = TokenStream::resume(&mut model, tokenizer.clone(), &prompt, kept, params).unwrap();
            let tokens: Vec<_> = stream.by_ref().filter_map(|piece| piece.unwrap().token).collect();
            held = stream.held_tokens().to_vec();
            said.push(tokens);
        }
        said
    };
    let want = run(HeadKind::Full);
    for kind in EXACT {
        assert_eq!(run(kind), want, "{kind}");
    }
}

#[test]
fn all_logits_stay_those_of_the_whole_head() {
    for name in FIXTURES {
        let full = decoder(name, HeadKind::Full);
        let prompt: Vec<u32> = (3..40).collect();
        let logits = |loaded: &LoadedDecoder, wanted| {
            let cache = loaded.decoder.kv_cache(loaded.kv_dtype, 1).unwrap();
            let sequence = Sequence { slot: 0, position: 0, tokens: &prompt };
            loaded.decoder.forward(&[sequence], &cache, wanted).unwrap().to_vec2::<f32>().unwrap()
        };
        for kind in EXACT {
            let screened = decoder(name, kind);
            for wanted in [Logits::All, Logits::Last] {
                assert_eq!(logits(&screened, wanted), logits(&full, wanted), "{name}, {kind}, {wanted:?}");
            }
            let (some, all) = (logits(&screened, Logits::Top(3)), logits(&full, Logits::Top(3)));
            assert_eq!(logits(&full, Logits::Last), all);
            let kept = some[0].iter().filter(|v| v.is_finite()).count();
            assert!((3..384).contains(&kept), "{name}, {kind}: {kept} rows");
            assert!(some[0].iter().zip(&all[0]).all(|(s, a)| *s == f32::NEG_INFINITY || s == a));
        }
        // `advance` promises all of them.
        let mut model = bitnet(name, HeadKind::Screened);
        assert_eq!(model.advance(&prompt).unwrap(), logits(&full, Logits::Last)[0]);
    }
}

#[test]
fn sequences_of_a_batch_draw_what_they_draw_alone() {
    let samplers = |vocab: usize, ks: &[usize]| -> Vec<Sampler> {
        let sampler = |(i, k): (usize, &usize)| {
            let options = GenerateOptions::new().temperature(0.9).top_k(*k).top_p(1.0).seed(i as u64);
            Sampler::new(&options.resolve(&GenerationDefaults::default(), vocab).unwrap().sampling, vocab)
        };
        ks.iter().enumerate().map(sampler).collect()
    };
    let run = |kind, ks: &[usize]| {
        let loaded = decoder("a3_llama", kind);
        let (decoder, vocab) = (&loaded.decoder, loaded.decoder.config().vocab_size);
        let cache = decoder.kv_cache(loaded.kv_dtype, ks.len()).unwrap();
        let mut draw = TokenDraw::new(decoder.backend(), ks.len(), vocab).unwrap();
        let mut samplers = samplers(vocab, ks);
        let (mut drawn, mut all) = (Vec::new(), Vec::new());
        let mut tokens: Vec<u32> = (0..ks.len() as u32).map(|i| 5 + 9 * i).collect();
        for position in 0..20 {
            let sequence = |(slot, token)| Sequence { slot, position, tokens: std::slice::from_ref(token) };
            let step: Vec<_> = tokens.iter().enumerate().map(sequence).collect();
            let wanted = TokenDraw::wanted(&samplers);
            decoder.forward_with(&step, &cache, wanted, |l| draw.draw(l, &mut samplers, &mut drawn)).unwrap();
            tokens = drawn.iter().map(|s| s.token).collect();
            all.push(tokens.clone());
        }
        (all, decoder.head().reads())
    };
    for (ks, screened) in [(&[4][..], 20), (&[1, 64], 40), (&[3, 0], 0), (&[1, 2, 3], 60), (&[4, 3, 2, 1], 0)] {
        let (want, _) = run(HeadKind::Full, ks);
        for kind in EXACT {
            let (got, reads) = run(kind, ks);
            assert_eq!((got, reads.screened, reads.passes), (want.clone(), screened, 20), "{kind}, {ks:?}");
        }
    }
}

#[test]
fn reports_say_which_head_it_is() {
    let reports: HashMap<_, _> = [HeadKind::Full, HeadKind::Int8, HeadKind::Screened, HeadKind::ScreenedProbable]
        .map(|kind| (kind.name(), decoder("a1_packed", kind).report()))
        .into();
    for (kind, report) in &reports {
        assert_eq!(report.head.name(), *kind);
    }
    let text = |kind: &str| reports[kind].to_string();
    assert!(text("full").contains(" bf16), KV") && text("int8").contains("int8, approximate, of bf16"));
    assert!(text("screened").contains(" screened, of bf16"));
    let bytes = |kind: &str| reports[kind].footprint.head;
    let full = bytes("full");
    assert_eq!(full, 384 * 128 * 2);
    // Eight, six and four bits of sixteen, and what is known of a row.
    assert_eq!(bytes("int8"), full / 2 + 384 * 4);
    assert_eq!(bytes("screened"), full * 6 / 16 + 384 * 16);
    assert_eq!(bytes("screened-probable"), full * 4 / 16 + 384 * 16);
    // A head of this size is not worth it.
    let auto = LoadOptions::new(&select_device(DeviceChoice::Cpu).unwrap());
    let loaded = LoadedDecoder::load(fixture("a1_packed").to_str().unwrap(), &auto).unwrap();
    assert_eq!(loaded.report().head, HeadKind::Full);
}

#[test]
fn an_int8_head_is_close() {
    for name in FIXTURES {
        let (full, int8) = (decoder(name, HeadKind::Full), decoder(name, HeadKind::Int8));
        let tokens: Vec<u32> = (10..60).collect();
        let logits = |loaded: &LoadedDecoder| {
            let cache = loaded.decoder.kv_cache(loaded.kv_dtype, 1).unwrap();
            let sequence = Sequence { slot: 0, position: 0, tokens: &tokens };
            loaded.decoder.forward(&[sequence], &cache, Logits::All).unwrap().to_vec2::<f32>().unwrap()
        };
        let (want, got) = (logits(&full), logits(&int8));
        let size = want.iter().flatten().fold(0f32, |m, v| m.max(v.abs()));
        let error = want.iter().flatten().zip(got.iter().flatten()).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(error > 0.0 && error < 0.02 * size, "{name}: {error} of {size}");
    }
}

/// cargo test --release --test head -- --ignored --nocapture
#[test]
#[ignore = "a measurement on real shapes, with 1.6 GB"]
fn what_a_head_costs_at_load() {
    let options = options(HeadKind::Full).context(Some(64));
    for kind in [HeadKind::Screened, HeadKind::ScreenedProbable, HeadKind::Int8] {
        let decoder = LoadedDecoder::synthetic("2b4t", &options).unwrap().decoder;
        let start = Instant::now();
        let decoder = decoder.with_head(kind.into()).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        println!("{kind}: {seconds:.3} s, {:.0} MB", decoder.head().added_bytes() as f64 / 1e6);
    }
}

#[test]
fn a_gpu_refuses_what_is_for_the_cpu() {
    for gpu in gpus() {
        let path = fixture("a1_packed");
        let load = |head: HeadChoice| LoadedDecoder::load(path.to_str().unwrap(), &LoadOptions::new(&gpu).head(head));
        for kind in [HeadKind::Int8, HeadKind::Screened, HeadKind::ScreenedProbable] {
            let error = load(kind.into()).unwrap_err();
            assert!(matches!(&error, Error::Request { what, .. } if what == "--head"), "{error}");
            assert!(error.to_string().contains("--device cpu"), "{error}");
        }
        for choice in [HeadChoice::Auto, HeadKind::Full.into()] {
            assert_eq!(load(choice).unwrap().report().head, HeadKind::Full);
        }
    }
}
