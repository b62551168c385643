//! AdamW against f64, and what it must never do.

use crate::{CPU, flat, parameters, small, snapshot, tensor};
use candle_bitnet::train::{AdamW, AdamWOptions, Blocks, Kind, Masters, Parameters};
use candle_core::{DType, Tensor};

fn gradients(parameters: &Parameters, size: f64, seed: u64) -> Vec<Tensor> {
    let all = parameters.list().iter().enumerate();
    all.map(|(i, p)| tensor(p.value.dims(), seed * 1000 + i as u64).affine(size, 0.0).unwrap()).collect()
}

#[test]
fn steps_are_those_of_f64() {
    let config = small(Blocks::Bitnet, false);
    let mut p = parameters(&config, Masters::F32, 1);
    let options = AdamWOptions { beta1: 0.8, beta2: 0.9, eps: 1e-6, clip: 0.5 };
    let mut adamw = AdamW::new(&p, options).unwrap();
    let values = |p: &Parameters| -> Vec<Vec<f64>> {
        p.list().iter().map(|p| flat(&p.value).into_iter().map(f64::from).collect()).collect()
    };
    let mut want = values(&p);
    let mut moments: Vec<Vec<(f64, f64)>> = want.iter().map(|w| vec![(0.0, 0.0); w.len()]).collect();
    let mut clipped = 0;
    for step in 1..=6 {
        // Sums over 7 targets; every other step is clipped.
        let (count, lr, decay) = (7, 0.01 / step as f64, if step < 4 { 0.2 } else { 0.0 });
        let g = gradients(&p, if step % 2 == 0 { 1.0 } else { 0.02 }, step);
        let mean: Vec<Vec<f64>> = g.iter().map(|g| flat(g).iter().map(|g| f64::from(*g) / 7.0).collect()).collect();
        let norm = mean.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let clip = (0.5 / norm).min(1.0);
        clipped += usize::from(clip < 1.0);
        for (((w, m), g), p) in want.iter_mut().zip(&mut moments).zip(&mean).zip(p.list()) {
            let decay = if p.kind == Kind::Ternary { decay } else { 0.0 };
            for ((w, (m, v)), g) in w.iter_mut().zip(m).zip(g) {
                let g = g * clip;
                *m = 0.8 * *m + 0.2 * g;
                *v = 0.9 * *v + 0.1 * g * g;
                let (m, v) = (*m / (1.0 - 0.8f64.powi(step as i32)), *v / (1.0 - 0.9f64.powi(step as i32)));
                *w -= lr * (m / (v.sqrt() + 1e-6) + decay * *w);
            }
        }
        let got = adamw.step(&mut p, &g, count, lr, decay, 0).unwrap();
        assert!((got / norm - 1.0).abs() < 1e-6, "norm {got} instead of {norm}");
        for ((got, want), p) in values(&p)
            .iter()
            .flatten()
            .zip(want.iter().flatten())
            .zip(p.list().iter().flat_map(|p| std::iter::repeat_n(p, p.value.elem_count())))
        {
            assert!((got - want).abs() < 3e-6, "step {step}, {}: {got} instead of {want}", p.name);
        }
    }
    assert_eq!((clipped, adamw.steps()), (3, 6));
}

#[test]
fn only_ternary_masters_decay() {
    let config = small(Blocks::Llama, false);
    let mut p = parameters(&config, Masters::F32, 2);
    let before: Vec<Vec<f32>> = p.list().iter().map(|p| flat(&p.value)).collect();
    let zero: Vec<Tensor> = p.list().iter().map(|p| p.value.zeros_like().unwrap()).collect();
    let mut adamw = AdamW::new(&p, AdamWOptions::default()).unwrap();
    assert_eq!(adamw.step(&mut p, &zero, 1, 0.1, 0.5, 0).unwrap(), 0.0);
    for (p, before) in p.list().iter().zip(&before) {
        let factor = if p.kind == Kind::Ternary { 0.95 } else { 1.0 };
        let right = flat(&p.value).iter().zip(before).all(|(a, b)| (a - b * factor).abs() <= 1e-7);
        assert!(right, "{}", p.name);
    }
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    for (bad, masters) in [(f32::NAN, Masters::F32), (f32::INFINITY, Masters::BF16), (3e38, Masters::F32)] {
        let config = small(Blocks::Bitnet, true);
        let mut p = parameters(&config, masters, 3);
        let mut adamw = AdamW::new(&p, AdamWOptions::default()).unwrap();
        let g = gradients(&p, 1.0, 1);
        adamw.step(&mut p, &g, 1, 0.01, 0.1, 0).unwrap();
        let moments = |a: &AdamW| a.moments().iter().flat_map(|(m, v)| [flat(m), flat(v)]).collect::<Vec<_>>();
        let before = (snapshot(&p), moments(&adamw), adamw.steps());
        let mut g = gradients(&p, 1.0, 2);
        let last = g.len() - 1;
        let mut values = flat(&g[last]);
        values[2] = bad;
        g[last] = Tensor::from_vec(values, g[last].dims(), &CPU).unwrap();
        let norm = adamw.step(&mut p, &g, 1, 0.01, 0.1, 0).unwrap();
        assert!(!norm.is_finite(), "{bad}: {norm}");
        assert_eq!((snapshot(&p), moments(&adamw), adamw.steps()), before, "{bad}");
    }
}

#[test]
fn rounding_of_bf16_masters_is_unbiased_and_never_the_same_twice() {
    let config = small(Blocks::Bitnet, false);
    let ones = |_: &str, dims: &[usize]| Ok(Tensor::ones(dims, DType::F32, &CPU)?);
    let mut p = Parameters::from_values(&config, Masters::BF16, &CPU, ones).unwrap();
    let g: Vec<Tensor> = p.list().iter().map(|p| p.value.ones_like().unwrap().to_dtype(DType::F32).unwrap()).collect();
    let mut adamw = AdamW::new(&p, AdamWOptions { clip: 1e9, ..AdamWOptions::default() }).unwrap();
    // A fifth of the step between 1 and the next smaller bf16: always lost if rounded to the nearest.
    let (ulp, mut expected, mut patterns) = (1.0 / 256.0, 1.0, Vec::new());
    let lr = ulp / 5.0;
    for step in 0..3 {
        adamw.step(&mut p, &g, 1, lr, 0.0, 0).unwrap();
        expected -= lr;
        for p in p.list().iter().filter(|p| p.value.elem_count() > 5000) {
            let values = flat(&p.value);
            let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
            // Each value's deviation is at most half a step per update.
            let sigma = 0.5 * ulp * f64::from(step + 1).sqrt() / (values.len() as f64).sqrt();
            assert!((mean - expected).abs() < 5.0 * sigma, "{}: {mean} instead of {expected}", p.name);
            if step == 0 {
                patterns.push(values[..5000].iter().map(|v| *v < 1.0).collect::<Vec<bool>>());
            }
        }
    }
    // Embedding and head: neither the same noise nor the same noise shifted.
    let [a, b] = &patterns[..] else { panic!("{}", patterns.len()) };
    for shift in 0..4 {
        let equal = a[shift..].iter().zip(b).filter(|(a, b)| a == b).count() as f64 / (a.len() - shift) as f64;
        // Independent: 0.8² + 0.2² = 0.68.
        assert!((equal - 0.68).abs() < 0.05, "{equal} at {shift}");
    }
}

#[test]
fn saved_moments_of_another_model_are_refused() {
    let p = parameters(&small(Blocks::Bitnet, true), Masters::F32, 1);
    let other = parameters(&small(Blocks::Llama, true), Masters::F32, 1);
    let moments = AdamW::new(&other, AdamWOptions::default()).unwrap().moments().to_vec();
    let error = AdamW::resume(&p, AdamWOptions::default(), moments, 3).unwrap_err().to_string();
    assert!(error.contains("another model"), "{error}");
}
