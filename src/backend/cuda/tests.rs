//! Every operation on a device against naive references. The device is a GPU or, where there is none, the emulator
//! (`kernels/emulator/with_driver.sh`); without either the tests say so and pass.

use super::*;
use crate::Error;
use crate::backend::attention::{AttentionShape, RopeTable, RowPosition};
use crate::backend::cpu::Gate;
use crate::backend::gpu::{MarkUpdate, SampleSettings};
use crate::backend::{Arrangement, DenseType};
use crate::ternary::{PackedTernary, Scale, round_half_even};
use candle_core::Device;

fn device() -> Option<Cuda> {
    if count() == 0 {
        eprintln!("there is no CUDA device here, nothing was run");
        return None;
    }
    let Device::Cuda(device) = open(0).unwrap() else { panic!("not a CUDA device") };
    Some(Cuda::new(&device).unwrap())
}

/// Numbers between -1 and 1, other ones for each seed.
fn values(n: usize, seed: u64) -> Vec<f32> {
    let value = |i: usize| ((i as u64 + 1).wrapping_mul(2 * seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32;
    (0..n).map(|i| value(i) / 8_388_608.0 - 1.0).collect()
}

fn close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let size = want.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * size, "{what}: element {i} is {g}, not {w} (of up to {size})");
    }
}

fn normed(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let cols = weight.len();
    let row = |x: &[f32]| {
        let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / cols as f64;
        let r = 1.0 / (mean + f64::from(eps)).sqrt();
        x.iter().zip(weight).map(|(x, w)| (f64::from(*x) * f64::from(*w) * r) as f32).collect::<Vec<_>>()
    };
    x.chunks_exact(cols).flat_map(row).collect()
}

fn gate(kind: Gate, g: f32, up: f32) -> f32 {
    match kind {
        Gate::Relu2 => g.max(0.0).powi(2) * up,
        Gate::Silu => g / (1.0 + (-g).exp()) * up,
    }
}

fn ternary(rows: usize, cols: usize, seed: u64) -> PackedTernary {
    let weights: Vec<i8> = values(rows * cols, seed).iter().map(|v| (v * 1.5).round() as i8).collect();
    let scale =
        if seed.is_multiple_of(2) { Scale::Multiply(0.5 + seed as f32) } else { Scale::Divide(0.5 + seed as f32) };
    PackedTernary::from_weights(rows, cols, &weights, scale).unwrap()
}

/// Quantised rows times a weight.
fn product(x: &[f32], w: &PackedTernary) -> Vec<f32> {
    let mut out = Vec::new();
    for x in x.chunks_exact(w.cols()) {
        let s_x = 127.0 / x.iter().fold(1e-5f32, |m, v| m.max(v.abs()));
        let q: Vec<i32> = x.iter().map(|v| round_half_even(v * s_x) as i32).collect();
        for row in 0..w.rows() {
            let sum: i32 = q.iter().enumerate().map(|(k, q)| q * i32::from(w.weight(row, k))).sum();
            out.push((f64::from(sum) * w.scale().factor(s_x)) as f32);
        }
    }
    out
}

#[test]
fn a_device_that_is_not_there() {
    let message = open(count()).unwrap_err().to_string();
    assert!(message.contains("GPU") || message.contains("CUDA"), "{message}");
    assert!(message.contains("--device cpu"), "{message}");
}

#[test]
fn quantised_products() {
    let Some(cuda) = device() else { return };
    assert!(cuda.memory().unwrap().0 > 0);
    for (case, (rows, cols)) in
        [(vec![5usize], 7usize), (vec![16, 8, 8], 256), (vec![20, 3], 301), (vec![1, 2, 3, 4], 520)].iter().enumerate()
    {
        let weights: Vec<_> = rows.iter().enumerate().map(|(i, r)| ternary(*r, *cols, (case + i) as u64)).collect();
        let packed = cuda.pack(&weights, Arrangement::Stacked).unwrap();
        let n: usize = rows.iter().sum();
        assert_eq!((packed.rows(), packed.cols(), packed.segments().len()), (n, *cols, rows.len()));
        assert_eq!(packed.bytes(), n.div_ceil(16) * cols.div_ceil(256) * 1024);
        for tokens in [1, 3, 8, 9, 70] {
            let x = values(tokens * cols, 7);
            let norm = values(*cols, 8);
            let (width, first) = (n + 5, 2);
            let before = values(tokens * width, 9);
            let input = cuda.upload(&x, "x").unwrap();
            let norm_in = cuda.upload(&norm, "norm").unwrap();
            for (with_norm, add) in [(false, false), (false, true), (true, false)] {
                let mut out = cuda.upload(&before, "out").unwrap();
                let view = norm_in.as_view();
                let given = with_norm.then_some((&view, 1e-5));
                cuda.norm_linear(&packed, &input.as_view(), given, &mut out.as_view_mut(), first, width, add).unwrap();
                let got = cuda.download(&out, "out").unwrap();
                let source = if with_norm { normed(&x, &norm, 1e-5) } else { x.clone() };
                let parts: Vec<_> = weights.iter().map(|w| product(&source, w)).collect();
                let mut want = before.clone();
                for t in 0..tokens {
                    let mut at = t * width + first;
                    for (part, rows) in parts.iter().zip(rows) {
                        for v in &part[t * rows..][..*rows] {
                            want[at] = if add { want[at] + v } else { *v };
                            at += 1;
                        }
                    }
                }
                // A norm rounded otherwise moves a code here and there.
                let tolerance = if with_norm { 0.02 } else { 1e-6 };
                close(
                    &got,
                    &want,
                    tolerance,
                    &format!("{rows:?} x {cols}, {tokens} tokens, add {add}, norm {with_norm}"),
                );
            }
        }
    }
}

#[test]
fn gated_products_and_activations() {
    let Some(cuda) = device() else { return };
    for (n, cols, tokens, kind) in [(8, 64, 1, Gate::Silu), (19, 300, 5, Gate::Relu2), (33, 128, 12, Gate::Silu)] {
        let pair = [ternary(n, cols, 3), ternary(n, cols, 4)];
        let packed = cuda.pack(&pair, Arrangement::GateUp).unwrap();
        let x = values(tokens * cols, 5);
        let input = cuda.upload(&x, "x").unwrap();
        let mut out = cuda.zeroed::<f32>(tokens * n, "out").unwrap();
        cuda.gated_linear(kind, &packed, &input.as_view(), None, &mut out.as_view_mut()).unwrap();
        let (g, up) = (product(&x, &pair[0]), product(&x, &pair[1]));
        let want: Vec<f32> = g.iter().zip(&up).map(|(g, u)| gate(kind, *g, *u)).collect();
        close(&cuda.download(&out, "out").unwrap(), &want, 1e-5, "gated product");

        let rows: Vec<f32> = (0..tokens).flat_map(|t| [&g[t * n..][..n], &up[t * n..][..n]].concat()).collect();
        let rows = cuda.upload(&rows, "gate and up").unwrap();
        cuda.gated(kind, &rows.as_view(), n, &mut out.as_view_mut()).unwrap();
        close(&cuda.download(&out, "out").unwrap(), &want, 1e-5, "gated activation");

        let weight = values(cols, 6);
        let weight_in = cuda.upload(&weight, "norm").unwrap();
        let mut out = cuda.zeroed::<f32>(tokens * cols, "out").unwrap();
        cuda.rms_norm(&input.as_view(), &weight_in.as_view(), 1e-6, &mut out.as_view_mut()).unwrap();
        close(&cuda.download(&out, "out").unwrap(), &normed(&x, &weight, 1e-6), 1e-6, "norm");
        assert!(cuda.norm_linear(&packed, &input.as_view(), None, &mut out.as_view_mut(), 0, 2 * n, false).is_err());
    }
}

fn dense(cuda: &Cuda, dtype: DenseType, rows: usize, cols: usize, seed: u64) -> (CudaDense, Vec<f32>) {
    let (mut bytes, mut wide) = (Vec::new(), vec![0.0; rows * cols]);
    for v in values(rows * cols, seed) {
        match dtype {
            DenseType::F32 => bytes.extend(v.to_le_bytes()),
            DenseType::F16 => bytes.extend(half::f16::from_f32(v).to_le_bytes()),
            DenseType::BF16 => bytes.extend(half::bf16::from_f32(v).to_le_bytes()),
        }
    }
    dtype.widen(&bytes, &mut wide);
    let matrix = CudaDense::filled(cuda, dtype, rows, cols, |to| to.copy_from_slice(&bytes)).unwrap();
    (matrix, wide)
}

fn matmul(x: &[f32], w: &[f32], cols: usize) -> Vec<f32> {
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>() as f32;
    x.chunks_exact(cols).flat_map(|x| w.chunks_exact(cols).map(move |w| dot(x, w))).collect()
}

#[test]
fn dense_products_embeddings_and_rows() {
    let Some(cuda) = device() else { return };
    for (dtype, rows, cols, tokens) in
        [(DenseType::F32, 9, 20, 3), (DenseType::BF16, 50, 264, 17), (DenseType::F16, 31, 8, 1)]
    {
        let (matrix, wide) = dense(&cuda, dtype, rows, cols, 2);
        let x = values(tokens * cols, 3);
        let input = cuda.upload(&x, "x").unwrap();
        let want = matmul(&x, &wide, cols);
        let mut out = cuda.zeroed::<f32>(tokens * rows, "out").unwrap();
        cuda.dense_linear(&matrix, &input.as_view(), &mut out.as_view_mut(), 0, rows, false).unwrap();
        close(&cuda.download(&out, "out").unwrap(), &want, 1e-5, "dense product");
        let width = rows + 3;
        let before = values(tokens * width, 4);
        let mut out = cuda.upload(&before, "out").unwrap();
        cuda.dense_linear(&matrix, &input.as_view(), &mut out.as_view_mut(), 1, width, true).unwrap();
        let mut sum = before;
        want.iter().enumerate().for_each(|(i, v)| sum[i / rows * width + 1 + i % rows] += v);
        close(&cuda.download(&out, "out").unwrap(), &sum, 1e-5, "dense product, added");

        let mut batch = CudaBatch::new(&cuda, tokens).unwrap();
        let ids: Vec<u32> = (0..tokens as u32).map(|i| i * 7 % rows as u32).collect();
        let at: Vec<_> = (0..tokens).map(|position| RowPosition { slot: 0, position }).collect();
        batch.set(&ids, &at).unwrap();
        let mut out = cuda.zeroed::<f32>(tokens * cols, "out").unwrap();
        cuda.embed(&matrix, &batch, &mut out.as_view_mut()).unwrap();
        let rows_of = |table: &[f32], ids: &[u32]| -> Vec<f32> {
            ids.iter().flat_map(|id| table[*id as usize * cols..][..cols].to_vec()).collect()
        };
        assert_eq!(cuda.download(&out, "out").unwrap(), rows_of(&wide, &ids));
        let chosen = [tokens as u32 - 1, 0];
        let mut out = cuda.zeroed::<f32>(2 * cols, "out").unwrap();
        cuda.select_rows(&input.as_view(), cols, &chosen, &mut out.as_view_mut()).unwrap();
        assert_eq!(cuda.download(&out, "out").unwrap(), rows_of(&x, &chosen));
        assert!(cuda.select_rows(&input.as_view(), cols, &[tokens as u32, 0], &mut out.as_view_mut()).is_err());
        batch.set(&[rows as u32], &at[..1]).unwrap();
        let message = cuda.embed(&matrix, &batch, &mut out.slice_mut(..cols)).unwrap_err().to_string();
        assert!(message.contains("vocabulary"), "{message}");
    }
}

#[test]
fn low_rank_updates() {
    let Some(cuda) = device() else { return };
    let (cols, tokens, stride) = (40, 11, 30);
    let x = values(tokens * cols, 1);
    let mut want = values(tokens * stride, 2);
    let input = cuda.upload(&x, "x").unwrap();
    let mut out = cuda.upload(&want, "out").unwrap();
    let mut updates = Vec::new();
    for (at, rank, rows, scaling) in [(2, 3, 10, 0.5f32), (12, 8, 18, 2.0)] {
        let (a, b) = (values(rank * cols, 3), values(rows * rank, 4));
        let inner = matmul(&x, &a, cols);
        let y = matmul(&inner, &b, rank);
        y.iter().enumerate().for_each(|(i, v)| want[i / rows * stride + at + i % rows] += scaling * v);
        let packed = CudaLowRank::pack(&cuda, rank, &a, &b, scaling).unwrap();
        assert_eq!((packed.rank(), packed.rows(), packed.cols()), (rank, rows, cols));
        updates.push((at, packed));
    }
    let updates: Vec<_> = updates.iter().map(|(at, w)| (*at, w)).collect();
    cuda.low_rank(&updates, &input.as_view(), stride, &mut out.as_view_mut()).unwrap();
    close(&cuda.download(&out, "out").unwrap(), &want, 1e-5, "low-rank updates");
    assert!(cuda.low_rank(&[updates[1], updates[0]], &input.as_view(), stride, &mut out.as_view_mut()).is_err());
}

/// Keys and values of one layer, and attention over them in f64.
struct Naive {
    heads: AttentionShape,
    dtype: DenseType,
    table: RopeTable,
    cache: std::collections::HashMap<(usize, usize), (Vec<f32>, Vec<f32>)>,
}

impl Naive {
    fn stored(&self, v: f32) -> f32 {
        match self.dtype {
            DenseType::F32 => v,
            DenseType::F16 => half::f16::from_f32(v).to_f32(),
            DenseType::BF16 => half::bf16::from_f32(v).to_f32(),
        }
    }

    fn attend(&mut self, qkv: &[f32], rows: &[RowPosition]) -> Vec<f32> {
        let AttentionShape { heads, kv_heads, head_dim: d } = self.heads;
        let rotated = |x: &[f32], position: usize| -> Vec<f32> {
            let (cos, sin) = self.table.at(position);
            let half = d / 2;
            let one = |(i, _): (usize, &f32)| {
                let (h, c) = (i / d * d, i % d);
                let (a, b) = (x[h + c % half], x[h + c % half + half]);
                if c < half { a * cos[c] - b * sin[c] } else { b * cos[c - half] + a * sin[c - half] }
            };
            x.iter().enumerate().map(one).collect()
        };
        let mut queries = Vec::new();
        for (x, row) in qkv.chunks_exact(self.heads.qkv_dim()).zip(rows) {
            let (q, kv) = x.split_at(heads * d);
            let (k, v) = kv.split_at(kv_heads * d);
            queries.push(rotated(q, row.position));
            let store = |v: &[f32]| v.iter().map(|v| self.stored(*v)).collect::<Vec<_>>();
            let entry = (store(&rotated(k, row.position)), store(v));
            self.cache.insert((row.slot, row.position), entry);
        }
        let mut out = Vec::new();
        for (q, row) in queries.iter().zip(rows) {
            for h in 0..heads {
                let at = h / (heads / kv_heads) * d;
                let past: Vec<_> = (0..=row.position).map(|p| &self.cache[&(row.slot, p)]).collect();
                let score = |k: &[f32]| {
                    let dot: f64 =
                        q[h * d..][..d].iter().zip(&k[at..]).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                    dot / (d as f64).sqrt()
                };
                let scores: Vec<f64> = past.iter().map(|(k, _)| score(k)).collect();
                let top = scores.iter().fold(f64::MIN, |m, s| m.max(*s));
                let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
                let total: f64 = weights.iter().sum();
                out.extend((0..d).map(|c| {
                    let sum: f64 = past.iter().zip(&weights).map(|((_, v), w)| w * f64::from(v[at + c])).sum();
                    (sum / total) as f32
                }));
            }
        }
        out
    }
}

#[test]
fn attention_over_prompts_and_steps() {
    let Some(cuda) = device() else { return };
    for (dtype, heads, kv_heads, head_dim) in [
        (DenseType::F32, 6, 1, 20),
        (DenseType::BF16, 4, 2, 64),
        (DenseType::F16, 2, 2, 64),
        (DenseType::BF16, 1, 1, 8),
    ] {
        let heads = AttentionShape::new(heads, kv_heads, head_dim).unwrap();
        let positions = 90;
        let table = || RopeTable::new(positions, head_dim, 10_000.0).unwrap();
        let rope = CudaRope::new(&cuda, &table()).unwrap();
        let mut kv = CudaKv::new(&cuda, dtype, heads, 3, positions).unwrap();
        let mut naive = Naive { heads, dtype, table: table(), cache: Default::default() };
        let mut batch = CudaBatch::new(&cuda, 128).unwrap();
        let run =
            |slot: usize, from: usize, n: usize| (from..from + n).map(move |position| RowPosition { slot, position });
        let steps: [Vec<RowPosition>; 5] = [
            run(2, 0, 70).chain(run(0, 0, 5)).collect(),
            run(2, 70, 1).chain(run(0, 5, 1)).collect(),
            run(0, 6, 40).chain(run(1, 0, 1)).collect(),
            run(0, 46, 1).chain(run(1, 1, 1)).chain(run(2, 71, 1)).collect(),
            run(2, 72, 1).collect(),
        ];
        for (step, rows) in steps.iter().enumerate() {
            batch.set(&vec![0; rows.len()], rows).unwrap();
            assert_eq!(batch.decode(), [false, true, false, true, true][step]);
            let qkv: Vec<f32> = values(rows.len() * heads.qkv_dim(), step as u64).iter().map(|v| v * 3.0).collect();
            let input = cuda.upload(&qkv, "qkv").unwrap();
            let mut out = cuda.zeroed::<f32>(rows.len() * heads.heads * head_dim, "out").unwrap();
            cuda.attention(heads, &input.as_view(), &batch, &rope, &mut kv, &mut out.as_view_mut()).unwrap();
            let want = naive.attend(&qkv, rows);
            // A rotation rounded otherwise moves a stored key by a unit of its type.
            let tolerance = if dtype == DenseType::F32 { 1e-5 } else { 2e-3 };
            close(&cuda.download(&out, "out").unwrap(), &want, tolerance, &format!("{dtype} {heads:?} step {step}"));
        }
        batch.set(&[0], &[RowPosition { slot: 0, position: positions }]).unwrap();
        let input = cuda.zeroed::<f32>(heads.qkv_dim(), "qkv").unwrap();
        let mut out = cuda.zeroed::<f32>(heads.heads * head_dim, "out").unwrap();
        let full = cuda.attention(heads, &input.as_view(), &batch, &rope, &mut kv, &mut out.as_view_mut());
        assert!(matches!(full, Err(Error::ContextFull { needed: 91, available: 90 })));
    }
}

#[test]
fn choosing_tokens() {
    let Some(cuda) = device() else { return };
    let vocab = 1000;
    let mut logits = values(3 * vocab, 4);
    logits[17] = 3.0;
    logits[18] = 3.0;
    logits[vocab + 999] = 5.0;
    logits[2 * vocab + 4] = f32::NAN;
    let memory = cuda.upload(&logits, "logits").unwrap();
    let mut sampler = CudaSampler::new(&cuda, 3, vocab).unwrap();
    for _ in 0..2 {
        sampler.draw(&cuda, &memory.as_view()).unwrap();
        assert_eq!(sampler.ids(&cuda).unwrap(), [17, 999, -1]);
    }
    let warm = SampleSettings { temperature: 1.0, top_k: 2, seed: 5, ..SampleSettings::default() };
    let mut drawn = std::collections::BTreeSet::new();
    for draw in 0..12 {
        let two = [SampleSettings { draw, ..warm }, SampleSettings { draw, top_p: 0.001, ..warm }];
        sampler.set(&cuda, &two).unwrap();
        assert!(!sampler.is_argmax());
        sampler.draw(&cuda, &memory.slice(..2 * vocab)).unwrap();
        let ids = sampler.ids(&cuda).unwrap();
        assert_eq!(ids[1], 999);
        drawn.insert(ids[0]);
    }
    assert_eq!(drawn.into_iter().collect::<Vec<_>>(), [17, 18], "equal logits are both drawn");
    // Penalties: the best two of row 0 have been in the answer, once and twice.
    let penalties = SampleSettings { presence: 1.0, frequency: 0.5, slot: 2, ..SampleSettings::default() };
    let mark = |token, times: u32| MarkUpdate { slot: 2, token, mark: 1 << 31 | times };
    sampler.mark(&cuda, &[mark(17, 2), mark(18, 1), MarkUpdate { slot: -1, token: 9999, mark: 1 }]).unwrap();
    sampler.set(&cuda, &[penalties]).unwrap();
    sampler.draw(&cuda, &memory.slice(..vocab)).unwrap();
    assert_eq!(sampler.ids(&cuda).unwrap(), [18]);
    sampler.clear_marks(&cuda, 2).unwrap();
    sampler.draw(&cuda, &memory.slice(..vocab)).unwrap();
    assert_eq!(sampler.ids(&cuda).unwrap(), [17]);
    assert!(sampler.mark(&cuda, &[mark(1000, 1)]).is_err());
    assert!(sampler.set(&cuda, &[SampleSettings { slot: 3, ..penalties }]).is_err());
    assert!(sampler.draw(&cuda, &memory.as_view()).is_err(), "three rows of logits for one of settings");
}

/// One layer's worth of a decode step.
struct Step {
    weight: CudaTernary,
    rope: CudaRope,
    kv: CudaKv,
    batch: CudaBatch,
    embedding: CudaDense,
    x: CudaSlice<f32>,
    qkv: CudaSlice<f32>,
    context: CudaSlice<f32>,
}

impl Step {
    const HEADS: AttentionShape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 32 };

    fn new(cuda: &Cuda) -> Self {
        let (hidden, d) = (64, Self::HEADS.qkv_dim());
        Self {
            weight: cuda.pack(&[ternary(d, hidden, 3)], Arrangement::Stacked).unwrap(),
            rope: CudaRope::new(cuda, &RopeTable::new(600, 32, 1e4).unwrap()).unwrap(),
            kv: CudaKv::new(cuda, DenseType::F16, Self::HEADS, 2, 600).unwrap(),
            batch: CudaBatch::new(cuda, 16).unwrap(),
            embedding: dense(cuda, DenseType::BF16, 100, hidden, 1).0,
            x: cuda.zeroed(2 * hidden, "x").unwrap(),
            qkv: cuda.zeroed(2 * d, "qkv").unwrap(),
            context: cuda.zeroed(2 * 64, "context").unwrap(),
        }
    }

    fn run(&mut self, cuda: &Cuda) -> Result<()> {
        cuda.embed(&self.embedding, &self.batch, &mut self.x.as_view_mut())?;
        let width = self.weight.rows();
        cuda.norm_linear(&self.weight, &self.x.as_view(), None, &mut self.qkv.as_view_mut(), 0, width, false)?;
        let (qkv, out) = (self.qkv.as_view(), &mut self.context.as_view_mut());
        cuda.attention(Self::HEADS, &qkv, &self.batch, &self.rope, &mut self.kv, out)
    }
}

#[test]
fn recorded_steps_are_the_steps() {
    let Some(cuda) = device() else { return };
    let (mut eager, mut step) = (Step::new(&cuda), Step::new(&cuda));
    let mut graphs = Graphs::new(true);
    let mut runs = 0;
    for i in 0..9u32 {
        let rows = [0, 1].map(|slot| RowPosition { slot, position: i as usize });
        for s in [&mut eager, &mut step] {
            s.batch.set(&[i * 3, 50 + i], &rows).unwrap();
        }
        if i == 5 {
            // Scratch memory moves: the graph has to be recorded again.
            let len = cuda.scratch().partial.at_least(&cuda, 1, "partial").unwrap().len();
            cuda.scratch().partial.at_least(&cuda, 2 * len, "partial").unwrap();
        }
        eager.run(&cuda).unwrap();
        let key = GraphKey { tokens: 2, bucket: step.batch.bucket(), cache: step.kv.id(), other: 0 };
        let run = || {
            runs += 1;
            step.run(&cuda)
        };
        graphs.replay(&cuda, key, run).unwrap();
        assert_eq!(graphs.len(), usize::from(i > 0));
        let (want, got) = (cuda.download(&eager.context, "").unwrap(), cuda.download(&step.context, "").unwrap());
        assert_eq!(want, got, "step {i}");
    }
    assert_eq!(runs, 3, "once as it is, recorded twice");
    assert_eq!(graphs.take_failure(), None);
    // A step that fails anyway does not turn recording off.
    let key = GraphKey { tokens: 2, bucket: 512, cache: 0, other: 0 };
    graphs.replay(&cuda, key, || Ok(())).unwrap();
    assert!(graphs.replay(&cuda, key, || Err(Error::request("a test", "it fails"))).is_err() && graphs.is_on());
    // What allocates cannot be recorded: it runs as it is, and the reason is told once.
    let key = GraphKey { tokens: 3, bucket: 256, cache: 0, other: 0 };
    for _ in 0..3 {
        graphs.replay(&cuda, key, || cuda.zeroed::<f32>(10, "a test").map(drop)).unwrap();
    }
    assert!(graphs.take_failure().is_some_and(|f| !f.is_empty()));
    assert!(!graphs.is_on() && graphs.take_failure().is_none());
    cuda.synchronize().unwrap();
}

#[test]
fn a_gpu_is_opened_while_another_thread_records() {
    let Some(cuda) = device() else { return };
    let recording = AtomicBool::new(false);
    std::thread::scope(|threads| {
        let opened = threads.spawn(|| {
            while !recording.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            open(0).map(drop)
        });
        let mut step = Step::new(&cuda);
        step.batch.set(&[1, 2], &[0, 1].map(|slot| RowPosition { slot, position: 0 })).unwrap();
        let mut graphs = Graphs::new(true);
        let key = GraphKey { tokens: 2, bucket: 256, cache: 0, other: 0 };
        graphs.replay(&cuda, key, || step.run(&cuda)).unwrap();
        let record = || {
            recording.store(true, Ordering::Relaxed);
            std::thread::sleep(std::time::Duration::from_millis(100));
            step.run(&cuda)
        };
        graphs.replay(&cuda, key, record).unwrap();
        assert_eq!((graphs.len(), graphs.take_failure()), (1, None));
        opened.join().unwrap().unwrap();
    });
    cuda.synchronize().unwrap();
}

#[test]
fn times_and_memory_are_told() {
    let Some(cuda) = device() else { return };
    assert!(cuda.copy_bandwidth().unwrap() > 1e6);
    let mut step = Step::new(&cuda);
    step.batch.set(&[1, 2], &[RowPosition { slot: 0, position: 0 }, RowPosition { slot: 1, position: 0 }]).unwrap();
    cuda.profile(true);
    step.run(&cuda).unwrap();
    let times = cuda.take_profile().unwrap();
    let kernels: std::collections::BTreeSet<_> = times.iter().map(|t| t.kernel).collect();
    assert!(kernels.contains("bitnet_gemv_norm") && kernels.contains("bitnet_decode_attention_f16"), "{kernels:?}");
    assert!(times.iter().all(|t| t.launches == 1 && t.seconds >= 0.0 && t.bytes > 0));
    cuda.profile(false);
    step.run(&cuda).unwrap();
    assert!(cuda.take_profile().unwrap().is_empty());
    let message = CudaKv::new(&cuda, DenseType::F32, Step::HEADS, 1 << 20, 1 << 24).unwrap_err().to_string();
    assert!(message.contains("KV cache") && message.contains("free"), "{message}");
    assert!(CudaKv::new(&cuda, DenseType::F32, Step::HEADS, usize::MAX, 2).is_err());
}
