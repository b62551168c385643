//! The sampler against an oracle that sorts, in f64.

use super::super::{MarksHeld, TokenMark};
use super::*;
use proptest::prelude::*;

fn neutral() -> SamplingParams {
    SamplingParams { temperature: 1.0, seed: 1, ..SamplingParams::greedy() }
}

/// Probability of every token, and how close the closest decision about a token was.
fn oracle(params: &SamplingParams, logits: &[f32], prompt: &[u32], generated: &[u32]) -> (Vec<f64>, f64) {
    let mut scores: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
    for (id, score) in scores.iter_mut().enumerate() {
        let count = generated.iter().filter(|&&t| t as usize == id).count();
        if count > 0 || prompt.contains(&(id as u32)) {
            let penalty = f64::from(params.repetition_penalty);
            *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
        }
        if count > 0 {
            *score -= f64::from(params.presence_penalty) + f64::from(params.frequency_penalty) * count as f64;
        }
        *score += params.logit_bias.iter().filter(|b| b.0 as usize == id).map(|b| f64::from(b.1)).sum::<f64>();
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap().then(a.cmp(&b)));
    let mut out = vec![0.0; scores.len()];
    let mut margin = f64::INFINITY;
    if params.temperature == 0.0 {
        out[order[0]] = 1.0;
        return (out, margin);
    }
    if params.top_k > 0 {
        order.truncate(params.top_k);
    }
    let weight = |id: usize| ((scores[id] - scores[order[0]]) / f64::from(params.temperature)).exp();
    let total: f64 = order.iter().map(|&id| weight(id)).sum();
    let mut above = 0.0;
    let mut kept = vec![];
    for &id in &order {
        if params.top_p < 1.0 && !kept.is_empty() {
            margin = margin.min((above / total - f64::from(params.top_p)).abs());
            if above / total >= f64::from(params.top_p) {
                break;
            }
        }
        kept.push(id);
        above += weight(id);
    }
    if params.min_p > 0.0 {
        for &id in kept.iter().skip(1) {
            margin = margin.min((weight(id) / f64::from(params.min_p) - 1.0).abs());
        }
        kept.retain(|&id| weight(id) >= f64::from(params.min_p));
    }
    let total: f64 = kept.iter().map(|&id| weight(id)).sum();
    for id in kept {
        out[id] = weight(id) / total;
    }
    (out, margin)
}

/// Probability of every token as the sampler sees it.
fn distribution(sampler: &mut Sampler, logits: &[f32]) -> Vec<f64> {
    let mut out = vec![0.0; logits.len()];
    match sampler.support(logits).unwrap() {
        Support::One(id) => out[id as usize] = 1.0,
        Support::All => {
            let total: f64 = sampler.blocks.iter().sum();
            sampler.weights.iter().zip(&mut out).for_each(|(&w, p)| *p = f64::from(w) / total);
        }
        Support::Some => {
            assert!(sampler.candidates.windows(2).all(|w| w[0].id < w[1].id));
            let total: f64 = sampler.candidates.iter().map(|c| f64::from(c.weight)).sum();
            sampler.candidates.iter().for_each(|c| out[c.id as usize] = f64::from(c.weight) / total);
        }
    }
    out
}

fn any_params() -> impl Strategy<Value = SamplingParams> {
    (
        prop_oneof![Just(0.0f32), Just(1.0), 0.05f32..3.0],
        prop_oneof![Just(0usize), 1usize..60, 200usize..900],
        prop_oneof![Just(1.0f32), 0.001f32..1.0],
        prop_oneof![Just(0.0f32), 0.001f32..1.0],
        prop_oneof![Just(1.0f32), 0.5f32..2.0],
        prop_oneof![Just(0.0f32), -2.0f32..2.0],
        prop_oneof![Just(0.0f32), -2.0f32..2.0],
    )
        .prop_map(|(temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty)| {
            SamplingParams {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
                ..neutral()
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn equals_the_oracle(
        mut params in any_params(),
        logits in prop_oneof![
            prop::collection::vec(-12.0f32..12.0, 1..700),
            // Few distinct values: ties.
            prop::collection::vec((-3i8..4).prop_map(f32::from), 1..700),
            // Masked tokens.
            prop::collection::vec(prop_oneof![Just(f32::NEG_INFINITY), -3.0f32..3.0], 1..50),
        ],
        prompt in prop::collection::vec(0u32..700, 0..20),
        generated in prop::collection::vec(0u32..40, 0..40),
        bias in prop::collection::vec((0u32..40, -5.0f32..5.0), 0..3),
    ) {
        prop_assume!(logits.iter().any(|l| l.is_finite()));
        params.logit_bias = bias;
        params.logit_bias.dedup_by_key(|b| b.0);
        let (want, margin) = oracle(&params, &logits, &prompt, &generated);
        // f32 and f64 may order or cut differently where scores nearly meet after penalties.
        prop_assume!(margin > 1e-4);
        let mut sampler = Sampler::new(&params, logits.len());
        sampler.observe_prompt(&prompt);
        generated.iter().for_each(|&t| sampler.accept(t));
        let got = distribution(&mut sampler, &logits);
        let edited = params.repetition_penalty != 1.0 || params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0 || !params.logit_bias.is_empty();
        let mut difference = 0.0;
        for (g, w) in got.iter().zip(&want) {
            difference += (g - w).abs();
            if !edited {
                prop_assert!((g - w).abs() < 1e-5, "{g} {w}");
            }
        }
        // Edited scores can tie in f32 and not in f64: then equal tokens may have changed places.
        if difference > 1e-4 {
            let sorted = |p: &[f64]| { let mut p = p.to_vec(); p.sort_by(f64::total_cmp); p };
            for (g, w) in sorted(&got).iter().zip(sorted(&want)) {
                prop_assert!((g - w).abs() < 1e-4, "{g} {w}");
            }
        }
    }
}

#[test]
fn greedy_takes_the_lowest_of_equals() {
    let mut sampler = Sampler::new(&SamplingParams { temperature: 0.0, ..neutral() }, 100);
    let mut logits = vec![0.0; 100];
    logits[77] = 3.0;
    logits[41] = 3.0;
    assert_eq!(sampler.sample(&logits).unwrap().token, 41);
    logits[0] = -0.0;
    logits[41] = 0.0;
    logits[77] = 0.0;
    assert_eq!(sampler.sample(&logits).unwrap().token, 0);
}

#[test]
fn unsound_logits_are_named() {
    let mut sampler = Sampler::new(&neutral(), 40);
    let mut logits = vec![0.0; 40];
    logits[37] = f32::NAN;
    assert!(sampler.sample(&logits).unwrap_err().to_string().contains("token 37 is NaN"));
    logits[37] = f32::INFINITY;
    assert!(sampler.sample(&logits).unwrap_err().to_string().contains("token 37 is infinite"));
    assert!(sampler.sample(&[f32::NEG_INFINITY; 40]).unwrap_err().to_string().contains("no token has a finite logit"));
    assert!(matches!(sampler.sample(&[0.0; 39]), Err(Error::Shape { .. })));
    assert!(matches!(Sampler::new(&neutral(), 0).sample(&[]), Err(Error::Shape { .. })));
}

/// Chi-square of draws against the oracle, for every path through the sampler.
#[test]
fn draws_follow_the_distribution() {
    let logits: Vec<f32> = (0..600).map(|i| ((i * 37 % 101) as f32) / 25.0).collect();
    for params in [
        neutral(),
        SamplingParams { temperature: 0.7, ..neutral() },
        SamplingParams { top_k: 17, ..neutral() },
        SamplingParams { top_p: 0.2, ..neutral() },
        SamplingParams { min_p: 0.6, ..neutral() },
        SamplingParams { top_k: 100, top_p: 0.7, min_p: 0.3, temperature: 1.5, ..neutral() },
    ] {
        let (want, _) = oracle(&params, &logits, &[], &[]);
        let mut sampler = Sampler::new(&SamplingParams { seed: 7, ..params.clone() }, logits.len());
        let draws = 60_000;
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(&logits).unwrap().token as usize] += 1.0;
        }
        let mut chi = 0.0;
        let mut degrees = -1.0;
        for (count, p) in counts.iter().zip(&want) {
            if *p == 0.0 {
                assert_eq!(*count, 0.0, "a token that cannot be drawn was drawn");
                continue;
            }
            let expected = p * f64::from(draws);
            chi += (count - expected) * (count - expected) / expected;
            degrees += 1.0;
        }
        // Mean and standard deviation of the chi-square distribution are d and sqrt(2d).
        assert!(chi < degrees + 5.0 * f64::sqrt(2.0 * degrees), "chi-square {chi} with {degrees} degrees: {params:?}");
    }
}

#[test]
fn seeds_are_stable_across_versions() {
    let logits: Vec<f32> = (0..1000).map(|i| ((i * 37 % 101) as f32) / 20.0).collect();
    let draw = |seed| -> Vec<u32> {
        let mut sampler = Sampler::new(&SamplingParams { seed, ..neutral() }, logits.len());
        (0..6).map(|_| sampler.sample(&logits).unwrap().token).collect()
    };
    assert_eq!(draw(42), draw(42));
    assert_ne!(draw(42), draw(43));
    // Written down once: a change of these is a change of what users' seeds mean.
    assert_eq!(draw(42), GOLDEN);
}

const GOLDEN: [u32; 6] = [349, 286, 494, 368, 827, 67];

#[test]
fn log_probabilities_are_the_models() {
    let logits = [1.0f32, 2.0, -1.0, 0.5];
    let params = SamplingParams { logprobs: true, temperature: 0.3, logit_bias: vec![(2, 50.0)], ..neutral() };
    let sampled = Sampler::new(&params, 4).sample(&logits).unwrap();
    assert_eq!(sampled.token, 2);
    let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    assert!((f64::from(sampled.logprob.unwrap()) - (-1.0 - total.ln())).abs() < 1e-6);
    assert_eq!(Sampler::new(&neutral(), 4).sample(&logits).unwrap().logprob, None);
}

#[test]
fn extreme_temperatures() {
    let logits: Vec<f32> = (0..50).map(|i| i as f32).collect();
    for temperature in [f32::MIN_POSITIVE, 1e-40, 1e-6] {
        let mut sampler = Sampler::new(&SamplingParams { temperature, ..neutral() }, 50);
        assert_eq!(sampler.sample(&logits).unwrap().token, 49);
        let mut sampler = Sampler::new(&SamplingParams { temperature, top_p: 0.9, min_p: 0.1, ..neutral() }, 50);
        assert_eq!(sampler.sample(&logits).unwrap().token, 49);
    }
    let mut sampler = Sampler::new(&SamplingParams { temperature: f32::MAX, top_p: 0.999, ..neutral() }, 50);
    assert!(sampler.sample(&logits).unwrap().token < 50);
}

#[test]
fn buffers_are_reused() {
    let logits: Vec<f32> = (0..5000).map(|i| ((i * 37 % 1013) as f32) / 100.0).collect();
    let params = SamplingParams { top_p: 0.9, repetition_penalty: 1.1, ..neutral() };
    let mut sampler = Sampler::new(&params, logits.len());
    sampler.observe_prompt(&[1, 2, 3]);
    sampler.sample(&logits).unwrap();
    let before = [sampler.scores.as_ptr(), sampler.weights.as_ptr(), sampler.candidates.as_ptr().cast()];
    for _ in 0..20 {
        sampler.sample(&logits).unwrap();
    }
    assert_eq!(before, [sampler.scores.as_ptr(), sampler.weights.as_ptr(), sampler.candidates.as_ptr().cast()]);
}

#[test]
fn what_a_device_needs() {
    let params = SamplingParams { temperature: 0.7, top_k: usize::MAX, presence_penalty: 0.5, seed: 9, ..neutral() };
    let mut sampler = Sampler::new(&params, 10);
    let plan = sampler.on_device().unwrap();
    assert_eq!((plan.temperature, plan.top_k, plan.seed, plan.draw), (0.7, u32::MAX, 9, 0));
    assert!(plan.has_penalties() && !plan.is_argmax());
    sampler.sample(&[0.0; 10]).unwrap();
    assert_eq!(sampler.drawn(3), Some(Sampled { token: 3, logprob: None }));
    assert_eq!((sampler.drawn(-1), sampler.drawn(10)), (None, None));
    assert_eq!(sampler.on_device().unwrap().draw, 2);
    for greedy in [SamplingParams { temperature: 0.0, ..neutral() }, SamplingParams { top_k: 1, ..neutral() }] {
        assert!(Sampler::new(&greedy, 10).on_device().unwrap().is_argmax());
        let penalty = SamplingParams { frequency_penalty: 0.1, ..greedy };
        assert!(!Sampler::new(&penalty, 10).on_device().unwrap().is_argmax());
    }
    for host in
        [SamplingParams { logprobs: true, ..neutral() }, SamplingParams { logit_bias: vec![(1, 2.0)], ..neutral() }]
    {
        assert_eq!(Sampler::new(&host, 10).on_device(), None);
    }
}

#[test]
fn a_device_follows_the_marks() {
    const SEEN: u32 = 1 << 31;
    let params = SamplingParams { repetition_penalty: 1.2, ..neutral() };
    let mut sampler = Sampler::new(&params, 10);
    sampler.observe_prompt(&[5, 2, 5, 77]);
    sampler.accept(2);
    let (mut held, mut marks) = (MarksHeld::default(), vec![]);
    let mark = |token, mark| TokenMark { token, mark };
    assert!(sampler.marks_since(&mut held, &mut marks), "the device knows nothing");
    assert_eq!(marks, [mark(2, SEEN + 1), mark(5, SEEN)]);
    assert!(!sampler.marks_since(&mut held, &mut marks));
    assert_eq!(marks, []);
    for token in [5, 1, 5] {
        sampler.accept(token);
    }
    let mut twin = sampler.clone();
    twin.accept(9);
    let before = held;
    assert!(!sampler.marks_since(&mut held, &mut marks));
    assert_eq!(marks, [mark(1, SEEN + 1), mark(5, SEEN + 2)]);
    // Another sequence, even one that began as this, needs everything.
    held = before;
    assert!(twin.marks_since(&mut held, &mut marks));
    assert_eq!(marks, [mark(1, SEEN + 1), mark(2, SEEN + 1), mark(5, SEEN + 2), mark(9, SEEN + 1)]);
    assert!(sampler.marks_since(&mut held, &mut marks) && marks.len() == 3);
    // Without penalties there is nothing to hold.
    let mut free = Sampler::new(&neutral(), 10);
    free.accept(3);
    free.marks_since(&mut held, &mut marks);
    assert_eq!(marks, []);
}

proptest! {
    /// Few distinct logits: ties everywhere.
    #[test]
    fn what_decides_is_enough(
        logits in prop::collection::vec((-9i8..9).prop_map(|v| f32::from(v) / 4.0), 2..300),
        temperature in prop_oneof![Just(0.0f32), 0.1f32..3.0],
        k in 0usize..80, top_p in prop_oneof![Just(1.0f32), 0.1f32..1.0], min_p in prop_oneof![Just(0.0f32), 0f32..0.5],
        seed: u64,
    ) {
        let params = SamplingParams { temperature, top_k: k, top_p, min_p, seed, ..neutral() };
        let mut whole = Sampler::new(&params, logits.len());
        let Some(decide) = whole.decided_by() else {
            prop_assert!(temperature > 0.0 && (k == 0 || k >= logits.len()));
            return Ok(());
        };
        prop_assert_eq!(decide, if temperature == 0.0 { 1 } else { k });
        let mut sorted = logits.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let least = sorted[decide - 1];
        let some: Vec<f32> = logits.iter().map(|v| if *v < least { f32::NEG_INFINITY } else { *v }).collect();
        let mut screened = whole.clone();
        for _ in 0..20 {
            prop_assert_eq!(screened.sample(&some).unwrap(), whole.sample(&logits).unwrap());
        }
    }
}

#[test]
fn what_asks_for_all_logits_is_not_decided_by_a_few() {
    let greedy = SamplingParams { temperature: 0.0, ..neutral() };
    assert_eq!(Sampler::new(&greedy, 9).decided_by(), Some(1));
    for params in [
        SamplingParams { repetition_penalty: 1.1, ..greedy.clone() },
        SamplingParams { presence_penalty: 0.1, ..greedy.clone() },
        SamplingParams { frequency_penalty: -0.1, ..greedy.clone() },
        SamplingParams { logit_bias: vec![(3, 1.0)], ..greedy.clone() },
        SamplingParams { logprobs: true, ..greedy.clone() },
        neutral(),
    ] {
        assert_eq!(Sampler::new(&params, 9).decided_by(), None, "{params:?}");
    }
}
