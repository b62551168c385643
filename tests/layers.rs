//! Operations and layers through the public interface, against plain candle arithmetic.

mod common;

use candle_bitnet::backend::attention::RopeTable;
use candle_bitnet::backend::cpu::{CpuOptions, Gate};
use candle_bitnet::backend::{Backend, DenseType, DenseWeight};
use candle_bitnet::checkpoint::write::{Entry, write_file};
use candle_bitnet::checkpoint::{Checkpoint, StoredType};
use candle_bitnet::model::config::{ModelConfig, Projection};
use candle_bitnet::nn::{BitLinear, Linear, LinearGroup, LinearParts, LinearWeight, RmsNorm};
use candle_bitnet::ops;
use candle_bitnet::ternary::{PackedTernary, Scale};
use candle_bitnet::{LoadOptions, LoadedDecoder};
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
        let quantized = ops::quantize(&backend(), &x).unwrap().dequantize().unwrap();
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
    close(&plain_norm(&x, &outer), &outer.forward(&backend, &x).unwrap(), 1e-6);
    let normed = |n: &RmsNorm, x: &Tensor| n.forward(&backend, x).unwrap();
    same(&without.forward(&backend, &x, None, None).unwrap(), &plain.forward(&x).unwrap());
    same(&without.forward(&backend, &x, Some(&outer), None).unwrap(), &plain.forward(&normed(&outer, &x)).unwrap());
    same(&with.forward(&backend, &x, None, None).unwrap(), &plain.forward(&normed(&own, &x)).unwrap());
    let both = plain.forward(&normed(&own, &normed(&outer, &x))).unwrap();
    same(&with.forward(&backend, &x, Some(&outer), None).unwrap(), &both);
    let residual = values(5, 20, 3);
    same(&with.forward(&backend, &x, Some(&outer), Some(&residual)).unwrap(), &(both + &residual).unwrap());
}

#[test]
fn gated_layers_equal_their_parts() {
    let backend = backend();
    let gate_up = values(4, 2 * 48, 11);
    let (g, up) = (gate_up.narrow(1, 0, 48).unwrap(), gate_up.narrow(1, 48, 48).unwrap());
    let sub = norm(48, 1e-5);
    for gate in [Gate::Relu2, Gate::Silu] {
        let act = match gate {
            Gate::Relu2 => g.relu().unwrap().sqr().unwrap(),
            Gate::Silu => candle_nn::ops::silu(&g).unwrap(),
        };
        let h = ops::gated(&backend, gate, &gate_up).unwrap();
        close(&h, &(act * &up).unwrap(), 1e-6);
        for own in [None, Some(norm(48, 1e-6))] {
            let weight = LinearWeight::Ternary(ternary(8, 48, Scale::Multiply(0.5)));
            let layer = Linear::new(&backend, LinearParts { weight, norm: own }).unwrap();
            for before in [None, Some(&sub)] {
                let want = layer.forward(&backend, &h, before, None).unwrap();
                same(&layer.forward_gated(&backend, gate, &gate_up, before, None).unwrap(), &want);
            }
        }
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
    close(&layer.forward(&backend, &x, Some(&n), None).unwrap(), &want, 1e-5);
    let residual = values(3, 10, 2);
    let y = layer.forward(&backend, &x, Some(&n), Some(&residual)).unwrap();
    close(&y, &(&want + &residual).unwrap(), 1e-5);
    // A dense layer among ternary ones splits the group; the ternary ones give the same bits as stacked.
    let q = || parts(LinearWeight::Ternary(ternary(16, 80, Scale::Multiply(0.25))));
    let k = || parts(LinearWeight::Ternary(ternary(7, 80, Scale::Divide(4.0))));
    let stacked = LinearGroup::new(&backend, vec![q(), k()]).unwrap();
    let v = parts(LinearWeight::Dense(dense(&backend, &w)));
    let separate = LinearGroup::new(&backend, vec![q(), k(), v]).unwrap();
    assert!(matches!((&stacked, &separate), (LinearGroup::Stacked(_), LinearGroup::Separate(_))));
    let (a, b) = (stacked.forward(&backend, &x, &n).unwrap(), separate.forward(&backend, &x, &n).unwrap());
    assert_eq!((a.dims(), b.dims()), (&[3, 23][..], &[3, 33][..]));
    same(&b.narrow(1, 0, 23).unwrap().contiguous().unwrap(), &a);
    close(&b.narrow(1, 23, 10).unwrap().contiguous().unwrap(), &want, 1e-5);
    assert!(LinearGroup::new(&backend, Vec::new()).is_err());
}

#[test]
fn rope_is_candles_and_embeddings_are_rows() {
    let backend = backend();
    let (heads, dim, positions) = (3, 32, [0usize, 5, 77, 200]);
    let table = RopeTable::new(256, dim, 10_000.0).unwrap();
    let x = values(4, heads * dim, 13);
    let got = ops::rope(&backend, &x, &positions, &table).unwrap();
    for (t, p) in positions.iter().enumerate() {
        let (cos, sin) = table.at(*p);
        let angles = |v: &[f32]| Tensor::from_slice(v, (1, dim / 2), &CPU).unwrap();
        let row = x.narrow(0, t, 1).unwrap().reshape((1, heads, 1, dim)).unwrap();
        let want = candle_nn::rotary_emb::rope(&row, &angles(cos), &angles(sin)).unwrap();
        close(&got.narrow(0, t, 1).unwrap(), &want.reshape((1, heads * dim)).unwrap(), 1e-6);
    }
    let far = ops::rope(&backend, &x, &[0, 1, 2, 256], &table).unwrap_err().to_string();
    assert!(far.contains("257 positions needed, 256 available"), "{far}");
    let embedding = values(9, 6, 17);
    let ids = Tensor::new(&[8u32, 0, 8], &CPU).unwrap();
    let rows = ops::embed(&backend, &dense(&backend, &embedding), &ids).unwrap();
    same(&rows, &embedding.index_select(&ids, 0).unwrap());
    let outside = ops::embed(&backend, &dense(&backend, &embedding), &Tensor::new(&[9u32], &CPU).unwrap());
    assert!(outside.unwrap_err().to_string().contains("9 is outside the vocabulary of 9"));
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
