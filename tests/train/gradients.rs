//! Every op against its composed twin, and the whole loss against finite differences and the straight-through formula.

use crate::oracle::Oracle;
use crate::{CPU, bits, close, flat, numbers, parameters, small, tensor, var};
use candle_bitnet::backend::attention::{AttentionShape, RopeTable};
use candle_bitnet::backend::cpu::Gate;
use candle_bitnet::ops::grad::{self, Precision, composed};
use candle_bitnet::ternary::{PackedTernary, quantize_activations};
use candle_bitnet::train::{Batch, BitLinear, Blocks, Decoder, Kind, Masters, Regularization};
use candle_core::{DType, Module, Result, Tensor, Var};
use std::sync::Arc;

/// Both forms of an op give the same values and, for a random direction, the same gradients of all variables.
#[track_caller]
fn agree(
    what: &str,
    vars: &[&Var],
    fused: impl FnOnce() -> Result<Tensor>,
    plain: impl FnOnce() -> Result<Tensor>,
    tolerance: f32,
) {
    let (a, b) = (fused().unwrap(), plain().unwrap());
    close(&a, &b, tolerance, &format!("{what}, values"));
    let direction = tensor(a.dims(), 99);
    let gradients = |y: &Tensor| (y * &direction).unwrap().sum_all().unwrap().backward().unwrap();
    let (a, b) = (gradients(&a), gradients(&b));
    for (i, v) in vars.iter().enumerate() {
        let name = format!("{what}, gradient of operand {i}");
        match (a.get(v), b.get(v)) {
            (Some(a), Some(b)) => {
                assert_eq!(a.dtype(), v.dtype(), "{name}");
                close(a, b, tolerance, &name);
            }
            (a, b) => panic!("{name}: {:?} and {:?}", a.is_some(), b.is_some()),
        }
    }
}

#[test]
fn norms_products_and_gates_agree_with_their_composed_forms() {
    for dims in [&[1, 2][..], &[5, 33], &[2, 3, 16], &[3, 130]] {
        let cols = dims[dims.len() - 1];
        let (x, w) = (var(dims, 1), var(&[cols], 2));
        let run = (|| grad::rms_norm(&x, &w, 1e-5), || composed::rms_norm(&x, &w, 1e-5));
        agree(&format!("rms_norm {dims:?}"), &[&x, &w], run.0, run.1, 2e-6);
        let w = var(&[7, cols], 3);
        agree(
            &format!("linear {dims:?}"),
            &[&x, &w],
            || grad::linear(&x, &w, Precision::F32),
            || composed::linear(&x, &w),
            2e-6,
        );
        for lambda in [0.0, 0.3, 1.0] {
            let plain = || composed::linear(&composed::fake_quantize(&x, lambda)?, &w);
            let fused = || grad::bit_linear(&x, &w, lambda, Precision::F32);
            agree(&format!("bit_linear {dims:?} λ {lambda}"), &[&x, &w], fused, plain, 2e-6);
        }
    }
    for gate in [Gate::Relu2, Gate::Silu] {
        for dims in [&[1, 2][..], &[4, 38], &[2, 3, 64]] {
            let x = Var::from_tensor(&tensor(dims, 4).affine(4.0, 0.0).unwrap()).unwrap();
            agree(&format!("{gate:?} {dims:?}"), &[&x], || grad::gated(gate, &x), || composed::gated(gate, &x), 2e-6);
        }
    }
}

#[test]
fn quantisers_and_dropout_agree_with_their_composed_forms_bit_for_bit() {
    let same = |what: &str, a: &Tensor, b: &Tensor| assert_eq!(bits(a), bits(b), "{what}");
    for lambda in [0.0, 0.25, 1.0] {
        for dims in [&[1, 1][..], &[3, 37], &[2, 2, 64]] {
            let x = var(dims, 5);
            let what = format!("fake_quantize {dims:?} λ {lambda}");
            agree(&what, &[&x], || grad::fake_quantize(&x, lambda), || composed::fake_quantize(&x, lambda), 1e-6);
            let (a, b) = (grad::fake_quantize(&x, lambda).unwrap(), composed::fake_quantize(&x, lambda).unwrap());
            if lambda != 0.25 {
                same(&what, &a, &b);
            }
        }
        for dtype in [DType::F32, DType::BF16] {
            let w = Var::from_tensor(&tensor(&[11, 13], 6).to_dtype(dtype).unwrap()).unwrap();
            let (a, b) = (grad::fake_ternary(&w, lambda).unwrap(), composed::fake_ternary(&w, lambda).unwrap());
            let what = format!("fake_ternary {dtype:?} λ {lambda}");
            if lambda == 0.25 {
                close(&a, &b, 1e-6, &what);
            } else {
                same(&what, &a, &b);
            }
            if lambda == 0.0 {
                same("a dense model's weights", &a, &w.to_dtype(DType::BF16).unwrap());
            }
            let gradient = a.sum_all().unwrap().backward().unwrap();
            let gradient = gradient.get(&w).unwrap();
            assert!(gradient.dtype() == dtype && flat(gradient).iter().all(|g| *g == 1.0), "{what}");
        }
    }
    let x = var(&[9, 31], 7);
    for (p, seed) in [(0.1, 1), (0.5, 2), (0.9, 3)] {
        agree("dropout", &[&x], || grad::dropout(&x, p, seed), || composed::dropout(&x, p, seed), 0.0);
    }
    assert!(grad::dropout(&x, 1.0, 0).is_err() && grad::dropout(&x, f32::NAN, 0).is_err());
    assert_eq!(bits(&grad::dropout(&x, 0.0, 0).unwrap()), bits(&x));
}

#[test]
fn dropout_drops_its_share_and_keeps_the_mean() {
    let x = Tensor::ones((1000, 100), DType::F32, &CPU).unwrap();
    for p in [0.05f32, 0.3, 0.8] {
        let y = flat(&grad::dropout(&x, p, 11).unwrap());
        let dropped = y.iter().filter(|v| **v == 0.0).count() as f64 / y.len() as f64;
        let mean = y.iter().map(|v| f64::from(*v)).sum::<f64>() / y.len() as f64;
        assert!((dropped - f64::from(p)).abs() < 0.008 && (mean - 1.0).abs() < 0.05, "{p}: {dropped}, {mean}");
        assert_ne!(y, flat(&grad::dropout(&x, p, 12).unwrap()));
    }
}

#[test]
fn attention_agrees_with_its_composed_form() {
    // Around the 64 queries of a block, with and without groups.
    let cases =
        [(1, 1, 2, 1, 1), (4, 2, 8, 2, 5), (3, 3, 4, 1, 63), (6, 1, 16, 1, 64), (2, 1, 4, 2, 65), (2, 2, 6, 1, 131)];
    for (heads, kv_heads, dim, sequences, length) in cases {
        let shape = AttentionShape::new(heads, kv_heads, dim).unwrap();
        let rope = Arc::new(RopeTable::new(140, dim, 10_000.0).unwrap());
        let x = tensor(&[sequences, length, shape.qkv_dim()], 8).affine(3.0, 0.0).unwrap();
        let x = Var::from_tensor(&x).unwrap();
        agree(
            &format!("attention {heads}/{kv_heads}×{dim}, {sequences} of {length}"),
            &[&x],
            || grad::attention(&x, shape, &rope),
            || composed::attention(&x, shape, &rope),
            5e-6,
        );
    }
    let shape = AttentionShape::new(1, 1, 2).unwrap();
    let rope = Arc::new(RopeTable::new(4, 2, 10_000.0).unwrap());
    assert!(grad::attention(&tensor(&[1, 5, 6], 1), shape, &rope).is_err(), "more positions than the table has");
    assert!(grad::attention(&tensor(&[1, 4, 8], 1), shape, &rope).is_err());
}

#[test]
fn cross_entropy_agrees_with_its_composed_form() {
    // The last: a vocabulary of which only three rows of logits are held at a time.
    for (tokens, cols, vocab) in [(1, 1, 2), (9, 5, 7), (13, 24, 300), (8, 2, 300_000)] {
        let (hidden, head) = (var(&[tokens, cols], 9), var(&[vocab, cols], 10));
        let target = |i: usize| (i % 4 != 1).then_some((i * 7919 % vocab) as u32);
        let targets: Vec<Option<u32>> = (0..tokens).map(target).collect();
        agree(
            &format!("cross_entropy {tokens}×{cols}, {vocab}"),
            &[&hidden, &head],
            || grad::cross_entropy(&hidden, &head, &targets, Precision::F32),
            || composed::cross_entropy(&hidden, &head, &targets),
            2e-5,
        );
    }
    let (hidden, head) = (var(&[2, 3], 1), var(&[5, 3], 2));
    let none = grad::cross_entropy(&hidden, &head, &[None, None], Precision::F32).unwrap();
    assert_eq!(none.to_scalar::<f32>().unwrap(), 0.0);
    let bad = grad::cross_entropy(&hidden, &head, &[Some(5), None], Precision::F32).unwrap_err().to_string();
    assert!(bad.contains("target 5") && bad.contains("vocabulary of 5"), "{bad}");
    assert!(grad::cross_entropy(&hidden, &head, &[None], Precision::F32).is_err());
}

#[test]
fn bf16_operands_are_exact_where_they_are_quantised_and_close_elsewhere() {
    for dims in [&[1, 2][..], &[5, 33], &[2, 40, 70]] {
        let cols = dims[dims.len() - 1];
        let (x, w) = (var(dims, 1), grad::fake_ternary(&var(&[37, cols], 3), 1.0).unwrap());
        let w = Var::from_tensor(&w).unwrap();
        let [f32, bf16] = [Precision::F32, Precision::BF16].map(|p| grad::bit_linear(&x, &w, 1.0, p).unwrap());
        close(&f32, &bf16, 1e-6, &format!("quantised product {dims:?}"));
        let direction = tensor(f32.dims(), 99);
        let gradients = |y: &Tensor| (y * &direction).unwrap().sum_all().unwrap().backward().unwrap();
        let (a, b) = (gradients(&f32), gradients(&bf16));
        for v in [&x, &w] {
            // The gradient of the result is rounded to 8 bits.
            close(a.get(v).unwrap(), b.get(v).unwrap(), 1e-2, &format!("gradients {dims:?}"));
        }
    }
    let (hidden, head) = (var(&[9, 20], 1), var(&[50, 20], 2));
    let targets: Vec<Option<u32>> = (0..9).map(|i| (i != 4).then_some(i * 5)).collect();
    let [f32, bf16] =
        [Precision::F32, Precision::BF16].map(|p| grad::cross_entropy(&hidden, &head, &targets, p).unwrap());
    close(&f32, &bf16, 1e-2, "cross-entropy");
    let (a, b) = (f32.backward().unwrap(), bf16.backward().unwrap());
    for v in [&hidden, &head] {
        close(a.get(v).unwrap(), b.get(v).unwrap(), 2e-2, "gradients of the cross-entropy");
    }
}

#[test]
fn a_nan_reaches_the_loss() {
    let poison = |dims: &[usize]| {
        let mut v = numbers(dims.iter().product(), 3);
        v[5] = f32::NAN;
        Tensor::from_vec(v, dims, &CPU).unwrap()
    };
    let nan = |t: candle_core::Result<Tensor>| assert!(flat(&t.unwrap()).iter().any(|v| v.is_nan()));
    let (x, w) = (poison(&[2, 8]), tensor(&[4, 8], 1));
    nan(grad::bit_linear(&x, &w, 1.0, Precision::F32));
    nan(grad::bit_linear(&x, &w, 1.0, Precision::BF16));
    nan(grad::bit_linear(&tensor(&[2, 8], 1), &poison(&[4, 8]), 1.0, Precision::F32));
    nan(grad::bit_linear(&tensor(&[2, 8], 1), &poison(&[4, 8]), 1.0, Precision::BF16));
    nan(grad::fake_ternary(&x, 1.0));
    nan(grad::rms_norm(&x, &tensor(&[8], 1), 1e-5));
    nan(grad::gated(Gate::Relu2, &x));
    nan(grad::gated(Gate::Silu, &x));
    nan(grad::cross_entropy(&x, &w, &[Some(0), Some(1)], Precision::F32));
    nan(grad::cross_entropy(&x, &w, &[Some(0), Some(1)], Precision::BF16));
}

#[test]
fn the_loss_is_that_of_f64_and_so_are_its_gradients() {
    let length = 7;
    let tokens: Vec<u32> = (0..2 * length as u32).map(|i| i * 37 % 11 + i % 2 * 200).collect();
    let targets: Vec<Option<u32>> = (0..tokens.len()).map(|i| (i != 4).then_some((i as u32 * 53 + 1) % 257)).collect();
    for (blocks, tied) in [Blocks::Bitnet, Blocks::Llama].into_iter().flat_map(|b| [(b, true), (b, false)]) {
        let config = small(blocks, tied);
        let decoder = Decoder::new(&config).unwrap();
        let parameters = parameters(&config, Masters::F32, 40);
        let prepared = decoder.prepare(&parameters, 0.0).unwrap();
        let batch = Batch { length, tokens: tokens.clone(), targets: targets.clone() };
        let loss = prepared.loss(&batch, Regularization::default()).unwrap();
        let gradients = prepared.gradients(loss.backward().unwrap()).unwrap();
        let gradients = prepared.by_parameter(&gradients, &parameters).unwrap();

        let mut oracle = Oracle::new(&config, &parameters);
        let (got, want) = (f64::from(loss.to_scalar::<f32>().unwrap()), oracle.loss(&tokens, length, &targets));
        assert!((got / want - 1.0).abs() < 2e-6, "{blocks:?}, tied {tied}: {got} instead of {want}");
        for (p, gradient) in parameters.list().iter().zip(&gradients) {
            let gradient = flat(gradient);
            let size = gradient.iter().fold(0f32, |m, g| m.max(g.abs()));
            assert!(size > 0.0, "{}", p.name);
            let largest = gradient.iter().position(|g| g.abs() == size).unwrap();
            for at in [largest, 0, gradient.len() / 3, gradient.len() - 1] {
                let mut moved = |by: f64| {
                    oracle.weights.get_mut(&p.name).unwrap()[at] += by;
                    let loss = oracle.loss(&tokens, length, &targets);
                    oracle.weights.get_mut(&p.name).unwrap()[at] -= by;
                    loss
                };
                let h = 1e-5;
                let want = (moved(h) - moved(-h)) / (2.0 * h);
                let error = (f64::from(gradient[at]) - want).abs();
                let name = &p.name;
                assert!(error <= 2e-5 * f64::from(size), "{blocks:?} {name}[{at}]: {} for {want}", gradient[at]);
            }
        }
    }
}

#[test]
fn the_straight_through_formula_holds() {
    let (tokens, rows, cols) = (3, 6, 10);
    let (x, direction) = (var(&[tokens, cols], 20), tensor(&[tokens, rows], 21));
    for dtype in [DType::F32, DType::BF16] {
        let master = Var::from_tensor(&tensor(&[rows, cols], 22).to_dtype(dtype).unwrap()).unwrap();
        let layer = BitLinear::new(master.clone());
        let y = layer.forward(&x).unwrap();
        let gradients = (&y * &direction).unwrap().sum_all().unwrap().backward().unwrap();

        let packed = layer.packed().unwrap();
        let weights = packed.dequantize();
        assert_eq!(flat(&grad::fake_ternary(&master, 1.0).unwrap()), weights, "codes and scale of inference");
        let mut seen = Vec::new();
        for row in flat(&x).chunks(cols) {
            let mut q = vec![0; cols];
            let (scale, _) = quantize_activations(row, &mut q);
            seen.extend(q.iter().map(|q| f32::from(*q) / scale));
        }
        let dy = flat(&direction);
        let sum = |n: usize, f: &dyn Fn(usize) -> (f32, f32)| {
            (0..n).map(f).map(|(a, b)| f64::from(a) * f64::from(b)).sum::<f64>() as f32
        };
        let table = |r: usize, c: usize, n: usize, f: &dyn Fn(usize, usize, usize) -> (f32, f32)| {
            let all = (0..r * c).map(|i| sum(n, &|k| f(i / c, i % c, k))).collect::<Vec<f32>>();
            Tensor::from_vec(all, (r, c), &CPU).unwrap()
        };
        let want = table(tokens, rows, cols, &|t, r, k| (seen[t * cols + k], weights[r * cols + k]));
        close(&y, &want, 1e-6, "y = Q(x) · Wᵀ");
        let dw = table(rows, cols, tokens, &|r, c, t| (dy[t * rows + r], seen[t * cols + c]));
        let tolerance = if dtype == DType::F32 { 1e-6 } else { 5e-3 };
        close(gradients.get(&master).unwrap(), &dw, tolerance, "dL/dmaster = dyᵀ · Q(x)");
        let dx = table(tokens, cols, rows, &|t, c, r| (dy[t * rows + r], weights[r * cols + c]));
        close(gradients.get(&x).unwrap(), &dx, 1e-6, "dL/dx = dy · W");
    }
}

#[test]
fn what_a_bf16_checkpoint_cannot_hold_changes_no_gradient() {
    let config = small(Blocks::Bitnet, true);
    let decoder = Decoder::new(&config).unwrap();
    let masters = parameters(&config, Masters::F32, 60);
    let batch = Batch { length: 5, tokens: vec![1, 2, 3, 4, 5], targets: [2, 3, 4, 5, 6].map(Some).to_vec() };
    let of = |parameters| {
        let prepared = decoder.prepare(parameters, 1.0).unwrap();
        let loss = prepared.loss(&batch, Regularization::default()).unwrap();
        let gradients = prepared.gradients(loss.backward().unwrap()).unwrap();
        prepared.by_parameter(&gradients, parameters).unwrap()
    };
    let first = of(&masters);
    // What is below bf16's resolution reaches neither the codes nor the scale, and so changes no gradient.
    let nudged = candle_bitnet::train::Parameters::from_values(&config, Masters::F32, &CPU, |name, _| {
        let p = &masters.list()[masters.index(name)?];
        let rounded = p.value.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
        Ok(if p.kind == Kind::Ternary { rounded } else { p.value.clone() })
    });
    let second = of(&nudged.unwrap());
    for ((a, b), p) in first.iter().zip(&second).zip(masters.list()) {
        assert_eq!(bits(a), bits(b), "{}", p.name);
    }
}

#[test]
fn the_packed_layer_is_the_one_that_trained() {
    for (rows, cols, seed) in [(1, 1, 1), (3, 5, 2), (40, 37, 3)] {
        let layer = BitLinear::new(var(&[rows, cols], seed));
        let packed = layer.packed().unwrap();
        let effective = flat(&grad::fake_ternary(layer.master(), 1.0).unwrap());
        let m = packed.scale().multiplier();
        for (i, w) in effective.iter().enumerate() {
            assert_eq!(w / m, f32::from(packed.weight(i / cols, i % cols)));
        }
        let stored = layer.master().to_dtype(DType::BF16).unwrap();
        assert_eq!(packed, PackedTernary::quantize(&stored).unwrap());
    }
}

#[test]
fn what_does_not_fit_a_decoder_is_named() {
    let mut config = small(Blocks::Bitnet, true);
    let decoder = Decoder::new(&config).unwrap();
    let parameters = parameters(&config, Masters::F32, 1);
    let prepared = decoder.prepare(&parameters, 1.0).unwrap();
    let error = |tokens: &[u32], length| prepared.logits(tokens, length).unwrap_err().to_string();
    assert!(error(&[1; 33], 33).starts_with("context full: 33 positions needed, 32 available"));
    assert!(error(&[1; 5], 2).contains("5 tokens in sequences of 2"));
    assert!(error(&[], 2).contains("0 tokens"));
    assert!(error(&[1, 257], 2).contains("257 is outside the vocabulary of 257"));
    config.quantization.use_rms_norm = true;
    assert!(Decoder::new(&config).unwrap_err().to_string().contains("use_rms_norm"));
    let text = small(Blocks::Llama, true)
        .to_json()
        .replace("\"modules_to_not_convert\": null", "\"modules_to_not_convert\": [\"model.layers.1.mlp.down_proj\"]");
    let config = candle_bitnet::model::config::ModelConfig::parse("config.json".as_ref(), &text).unwrap();
    let error = Decoder::new(&config).unwrap_err().to_string();
    assert!(error.contains("model.layers.1.mlp.down_proj") && error.contains("modules_to_not_convert"), "{error}");
}
