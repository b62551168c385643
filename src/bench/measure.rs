//! The measurement: repetitions of a prefill and of decode steps after it, each followed by the bandwidth.

use super::energy::EnergyCounters;
use super::memory;
use super::operations::Operation;
use super::report::{Energy, Report};
use super::spread::Spread;
use crate::backend::cpu::read_bandwidth;
use crate::backend::host;
use crate::generate::{Sampled, Sampler};
use crate::model::config::MAX_POSITIONS;
use crate::model::{Decoder, Footprint, Logits, Sequence};
use crate::nn::{HeadReads, KvCache};
use crate::{Error, LoadedDecoder, Result, TokenDraw};
use std::time::{Duration, Instant};

/// Most sequences that are decoded together.
pub const MAX_BATCH: usize = 32;
/// Most repetitions.
pub const MAX_REPS: usize = 1000;
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

impl Plan {
    pub(super) fn check(&self) -> Result<()> {
        for (what, value, most) in [
            ("tokens to prefill", self.pp, MAX_POSITIONS),
            ("tokens to decode", self.tg, MAX_POSITIONS),
            ("repetitions", self.reps, MAX_REPS),
            ("batch", self.batch, MAX_BATCH),
        ] {
            if !(1..=most).contains(&value) {
                return Err(Error::request(what, format!("{value} is not between 1 and {most}")));
            }
        }
        Ok(())
    }
}

/// Joules of repetitions, with the seconds that they took.
#[derive(Default)]
struct Energies {
    joules: Vec<(f64, f64)>,
}

impl Energies {
    /// The seconds of `run`, counting its energy where that can be read.
    fn of(&mut self, counters: Option<&EnergyCounters>, run: impl FnOnce() -> Result<f64>) -> Result<f64> {
        let begin = counters.and_then(EnergyCounters::read);
        let seconds = run()?;
        let joules = counters.zip(begin).and_then(|(counters, begin)| counters.joules_since(&begin));
        self.joules.extend(joules.map(|j| (j, seconds)));
        Ok(seconds)
    }

    fn joules(&self) -> f64 {
        Spread::of(self.joules.iter().map(|(joules, _)| *joules).collect()).median
    }

    fn watts(&self) -> f64 {
        Spread::of(self.joules.iter().map(|(joules, seconds)| joules / seconds).collect()).median
    }
}

/// Measures a decoder; `model` names it in the report. The decoder's context must hold `pp + tg` positions.
///
/// # Errors
/// [`Error::Request`] for a plan of nothing or of too much, [`Error::Unavailable`] if memory is short; those of the decoder.
pub fn measure(model: String, loaded: &LoadedDecoder, plan: Plan) -> Result<Report> {
    measure_with(model, loaded, plan, &EnergyCounters::open())
}

/// As [`measure`], with counters of energy, or why there are none.
pub(super) fn measure_with(
    model: String,
    loaded: &LoadedDecoder,
    plan: Plan,
    counters: &Result<EnergyCounters, String>,
) -> Result<Report> {
    plan.check()?;
    let Plan { pp, tg, batch, reps, .. } = plan;
    let (decoder, about) = (&loaded.decoder, loaded.report());
    let backend = decoder.backend();
    if backend.is_cpu() {
        let bytes = memory::kv_bytes(decoder.config(), loaded.kv_dtype, batch, pp + tg);
        memory::ensure(&format!("a KV cache of {batch} × {} positions", pp + tg), bytes)?;
    }
    let weights = decoder.host_weights();
    let mut bench = Bench::new(loaded, batch, pp + tg)?;
    bench.prefill(pp.min(WARM_UP.0))?;
    bench.decode(pp.min(WARM_UP.0), tg.min(WARM_UP.1))?;
    let mut reads = HeadReads::default();
    let (mut prefill, mut decode, mut bandwidth) = (Vec::new(), Vec::new(), Vec::new());
    let (mut prefill_energy, mut decode_energy) = (Energies::default(), Energies::default());
    let (mut resident, mut memory) = (None, None);
    let counters = counters.as_ref().map_err(String::as_str);
    for _ in 0..reps {
        prefill.push((batch * pp) as f64 / prefill_energy.of(counters.ok(), || bench.prefill(pp))?);
        let before = decoder.head().reads();
        decode.push((batch * tg) as f64 / decode_energy.of(counters.ok(), || bench.decode(pp, tg))?);
        reads = reads.and(decoder.head().reads().since(before));
        (resident, memory) = (host::resident_bytes(), backend.device_memory()?);
        bandwidth.push(match backend.copy_bandwidth()? {
            Some(copied) => copied,
            None => read_bandwidth(backend.cpu(), &weights, BANDWIDTH_TIME),
        });
    }
    let energy = counters.map(|counters| Energy {
        packages: counters.packages(),
        prefill_joules_per_token: prefill_energy.joules() / (batch * pp) as f64,
        decode_joules_per_token: decode_energy.joules() / (batch * tg) as f64,
        decode_watts: decode_energy.watts(),
    });
    let (energy, energy_unreadable) = match (energy, decode_energy.joules.is_empty()) {
        (Ok(energy), false) => (Some(energy), None),
        (Ok(_), true) => (None, Some("a repetition took so long that the counters began anew".to_owned())),
        (Err(reason), _) => (None, Some(reason.to_owned())),
    };
    let profile = plan.profile.then(|| bench.profile(pp, tg)).transpose()?;
    let (prefill, decode, bandwidth) = (Spread::of(prefill), Spread::of(decode), Spread::of(bandwidth).median / 1e9);
    let kv = about.kv_bytes_per_position() * (pp + tg.div_ceil(2));
    let (head, head_name) = (reads.bytes / reads.passes.max(1), about.head_name());
    let per_token = about.bytes_per_token() - about.footprint.head + head;
    let Footprint { ternary, dense, adapter, embedding, .. } = about.footprint;
    let weights_in_memory =
        ternary + dense + adapter + embedding + decoder.head().weight().bytes() + decoder.head().added_bytes();
    let bytes_per_step = per_token + batch * kv;
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
        bytes_per_token: per_token + kv,
        bytes_per_token_ternary: about.footprint.ternary,
        bytes_per_token_head: head,
        head: head_name,
        head_rows_refined: reads.screened_mean(reads.refined),
        head_rows_rescored: reads.screened_mean(reads.rescored),
        bytes_per_token_dense: about.footprint.dense,
        bytes_per_token_adapter: about.footprint.adapter,
        bytes_per_token_kv: kv,
        weight_bytes: weights_in_memory,
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
        energy,
        energy_unreadable,
        baselines: Vec::new(),
        profile,
    })
}

/// Seconds from `prompt` to the first token after it, and that token with those that follow, greedily; `count` of them, whatever
/// they are.
pub(super) fn first_tokens(loaded: &LoadedDecoder, prompt: &[u32], count: usize) -> Result<(f64, Vec<u32>)> {
    let Bench { decoder, cache, mut draw, mut samplers, mut drawn, .. } = Bench::new(loaded, 1, prompt.len() + count)?;
    let mut tokens = Vec::with_capacity(count);
    let start = Instant::now();
    let last = prompt.len().saturating_sub(1) / CHUNK * CHUNK;
    let (read, rest) = prompt.split_at(last);
    for (i, tokens) in read.chunks(CHUNK).enumerate() {
        let piece = Sequence { slot: 0, position: i * CHUNK, tokens };
        decoder.forward_with(&[piece], &cache, Logits::Top(1), |_| Ok(()))?;
    }
    let (mut position, mut next, mut first) = (last, rest.to_vec(), None);
    while tokens.len() < count {
        let step = [Sequence { slot: 0, position, tokens: &next }];
        let wanted = TokenDraw::wanted(&samplers);
        decoder.forward_with(&step, &cache, wanted, |logits| draw.draw(logits, &mut samplers, &mut drawn))?;
        first.get_or_insert_with(|| start.elapsed().as_secs_f64());
        position += next.len();
        let sampled =
            drawn.first().ok_or_else(|| Error::Shape { op: "sample", reason: "no token was drawn".into() })?;
        tokens.push(sampled.token);
        next = vec![sampled.token];
    }
    Ok((first.unwrap_or_default(), tokens))
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
    fn new(loaded: &'a LoadedDecoder, batch: usize, positions: usize) -> Result<Self> {
        let decoder = &loaded.decoder;
        let vocab = decoder.config().vocab_size;
        Ok(Self {
            cache: decoder.kv_cache_of(loaded.kv_dtype, batch, positions)?,
            draw: TokenDraw::new(decoder.backend(), batch, vocab)?,
            samplers: vec![Sampler::greedy(vocab); batch],
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LoadOptions;
    use candle_core::Device;

    fn plan() -> Plan {
        Plan { pp: 3, tg: 2, batch: 2, reps: 3, profile: false }
    }

    fn load() -> LoadedDecoder {
        let options = LoadOptions::new(&Device::Cpu).threads(Some(1)).context(Some(8));
        LoadedDecoder::load("builtin", &options).unwrap()
    }

    #[test]
    fn energy_is_told_by_the_token_where_it_can_be_read() {
        let root = tempfile::tempdir().unwrap();
        let package = root.path().join("intel-rapl:0");
        std::fs::create_dir(&package).unwrap();
        let write = |file: &str, text: &str| std::fs::write(package.join(file), text).unwrap();
        for (file, text) in [("name", "package-0"), ("energy_uj", "7"), ("max_energy_range_uj", "262143328850")] {
            write(file, text);
        }
        let (loaded, counters) = (load(), EnergyCounters::open_at(root.path()));
        let report = measure_with("m".into(), &loaded, plan(), &counters).unwrap();
        // A counter that stands still.
        let energy =
            Energy { packages: 1, prefill_joules_per_token: 0.0, decode_joules_per_token: 0.0, decode_watts: 0.0 };
        assert_eq!((report.energy, report.energy_unreadable.as_deref()), (Some(energy), None));
        assert!(report.describe().contains("energy    0.000 J a token decoded"), "{}", report.describe());
        // One that begins anew too often.
        write("max_energy_range_uj", "1");
        let report = measure_with("m".into(), &loaded, plan(), &EnergyCounters::open_at(root.path())).unwrap();
        assert!(report.energy.is_none() && report.energy_unreadable.unwrap().contains("began anew"));
        let report = measure_with("m".into(), &loaded, plan(), &Err("no such file".into())).unwrap();
        assert!(report.describe().contains("energy    not readable: no such file"), "{}", report.describe());
    }

    #[test]
    fn joules_and_watts_are_medians() {
        let energies = Energies { joules: vec![(2.0, 1.0), (9.0, 1.0), (3.0, 0.5)] };
        assert_eq!((energies.joules(), energies.watts()), (3.0, 6.0));
    }

    #[test]
    fn plans_of_nothing_or_too_much_are_refused() {
        let loaded = load();
        for (plan, word) in [
            (Plan { pp: 0, ..plan() }, "tokens to prefill"),
            (Plan { tg: 0, ..plan() }, "tokens to decode"),
            (Plan { reps: 0, ..plan() }, "repetitions"),
            (Plan { batch: 33, ..plan() }, "batch"),
        ] {
            let error = measure("m".into(), &loaded, plan).unwrap_err();
            assert!(matches!(&error, Error::Request { what, .. } if what == word), "{error}");
        }
        let long = measure("m".into(), &loaded, Plan { pp: 9, ..plan() }).unwrap_err();
        assert!(matches!(long, Error::ContextFull { .. }), "{long}");
    }
}
