//! LoRA adapters through the public interface: what they compute, what is read and written, what is refused.

mod common;

use candle_bitnet::backend::cpu::{CpuOptions, Gate, KernelKind};
use candle_bitnet::backend::{Backend, DenseType};
use candle_bitnet::checkpoint::adapter::{
    Adapter, AdapterConfig, AdapterMatrices, CONFIG_FILE, MAX_RANK, WEIGHTS_FILE, tensor_names, write_adapter,
};
use candle_bitnet::checkpoint::write::{Entry, write_file};
use candle_bitnet::checkpoint::{Checkpoint, StoredType};
use candle_bitnet::model::config::{ModelConfig, Projection};
use candle_bitnet::model::{Logits, Sequence};
use candle_bitnet::nn::{BitLinear, Linear, LinearGroup, LinearParts, LinearWeight, LowRank, RmsNorm};
use candle_bitnet::ops::{self, Output};
use candle_bitnet::ternary::{PackedTernary, Scale};
use candle_bitnet::{Error, LoadOptions, LoadedDecoder};
use candle_core::{Device, Module, Tensor};
use common::{FIXTURES, fixture};
use serde_json::{Value, json};
use std::path::Path;
use tempfile::TempDir;

const CPU: Device = Device::Cpu;

fn values(n: usize, seed: u32) -> Vec<f32> {
    let value = |i: usize| {
        let x = (i as u32).wrapping_add(seed.wrapping_mul(7919)).wrapping_mul(2_654_435_761);
        ((x ^ x >> 15).wrapping_mul(2_246_822_519) >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..n).map(value).collect()
}

fn tensor(rows: usize, cols: usize, seed: u32) -> Tensor {
    Tensor::from_vec(values(rows * cols, seed), (rows, cols), &CPU).unwrap()
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// `base + scaling · B · (A · h)` for each row of `h`, in f64 and the order of the formula.
fn naive(base: &[f32], h: &[f32], a: &[f32], b: &[f32], rank: usize, scaling: f64) -> Vec<f64> {
    let (rows, cols) = (b.len() / rank, a.len() / rank);
    let dot = |w: &[f32], x: &[f64]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>();
    let mut out = Vec::new();
    for (base, h) in base.chunks(rows).zip(h.chunks(cols)) {
        let h: Vec<f64> = h.iter().map(|v| f64::from(*v)).collect();
        let inner: Vec<f64> = a.chunks(cols).map(|row| dot(row, &h)).collect();
        out.extend(base.iter().zip(b.chunks(rank)).map(|(y, row)| f64::from(*y) + scaling * dot(row, &inner)));
    }
    out
}

#[track_caller]
fn close(got: &[f32], want: &[f64], relative: f64) {
    assert_eq!(got.len(), want.len());
    let size = want.iter().fold(1e-9f64, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*g) - w).abs() <= relative * size, "element {i}: {g} instead of {w}");
    }
}

fn ternary(rows: usize, cols: usize) -> PackedTernary {
    let weights: Vec<i8> = (0..rows * cols).map(|i| ((i * i + 3 * i) % 7 % 3) as i8 - 1).collect();
    PackedTernary::from_weights(rows, cols, &weights, Scale::Multiply(0.21)).unwrap()
}

fn norm(len: usize) -> RmsNorm {
    RmsNorm::new((0..len).map(|i| 0.5 + (i % 5) as f32 / 4.0).collect(), 1e-5, &CPU).unwrap()
}

fn backend() -> Backend {
    Backend::new(&CPU, CpuOptions { kernel: None, threads: Some(2) }).unwrap()
}

/// f32 `[rows, cols]` that `f` replaces whole.
#[track_caller]
fn written(rows: usize, cols: usize, f: impl FnOnce(&Tensor) -> Result<(), Error>) -> Tensor {
    let out = Tensor::full(f32::NAN, (rows, cols), &CPU).unwrap();
    f(&out).unwrap();
    out
}

#[test]
fn a_layer_adds_the_update_of_its_own_unquantised_input() {
    let backend = backend();
    for (rows, cols, rank, scaling) in [(20, 96, 4, 2.0f32), (70, 130, 65, 0.3), (1, 64, 1, -1.0), (33, 48, 16, 1.0)] {
        let (a, b) = (values(rank * cols, 3), values(rows * rank, 4));
        let (outer, own) = (norm(cols), norm(cols));
        let (x, residual) = (tensor(5, cols, 1), tensor(5, rows, 2));
        let update = || LowRank::new(&backend, rank, &a, &b, scaling).unwrap();
        let bit_linear = BitLinear::with_backend(ternary(rows, cols), &backend).unwrap();
        let normed = written(5, cols, |out| outer.forward(&backend, &x, out));
        for inner in [None, Some(own)] {
            let parts = LinearParts { weight: LinearWeight::Ternary(ternary(rows, cols)), norm: inner.clone() };
            let layer = Linear::new(&backend, parts).unwrap().with_adapter(Some(update())).unwrap();
            for (before, h) in [(None, &x), (Some(&outer), &normed)] {
                // The inner norm is BitLinear's own: the adapter does not see it.
                let normed = |n: &RmsNorm| written(5, cols, |out| n.forward(&backend, h, out));
                let inside = inner.as_ref().map_or_else(|| h.clone(), normed);
                let base = bit_linear.forward(&inside).unwrap();
                let want = naive(&flat(&base), &flat(h), &a, &b, rank, f64::from(scaling));
                let got = written(5, rows, |out| layer.forward(&backend, &x, before, Output::replace(out)));
                close(&flat(&got), &want, 2e-6);
                let sum = residual.copy().unwrap();
                layer.forward(&backend, &x, before, Output::add_to(&sum)).unwrap();
                let want = naive(&flat(&(&base + &residual).unwrap()), &flat(h), &a, &b, rank, f64::from(scaling));
                close(&flat(&sum), &want, 2e-6);
                // The residual stream gets the update first and then the product, as training sums them.
                let update = tensor(5, rows, 2);
                layer.adapter().unwrap().add_to(&backend, h, &update, 0).unwrap();
                assert_eq!(flat(&sum), flat(&(update + &base).unwrap()));
                // In the middle of wider rows the same.
                let wide = tensor(5, rows + 3, 8);
                layer.forward(&backend, &x, before, Output::replace(&wide).skip(2)).unwrap();
                assert_eq!(flat(&wide.narrow(1, 2, rows).unwrap().contiguous().unwrap()), flat(&got));
            }
        }
        let wrong = LowRank::new(&backend, rank, &a, &b[..rank], scaling).unwrap();
        if rows > 1 {
            let parts = LinearParts { weight: LinearWeight::Ternary(ternary(rows, cols)), norm: None };
            let e = Linear::new(&backend, parts).unwrap().with_adapter(Some(wrong)).unwrap_err();
            assert!(e.to_string().contains(&format!("[1, {cols}] for a layer of [{rows}, {cols}]")), "{e}");
        }
    }
    assert!(LowRank::new(&backend, 3, &[0.0; 6], &[0.0; 4], 1.0).is_err());
    assert!(LowRank::new(&backend, 0, &[], &[], 1.0).is_err());
}

#[test]
fn a_group_gives_each_layer_its_own_update() {
    let backend = backend();
    let (cols, n, x) = (80, norm(80), tensor(4, 80, 5));
    let rows = [16, 7, 9];
    let (a, b) = (|i: u32| values(2 * 80, i), |i: u32| values(2 * rows[i as usize], 10 + i));
    let parts = |inner: bool| -> Vec<LinearParts> {
        let part =
            |r: usize| LinearParts { weight: LinearWeight::Ternary(ternary(r, cols)), norm: inner.then(|| norm(cols)) };
        rows.into_iter().map(part).collect()
    };
    let h = flat(&written(4, cols, |out| n.forward(&backend, &x, out)));
    let forward = |group: &LinearGroup| written(4, 32, |out| group.forward(&backend, &x, &n, Output::replace(out)));
    for inner in [false, true] {
        let plain = forward(&LinearGroup::new(&backend, parts(inner)).unwrap());
        for present in [[true, true, true], [true, false, true], [false, true, false], [false; 3]] {
            let adapter =
                |i: u32| present[i as usize].then(|| LowRank::new(&backend, 2, &a(i), &b(i), i as f32 - 0.5).unwrap());
            let group = LinearGroup::new(&backend, parts(inner)).unwrap();
            let group = group.with_adapters((0..3).map(adapter).collect()).unwrap();
            assert_eq!(group.adapters().len(), present.iter().filter(|p| **p).count());
            assert_eq!(matches!(group, LinearGroup::Stacked(_)), !inner && present == [false; 3]);
            let got = forward(&group);
            let mut first = 0;
            for i in 0..3u32 {
                let r = rows[i as usize];
                let part = |t: &Tensor| flat(&t.narrow(1, first, r).unwrap().contiguous().unwrap());
                match present[i as usize] {
                    true => {
                        close(&part(&got), &naive(&part(&plain), &h, &a(i), &b(i), 2, f64::from(i) - 0.5), 2e-6);
                    }
                    false => assert_eq!(part(&got), part(&plain)),
                }
                first += r;
            }
        }
        let group = || LinearGroup::new(&backend, parts(inner)).unwrap();
        assert!(group().with_adapters(vec![None, None]).is_err());
        let wrong = LowRank::new(&backend, 2, &a(0), &b(0), 1.0).unwrap();
        assert!(group().with_adapters(vec![None, Some(wrong), None]).is_err());
    }
}

#[test]
fn updates_of_gate_and_up_come_before_the_activation() {
    let backend = backend();
    let (rows, cols, n, x) = (24, 40, norm(40), tensor(3, 40, 5));
    let part = || LinearParts { weight: LinearWeight::Ternary(ternary(rows, cols)), norm: None };
    let update = || LowRank::new(&backend, 2, &values(2 * cols, 1), &values(rows * 2, 2), 0.5).unwrap();
    let group = LinearGroup::new(&backend, vec![part(), part()]).unwrap();
    let group = group.with_adapters(vec![None, Some(update())]).unwrap();
    let gate_up = written(3, 2 * rows, |out| group.forward(&backend, &x, &n, Output::replace(out)));
    for gate in [Gate::Relu2, Gate::Silu] {
        let want = written(3, rows, |out| ops::gated(&backend, gate, &gate_up, out));
        assert_eq!(flat(&written(3, rows, |out| group.forward_gated(&backend, gate, &x, &n, out))), flat(&want));
    }
    let fused = || LinearGroup::gate_up(&backend, vec![part(), part()]).unwrap();
    assert!(matches!(fused().with_adapters(vec![None, None]).unwrap(), LinearGroup::GateUp(_)));
    let e = fused().with_adapters(vec![None, Some(update())]).unwrap_err().to_string();
    assert!(e.contains("gate and up packed for their gated product take no adapters"), "{e}");
}

fn config_of(dir: &Path) -> ModelConfig {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let (path, text) = checkpoint.config();
    ModelConfig::parse(path, text).unwrap()
}

/// Random matrices for every projection that `config` targets.
fn matrices(model: &ModelConfig, config: &AdapterConfig) -> Vec<AdapterMatrices> {
    let linears = (0..model.num_layers).flat_map(|layer| model.linears(layer));
    let targeted = linears.filter(|(name, ..)| config.targets(name)).enumerate();
    targeted
        .map(|(i, (module, rows, cols))| {
            let rank = config.rank_of(&module);
            let scaled = |n: usize, seed: u32| values(n, seed).into_iter().map(|v| v * 0.05).collect();
            let (a, b) = (scaled(rank * cols, 2 * i as u32), scaled(rows * rank, 2 * i as u32 + 1));
            AdapterMatrices { module, rows, cols, a, b }
        })
        .collect()
}

const ALL: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

fn lora(rank: usize, alpha: f32, modules: &[&str]) -> AdapterConfig {
    AdapterConfig::new(rank, alpha, modules.iter().map(|m| (*m).to_owned()).collect())
}

fn random_adapter(model: &str, config: &AdapterConfig) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_adapter(dir.path(), config, matrices(&config_of(&fixture(model)), config)).unwrap();
    dir
}

fn load(model: &Path, adapter: Option<&Path>, cpu: CpuOptions) -> Result<LoadedDecoder, Error> {
    let options = LoadOptions::new(&CPU).threads(cpu.threads).kernel(cpu.kernel);
    LoadedDecoder::load(model.to_str().unwrap(), &options.adapter(adapter.map(Path::to_owned)))
}

fn ids(seed: u32, n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 23 + seed * 7) % 380).collect()
}

/// Logits after each of a prompt's tokens, given in pieces.
fn logits(loaded: &LoadedDecoder, ids: &[u32], chunk: usize) -> Vec<Vec<f32>> {
    let cache = loaded.decoder.kv_cache(DenseType::F32, 1).unwrap();
    let rows = ids.chunks(chunk).enumerate().flat_map(|(i, tokens)| {
        let piece = Sequence { slot: 0, position: i * chunk, tokens };
        loaded.decoder.forward(&[piece], &cache, Logits::All).unwrap().to_vec2::<f32>().unwrap()
    });
    rows.collect()
}

#[test]
fn logits_are_the_same_bits_however_they_are_computed() {
    for name in FIXTURES {
        let adapter = random_adapter(name, &lora(6, 9.0, &ALL));
        let dir = fixture(name);
        let open = |kernel, threads| load(&dir, Some(adapter.path()), CpuOptions { kernel, threads }).unwrap();
        let first = open(None, Some(1));
        let want = logits(&first, &ids(1, 21), 21);
        let plain = logits(&load(&dir, None, CpuOptions::default()).unwrap(), &ids(1, 21), 21);
        assert_ne!(want, plain, "{name}: the adapter has an effect");
        for chunk in [1, 2, 8] {
            assert_eq!(logits(&first, &ids(1, 21), chunk), want, "{name}, pieces of {chunk}");
        }
        for kernel in KernelKind::available() {
            for threads in [1, 2, 3] {
                let loaded = open(Some(kernel), Some(threads));
                assert_eq!(logits(&loaded, &ids(1, 21), 21), want, "{name}, {kernel}, {threads} threads");
            }
        }
        // In a batch with other sequences of other lengths.
        let (one, two, three) = (ids(1, 21), ids(2, 5), ids(3, 9));
        let cache = first.decoder.kv_cache(DenseType::F32, 3).unwrap();
        let batch = [(1, &two), (0, &one), (2, &three)];
        let batch = batch.map(|(slot, tokens)| Sequence { slot, position: 0, tokens });
        let rows = first.decoder.forward(&batch, &cache, Logits::All).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(rows[5..26], want, "{name}, in a batch");
    }
}

#[test]
fn zero_b_changes_no_bit_and_every_projection_has_its_place() {
    for name in FIXTURES {
        let (dir, model) = (fixture(name), config_of(&fixture(name)));
        let plain = logits(&load(&dir, None, CpuOptions::default()).unwrap(), &ids(0, 12), 12);
        let config = lora(4, 8.0, &ALL);
        let adapter = tempfile::tempdir().unwrap();
        let mut zero = matrices(&model, &config);
        zero.iter_mut().for_each(|m| m.b.fill(0.0));
        write_adapter(adapter.path(), &config, zero.clone()).unwrap();
        let loaded = load(&dir, Some(adapter.path()), CpuOptions::default()).unwrap();
        let bits = |rows: &[Vec<f32>]| rows.iter().flatten().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&logits(&loaded, &ids(0, 12), 12)), bits(&plain), "{name}");
        // What is reported, and what a token reads.
        let report = loaded.report();
        let about = report.adapter.clone().unwrap();
        assert_eq!((about.rank, about.alpha, about.modules), (4, 8.0, 7 * model.num_layers));
        assert_eq!(about.parameters, zero.iter().map(|m| (m.a.len() + m.b.len()) as u64).sum::<u64>());
        // B's rows are padded to whole blocks.
        let bytes = report.footprint.adapter as u64;
        assert!((4 * about.parameters..5 * about.parameters).contains(&bytes), "{bytes}");
        assert!(report.to_string().contains("r 4, alpha 8"), "{report}");
        let plain_loaded = load(&dir, None, CpuOptions::default()).unwrap();
        assert_eq!(report.bytes_per_token(), plain_loaded.report().bytes_per_token() + report.footprint.adapter);
        let sum = |l: &LoadedDecoder| l.decoder.host_weights().iter().map(|b| b.len()).sum::<usize>();
        assert_eq!(sum(&loaded), sum(&plain_loaded) + report.footprint.adapter);
        // Each projection alone has an effect, and another one.
        let mut seen = vec![plain];
        for which in Projection::ALL {
            let alone = lora(4, 40.0, &[&model.projection_name(model.num_layers - 1, which)]);
            let adapter = random_adapter(name, &alone);
            let rows = logits(&load(&dir, Some(adapter.path()), CpuOptions::default()).unwrap(), &ids(0, 12), 12);
            assert!(!seen.contains(&rows), "{name}, {which:?}");
            seen.push(rows);
        }
    }
}

/// A fixture's model with all projections dense f32, `update` added to each.
fn dense_model(name: &str, update: impl Fn(&str, usize, usize) -> Vec<f64>) -> TempDir {
    let source = Checkpoint::open(&fixture(name)).unwrap();
    let model = config_of(&fixture(name));
    let mut config: Value = serde_json::from_str(source.config().1).unwrap();
    config["quantization_config"]["modules_to_not_convert"] = json!([".*proj"]);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let mut entries: Vec<Entry> = Vec::new();
    for info in source.tensors().filter(|t| !t.name.contains("_proj.")) {
        let bytes = source.tensor(&info.name).unwrap().bytes().to_vec();
        entries.push(Entry::from_bytes(&info.name, info.dtype, info.shape.clone(), bytes));
    }
    for (i, (name, rows, cols)) in (0..model.num_layers).flat_map(|l| model.linears(l)).enumerate() {
        let weight = values(rows * cols, 1000 + i as u32).into_iter().map(|v| f64::from(v * 0.08));
        let sum = weight.zip(update(&name, rows, cols)).map(|(w, u)| (w + u) as f32);
        let bytes = sum.flat_map(f32::to_le_bytes).collect();
        entries.push(Entry::from_bytes(format!("{name}.weight"), StoredType::F32, [rows, cols], bytes));
    }
    write_file(&dir.path().join("model.safetensors"), entries, &mut |_| ()).unwrap();
    dir
}

#[test]
fn beside_dense_weights_it_equals_weights_that_it_was_merged_into() {
    let text = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": "all-linear",
        "rank_pattern": {"self_attn.v_proj": 7, "layers\\.1\\.mlp\\.(gate|up)_proj": 2},
        "alpha_pattern": {"down_proj": 1.5}, "use_rslora": RSLORA}"#;
    for (name, rslora) in [("a1_packed", "false"), ("a3_llama", "true")] {
        let config = AdapterConfig::parse(Path::new("c.json"), &text.replace("RSLORA", rslora)).unwrap();
        let model = config_of(&fixture(name));
        let all = matrices(&model, &config);
        assert_eq!(all.len(), 7 * model.num_layers);
        let ranks: Vec<usize> = all[7..14].iter().map(|m| m.a.len() / m.cols).collect();
        assert_eq!(ranks, [4, 4, 7, 4, 2, 2, 4]);
        let merged = dense_model(name, |module, rows, cols| {
            let m = all.iter().find(|m| m.module == module).unwrap();
            let rank = m.a.len() / cols;
            let alpha = if module.ends_with("down_proj") { 1.5 } else { 6.0 };
            let scaling = alpha / if rslora == "true" { (rank as f64).sqrt() } else { rank as f64 };
            let at = |r: usize, c: usize, j: usize| f64::from(m.b[r * rank + j]) * f64::from(m.a[j * cols + c]);
            let entry = |i: usize| scaling * (0..rank).map(|j| at(i / cols, i % cols, j)).sum::<f64>();
            (0..rows * cols).map(entry).collect()
        });
        let base = dense_model(name, |_, rows, cols| vec![0.0; rows * cols]);
        let adapter = tempfile::tempdir().unwrap();
        write_adapter(adapter.path(), &config, all.clone()).unwrap();
        let run = |dir: &Path, adapter| {
            let loaded = load(dir, adapter, CpuOptions::default()).unwrap();
            logits(&loaded, &ids(4, 16), 16).concat()
        };
        let want: Vec<f64> = run(merged.path(), None).into_iter().map(f64::from).collect();
        let plain = run(base.path(), None);
        let far = plain.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(far > 0.1, "{name}: the adapter moves logits by {far}");
        close(&run(base.path(), Some(adapter.path())), &want, 1e-4);
    }
}

#[test]
fn what_is_written_is_read_back_and_peft_would_read_it() {
    let model = config_of(&fixture("a1_packed"));
    let mut config = lora(3, 4.5, &["q_proj", "model.layers.1.mlp.down_proj"]);
    (config.dropout, config.base_model, config.use_rslora) = (0.1, Some("owner/name".into()), true);
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("new/adapter");
    let written = matrices(&model, &config);
    write_adapter(&dir, &config, written.clone()).unwrap();
    let adapter = Adapter::open(&dir).unwrap();
    assert_eq!(*adapter.config(), config);
    assert_eq!(adapter.modules().len(), written.len());
    for m in &written {
        let module = adapter.module(&m.module).unwrap();
        assert_eq!(module.matrices().unwrap(), (m.a.clone(), m.b.clone()));
        assert_eq!((module.rank(), module.scaling), (3, (4.5 / 3f64.sqrt()) as f32));
    }
    let text = std::fs::read_to_string(dir.join(CONFIG_FILE)).unwrap();
    let saved: Value = serde_json::from_str(&text).unwrap();
    for (key, value) in [
        ("peft_type", json!("LORA")),
        ("task_type", json!("CAUSAL_LM")),
        ("r", json!(3)),
        ("lora_alpha", json!(4.5)),
        ("lora_dropout", json!(0.1)),
        ("bias", json!("none")),
        ("target_modules", json!(["q_proj", "model.layers.1.mlp.down_proj"])),
    ] {
        assert_eq!(saved[key], value, "{key}");
    }
    let tensors = candle_core::safetensors::load(dir.join(WEIGHTS_FILE), &CPU).unwrap();
    let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    assert_eq!(tensors[name].dims(), [3, model.hidden_size]);
    assert_eq!(tensors[&name.replace("_A", "_B")].dims(), [model.q_size(), 3]);
    // Replaced by another adapter; nothing else is left in the directory.
    let other = lora(2, 2.0, &["o_proj"]);
    write_adapter(&dir, &other, matrices(&model, &other)).unwrap();
    assert_eq!(*Adapter::open(&dir).unwrap().config(), other);
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 2);
    // What could not be read back is not written, and what was there stays.
    let good = matrices(&model, &other);
    let with = |change: &dyn Fn(&mut AdapterMatrices)| {
        let mut all = good.clone();
        change(&mut all[0]);
        write_adapter(&dir, &other, all).unwrap_err().to_string()
    };
    for (error, words) in [
        (with(&|m| m.module = "model.layers.0.mlp.up_proj".into()), "does not target"),
        (with(&|m| m.a[5] = f32::NAN), "lora_A.weight: value 5 is NaN"),
        (with(&|m| m.b.truncate(7)), "lora_B.weight: 7 values"),
        (with(&|m| m.module = good[1].module.clone()), "given twice"),
        (write_adapter(&dir, &lora(0, 1.0, &["q_proj"]), Vec::new()).unwrap_err().to_string(), "r: 0 where"),
        (write_adapter(&dir, &other, Vec::new()).unwrap_err().to_string(), "0 tensors"),
    ] {
        assert!(error.contains(words), "no {words:?} in {error}");
    }
    assert_eq!(*Adapter::open(&dir).unwrap().config(), other);
}

#[test]
fn half_precision_matrices_give_what_their_values_give_in_f32() {
    let (name, config) = ("a1_packed", lora(4, 4.0, &ALL));
    let model = config_of(&fixture(name));
    for (stored, size) in [(StoredType::BF16, 8), (StoredType::F16, 11)] {
        let mut all = matrices(&model, &config);
        let round = |v: &mut f32| match size {
            8 => *v = half::bf16::from_f32(*v).to_f32(),
            _ => *v = half::f16::from_f32(*v).to_f32(),
        };
        all.iter_mut().for_each(|m| m.a.iter_mut().chain(&mut m.b).for_each(round));
        let wide = tempfile::tempdir().unwrap();
        write_adapter(wide.path(), &config, all.clone()).unwrap();
        let narrow = tempfile::tempdir().unwrap();
        let bytes = |values: &[f32]| -> Vec<u8> {
            let half = |v: &f32| match size {
                8 => half::bf16::from_f32(*v).to_le_bytes(),
                _ => half::f16::from_f32(*v).to_le_bytes(),
            };
            values.iter().flat_map(half).collect()
        };
        let entries = all.iter().flat_map(|m| {
            let [a, b] = tensor_names(&m.module);
            let [a_shape, b_shape] = [[4, m.cols], [m.rows, 4]];
            [Entry::from_bytes(a, stored, a_shape, bytes(&m.a)), Entry::from_bytes(b, stored, b_shape, bytes(&m.b))]
        });
        write_file(&narrow.path().join(WEIGHTS_FILE), entries.collect(), &mut |_| ()).unwrap();
        std::fs::write(narrow.path().join(CONFIG_FILE), config.to_json()).unwrap();
        let run = |dir: &TempDir| {
            logits(&load(&fixture(name), Some(dir.path()), CpuOptions::default()).unwrap(), &ids(0, 9), 9)
        };
        assert_eq!(run(&narrow), run(&wide), "{stored}");
    }
}

/// As peft 0.21 saves it, every key.
const SAVED: &str = r#"{
  "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
  "base_model_name_or_path": "microsoft/bitnet-b1.58-2B-4T-bf16", "bias": "none", "corda_config": null,
  "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false,
  "inference_mode": true, "init_lora_weights": true, "kasa_config": null, "layer_replication": null,
  "layers_pattern": null, "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 32, "lora_bias": false,
  "lora_dropout": 0.05, "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core",
  "modules_to_save": null, "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.2",
  "qalora_group_size": 16, "r": 16, "rank_pattern": {}, "revision": null, "target_modules": ["q_proj", "v_proj"],
  "target_parameters": null, "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_bdlora": null,
  "use_dora": false, "use_qalora": false, "use_rslora": false, "velora_config": null}"#;

fn parse(text: &str) -> Result<AdapterConfig, Error> {
    AdapterConfig::parse(Path::new("adapter_config.json"), text)
}

/// `SAVED` with some keys replaced.
fn saved(keys: Value) -> String {
    let mut config: Value = serde_json::from_str(SAVED).unwrap();
    config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    config.to_string()
}

const Q1: &str = "model.layers.1.self_attn.q_proj";
const UP: &str = "model.layers.12.mlp.up_proj";

#[test]
fn configurations_mean_what_they_mean_to_peft() {
    let config = parse(SAVED).unwrap();
    assert_eq!((config.rank, config.alpha, config.dropout, config.use_rslora), (16, 32.0, 0.05, false));
    assert_eq!((config.rank_of(Q1), config.scaling_of(Q1)), (16, 2.0));
    // (keys, is q_proj of layer 1 targeted, is up_proj of layer 12)
    for (keys, q, up) in [
        (json!({}), true, false),
        (json!({"target_modules": "all-linear"}), true, true),
        (json!({"target_modules": "ALL-LINEAR", "exclude_modules": ["up_proj"]}), true, false),
        (json!({"target_modules": "all-linear", "exclude_modules": ".*self_attn.*"}), false, true),
        (json!({"target_modules": r".*\.(q|up)_proj"}), true, true),
        (json!({"target_modules": r".*layers\.\d{2}\..*"}), false, true),
        (json!({"target_modules": "q_proj"}), false, false),
        (json!({"target_modules": ["up_proj", "proj"]}), false, true),
        (json!({"target_modules": ["mlp.up_proj", Q1]}), true, true),
        (json!({"target_modules": ["up_proj", "q_proj"], "layers_to_transform": [0, 12]}), false, true),
        (
            json!({"target_modules": ["up_proj", "q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
            true,
            false,
        ),
        (json!({"target_modules": ["up_proj", "q_proj"], "layers_to_transform": []}), true, true),
    ] {
        let config = parse(&saved(keys.clone())).unwrap();
        assert_eq!((config.targets(Q1), config.targets(UP)), (q, up), "{keys}");
        assert_eq!(parse(&config.to_json()).unwrap(), config, "{keys}");
    }
    let patterns = json!({
        "rank_pattern": {"up_proj": 4, r"layers\.1\..*": 64, "q_proj": 8}, "alpha_pattern": {r"self_attn\..*": 2.5}, "use_rslora": true
    });
    let config = parse(&saved(patterns)).unwrap();
    assert_eq!((config.rank_of(Q1), config.rank_of(UP), config.rank_of("lm_head")), (64, 4, 16));
    assert_eq!((config.scaling_of(Q1), config.scaling_of(UP)), (0.3125, 16.0));
    assert_eq!(parse(&config.to_json()).unwrap(), config);
    for init in [json!(false), json!("gaussian"), json!("eva"), json!("orthogonal"), json!(null)] {
        parse(&saved(json!({"init_lora_weights": init}))).unwrap();
    }
}

#[test]
fn configurations_that_are_not_plain_lora_are_refused_by_key() {
    let cases = [
        (json!({"peft_type": "IA3"}), "peft_type: \"IA3\" is not LORA"),
        (json!({"peft_type": null}), "peft_type: missing"),
        (json!({"r": 0}), "r: 0 where a whole number from 1"),
        (json!({"r": -4}), "r: -4"),
        (json!({"r": 8.5}), "r: 8.5"),
        (json!({"r": "8"}), "r: \"8\""),
        (json!({"r": MAX_RANK + 1}), "r: 16385"),
        (json!({"r": null}), "r: missing"),
        (json!({"lora_alpha": null}), "lora_alpha: missing"),
        (json!({"lora_alpha": "big"}), "lora_alpha: \"big\""),
        (json!({"lora_alpha": 1e300}), "lora_alpha: "),
        (json!({"lora_dropout": 2}), "lora_dropout: 2 where a number from 0 to 1"),
        (json!({"target_modules": null}), "target_modules: missing"),
        (json!({"target_modules": []}), "target_modules: names no module"),
        (json!({"target_modules": ""}), "target_modules: names no module"),
        (json!({"target_modules": ["q_proj", 3]}), "target_modules: 3 where a module's name"),
        (json!({"target_modules": {"q": 1}}), "target_modules: an object"),
        (json!({"target_modules": "(?=q).*"}), "target_modules: \"(?=q).*\" is not supported"),
        (json!({"target_modules": "(q_proj"}), "target_modules: \"(q_proj\""),
        (json!({"exclude_modules": "["}), "exclude_modules: \"[\""),
        (json!({"use_rslora": 1}), "use_rslora: 1 where true or false"),
        (json!({"use_dora": true}), "use_dora: true: DoRA is not supported"),
        (json!({"bias": "all"}), "bias: \"all\" where \"none\""),
        (json!({"fan_in_fan_out": true}), "fan_in_fan_out: true: weights that are stored transposed"),
        (json!({"modules_to_save": ["lm_head"]}), "modules_to_save: [\"lm_head\"]: weights that the adapter replaces"),
        (json!({"trainable_token_indices": [1]}), "trainable_token_indices: [1]"),
        (json!({"init_lora_weights": "pissa"}), "init_lora_weights: \"pissa\" may have changed the base's weights"),
        (json!({"init_lora_weights": "olora"}), "init_lora_weights"),
        (json!({"lora_bias": true}), "lora_bias: true: only plain LoRA"),
        (json!({"layer_replication": [[0, 4], [2, 5]]}), "layer_replication"),
        (json!({"target_parameters": ["mlp.experts"]}), "target_parameters"),
        (json!({"alora_invocation_tokens": [5]}), "alora_invocation_tokens"),
        (json!({"use_something_new": {"x": 1}}), "use_something_new: an object: only plain LoRA"),
        (json!({"layers_to_transform": [-1]}), "layers_to_transform: -1"),
        (json!({"layers_to_transform": ["a"]}), "layers_to_transform: \"a\""),
        (json!({"layers_to_transform": [1], "layers_pattern": "h"}), "layers_pattern: \"h\" where \"layers\""),
        (json!({"layers_to_transform": [1], "target_modules": "all-linear"}), "layers_to_transform: needs a list"),
        (json!({"rank_pattern": [1]}), "rank_pattern: [1] where an object"),
        (json!({"rank_pattern": {"q_proj": 0}}), "rank_pattern: 0 where"),
        (json!({"rank_pattern": {"(": 2}}), "rank_pattern: \"(\""),
        (json!({"alpha_pattern": {"q_proj": []}}), "alpha_pattern: [] where"),
        (json!({"base_model_name_or_path": 5}), "base_model_name_or_path: 5"),
    ];
    for (keys, words) in cases {
        let error = parse(&saved(keys.clone())).unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{keys}: {error:?}");
        assert!(error.to_string().contains(words), "no {words:?} in {error}");
    }
    let many: serde_json::Map<_, _> = (0..65).map(|i| (format!("layers.{i}.(q|v)_proj"), json!(2))).collect();
    assert!(parse(&saved(json!({"rank_pattern": many}))).unwrap_err().to_string().contains("more than 64"));
    for (text, words) in [
        ("", "EOF"),
        ("[]", "an object"),
        ("{\"r\": 1, \"r\": 2}", "\"r\" is given twice"),
        ("{\"x\": {\"y\": 1, \"y\": 2}}", "given twice"),
        ("{\"peft_type\": \"LORA\"} x", "trailing"),
        (&format!("{{\"x\": [{}0]}}", "0,".repeat(9000)), "more than 8192 values"),
        (&"[".repeat(100_000), "invalid type"),
    ] {
        let error = parse(text).unwrap_err();
        assert!(matches!(error, Error::File { .. }) && error.to_string().contains(words), "no {words:?} in {error}");
    }
}

/// A safetensors file of f32 zeros, from literal names and shapes.
fn file(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        header.insert((*name).into(), json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + end, 0);
    bytes
}

#[test]
fn hostile_weights_are_refused_by_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let q = "base_model.model.model.layers.0.self_attn.q_proj";
    let [a, b] = [format!("{q}.lora_A.weight"), format!("{q}.lora_B.weight")];
    let (a, b) = (a.as_str(), b.as_str());
    let text = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}"#;
    std::fs::write(dir.join(CONFIG_FILE), text).unwrap();
    let open = |bytes: &[u8]| {
        std::fs::write(dir.join(WEIGHTS_FILE), bytes).unwrap();
        Adapter::open(dir)
    };
    open(&file(&[(a, &[2, 8]), (b, &[6, 2])])).unwrap();
    let k = b.replace("q_proj", "k_proj");
    let [k_a, dora, bias] = [k.replace("_B", "_A"), format!("{q}.lora_magnitude_vector"), format!("{q}.lora_B.bias")];
    type Case<'a> = (&'a [(&'a str, &'a [usize])], &'a str, &'a str);
    let cases: &[Case] = &[
        (&[(a, &[2, 8])], a, "without its partner"),
        (&[(b, &[6, 2])], b, "without its partner"),
        (&[(a, &[2, 8]), (&k, &[6, 2])], &k, "without its partner"),
        (&[(a, &[3, 8]), (b, &[6, 3])], a, "shape [3, 8] where [2, inputs]"),
        (&[(a, &[2, 8]), (b, &[6, 3])], b, "shape [6, 3] where [outputs, 2]"),
        (&[(a, &[16]), (b, &[6, 2])], a, "shape [16]"),
        (&[(a, &[2, 0]), (b, &[6, 2])], a, "shape [2, 0]"),
        (&[(a, &[2, 8]), (b, &[6, 2]), (&k, &[6, 2]), (&k_a, &[2, 8])], &k_a, "does not target"),
        (&[(a, &[2, 8]), (b, &[6, 2]), (&dora, &[6])], &dora, "DoRA"),
        (&[(a, &[2, 8]), (b, &[6, 2]), (&bias, &[6])], &bias, "biases are not supported"),
        (&[("model.layers.0.self_attn.q_proj.weight", &[6, 8])], "model.layers.0", "would run without it"),
        (&[("base_model.model..lora_A.weight", &[2, 8])], "base_model.model..lora_A.weight", "not base_model"),
        (&[("base_model.model.model.embed_tokens.lora_embedding_A", &[2, 8])], "embed_tokens", "embeddings"),
    ];
    for (tensors, name, words) in cases {
        let error = open(&file(tensors)).unwrap_err();
        assert!(matches!(&error, Error::Tensor { tensor, .. } if tensor.contains(name)), "{words}: {error:?}");
        assert!(error.to_string().contains(words), "no {words:?} in {error}");
    }
    let whole = file(&[(a, &[2, 8]), (b, &[6, 2])]);
    for bytes in [&whole[..whole.len() - 4], &whole[..40], b"", b"version https://git-lfs.github.com/spec/v1\n"] {
        let error = open(bytes).unwrap_err().to_string();
        assert!(error.contains(WEIGHTS_FILE), "{error}");
    }
    let mut bytes = whole.clone();
    let at = bytes.windows(3).position(|w| w == b"F32").unwrap();
    bytes[at] = b'I';
    assert!(open(&bytes).unwrap_err().to_string().contains("I32 where F32, F16 or BF16"));
    assert!(open(&file(&[])).unwrap_err().to_string().contains("holds no tensors"));
    // Not finite is seen when the values are read.
    let mut bytes = whole.clone();
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let error = open(&bytes).unwrap().modules()[0].matrices().unwrap_err();
    assert!(error.to_string().contains("value 11 is inf"), "{error}");
    // Files that are not there.
    std::fs::rename(dir.join(WEIGHTS_FILE), dir.join("adapter_model.bin")).unwrap();
    assert!(Adapter::open(dir).unwrap_err().to_string().contains("adapter_model.bin is a pickle"));
    std::fs::remove_file(dir.join("adapter_model.bin")).unwrap();
    assert!(Adapter::open(dir).unwrap_err().to_string().contains("adapter_model.safetensors: not found"));
    let error = Adapter::open(&dir.join(CONFIG_FILE)).unwrap_err().to_string();
    assert!(error.contains("not a directory; a LoRA adapter is"), "{error}");
    std::fs::remove_file(dir.join(CONFIG_FILE)).unwrap();
    assert!(Adapter::open(dir).unwrap_err().to_string().contains("adapter_config.json: not found"));
    assert!(Adapter::open(&dir.join("gone")).unwrap_err().to_string().contains("no such directory"));
}

#[test]
fn an_adapter_of_another_base_is_refused_by_tensor() {
    let model = config_of(&fixture("a1_packed"));
    let config = lora(2, 2.0, &["q_proj", "down_proj"]);
    let all = matrices(&model, &config);
    let run = |config: &AdapterConfig, all: Vec<AdapterMatrices>| {
        let dir = tempfile::tempdir().unwrap();
        write_adapter(dir.path(), config, all).unwrap();
        load(&fixture("a1_packed"), Some(dir.path()), CpuOptions::default()).map(drop)
    };
    run(&config, all.clone()).unwrap();
    let mut wide = all.clone();
    wide[0] = AdapterMatrices { cols: 2 * all[0].cols, a: vec![0.5; 4 * all[0].cols], ..all[0].clone() };
    let mut tall = all.clone();
    tall[1] = AdapterMatrices { rows: all[1].rows + 1, b: vec![0.5; 2 * all[1].rows + 2], ..all[1].clone() };
    let mut deep = all.clone();
    deep.push(AdapterMatrices { module: "model.layers.99.self_attn.q_proj".into(), ..all[0].clone() });
    let other = lora(2, 2.0, &["q_proj", "down_proj", "lm_head"]);
    let mut head = all.clone();
    head.push(AdapterMatrices { module: "lm_head".into(), ..all[0].clone() });
    for (config, all, words) in [
        (&config, wide, ["layers.0.self_attn.q_proj.lora_A.weight", "it adapts another base"]),
        (&config, tall, ["layers.0.mlp.down_proj.lora_B.weight", "it adapts another base"]),
        (&config, deep, ["layers.99.self_attn.q_proj.lora_A.weight", "no projection of this model"]),
        (&other, head, ["lm_head.lora_A.weight", "no projection of this model"]),
        (&config, all[1..].to_vec(), ["layers.0.self_attn.q_proj.lora_A.weight", "missing, although target_modules"]),
    ] {
        let error = run(config, all).unwrap_err();
        assert!(matches!(error, Error::Tensor { .. }), "{error:?}");
        words.iter().for_each(|w| assert!(error.to_string().contains(w), "no {w:?} in {error}"));
    }
    let options = LoadOptions::new(&CPU).adapter(Some("anything".into()));
    let error = LoadedDecoder::synthetic("0.7b", &options).unwrap_err();
    assert!(matches!(&error, Error::Request { what, .. } if what == "--adapter"), "{error:?}");
}
