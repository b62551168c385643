//! Operations and layers through the public interface, against plain candle arithmetic.

mod common;
#[path = "layers/operations.rs"]
mod operations;

use candle_bitnet::backend::activation::{QuantizedRows, row_stride};
use candle_bitnet::backend::cpu::{CpuOptions, Gate};
use candle_bitnet::backend::{Backend, DenseType, DenseWeight};
use candle_bitnet::checkpoint::write::{Entry, write_file};
use candle_bitnet::checkpoint::{Checkpoint, StoredType};
use candle_bitnet::model::config::{ModelConfig, Projection};
use candle_bitnet::nn::{BitLinear, Linear, LinearGroup, LinearParts, LinearWeight, RmsNorm};
use candle_bitnet::ops::{self, Output};
use candle_bitnet::ternary::{PackedTernary, Scale};
use candle_bitnet::{LoadOptions, LoadedDecoder, Result};
use candle_core::{D, DType, Device, Module, Tensor};
use common::fixture;

const CPU: Device = Device::Cpu;

fn backend() -> Backend {
    Backend::new(&CPU, CpuOptions { kernel: None, threads: Some(2) }).unwrap()
}

fn values(rows: usize, cols: usize, seed: u32) -> Tensor {
    let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 8_388_608.0 - 1.0;
    Tensor::from_vec((0..rows * cols).map(value).collect::<Vec<f32>>(), (rows, cols), &CPU).unwrap()
}

fn ternary(rows: usize, cols: usize, scale: Scale) -> PackedTernary {
    let weights: Vec<i8> = (0..rows * cols).map(|i| ((i * i + 3 * i) % 7 % 3) as i8 - 1).collect();
    PackedTernary::from_weights(rows, cols, &weights, scale).unwrap()
}

fn norm(len: usize, eps: f32) -> RmsNorm {
    RmsNorm::new((0..len).map(|i| 0.5 + (i % 5) as f32 / 4.0).collect(), eps, &CPU).unwrap()
}

/// f32 `[rows, cols]` that `f` replaces whole.
#[track_caller]
fn written(rows: usize, cols: usize, f: impl FnOnce(&Tensor) -> Result<()>) -> Tensor {
    let out = Tensor::full(f32::NAN, (rows, cols), &CPU).unwrap();
    f(&out).unwrap();
    out
}

/// The activations that a quantised linear sees.
fn quantized(x: &Tensor) -> Tensor {
    let (tokens, cols) = x.dims2().unwrap();
    let mut bytes = vec![0; tokens * row_stride(cols)];
    let x = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    backend().cpu().quantize(&x, cols, None, &mut bytes).unwrap();
    let rows = QuantizedRows::new(&bytes, cols).unwrap();
    let row = |t: usize| rows.codes(t)[..cols].iter().map(move |q| f32::from(*q) / rows.scale(t));
    Tensor::from_vec((0..tokens).flat_map(row).collect::<Vec<f32>>(), (tokens, cols), &CPU).unwrap()
}

/// RMSNorm in candle's own operations.
fn plain_norm(x: &Tensor, n: &RmsNorm) -> Tensor {
    let mean = x.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
    let r = (mean + f64::from(n.eps())).unwrap().sqrt().unwrap();
    x.broadcast_div(&r).unwrap().broadcast_mul(n.weight()).unwrap()
}

#[track_caller]
fn close(got: &Tensor, want: &Tensor, relative: f32) {
    assert_eq!(got.dims(), want.dims());
    let flat = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (got, want) = (flat(got), flat(want));
    let size = want.iter().fold(1e-9f32, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        assert!((g - w).abs() <= relative * size, "element {i}: {g} instead of {w}");
    }
}

#[track_caller]
fn same(got: &Tensor, want: &Tensor) {
    assert_eq!(got.dims(), want.dims());
    assert_eq!(
        got.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        want.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    );
}

#[test]
fn bit_linear_is_a_candle_module_of_any_float_type_and_leading_shape() {
    for scale in [Scale::Multiply(0.37), Scale::Divide(2.7)] {
        let weight = ternary(12, 100, scale);
        let dense = Tensor::from_vec(weight.dequantize(), (12, 100), &CPU).unwrap();
        let layer = BitLinear::new(weight, &CPU).unwrap();
        let x = values(6, 100, 1);
        let quantized = quantized(&x);
        close(&quantized, &x, 0.005);
        let want = quantized.matmul(&dense.t().unwrap()).unwrap();
        close(&layer.forward(&x).unwrap(), &want, 1e-5);
        close(&layer.forward(&x.reshape((2, 3, 100)).unwrap()).unwrap(), &want.reshape((2, 3, 12)).unwrap(), 1e-5);
        for dtype in [DType::BF16, DType::F16] {
            let y = layer.forward(&x.to_dtype(dtype).unwrap()).unwrap();
            assert_eq!(y.dtype(), dtype);
            close(&y, &want, 0.03);
        }
        // A transposed input is not contiguous; an empty one is not an error.
        let transposed = x.t().unwrap().contiguous().unwrap().t().unwrap();
        close(&layer.forward(&transposed).unwrap(), &want, 1e-5);
        assert_eq!(layer.forward(&Tensor::zeros((0, 100), DType::F32, &CPU).unwrap()).unwrap().dims(), [0, 12]);
        let wrong = layer.forward(&values(2, 99, 0)).unwrap_err().to_string();
        assert!(wrong.contains("100 features"), "{wrong}");
    }
}

#[test]
fn a_layer_applies_the_norms_in_order() {
    let backend = backend();
    let x = values(5, 64, 7);
    let (outer, own) = (norm(64, 1e-5), norm(64, 1e-6));
    let plain = BitLinear::with_backend(ternary(20, 64, Scale::Divide(3.0)), &backend).unwrap();
    let weight = || LinearWeight::Ternary(ternary(20, 64, Scale::Divide(3.0)));
    let with = Linear::new(&backend, LinearParts { weight: weight(), norm: Some(own.clone()) }).unwrap();
    let without = Linear::new(&backend, LinearParts { weight: weight(), norm: None }).unwrap();
    let normed = |n: &RmsNorm, x: &Tensor| written(5, 64, |out| n.forward(&backend, x, out));
    close(&plain_norm(&x, &outer), &normed(&outer, &x), 1e-6);
    let forward = |layer: &Linear, norm| written(5, 20, |out| layer.forward(&backend, &x, norm, Output::replace(out)));
    same(&forward(&without, None), &plain.forward(&x).unwrap());
    same(&forward(&without, Some(&outer)), &plain.forward(&normed(&outer, &x)).unwrap());
    same(&forward(&with, None), &plain.forward(&normed(&own, &x)).unwrap());
    let both = plain.forward(&normed(&own, &normed(&outer, &x))).unwrap();
    same(&forward(&with, Some(&outer)), &both);
    let residual = values(5, 20, 3);
    let sum = (both + &residual).unwrap();
    with.forward(&backend, &x, Some(&outer), Output::add_to(&residual)).unwrap();
    same(&residual, &sum);
}

#[test]
fn gate_and_up_give_their_gated_product_however_they_are_packed() {
    let backend = backend();
    for (tokens, cols, rows) in [(1, 64, 48), (4, 100, 20), (37, 48, 7)] {
        let (x, n) = (values(tokens, cols, 11), norm(cols, 1e-5));
        let parts = |own: bool| -> Vec<LinearParts> {
            let weights = [ternary(rows, cols, Scale::Multiply(0.5)), ternary(rows, cols, Scale::Divide(1.7))];
            let part = |w| LinearParts { weight: LinearWeight::Ternary(w), norm: own.then(|| norm(cols, 1e-6)) };
            weights.into_iter().map(part).collect()
        };
        let fused = LinearGroup::gate_up(&backend, parts(false)).unwrap();
        let stacked = LinearGroup::new(&backend, parts(false)).unwrap();
        let separate = LinearGroup::gate_up(&backend, parts(true)).unwrap();
        assert!(matches!(
            (&fused, &stacked, &separate),
            (LinearGroup::GateUp(_), LinearGroup::Stacked(_), LinearGroup::Separate(_))
        ));
        assert!([&fused, &stacked, &separate].iter().all(|group| group.rows() == 2 * rows));
        for gate in [Gate::Relu2, Gate::Silu] {
            let product =
                |group: &LinearGroup| written(tokens, rows, |out| group.forward_gated(&backend, gate, &x, &n, out));
            same(&product(&fused), &product(&stacked));
            for group in [&stacked, &separate] {
                let gate_up = written(tokens, 2 * rows, |out| group.forward(&backend, &x, &n, Output::replace(out)));
                let half = |at: usize| gate_up.narrow(1, at, rows).unwrap();
                let act = match gate {
                    Gate::Relu2 => half(0).relu().unwrap().sqr().unwrap(),
                    Gate::Silu => candle_nn::ops::silu(&half(0).contiguous().unwrap()).unwrap(),
                };
                close(&product(group), &(act * half(rows)).unwrap(), 1e-6);
                same(&product(group), &written(tokens, rows, |out| ops::gated(&backend, gate, &gate_up, out)));
            }
        }
        let apart = Tensor::zeros((tokens, 2 * rows), DType::F32, &CPU).unwrap();
        let e = fused.forward(&backend, &x, &n, Output::replace(&apart)).unwrap_err().to_string();
        assert!(e.contains("packed as GateUp; Stacked is needed"), "{e}");
    }
    let part =
        |rows| LinearParts { weight: LinearWeight::Ternary(ternary(rows, 16, Scale::Multiply(1.0))), norm: None };
    for parts in [vec![part(8)], vec![part(8), part(9)], vec![part(8), part(8), part(8)]] {
        let e = LinearGroup::gate_up(&backend, parts).unwrap_err().to_string();
        assert!(e.contains("are not a gate and an up of one shape"), "{e}");
    }
}

fn dense(backend: &Backend, t: &Tensor) -> DenseWeight {
    let (rows, cols) = t.dims2().unwrap();
    let bytes: Vec<u8> =
        t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect();
    backend.dense_filled(DenseType::F32, rows, cols, |out| out.copy_from_slice(&bytes)).unwrap()
}

#[test]
fn unconverted_layers_and_separate_groups_compute_the_same_product() {
    let backend = backend();
    let x = values(3, 80, 5);
    let n = norm(80, 1e-5);
    let w = values(10, 80, 9);
    let parts = |weight| LinearParts { weight, norm: None };
    let layer = Linear::new(&backend, parts(LinearWeight::Dense(dense(&backend, &w)))).unwrap();
    let normed = plain_norm(&x, &n);
    let want = normed.matmul(&w.t().unwrap()).unwrap();
    let y = written(3, 10, |out| layer.forward(&backend, &x, Some(&n), Output::replace(out)));
    close(&y, &want, 1e-5);
    let residual = values(3, 10, 2);
    let sum = (&y + &residual).unwrap();
    layer.forward(&backend, &x, Some(&n), Output::add_to(&residual)).unwrap();
    same(&residual, &sum);
    // A dense layer among ternary ones splits the group; the ternary ones give the same bits as stacked.
    let q = || parts(LinearWeight::Ternary(ternary(16, 80, Scale::Multiply(0.25))));
    let k = || parts(LinearWeight::Ternary(ternary(7, 80, Scale::Divide(4.0))));
    let stacked = LinearGroup::new(&backend, vec![q(), k()]).unwrap();
    let v = parts(LinearWeight::Dense(dense(&backend, &w)));
    let separate = LinearGroup::new(&backend, vec![q(), k(), v]).unwrap();
    assert!(matches!((&stacked, &separate), (LinearGroup::Stacked(_), LinearGroup::Separate(_))));
    let forward = |group: &LinearGroup, tensor: &Tensor, add: bool| {
        group.forward(&backend, &x, &n, Output { tensor, first_column: 0, add }).unwrap();
    };
    let (a, b) = (values(3, 23, 1), values(3, 33, 1));
    forward(&stacked, &a, false);
    forward(&separate, &b, false);
    same(&b.narrow(1, 0, 23).unwrap().contiguous().unwrap(), &a);
    close(&b.narrow(1, 23, 10).unwrap().contiguous().unwrap(), &want, 1e-5);
    // Added to what is there, and in the middle of wider rows.
    for (group, y) in [(&stacked, &a), (&separate, &b)] {
        let residual = values(3, group.rows(), 8);
        let sum = (&residual + y).unwrap();
        forward(group, &residual, true);
        same(&residual, &sum);
        let wide = values(3, group.rows() + 9, 4);
        let want = wide.copy().unwrap();
        group.forward(&backend, &x, &n, Output::replace(&wide).skip(5)).unwrap();
        let columns = |t: &Tensor, at: usize, n: usize| t.narrow(1, at, n).unwrap().contiguous().unwrap();
        same(&columns(&wide, 5, group.rows()), y);
        same(&columns(&wide, 0, 5), &columns(&want, 0, 5));
        same(&columns(&wide, 5 + group.rows(), 4), &columns(&want, 5 + group.rows(), 4));
    }
    assert!(LinearGroup::new(&backend, Vec::new()).is_err());
}

/// The Llama fixture with other quantisation settings, some tensors more, and some projections left dense.
fn variant(settings: &str, extra: &[(String, usize)], dense: &[&str]) -> tempfile::TempDir {
    let source = Checkpoint::open(&fixture("a3_llama")).unwrap();
    let (path, text) = source.config();
    let config = ModelConfig::parse(path, text).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let text = text.replace("\"modules_to_not_convert\": null", settings);
    assert!(text.contains(settings));
    std::fs::write(dir.path().join("config.json"), text).unwrap();
    let mut entries = Vec::new();
    for info in source.tensors() {
        let base = info.name.trim_end_matches("_scale").trim_end_matches(".weight");
        if !dense.contains(&base) {
            let bytes = source.tensor(&info.name).unwrap().bytes().to_vec();
            entries.push(Entry::from_bytes(&info.name, info.dtype, info.shape.clone(), bytes));
        }
    }
    for name in dense {
        let which = Projection::ALL.into_iter().find(|p| name.ends_with(p.path())).unwrap();
        let (rows, cols) = config.projection_shape(which);
        let bytes = (0..rows * cols).flat_map(|i| (((i * 31 % 61) as f32 - 30.0) / 500.0).to_le_bytes()).collect();
        entries.push(Entry::from_bytes(format!("{name}.weight"), StoredType::F32, [rows, cols], bytes));
    }
    for (name, len) in extra {
        let bytes = (0..*len).flat_map(|i| (0.75 + (i % 3) as f32 / 4.0).to_le_bytes()).collect();
        entries.push(Entry::from_bytes(name, StoredType::F32, [*len], bytes));
    }
    write_file(&dir.path().join("model.safetensors"), entries, &mut |_| ()).unwrap();
    dir
}

fn logits(dir: &std::path::Path, chunk: usize) -> Vec<Vec<f32>> {
    use candle_bitnet::model::{Logits, Sequence};
    let loaded = LoadedDecoder::load(dir.to_str().unwrap(), &LoadOptions::new(&CPU)).unwrap();
    let cache = loaded.decoder.kv_cache(DenseType::F32, 1).unwrap();
    let ids: Vec<u32> = (0..20).map(|i| i * 23 % 500).collect();
    let rows = ids.chunks(chunk).enumerate().flat_map(|(i, tokens)| {
        let piece = Sequence { slot: 0, position: i * chunk, tokens };
        loaded.decoder.forward(&[piece], &cache, Logits::All).unwrap().to_vec2::<f32>().unwrap()
    });
    rows.collect()
}

#[test]
fn logits_are_lent_and_returned_alike_for_passes_of_any_size() {
    use candle_bitnet::model::{Logits, Sequence, read_logits};
    let loaded = LoadedDecoder::load(fixture("a1_packed").to_str().unwrap(), &LoadOptions::new(&CPU)).unwrap();
    let (model, ids) = (&loaded.decoder, (0..100u32).map(|i| i * 23 % 250).collect::<Vec<_>>());
    let cache = model.kv_cache(DenseType::F32, 12).unwrap();
    let sequence = |slot: usize, position: usize, end: usize| Sequence { slot, position, tokens: &ids[position..end] };
    // Every token's logits, one sequence alone.
    let all = model.forward(&[sequence(0, 0, 100)], &cache, Logits::All).unwrap();
    let row = |i: usize| all.narrow(0, i, 1).unwrap();
    // 1 to 8 rows, up to 512 and more than that; with every logit, one of a sequence, and one of a step's sequences.
    let cases: [(&[usize], bool); 8] = [
        (&[1], false),
        (&[2, 1], false),
        (&[8], true),
        (&[1; 12], false),
        (&[3, 40], false),
        (&[7, 9, 1], true),
        (&[100, 90, 80, 70, 60, 50, 40, 30, 20], false),
        (&[100, 99, 98, 97, 96, 95], true),
    ];
    for (lengths, every) in cases {
        let batch: Vec<_> = lengths.iter().enumerate().map(|(slot, n)| sequence(slot, 0, *n)).collect();
        let which = if every { Logits::All } else { Logits::Last };
        let own = model.forward(&batch, &cache, which).unwrap();
        let wanted = lengths.iter().flat_map(|n| if every { 0..*n } else { n - 1..*n });
        let want = Tensor::cat(&wanted.map(row).collect::<Vec<_>>(), 0).unwrap();
        same(&own, &want);
        let mut lent = Vec::new();
        let dims = model.forward_with(&batch, &cache, which, |logits| {
            read_logits(logits, &mut lent)?;
            Ok(logits.dims().to_vec())
        });
        assert_eq!(dims.unwrap(), want.dims());
        assert_eq!(lent, want.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        // What was returned stays when the next pass is made.
        model.forward(&[sequence(3, 0, 1)], &cache, Logits::Last).unwrap();
        same(&own, &want);
    }
    // What `read` refuses comes back, and the decoder goes on.
    let refused = model.forward_with(&[sequence(0, 0, 1)], &cache, Logits::Last, |_| -> Result<()> {
        Err(candle_bitnet::Error::request("test", "no"))
    });
    assert_eq!(refused.unwrap_err().to_string(), "test: no");
    same(&model.forward(&[sequence(0, 0, 1)], &cache, Logits::Last).unwrap(), &row(0));
}

#[test]
fn checkpoints_with_inner_norms_or_dense_projections_run_as_configured() {
    let plain = logits(&fixture("a3_llama"), 20);
    let config = {
        let source = Checkpoint::open(&fixture("a3_llama")).unwrap();
        let (path, text) = source.config();
        ModelConfig::parse(path, text).unwrap()
    };
    let inner =
        |n: usize| config.linears(n).into_iter().map(|(name, _, cols)| (format!("{name}.rms_norm.weight"), cols));
    let norms: Vec<_> = (0..config.num_layers).flat_map(inner).collect();
    let skip = "model.layers.0.mlp.down_proj";
    let with_norms = variant("\"use_rms_norm\": true", &norms, &[]);
    let with_dense = variant(&format!("\"modules_to_not_convert\": [\"{skip}\"]"), &[], &[skip]);
    for dir in [&with_norms, &with_dense] {
        let whole = logits(dir.path(), 20);
        assert!(whole.iter().flatten().all(|v| v.is_finite()));
        assert_ne!(whole, plain, "the variant has an effect");
        assert_eq!(whole, logits(dir.path(), 3), "and runs the same however the prompt is cut");
    }
    // A setting without its tensors, and tensors without their setting, are refused by name.
    let missing = variant("\"use_rms_norm\": true", &norms[1..], &[]);
    let error = LoadedDecoder::load(missing.path().to_str().unwrap(), &LoadOptions::new(&CPU)).unwrap_err();
    assert!(error.to_string().contains(&norms[0].0), "{error}");
    let unexplained = variant("\"modules_to_not_convert\": null", &norms[..1], &[]);
    let error = LoadedDecoder::load(unexplained.path().to_str().unwrap(), &LoadOptions::new(&CPU)).unwrap_err();
    assert!(error.to_string().contains(&norms[0].0), "{error}");
}
