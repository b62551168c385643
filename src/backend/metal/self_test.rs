//! Every kernel on the device against the CPU's portable kernels, for a machine where that was never tried:
//! `bitnet doctor --device metal --self-test`.

use super::{Metal, MetalBatch, MetalDense, MetalKv, MetalLowRank, MetalRope, MetalSampler, kernels};
use crate::backend::attention::{AttentionShape, RopeTable, RowPosition};
use crate::backend::cpu::{Cpu, CpuDense, CpuKv, CpuLowRank, CpuOptions, Gate, KernelKind, OutputColumns};
use crate::backend::gpu::{MarkUpdate, SampleSettings};
use crate::backend::{Arrangement, DenseType};
use crate::ternary::{PackedTernary, Scale};
use crate::{Error, Result};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What came of one part of the suite.
#[derive(Debug, Clone)]
pub struct SelfTest {
    /// Which kernels.
    pub name: &'static str,
    /// Launches of operations that were compared.
    pub cases: usize,
    /// Outputs a unit in the last place aside, where all bits should be equal and one in 2^24 may not be.
    pub aside: usize,
    /// How long it took, the CPU's share included.
    pub time: Duration,
    /// The first thing that was wrong.
    pub problem: Option<String>,
}

/// Runs the suite and calls `report` after each part.
///
/// # Errors
/// [`Error::Unavailable`] without the CPU's portable kernels. What fails on the device is in the parts.
pub fn self_test(metal: &Arc<Metal>, mut report: impl FnMut(&SelfTest)) -> Result<Vec<SelfTest>> {
    let cpu = Cpu::new(CpuOptions { kernel: Some(KernelKind::Generic), threads: None })?;
    let parts: [(&'static str, Run); 9] = [
        ("all kernels compile", |s| s.compiles()),
        ("gemv", |s| s.decode_products()),
        ("gemm", |s| s.prefill_products()),
        ("norm, gated activation", |s| s.norms()),
        ("decode attention", |s| s.decode_attention()),
        ("prefill attention", |s| s.prefill_attention()),
        ("head, embedding", |s| s.dense()),
        ("low-rank updates", |s| s.low_rank()),
        ("argmax, sampling", |s| s.choosing()),
    ];
    let mut all = Vec::new();
    for (name, part) in parts {
        let mut suite = Suite { metal, cpu: &cpu, cases: 0, aside: 0 };
        let start = Instant::now();
        let problem = part(&mut suite).err().map(|e| e.to_string());
        all.push(SelfTest { name, cases: suite.cases, aside: suite.aside, time: start.elapsed(), problem });
        all.last().into_iter().for_each(&mut report);
    }
    Ok(all)
}

/// A part of the suite.
type Run = fn(&mut Suite<'_>) -> Result<()>;

struct Suite<'a> {
    metal: &'a Arc<Metal>,
    cpu: &'a Cpu,
    cases: usize,
    aside: usize,
}

/// Numbers between -1 and 1, other ones for each seed.
fn values(n: usize, seed: usize) -> Vec<f32> {
    let value =
        |i: usize| ((i as u64 + 1).wrapping_mul(2 * seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32;
    (0..n).map(|i| value(i) / 8_388_608.0 - 1.0).collect()
}

fn ternary(rows: usize, cols: usize, seed: usize) -> Result<PackedTernary> {
    let weights: Vec<i8> = values(rows * cols, seed).iter().map(|v| (v * 1.5).round() as i8).collect();
    let factor = 0.5 + seed as f32;
    let scale = if seed.is_multiple_of(2) { Scale::Multiply(factor) } else { Scale::Divide(factor) };
    PackedTernary::from_weights(rows, cols, &weights, scale)
}

fn wrong(reason: String) -> Error {
    Error::SelfCheck { kernel: "metal", reason }
}

/// Elements of a type, little-endian.
fn stored(dtype: DenseType, values: &[f32]) -> Vec<u8> {
    let each = |v: &f32| match dtype {
        DenseType::F32 => v.to_le_bytes().to_vec(),
        DenseType::F16 => half::f16::from_f32(*v).to_le_bytes().to_vec(),
        DenseType::BF16 => half::bf16::from_f32(*v).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(each).collect()
}

impl Suite<'_> {
    /// Compares a case: largest difference at most `tolerance` of the largest value.
    fn close(&mut self, got: &[f32], want: &[f32], tolerance: f32, what: &str) -> Result<()> {
        self.cases += 1;
        let size = want.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
        let far = |(g, w): (&f32, &f32)| (g - w).abs() > tolerance * size || (g - w).is_nan();
        match got.iter().zip(want).position(far) {
            _ if got.len() != want.len() => Err(wrong(format!("{what}: {} values of {}", got.len(), want.len()))),
            Some(i) => Err(wrong(format!("{what}: value {i} is {}, not {} (of up to {size})", got[i], want[i]))),
            None => Ok(()),
        }
    }

    /// Compares a case: the same bits, but for a unit in the last place now and then, which is counted.
    fn equal(&mut self, got: &[f32], want: &[f32], what: &str) -> Result<()> {
        self.close(got, want, 0.0, what).or_else(|e| {
            let ulps = |(g, w): (&f32, &f32)| (i64::from(g.to_bits()) - i64::from(w.to_bits())).unsigned_abs();
            let aside = got.iter().zip(want).filter(|pair| ulps(*pair) == 1).count();
            let same = got.iter().zip(want).filter(|pair| ulps(*pair) == 0).count();
            self.aside += aside;
            if same + aside == want.len() && aside <= 1 + want.len() / 200_000 { Ok(()) } else { Err(e) }
        })
    }

    fn compiles(&mut self) -> Result<()> {
        for name in kernels::all() {
            self.metal.gpu.prepare(kernels::kernel(name)?)?;
            self.cases += 1;
        }
        Ok(())
    }

    /// One product in all its forms.
    fn products(&mut self, rows: &[usize], cols: usize, tokens: usize) -> Result<()> {
        let (metal, cpu) = (self.metal, self.cpu);
        let what = |form: &str| format!("{rows:?} x {cols}, {tokens} tokens, {form}");
        let weights = rows.iter().enumerate().map(|(i, r)| ternary(*r, cols, i + cols)).collect::<Result<Vec<_>>>()?;
        let x = values(tokens * cols, 7);
        let norm: Vec<f32> = values(cols, 8).iter().map(|v| v + 1.5).collect();
        let (input, norm_in) = (metal.upload(&x, "x")?, metal.upload(&norm, "norm")?);
        let n: usize = rows.iter().sum();
        let stacked = metal.pack(&weights, Arrangement::Stacked)?;
        let reference = cpu.pack(&weights, Arrangement::Stacked)?;
        let (width, first) = (n + 5, 2);
        for (form, with_norm, add) in [("replaced", false, false), ("added", false, true), ("normalised", true, false)]
        {
            let mut want = values(tokens * width, 9);
            let out = metal.upload(&want, "out")?;
            let given = with_norm.then_some((norm_in.as_slice(), 1e-5));
            metal.norm_linear(&stacked, input.as_slice(), given, out.as_slice(), first, width, add)?;
            let given = with_norm.then_some((&norm[..], 1e-5));
            let columns = OutputColumns { values: &mut want, width, first, add };
            cpu.norm_linear(&reference, &x, given, columns)?;
            let got = metal.download(&out, tokens * width)?;
            match with_norm {
                false => self.equal(&got, &want, &what(form))?,
                // A norm rounded otherwise moves a code here and there.
                true => self.close(&got, &want, 0.02, &what(form))?,
            }
        }
        let pair = [ternary(n, cols, 3)?, ternary(n, cols, 4)?];
        let (gated, reference) = (metal.pack(&pair, Arrangement::GateUp)?, cpu.pack(&pair, Arrangement::GateUp)?);
        for gate in [Gate::Relu2, Gate::Silu] {
            let out = metal.zeroed::<f32>(tokens * n, "out")?;
            let mut want = vec![0.0; tokens * n];
            metal.gated_linear(gate, &gated, input.as_slice(), None, out.as_slice())?;
            cpu.gated_linear(gate, &reference, &x, None, &mut want)?;
            self.close(&metal.download(&out, tokens * n)?, &want, 2e-6, &what("gated"))?;
        }
        Ok(())
    }

    fn decode_products(&mut self) -> Result<()> {
        for tokens in [1, 2, 3, 5, 8] {
            for (rows, cols) in
                [(&[5][..], 8), (&[16, 8, 8], 256), (&[20, 3], 304), (&[1, 2, 3, 4], 520), (&[96], 2560)]
            {
                self.products(rows, cols, tokens)?;
            }
        }
        // Inputs that threadgroup memory does not hold.
        for (cols, tokens) in [(6912, 3), (6912, 8), (16_640, 1), (16_640, 2)] {
            self.products(&[33], cols, tokens)?;
        }
        Ok(())
    }

    fn prefill_products(&mut self) -> Result<()> {
        for (rows, cols, tokens) in [
            (&[5][..], 8, 9),
            (&[16, 8, 8], 256, 33),
            (&[20, 3], 304, 32),
            (&[90, 2, 3, 4], 520, 70),
            (&[64], 2560, 40),
        ] {
            self.products(rows, cols, tokens)?;
        }
        Ok(())
    }

    fn norms(&mut self) -> Result<()> {
        let (metal, cpu) = (self.metal, self.cpu);
        for (tokens, cols) in [(1, 8), (3, 300), (9, 2560), (2, 6912)] {
            let (x, weight) = (values(tokens * cols, 1), values(cols, 2));
            let (input, weight_in) = (metal.upload(&x, "x")?, metal.upload(&weight, "norm")?);
            let out = metal.zeroed::<f32>(tokens * cols, "out")?;
            let mut want = vec![0.0; tokens * cols];
            metal.rms_norm(input.as_slice(), weight_in.as_slice(), 1e-6, out.as_slice())?;
            cpu.rms_norm(&x, &weight, 1e-6, &mut want)?;
            self.close(&metal.download(&out, want.len())?, &want, 1e-6, &format!("norm of [{tokens}, {cols}]"))?;
            for gate in [Gate::Relu2, Gate::Silu] {
                let rows = values(2 * tokens * cols, 3);
                let rows_in = metal.upload(&rows, "gate and up")?;
                metal.gated(gate, rows_in.as_slice(), cols, out.as_slice())?;
                cpu.gated(gate, &rows, cols, &mut want)?;
                let what = format!("{gate:?} of [{tokens}, {cols}]");
                self.close(&metal.download(&out, want.len())?, &want, 1e-6, &what)?;
            }
        }
        Ok(())
    }

    /// Passes over a cache of three slots.
    fn attention(&mut self, dtype: DenseType, heads: (usize, usize, usize), steps: &[Vec<RowPosition>]) -> Result<()> {
        let (metal, cpu) = (self.metal, self.cpu);
        let heads = AttentionShape::new(heads.0, heads.1, heads.2)?;
        let positions = steps.iter().flatten().map(|r| r.position + 1).max().unwrap_or(1);
        let table = RopeTable::new(positions, heads.head_dim, 10_000.0)?;
        let rope = MetalRope::new(metal, &table)?;
        let mut kv = MetalKv::new(metal, dtype, heads, 3, positions)?;
        let mut reference = CpuKv::new(dtype, heads, 3, positions)?;
        let mut batch = MetalBatch::new(metal, steps.iter().map(Vec::len).max().unwrap_or(1))?;
        for (step, rows) in steps.iter().enumerate() {
            batch.set(&vec![0; rows.len()], rows)?;
            let qkv: Vec<f32> = values(rows.len() * heads.qkv_dim(), step).iter().map(|v| v * 3.0).collect();
            let input = metal.upload(&qkv, "qkv")?;
            let mut want = vec![0.0; rows.len() * heads.heads * heads.head_dim];
            let out = metal.zeroed::<f32>(want.len(), "out")?;
            metal.attention(heads, input.as_slice(), &batch, &rope, &mut kv, out.as_slice())?;
            cpu.attention(heads, &qkv, rows, &table, &mut reference, &mut want)?;
            // A rotation rounded otherwise moves a stored key by a unit of its type.
            let tolerance = if dtype == DenseType::F32 { 2e-5 } else { 2e-3 };
            let what = format!("{dtype} {heads:?} step {step}");
            self.close(&metal.download(&out, want.len())?, &want, tolerance, &what)?;
        }
        Ok(())
    }

    fn each_attention(&mut self, steps: &[Vec<RowPosition>]) -> Result<()> {
        for dtype in [DenseType::F32, DenseType::BF16, DenseType::F16] {
            for heads in [(6, 1, 20), (4, 2, 64), (5, 1, 80), (2, 2, 128), (1, 1, 132), (2, 1, 256)] {
                self.attention(dtype, heads, steps)?;
            }
        }
        Ok(())
    }

    fn decode_attention(&mut self) -> Result<()> {
        let at = |list: &[(usize, usize)]| -> Vec<RowPosition> {
            list.iter().map(|(slot, position)| RowPosition { slot: *slot, position: *position }).collect()
        };
        let mut steps: Vec<_> = (0..4).map(|p| at(&[(2, p), (0, p)])).collect();
        steps.extend((4..40).map(|p| at(&[(2, p)])));
        steps.push(at(&[(0, 4), (1, 0), (2, 40)]));
        self.each_attention(&steps)
    }

    fn prefill_attention(&mut self) -> Result<()> {
        let run =
            |slot: usize, from: usize, n: usize| (from..from + n).map(move |position| RowPosition { slot, position });
        let steps: [Vec<RowPosition>; 5] = [
            run(2, 0, 70).chain(run(0, 0, 5)).collect(),
            run(2, 70, 1).chain(run(0, 5, 1)).collect(),
            run(0, 6, 40).chain(run(1, 0, 1)).collect(),
            run(0, 46, 1).chain(run(1, 1, 1)).chain(run(2, 71, 1)).collect(),
            run(2, 72, 18).collect(),
        ];
        self.each_attention(&steps)
    }

    fn dense(&mut self) -> Result<()> {
        let (metal, cpu) = (self.metal, self.cpu);
        for dtype in [DenseType::F32, DenseType::BF16, DenseType::F16] {
            for (rows, cols, tokens) in [(9, 24, 1), (130, 264, 2), (31, 8, 3), (70, 520, 8), (50, 264, 17)] {
                let what = format!("{dtype} [{rows}, {cols}], {tokens} tokens");
                let bytes = stored(dtype, &values(rows * cols, 2));
                let matrix = MetalDense::filled(metal, dtype, rows, cols, |to| to.copy_from_slice(&bytes))?;
                let reference = CpuDense::owned(dtype, rows, cols, |to| to.copy_from_slice(&bytes))?;
                let x = values(tokens * cols, 3);
                let input = metal.upload(&x, "x")?;
                for (first, width, add) in [(0, rows, false), (1, rows + 3, true)] {
                    let mut want = values(tokens * width, 4);
                    let out = metal.upload(&want, "out")?;
                    metal.dense_linear(&matrix, input.as_slice(), out.as_slice(), first, width, add)?;
                    cpu.dense_linear(&reference, &x, OutputColumns { values: &mut want, width, first, add })?;
                    self.close(&metal.download(&out, want.len())?, &want, 1e-5, &what)?;
                }
                let ids: Vec<u32> = (0..tokens as u32).map(|i| i * 7 % rows as u32).collect();
                let at: Vec<_> = (0..tokens).map(|position| RowPosition { slot: 0, position }).collect();
                let mut batch = MetalBatch::new(metal, tokens)?;
                batch.set(&ids, &at)?;
                let mut want = vec![0.0; tokens * cols];
                let out = metal.zeroed::<f32>(want.len(), "out")?;
                metal.embed(&matrix, &batch, out.as_slice())?;
                cpu.embed(&reference, &ids, &mut want)?;
                self.close(&metal.download(&out, want.len())?, &want, 0.0, &format!("rows of {what}"))?;
                let chosen = [tokens as u32 - 1, 0];
                let picked = metal.zeroed::<f32>(2 * cols, "out")?;
                metal.select_rows(input.as_slice(), cols, &chosen, picked.as_slice())?;
                let mut want = vec![0.0; 2 * cols];
                cpu.select_rows(&x, cols, &chosen, &mut want)?;
                self.close(&metal.download(&picked, 2 * cols)?, &want, 0.0, "selected rows")?;
            }
        }
        Ok(())
    }

    fn low_rank(&mut self) -> Result<()> {
        let (metal, cpu) = (self.metal, self.cpu);
        let (cols, stride) = (40, 30);
        for tokens in [1, 11] {
            let x = values(tokens * cols, 1);
            let mut want = values(tokens * stride, 2);
            let (input, out) = (metal.upload(&x, "x")?, metal.upload(&want, "out")?);
            let (mut updates, mut references) = (Vec::new(), Vec::new());
            for (at, rank, rows, scaling) in [(2, 3, 10, 0.3f32), (12, 8, 18, 2.0)] {
                let (a, b) = (values(rank * cols, 3), values(rows * rank, 4));
                updates.push((at, MetalLowRank::pack(metal, rank, &a, &b, scaling)?));
                references.push((at, CpuLowRank::pack(rank, &a, &b, scaling)?));
            }
            let updates: Vec<_> = updates.iter().map(|(at, w)| (*at, w)).collect();
            let references: Vec<_> = references.iter().map(|(at, w)| (*at, w)).collect();
            metal.low_rank(&updates, input.as_slice(), stride, out.as_slice())?;
            cpu.low_rank(&references, &x, cols, stride, &mut want)?;
            self.close(&metal.download(&out, want.len())?, &want, 1e-5, &format!("{tokens} tokens"))?;
        }
        Ok(())
    }

    /// Rows of logits whose tokens are known.
    fn choosing(&mut self) -> Result<()> {
        let metal = self.metal;
        let vocab = 1000;
        let mut logits = values(3 * vocab, 4);
        for (at, value) in [(17, 3.0), (18, 3.0), (vocab + 999, 5.0), (2 * vocab + 4, f32::NAN)] {
            logits[at] = value;
        }
        let memory = metal.upload(&logits, "logits")?;
        let mut sampler = MetalSampler::new(metal, 3, vocab)?;
        let mut expect = |got: Vec<i32>, good: &dyn Fn(&[i32]) -> bool, what: &str| {
            self.cases += 1;
            if good(&got) { Ok(()) } else { Err(wrong(format!("{what}: {got:?}"))) }
        };
        for _ in 0..2 {
            sampler.draw(metal, memory.as_slice())?;
            expect(sampler.ids(metal)?, &|ids| ids == [17, 999, -1], "the largest logits")?;
        }
        let warm = SampleSettings { temperature: 1.0, top_k: 2, seed: 5, ..SampleSettings::default() };
        let mut drawn = Vec::new();
        for draw in 0..12 {
            let two = [SampleSettings { draw, ..warm }, SampleSettings { draw, top_p: 0.001, ..warm }];
            sampler.set(metal, &two)?;
            sampler.draw(metal, memory.slice(..2 * vocab))?;
            let ids = sampler.ids(metal)?;
            drawn.push(ids[0]);
            expect(ids, &|ids| [17, 18].contains(&ids[0]) && ids[1] == 999, "draws of the best two")?;
        }
        expect(drawn, &|ids| ids.contains(&17) && ids.contains(&18), "equal logits are both drawn")?;
        // The best two of row 0 have been in the answer, twice and once.
        let penalties = SampleSettings { presence: 1.0, frequency: 0.5, slot: 2, ..SampleSettings::default() };
        let mark = |token, times: u32| MarkUpdate { slot: 2, token, mark: 1 << 31 | times };
        sampler.mark(metal, &[mark(17, 2), mark(18, 1), MarkUpdate { slot: -1, token: 9999, mark: 1 }])?;
        sampler.set(metal, &[penalties])?;
        sampler.draw(metal, memory.slice(..vocab))?;
        expect(sampler.ids(metal)?, &|ids| ids == [18], "penalties")?;
        sampler.clear_marks(metal, 2)?;
        sampler.draw(metal, memory.slice(..vocab))?;
        expect(sampler.ids(metal)?, &|ids| ids == [17], "penalties forgotten")
    }
}
