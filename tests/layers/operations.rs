//! The operations alone: where they write, and what they refuse.

use crate::{CPU, backend, close, dense, norm, same, ternary, values, written};
use candle_bitnet::backend::attention::{AttentionShape, RopeTable, RowPosition};
use candle_bitnet::backend::cpu::Gate;
use candle_bitnet::backend::{Arrangement, Backend, Batch, DenseType};
use candle_bitnet::ops::{self, AttentionInput, Output};
use candle_bitnet::ternary::Scale;
use candle_bitnet::{Error, Result};
use candle_core::{D, DType, Tensor};
use std::sync::Mutex;

fn batch(backend: &Backend, ids: &[u32], rows: &[(usize, usize)]) -> Batch {
    let rows: Vec<_> = rows.iter().map(|(slot, position)| RowPosition { slot: *slot, position: *position }).collect();
    let mut batch = backend.batch(ids.len()).unwrap();
    batch.set(ids, &rows).unwrap();
    batch
}

fn columns(t: &Tensor, at: usize, count: usize) -> Tensor {
    t.narrow(1, at, count).unwrap().contiguous().unwrap()
}

#[test]
fn products_are_written_into_columns_or_added_to_them_and_touch_nothing_else() {
    let backend = backend();
    let (rows, cols) = (21, 80);
    let weight = backend.pack(&[ternary(rows, cols, Scale::Divide(1.3))], Arrangement::Stacked).unwrap();
    let matrix = dense(&backend, &values(rows, cols, 4));
    let update = backend.low_rank(3, &vec![0.1; 3 * cols], &vec![0.3; rows * 3], 2.0).unwrap();
    let n = norm(cols, 1e-5);
    // One token, a few, and several of the prefill kernels' passes; each in the first rows of a larger buffer.
    for tokens in [1, 3, 40] {
        let x = values(tokens + 2, cols, 5);
        let x = x.narrow(0, 0, tokens).unwrap();
        let run = |which: usize, out: Output<'_>| -> Result<()> {
            match which {
                0 => ops::norm_linear(&backend, &weight, &x, None, out),
                1 => ops::norm_linear(&backend, &weight, &x, Some((n.weight(), n.eps())), out),
                _ => ops::dense_linear(&backend, &matrix, &x, out),
            }
        };
        for which in 0..3 {
            let alone = written(tokens, rows, |out| run(which, Output::replace(out)));
            for (first_column, width, add) in [(0, 21, true), (0, 30, false), (4, 25, false), (7, 40, true)] {
                let buffer = values(tokens + 4, width, 6);
                let before = buffer.copy().unwrap();
                let tensor = &buffer.narrow(0, 0, tokens).unwrap();
                run(which, Output { tensor, first_column, add }).unwrap();
                let old = columns(&before.narrow(0, 0, tokens).unwrap(), first_column, rows);
                let want = if add { (&old + &alone).unwrap() } else { alone.clone() };
                same(&columns(tensor, first_column, rows), &want);
                let after = first_column + rows;
                for (at, count) in [(0, first_column), (after, width - after)] {
                    same(&columns(&buffer, at, count), &columns(&before, at, count));
                }
                same(&buffer.narrow(0, tokens, 4).unwrap(), &before.narrow(0, tokens, 4).unwrap());
            }
        }
        let buffer = values(tokens, rows + 8, 7);
        let before = buffer.copy().unwrap();
        ops::low_rank(&backend, &[(5, &update)], &x, &buffer).unwrap();
        let zeros = Tensor::zeros((tokens, rows), DType::F32, &CPU).unwrap();
        ops::low_rank(&backend, &[(0, &update)], &x, &zeros).unwrap();
        same(&columns(&buffer, 5, rows), &(columns(&before, 5, rows) + zeros).unwrap());
        same(&columns(&buffer, 0, 5), &columns(&before, 0, 5));
        same(&columns(&buffer, rows + 5, 3), &columns(&before, rows + 5, 3));
    }
}

#[test]
fn the_gated_linear_is_the_linear_and_its_activation() {
    let backend = backend();
    let (rows, cols, n) = (35, 72, norm(72, 1e-5));
    let pack = |arrangement| {
        let weights = [ternary(rows, cols, Scale::Multiply(0.3)), ternary(rows, cols, Scale::Divide(2.0))];
        backend.pack(&weights, arrangement).unwrap()
    };
    let (fused, stacked) = (pack(Arrangement::GateUp), pack(Arrangement::Stacked));
    for tokens in [1, 2, 30] {
        let x = values(tokens, cols, 3);
        for norm in [None, Some((n.weight(), n.eps()))] {
            for gate in [Gate::Relu2, Gate::Silu] {
                let linear = |out: &Tensor| ops::norm_linear(&backend, &stacked, &x, norm, Output::replace(out));
                let gate_up = written(tokens, 2 * rows, linear);
                let want = written(tokens, rows, |out| ops::gated(&backend, gate, &gate_up, out));
                same(&written(tokens, rows, |out| ops::gated_linear(&backend, gate, &fused, &x, norm, out)), &want);
            }
        }
    }
}

#[test]
fn attention_is_candles_with_its_rotary_embedding() {
    let backend = backend();
    let (heads, kv_heads, dim, length, width) = (4, 2, 32, 90, 128);
    let shape = AttentionShape::new(heads, kv_heads, dim).unwrap();
    let qkv = values(length, shape.qkv_dim(), 13);
    let table = RopeTable::new(96, dim, 10_000.0).unwrap();
    let (cos, sin) = table.tables();
    let angles = |v: &[f32]| Tensor::from_slice(&v[..length * dim / 2], (length, dim / 2), &CPU).unwrap();
    let (cos, sin) = (angles(cos), angles(sin));
    let part = |first: usize, count: usize| {
        let x = qkv.narrow(1, first * dim, count * dim).unwrap().reshape((1, length, count, dim)).unwrap();
        x.transpose(1, 2).unwrap().contiguous().unwrap()
    };
    let shared = |x: Tensor| {
        let x = x.unsqueeze(2).unwrap().broadcast_as((1, kv_heads, heads / kv_heads, length, dim)).unwrap();
        x.contiguous().unwrap().reshape((1, heads, length, dim)).unwrap()
    };
    let rotated = |x: Tensor| candle_nn::rotary_emb::rope(&x, &cos, &sin).unwrap();
    let (q, k) = (rotated(part(0, heads)), shared(rotated(part(heads, kv_heads))));
    let v = shared(part(heads + kv_heads, kv_heads));
    let scores = (q.matmul(&k.t().unwrap()).unwrap() / (dim as f64).sqrt()).unwrap();
    let hidden = |i: usize| if i % length > i / length { f32::NEG_INFINITY } else { 0.0 };
    let mask: Vec<f32> = (0..length * length).map(hidden).collect();
    let scores = scores.broadcast_add(&Tensor::from_vec(mask, (length, length), &CPU).unwrap()).unwrap();
    let p = candle_nn::ops::softmax(&scores, D::Minus1).unwrap();
    let want = p.matmul(&v).unwrap().transpose(1, 2).unwrap().contiguous().unwrap().reshape((length, width)).unwrap();

    let rope = backend.rope(table).unwrap();
    assert_eq!((rope.positions(), rope.half_dim()), (96, 16));
    let ids = vec![0; length];
    let run = |kv: &Mutex<_>, first: usize, count: usize| {
        let rows: Vec<_> = (first..first + count).map(|position| (1, position)).collect();
        let batch = &batch(&backend, &ids[..count], &rows);
        let qkv = qkv.narrow(0, first.min(length - count), count).unwrap();
        let input = AttentionInput { shape, batch, rope: &rope, kv };
        let out = Tensor::full(f32::NAN, (count, width), &CPU).unwrap();
        ops::attention(&backend, &qkv, input, &out).map(|()| out)
    };
    let cache = || Mutex::new(backend.kv_layer(DenseType::F32, shape, 2, 96).unwrap());
    let whole = run(&cache(), 0, length).unwrap();
    close(&whole, &want, 1e-5);
    // Piece by piece the same bits.
    let kv = cache();
    for (first, count) in [(0, 1), (1, 1), (2, 50), (52, 1), (53, 37)] {
        same(&run(&kv, first, count).unwrap(), &whole.narrow(0, first, count).unwrap());
    }
    let far = run(&kv, 90, 7).unwrap_err().to_string();
    assert!(far.contains("97 positions needed, 96 available"), "{far}");
}

#[test]
fn embeddings_are_rows_and_rows_can_be_picked() {
    let backend = backend();
    let embedding = values(9, 6, 17);
    let weight = dense(&backend, &embedding);
    let ids = batch(&backend, &[8, 0, 8], &[(0, 4), (0, 5), (1, 0)]);
    assert_eq!((ids.len(), ids.capacity(), ids.ids(), ids.is_empty()), (3, 3, &[8, 0, 8][..], false));
    let rows = written(3, 6, |out| ops::embed(&backend, &weight, &ids, out));
    let want = Tensor::new(&[8u32, 0, 8], &CPU).unwrap();
    same(&rows, &embedding.index_select(&want, 0).unwrap());
    let out = Tensor::zeros((1, 6), DType::F32, &CPU).unwrap();
    let outside = ops::embed(&backend, &weight, &batch(&backend, &[9], &[(0, 0)]), &out).unwrap_err();
    assert!(outside.to_string().contains("9 is outside the vocabulary of 9"), "{outside}");
    let picked = written(2, 6, |out| ops::select_rows(&backend, &embedding, &[7, 2], out));
    same(&picked, &embedding.index_select(&Tensor::new(&[7u32, 2], &CPU).unwrap(), 0).unwrap());
    let e = ops::select_rows(&backend, &embedding, &[9], &out).unwrap_err().to_string();
    assert!(e.contains("select-rows: row 9 of [9, 6]"), "{e}");
}

#[test]
fn a_batch_takes_whole_runs_of_consecutive_positions() {
    let backend = backend();
    let mut batch = backend.batch(3).unwrap();
    assert!(batch.is_empty() && batch.capacity() == 3);
    let row = |slot: usize, position: usize| RowPosition { slot, position };
    batch.set(&[5, 6, 7], &[row(1, 9), row(1, 10), row(0, 0)]).unwrap();
    let mut refused = |ids: &[u32], rows: &[RowPosition], reason: &str| {
        let e = batch.set(ids, rows).unwrap_err();
        assert!(matches!(&e, Error::Shape { op: "batch", .. }) && e.to_string().contains(reason), "{e}");
        assert_eq!((batch.ids(), batch.rows().len()), (&[5, 6, 7][..], 3));
    };
    refused(&[], &[], "0 tokens");
    refused(&[1; 4], &[row(0, 0), row(0, 1), row(0, 2), row(0, 3)], "4 tokens; 1 to 3 are possible");
    refused(&[1, 2], &[row(0, 0)], "2 tokens with 1 positions");
    refused(&[1, 2], &[row(0, 1), row(0, 0)], "from position 1 to 0");
    refused(&[1, 2, 3], &[row(0, 0), row(1, 0), row(0, 1)], "the tokens of slot 0 are apart");
}

#[test]
fn operands_that_do_not_fit_are_refused_by_the_operations_name() {
    let backend = backend();
    let ones = |rows: usize, cols: usize| Tensor::ones((rows, cols), DType::F32, &CPU).unwrap();
    let n = norm(16, 1e-5);
    let ternaries = |count: usize| {
        vec![ternary(8, 16, Scale::Multiply(1.0)), ternary(8, 16, Scale::Multiply(1.0))][..count].to_vec()
    };
    let stacked = backend.pack(&ternaries(1), Arrangement::Stacked).unwrap();
    let fused = backend.pack(&ternaries(2), Arrangement::GateUp).unwrap();
    let (matrix, update) = (dense(&backend, &ones(8, 16)), backend.low_rank(1, &[1.0; 16], &[1.0; 8], 1.0).unwrap());
    let linear = |x: &Tensor, out: &Tensor| ops::norm_linear(&backend, &stacked, x, None, Output::replace(out));
    let normed = |weight: &Tensor, out: &Tensor| {
        ops::norm_linear(&backend, &stacked, &ones(2, 16), Some((weight, 1e-5)), Output::replace(out))
    };
    let gated = |x: &Tensor, out: &Tensor| ops::gated_linear(&backend, Gate::Silu, &fused, x, None, out);
    let product = |x: &Tensor, out: &Tensor| ops::dense_linear(&backend, &matrix, x, Output::replace(out));
    let rms = |x: &Tensor, out: &Tensor| ops::rms_norm(&backend, x, n.weight(), n.eps(), out);
    let gate = |x: &Tensor, out: &Tensor| ops::gated(&backend, Gate::Silu, x, out);
    let pick = |x: &Tensor, out: &Tensor| ops::select_rows(&backend, x, &[1, 0], out);
    let low = |x: &Tensor, out: &Tensor| ops::low_rank(&backend, &[(0, &update)], x, out);
    type Call<'a> = (&'static str, &'a dyn Fn(&Tensor, &Tensor) -> Result<()>, usize);
    let calls: [Call<'_>; 7] = [
        ("norm-linear", &linear, 8),
        ("gated-linear", &gated, 8),
        ("dense-linear", &product, 8),
        ("rms-norm", &rms, 16),
        ("gated-activation", &gate, 8),
        ("select-rows", &pick, 16),
        ("low-rank", &low, 8),
    ];
    for (name, call, width) in calls {
        let (x, out) = (ones(2, 16), ones(2, width));
        call(&x, &out).unwrap();
        let refused = |x: &Tensor, out: &Tensor| {
            let e = call(x, out).unwrap_err();
            assert!(matches!(&e, Error::Shape { op, .. } if *op == name), "{name}: {e}");
            assert!(e.to_string().starts_with(&format!("{name}: ")), "{e}");
        };
        refused(&x, &ones(3, width));
        refused(&x, &ones(2, width - 1));
        refused(&ones(2, 15), &out);
        refused(&ones(1, 16), &out);
        refused(&x.to_dtype(DType::F16).unwrap(), &out);
        refused(&x, &out.to_dtype(DType::BF16).unwrap());
        refused(&ones(16, 2).t().unwrap(), &out);
        refused(&x, &ones(width, 2).t().unwrap());
        refused(&x, &ones(2, width).unsqueeze(0).unwrap());
        refused(
            &Tensor::zeros((0, 16), DType::F32, &CPU).unwrap(),
            &Tensor::zeros((0, width), DType::F32, &CPU).unwrap(),
        );
        // An output that shares its storage with the input: an error, and no deadlock.
        let buffer = ones(6, 16);
        let rows = |at: usize| buffer.narrow(0, at, 2).unwrap();
        let flat = buffer.flatten_all().unwrap();
        let out = flat.narrow(0, 32, 2 * width).unwrap().reshape((2, width)).unwrap();
        let e = call(&rows(0), &out).unwrap_err().to_string();
        assert!(e.contains(name) && e.contains("shares storage"), "{e}");
        let e = if width == 16 { call(&buffer.narrow(0, 0, 2).unwrap(), &rows(0)) } else { call(&rows(0), &out) };
        assert!(e.unwrap_err().to_string().contains(name));
    }
    let refused = |e: Result<()>, reason: &str| {
        let e = e.unwrap_err().to_string();
        assert!(e.contains(reason), "{e}");
    };
    refused(normed(&Tensor::ones(15, DType::F32, &CPU).unwrap(), &ones(2, 8)), "norm-linear: norm is F32 [15]");
    refused(normed(&Tensor::ones(16, DType::F16, &CPU).unwrap(), &ones(2, 8)), "norm-linear: norm is F16 [16]");
    let out = ones(2, 12);
    let columns =
        |first: usize| ops::norm_linear(&backend, &stacked, &ones(2, 16), None, Output::add_to(&out).skip(first));
    columns(4).unwrap();
    refused(columns(5), "norm-linear: output [2, 12] for [2, 8] from column 5 on");
    refused(columns(usize::MAX), "norm-linear: output");
    let overlap = ops::low_rank(&backend, &[(0, &update), (4, &update)], &ones(2, 16), &out);
    refused(overlap, "low-rank: update [8, 16] at 4");
    refused(ops::norm_linear(&backend, &fused, &ones(2, 16), None, Output::replace(&ones(2, 16))), "packed as GateUp");
    refused(ops::gated_linear(&backend, Gate::Silu, &stacked, &ones(2, 16), None, &ones(2, 4)), "packed as Stacked");
    let shape = AttentionShape::new(2, 1, 8).unwrap();
    let kv = &Mutex::new(backend.kv_layer(DenseType::F32, shape, 1, 4).unwrap());
    let rope = &backend.rope(RopeTable::new(4, 8, 1e4).unwrap()).unwrap();
    let batch = &batch(&backend, &[1, 2], &[(0, 0), (0, 1)]);
    let input = AttentionInput { shape, batch, rope, kv };
    ops::attention(&backend, &ones(2, 32), input, &ones(2, 16)).unwrap();
    refused(ops::attention(&backend, &ones(2, 31), input, &ones(2, 16)), "attention: input is [2, 31]");
    refused(ops::attention(&backend, &ones(3, 32), input, &ones(3, 16)), "attention: input is [3, 32]");
    refused(ops::attention(&backend, &ones(2, 32), input, &ones(2, 17)), "attention: output is [2, 17]");
    let half = AttentionInput { rope: &backend.rope(RopeTable::new(4, 4, 1e4).unwrap()).unwrap(), ..input };
    refused(ops::attention(&backend, &ones(2, 32), half, &ones(2, 16)), "attention: ");
    refused(ops::embed(&backend, &matrix, batch, &ones(2, 15)), "embed: output is [2, 15]; [2, 16] is needed");
}
