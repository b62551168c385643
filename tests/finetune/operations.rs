//! The operations that adapters are trained with, against their formulas.

use crate::{CPU, backend, close, flat, tensor};
use candle_bitnet::backend::attention::{AttentionShape, RopeTable};
use candle_bitnet::backend::{Arrangement, DenseType, DenseWeight, TernaryWeight};
use candle_bitnet::ops::grad::{self, FrozenWeight, Update, composed};
use candle_bitnet::ternary::{PackedTernary, Scale};
use candle_core::{DType, Tensor, Var};
use std::sync::Arc;

#[test]
fn the_frozen_linears_compute_what_inference_does_and_their_gradient_is_that_of_the_weight() {
    let backend = backend();
    for (rows, cols, tokens) in [(20, 96, 5), (70, 130, 1), (5, 48, 13)] {
        let codes: Vec<i8> = (0..rows * cols).map(|i| ((i * i + 3 * i) % 7 % 3) as i8 - 1).collect();
        let first = PackedTernary::from_weights(rows, cols, &codes, Scale::Multiply(0.21)).unwrap();
        let second = PackedTernary::from_weights(rows, cols, &codes, Scale::Divide(3.0)).unwrap();
        let dense: Vec<f32> = first.dequantize().into_iter().chain(second.dequantize()).collect();
        let dense = Tensor::from_vec(dense, (2 * rows, cols), &CPU).unwrap();
        let packed: TernaryWeight = backend.pack(&[first, second], Arrangement::Stacked).unwrap();
        let x = Var::from_tensor(&tensor(&[tokens, cols], 1)).unwrap();
        let weight = tensor(&[tokens, 2 * rows], 2);
        let got = grad::frozen_linear(&backend, &FrozenWeight::Ternary(Arc::new(packed)), &x).unwrap();
        let want = composed::linear(&composed::fake_quantize(&x, 1.0).unwrap(), &dense).unwrap();
        close(&got, &want, 2e-6);
        let gradient = |y: &Tensor| y.mul(&weight).unwrap().sum_all().unwrap().backward().unwrap().remove(&x).unwrap();
        close(&gradient(&got), &gradient(&want), 2e-6);

        let stored = flat(&dense).iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        let stored = backend.dense_filled(DenseType::F32, 2 * rows, cols, |out| out.copy_from_slice(&stored)).unwrap();
        let got = grad::frozen_linear(&backend, &FrozenWeight::Dense(Arc::new(stored)), &x).unwrap();
        let want = composed::linear(&x, &dense).unwrap();
        close(&got, &want, 2e-6);
        close(&gradient(&got), &gradient(&want), 2e-6);
        // Nothing that is trained comes before it: nothing is kept for a gradient.
        let frozen =
            grad::frozen_linear(&backend, &FrozenWeight::Dense(Arc::new(backend_dense(&dense))), &weight_input(&x));
        assert!(!frozen.unwrap().track_op());
    }
    let weight = FrozenWeight::Dense(Arc::new(backend_dense(&tensor(&[4, 8], 1))));
    assert!(grad::frozen_linear(&backend, &weight, &tensor(&[2, 9], 1)).is_err());
    assert!(grad::frozen_linear(&backend, &weight, &tensor(&[2, 8], 1).to_dtype(DType::F16).unwrap()).is_err());
}

fn weight_input(x: &Var) -> Tensor {
    x.as_tensor().detach()
}

fn backend_dense(t: &Tensor) -> DenseWeight {
    let (rows, cols) = t.dims2().unwrap();
    let bytes: Vec<u8> = flat(t).iter().flat_map(|v| v.to_le_bytes()).collect();
    backend().dense_filled(DenseType::F32, rows, cols, |out| out.copy_from_slice(&bytes)).unwrap()
}

#[test]
fn the_frozen_head_is_the_cross_entropy_of_the_rows_with_a_target() {
    let (backend, head) = (backend(), tensor(&[37, 24], 3));
    let frozen = Arc::new(backend_dense(&head));
    for targets in [vec![Some(3), None, Some(36), Some(0), None], vec![None; 5], vec![Some(1); 5]] {
        let hidden = Var::from_tensor(&tensor(&[5, 24], 4)).unwrap();
        let got = grad::frozen_cross_entropy(&backend, &frozen, &hidden, &targets).unwrap();
        let want = composed::cross_entropy(&hidden, &head, &targets).unwrap();
        close(&got, &want, 2e-6);
        let gradient = |loss: &Tensor| (loss * 3.0).unwrap().backward().unwrap().remove(&hidden).unwrap();
        close(&gradient(&got), &gradient(&want), 5e-6);
    }
    let hidden = tensor(&[2, 24], 4);
    let e = grad::frozen_cross_entropy(&backend, &frozen, &hidden, &[Some(37), None]).unwrap_err();
    assert!(e.to_string().contains("target 37 is outside the vocabulary of 37"), "{e}");
    assert!(grad::frozen_cross_entropy(&backend, &frozen, &hidden, &[None]).is_err());
}

#[test]
fn the_low_rank_update_has_the_gradients_of_its_formula() {
    let backend = backend();
    for (tokens, cols, rank, rows, scaling) in [(6, 33, 4, 20, 2.0f32), (1, 16, 7, 65, -0.3)] {
        let [h, a, b] = [[tokens, cols], [rank, cols], [rows, rank]].map(|d| Var::from_tensor(&tensor(&d, 7)).unwrap());
        let weight = tensor(&[tokens, rows], 8);
        let got = grad::low_rank(&backend, &h, &a, &b, scaling).unwrap();
        let inner = composed::linear(&h, &a).unwrap();
        let want = (composed::linear(&inner, &b).unwrap() * f64::from(scaling)).unwrap();
        close(&got, &want, 2e-6);
        let gradients = |y: &Tensor| y.mul(&weight).unwrap().sum_all().unwrap().backward().unwrap();
        let (got, want) = (gradients(&got), gradients(&want));
        for x in [&h, &a, &b] {
            close(got.get(x).unwrap(), want.get(x).unwrap(), 3e-6);
        }
    }
    assert!(grad::low_rank(&backend, &tensor(&[2, 8], 1), &tensor(&[3, 8], 1), &tensor(&[8, 4], 1), 1.0).is_err());
}

#[test]
fn the_frozen_attention_is_inferences_with_the_gradient_of_attention() {
    let backend = backend();
    for (heads, kv_heads, dim, sequences, length) in [(4, 2, 8, 2, 19), (3, 3, 16, 1, 70), (2, 1, 4, 3, 1)] {
        let shape = AttentionShape::new(heads, kv_heads, dim).unwrap();
        let rope = Arc::new(RopeTable::new(80, dim, 10_000.0).unwrap());
        let qkv = Var::from_tensor(&tensor(&[sequences, length, shape.qkv_dim()], 5)).unwrap();
        let weight = tensor(&[sequences, length, heads * dim], 6);
        let got = grad::frozen_attention(&backend, &qkv, shape, &rope).unwrap();
        let want = composed::attention(&qkv, shape, &rope).unwrap();
        close(&got, &want, 1e-5);
        let gradient =
            |y: &Tensor| y.mul(&weight).unwrap().sum_all().unwrap().backward().unwrap().remove(&qkv).unwrap();
        close(&gradient(&got), &gradient(&want), 1e-5);
        assert!(
            grad::frozen_attention(&backend, &qkv, AttentionShape::new(heads, kv_heads, dim / 2).unwrap(), &rope)
                .is_err()
        );
    }
}

#[test]
fn an_adapted_layer_is_the_layer_and_its_updates_with_their_gradients() {
    let backend = backend();
    let (tokens, cols, rows) = (7, 40, [20, 9, 16]);
    let codes: Vec<i8> = (0..45 * cols).map(|i| ((i * i + 3 * i) % 7 % 3) as i8 - 1).collect();
    let ternary = PackedTernary::from_weights(45, cols, &codes, Scale::Multiply(0.21)).unwrap();
    let weight = FrozenWeight::Ternary(Arc::new(backend.pack(&[ternary], Arrangement::Stacked).unwrap()));
    let update = |first_row: usize, rows: usize, rank: usize, scaling: f32| Update {
        first_row,
        rows,
        rank,
        scaling,
        seed: 5 + first_row as u64,
    };
    let (first, last) = (update(0, rows[0], 3, 2.0), update(29, rows[2], 5, -0.5));
    let h = Var::from_tensor(&tensor(&[tokens, cols], 1)).unwrap();
    let a = Var::from_tensor(&tensor(&[8, cols], 2)).unwrap();
    let b = Var::from_tensor(&tensor(&[20 * 3 + 16 * 5], 3)).unwrap();
    let target = tensor(&[tokens, 45], 4);
    for dropout in [0.0, 0.3] {
        let got = grad::adapted_linear(&backend, &weight, &h, (&a, &b), &[first, last], dropout).unwrap();
        // The same of single operations.
        let part = |u: &Update, at_a: usize, at_b: usize| {
            let dropped = grad::dropout(&h, dropout, u.seed).unwrap();
            let b = b.narrow(0, at_b, u.rows * u.rank).unwrap().reshape((u.rows, u.rank)).unwrap();
            grad::low_rank(&backend, &dropped, &a.narrow(0, at_a, u.rank).unwrap(), &b, u.scaling).unwrap()
        };
        let middle = Tensor::zeros((tokens, rows[1]), DType::F32, &CPU).unwrap();
        let updates = Tensor::cat(&[part(&first, 0, 0), middle, part(&last, 3, 60)], 1).unwrap();
        let want = (grad::frozen_linear(&backend, &weight, &h).unwrap() + updates).unwrap();
        assert_eq!(flat(&got), flat(&want));
        let gradients = |y: &Tensor| y.mul(&target).unwrap().sum_all().unwrap().backward().unwrap();
        let (got, want) = (gradients(&got), gradients(&want));
        for x in [&h, &a, &b] {
            close(got.get(x).unwrap(), want.get(x).unwrap(), 3e-6);
        }
    }
    let refused = |updates: &[Update], dropout: f32| {
        grad::adapted_linear(&backend, &weight, &h, (&a, &b), updates, dropout).unwrap_err().to_string()
    };
    assert!(refused(&[first, last], 1.0).contains("dropout 1"));
    assert!(refused(&[last, first], 0.0).contains("of 45 rows"));
    assert!(refused(&[first, update(30, 16, 5, 1.0)], 0.0).contains("of 45 rows"));
    assert!(refused(&[first], 0.0).contains("with A [8, 40]"));
}
