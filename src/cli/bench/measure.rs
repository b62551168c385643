//! The measurement: repetitions of a prefill and of decode steps after it, each followed by the bandwidth.

use super::operations::Operation;
use super::report::Report;
use super::spread::Spread;
use crate::cli::greedy_sampler;
use anyhow::Result;
use candle_bitnet::backend::cpu::read_bandwidth;
use candle_bitnet::backend::host;
use candle_bitnet::generate::{Sampled, Sampler};
use candle_bitnet::model::{Decoder, Logits, Sequence};
use candle_bitnet::nn::{HeadReads, KvCache};
use candle_bitnet::{LoadedDecoder, TokenDraw};
use std::time::{Duration, Instant};

/// For how long the CPU's read bandwidth is measured in each repetition.
const BANDWIDTH_TIME: Duration = Duration::from_millis(800);
/// Tokens that are given to the model at once.
const CHUNK: usize = 512;
/// Tokens of the prefill and steps before the first repetition, at most.
const WARM_UP: (usize, usize) = (16, 4);

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Tokens of each sequence to prefill.
    pub pp: usize,
    /// Decode steps.
    pub tg: usize,
    /// Sequences that are decoded together.
    pub batch: usize,
    /// Repetitions.
    pub reps: usize,
    /// Whether each operation is timed as well, in a run of its own.
    pub profile: bool,
}

/// Measures a decoder; `model` names it in the report.
pub fn measure(model: String, loaded: &LoadedDecoder, plan: Plan) -> Result<Report> {
    let Plan { pp, tg, batch, reps, .. } = plan;
    let (decoder, about) = (&loaded.decoder, loaded.report());
    let backend = decoder.backend();
    let weights = decoder.host_weights();
    let mut bench = Bench::new(loaded, batch)?;
    bench.prefill(pp.min(WARM_UP.0))?;
    bench.decode(pp.min(WARM_UP.0), tg.min(WARM_UP.1))?;
    let mut reads = HeadReads::default();
    let (mut prefill, mut decode, mut bandwidth) = (Vec::new(), Vec::new(), Vec::new());
    let (mut resident, mut memory) = (None, None);
    for _ in 0..reps {
        prefill.push((batch * pp) as f64 / bench.prefill(pp)?);
        let before = decoder.head().reads();
        decode.push((batch * tg) as f64 / bench.decode(pp, tg)?);
        reads = reads.and(decoder.head().reads().since(before));
        (resident, memory) = (host::resident_bytes(), backend.device_memory()?);
        bandwidth.push(match backend.copy_bandwidth()? {
            Some(copied) => copied,
            None => read_bandwidth(backend.cpu(), &weights, BANDWIDTH_TIME),
        });
    }
    let profile = plan.profile.then(|| bench.profile(pp, tg)).transpose()?;
    let (prefill, decode, bandwidth) = (Spread::of(prefill), Spread::of(decode), Spread::of(bandwidth).median / 1e9);
    let kv = about.kv_bytes_per_position() * (pp + tg.div_ceil(2));
    let (head, head_name) = (reads.bytes / reads.passes.max(1), about.head_name());
    let weight_bytes = about.bytes_per_token() - about.footprint.head + head;
    let bytes_per_step = weight_bytes + batch * kv;
    let decode_gbps = decode.median / batch as f64 * bytes_per_step as f64 / 1e9;
    let on_gpu = memory.is_some();
    Ok(Report {
        model,
        device: about.device,
        kernel: about.kernel,
        threads: about.threads,
        cpu: host::cpu_name(),
        batch,
        prefill_tokens: pp,
        decode_tokens: tg,
        prefill_tps: prefill.median,
        prefill_tps_range: [prefill.min, prefill.max],
        decode_tps: decode.median,
        decode_tps_range: [decode.min, decode.max],
        bytes_per_token: weight_bytes + kv,
        bytes_per_token_ternary: about.footprint.ternary,
        bytes_per_token_head: head,
        head: head_name,
        head_rows_refined: reads.screened_mean(reads.refined),
        head_rows_rescored: reads.screened_mean(reads.rescored),
        bytes_per_token_dense: about.footprint.dense,
        bytes_per_token_adapter: about.footprint.adapter,
        bytes_per_token_kv: kv,
        bytes_per_step,
        decode_gbps,
        read_gbps: (!on_gpu).then_some(bandwidth),
        copy_gbps: on_gpu.then_some(bandwidth),
        decode_share: decode_gbps / bandwidth,
        resident_bytes: resident,
        device_bytes: memory.map(|m| m.used()),
        device_total_bytes: memory.map(|m| m.total),
        load_seconds: about.load_time.as_secs_f64(),
        kv_type: about.kv_dtype.name(),
        profile,
    })
}

/// Sequences that grow together, each in its slot.
struct Bench<'a> {
    decoder: &'a Decoder,
    cache: KvCache,
    draw: TokenDraw,
    samplers: Vec<Sampler>,
    drawn: Vec<Sampled>,
    vocab: usize,
}

impl<'a> Bench<'a> {
    fn new(loaded: &'a LoadedDecoder, batch: usize) -> Result<Self> {
        let decoder = &loaded.decoder;
        let vocab = decoder.config().vocab_size;
        Ok(Self {
            cache: decoder.kv_cache(loaded.kv_dtype, batch)?,
            draw: TokenDraw::new(decoder.backend(), batch, vocab)?,
            samplers: (0..batch).map(|_| greedy_sampler(vocab)).collect::<candle_bitnet::Result<_>>()?,
            drawn: Vec::with_capacity(batch),
            decoder,
            vocab,
        })
    }

    /// Seconds of a prefill of `pp` tokens of each sequence, one sequence after the other.
    fn prefill(&mut self, pp: usize) -> Result<f64> {
        let start = Instant::now();
        for slot in 0..self.samplers.len() {
            let prompt: Vec<u32> = (0..pp).map(|i| ((i * 7919 + slot) % self.vocab) as u32).collect();
            for (i, tokens) in prompt.chunks(CHUNK).enumerate() {
                let piece = Sequence { slot, position: i * CHUNK, tokens };
                self.decoder.forward_with(&[piece], &self.cache, Logits::Top(1), |_| Ok(()))?;
            }
        }
        self.decoder.backend().synchronize()?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Seconds of `tg` steps after the first `pp` tokens, each of one greedy token of each sequence. Tokens are drawn where
    /// generation draws them, and every step waits for them.
    fn decode(&mut self, pp: usize, tg: usize) -> Result<f64> {
        let Self { decoder, cache, draw, samplers, drawn, vocab } = self;
        let mut tokens: Vec<u32> = (0..samplers.len()).map(|slot| ((slot + 1) % *vocab) as u32).collect();
        let start = Instant::now();
        for position in pp..pp + tg {
            let sequence = |(slot, token)| Sequence { slot, position, tokens: std::slice::from_ref(token) };
            let step: Vec<Sequence<'_>> = tokens.iter().enumerate().map(sequence).collect();
            decoder
                .forward_with(&step, cache, TokenDraw::wanted(samplers), |logits| draw.draw(logits, samplers, drawn))?;
            tokens.clear();
            tokens.extend(drawn.iter().map(|sampled| sampled.token));
        }
        Ok(start.elapsed().as_secs_f64())
    }

    /// What each operation of the same steps takes.
    fn profile(&mut self, pp: usize, tg: usize) -> Result<Vec<Operation>> {
        let backend = self.decoder.backend();
        backend.profile(true);
        let decoded = self.decode(pp, tg);
        backend.profile(false);
        decoded?;
        Ok(Operation::of(backend.take_profile()?, tg))
    }
}
