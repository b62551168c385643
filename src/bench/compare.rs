//! Every device and kernel of this machine on the same model and prompt: speed, bandwidth, memory, energy, and whether all
//! choose the same tokens.

mod output;

use super::measure::{Plan, first_tokens, measure};
use super::model::BenchModel;
use super::report::Report;
use crate::backend::cpu::KernelKind;
use crate::backend::{Gpu, gpus, host, metal_gpus};
use crate::{DeviceChoice, Error, LoadOptions, Result, select_device};
use serde::Serialize;

/// Part by which a speed must be greater to count as greater: less is noise.
const NOISE: f64 = 0.03;

/// A device with its settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contender {
    /// The device; never [`DeviceChoice::Auto`].
    pub device: DeviceChoice,
    /// The CPU's ternary kernel; none on a GPU.
    pub kernel: Option<KernelKind>,
    /// The CPU's threads; none on a GPU.
    pub threads: Option<usize>,
}

/// What is compared.
#[derive(Debug, Clone, Copy, Default)]
pub struct Narrowed {
    /// Only this device.
    pub device: DeviceChoice,
    /// Only this kernel of the CPU.
    pub kernel: Option<KernelKind>,
    /// Only so many threads of the CPU.
    pub threads: Option<usize>,
}

/// What each contender does.
#[derive(Debug, Clone, Copy)]
pub struct Workload<'a> {
    /// Tokens that are read.
    pub prompt: &'a [u32],
    /// Tokens that follow it.
    pub decode_tokens: usize,
    /// Repetitions of each measurement.
    pub reps: usize,
}

impl Contender {
    /// Everything that is here, as far as `narrowed` leaves it: the GPUs whose kernels are built in, every kernel of this CPU
    /// with all its cores, and its fastest kernel with fewer and more threads.
    ///
    /// # Errors
    /// [`Error::Unavailable`] for a device or kernel that was asked for and is not here.
    pub fn all(narrowed: Narrowed) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        match narrowed.device {
            DeviceChoice::Auto => {
                let found = gpus().into_iter().flatten().chain(metal_gpus().into_iter().flatten());
                let usable = found.filter(|gpu: &Gpu| gpu.problem.is_none());
                all.extend(usable.map(|gpu| Self { device: gpu.device, kernel: None, threads: None }));
            }
            DeviceChoice::Cpu => {}
            device => {
                select_device(device)?;
                return Ok(vec![Self { device, kernel: None, threads: None }]);
            }
        }
        let available = KernelKind::available();
        let kernels = match narrowed.kernel {
            Some(kernel) if available.contains(&kernel) => vec![kernel],
            Some(kernel) => {
                let names: Vec<_> = available.iter().map(|k| k.name()).collect();
                let reason = format!("it needs {}; this CPU can run: {}", kernel.needs(), names.join(", "));
                return Err(Error::Unavailable { what: format!("kernel {kernel}"), reason });
            }
            None => available,
        };
        let cores = host::physical_cores();
        let cpu = |kernel, threads| Self { device: DeviceChoice::Cpu, kernel: Some(kernel), threads: Some(threads) };
        all.extend(kernels.iter().map(|kernel| cpu(*kernel, narrowed.threads.unwrap_or(cores))));
        if let (None, Some(fastest)) = (narrowed.threads, kernels.first()) {
            let hardware = std::thread::available_parallelism().map_or(1, |n| n.get());
            let fewer = std::iter::successors(Some(1), |n: &usize| n.checked_mul(2)).take_while(|n| *n < cores);
            let counts = fewer.chain((hardware > cores).then_some(hardware));
            all.extend(counts.map(|threads| cpu(*fastest, threads)));
        }
        Ok(all)
    }

    /// The flags that choose it.
    pub fn flags(&self) -> String {
        let mut flags = format!("--device {}", self.device);
        if let Some(kernel) = self.kernel {
            flags += &format!(" --kernel {kernel}");
        }
        if let Some(threads) = self.threads {
            flags += &format!(" --threads {threads}");
        }
        flags
    }
}

/// What a contender did.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// The flags that choose it.
    pub flags: String,
    /// What was measured.
    #[serde(flatten)]
    pub report: Option<Report>,
    /// Seconds from the prompt to the first token, its choice included; one run.
    pub first_token_seconds: Option<f64>,
    /// The tokens that it continues the prompt with, greedily.
    pub tokens: Vec<u32>,
    /// The first of them that is another than the first entry's that ran.
    pub differs_at: Option<usize>,
    /// Why it did not run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

/// All contenders on one model and prompt.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// The model's name.
    pub model: String,
    /// The CPU's name.
    pub cpu: Option<String>,
    /// Physical cores.
    pub cores: usize,
    /// Bytes of this machine's memory.
    pub memory_bytes: Option<u64>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens that follow it.
    pub decode_tokens: usize,
    /// Repetitions of each measurement.
    pub reps: usize,
    /// Why the CPU's energy could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub energy_unreadable: Option<String>,
    /// What each contender did, in the order in which they ran.
    pub entries: Vec<Entry>,
    /// Whether all that ran chose the same tokens.
    pub same_tokens: bool,
    /// Which settings to use, and why.
    pub recommendation: String,
}

/// Runs each contender on the same work, one after the other, each with the model loaded for it; `done` is told each
/// entry. One that fails says so and does not stop the others.
///
/// # Errors
/// [`Error::Request`] for an empty prompt, no tokens or no contenders; the first failure if all fail.
pub fn compare(
    model: &BenchModel,
    options: &LoadOptions,
    contenders: &[Contender],
    work: Workload<'_>,
    mut done: impl FnMut(&Entry),
) -> Result<Comparison> {
    let Workload { prompt, decode_tokens, reps } = work;
    let plan = Plan { pp: prompt.len(), tg: decode_tokens, batch: 1, reps, profile: false };
    plan.check()?;
    let mut entries: Vec<Entry> = Vec::new();
    let mut first_error = None;
    for contender in contenders {
        let mut entry = run(model, options, *contender, prompt, plan).unwrap_or_else(|e| {
            let reason = e.to_string().lines().next().unwrap_or_default().to_owned();
            first_error.get_or_insert(e);
            Entry {
                flags: contender.flags(),
                report: None,
                first_token_seconds: None,
                tokens: Vec::new(),
                differs_at: None,
                failed: Some(reason),
            }
        });
        if let Some(reference) = entries.iter().find(|e| e.report.is_some()).filter(|_| entry.report.is_some()) {
            entry.differs_at = first_difference(&reference.tokens, &entry.tokens);
        }
        done(&entry);
        entries.push(entry);
    }
    if entries.iter().all(|e| e.report.is_none()) {
        return Err(first_error.unwrap_or_else(|| Error::request("devices", "there is nothing to compare")));
    }
    let mut energy_unreadable = None;
    for report in entries.iter_mut().filter_map(|e| e.report.as_mut()) {
        energy_unreadable = report.energy_unreadable.take().or(energy_unreadable);
    }
    Ok(Comparison {
        model: model.name(),
        cpu: host::cpu_name(),
        cores: host::physical_cores(),
        memory_bytes: host::total_bytes(),
        prompt_tokens: prompt.len(),
        decode_tokens,
        reps,
        energy_unreadable,
        same_tokens: entries.iter().all(|e| e.differs_at.is_none()),
        recommendation: recommend(&entries),
        entries,
    })
}

fn run(model: &BenchModel, options: &LoadOptions, contender: Contender, prompt: &[u32], plan: Plan) -> Result<Entry> {
    let options = options.clone().device(&select_device(contender.device)?).kernel(contender.kernel);
    let loaded = model.load(&options.threads(contender.threads).context(Some(plan.pp + plan.tg)))?;
    let report = measure(model.name(), &loaded, plan)?;
    let (seconds, tokens) = first_tokens(&loaded, prompt, plan.tg)?;
    Ok(Entry {
        flags: contender.flags(),
        report: Some(report),
        first_token_seconds: Some(seconds),
        tokens,
        differs_at: None,
        failed: None,
    })
}

/// The first place where two sequences differ.
fn first_difference(a: &[u32], b: &[u32]) -> Option<usize> {
    let common = crate::generate::common_prefix(a, b);
    (common < a.len().max(b.len())).then_some(common)
}

/// Fastest decode; of those that are as fast, the one with fewer threads, as it leaves cores to others.
fn recommend(entries: &[Entry]) -> String {
    let ran: Vec<(&Entry, &Report)> = entries.iter().filter_map(|e| Some((e, e.report.as_ref()?))).collect();
    let fastest = ran.iter().map(|(_, r)| r.decode_tps).fold(0.0, f64::max);
    let as_fast = ran.iter().filter(|(_, r)| r.decode_tps >= fastest * (1.0 - NOISE));
    let best = as_fast.min_by(|(_, a), (_, b)| a.threads.cmp(&b.threads).then(b.prefill_tps.total_cmp(&a.prefill_tps)));
    let Some((best, report)) = best else { return "nothing ran".into() };
    let mut text = format!("{}: {:.2} tokens/s decoded", best.flags, report.decode_tps);
    let others = ran.iter().filter(|(e, _)| e.flags != best.flags);
    let next = others.clone().max_by(|(_, a), (_, b)| a.decode_tps.total_cmp(&b.decode_tps));
    text += &match next {
        None => ", the only one that ran".into(),
        Some((next, r)) if r.decode_tps >= report.decode_tps => {
            format!(", as fast as {} with fewer threads", next.flags)
        }
        Some((next, r)) => format!(", ×{:.2} the next ({})", report.decode_tps / r.decode_tps, next.flags),
    };
    let prefill = others.max_by(|(_, a), (_, b)| a.prefill_tps.total_cmp(&b.prefill_tps));
    if let Some((other, r)) = prefill.filter(|(_, r)| r.prefill_tps > report.prefill_tps * (1.0 + NOISE)) {
        text += &format!("; long prompts are read faster by {} ({:.0} tokens/s)", other.flags, r.prefill_tps);
    }
    text + &format!("; {:.0} % of the bandwidth of its memory", 100.0 * report.decode_share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contenders_are_all_kernels_and_thread_counts_of_this_machine() {
        let cpu = Narrowed { device: DeviceChoice::Cpu, ..Narrowed::default() };
        let all = Contender::all(cpu).unwrap();
        for kernel in KernelKind::available() {
            let here = all.iter().filter(|c| c.kernel == Some(kernel) && c.threads == Some(host::physical_cores()));
            assert_eq!(here.count(), 1, "{kernel}: {all:?}");
        }
        let mut unique: Vec<String> = all.iter().map(Contender::flags).collect();
        unique.sort();
        unique.dedup();
        assert_eq!(unique.len(), all.len(), "{all:?}");
        let one = Contender::all(Narrowed { kernel: Some(KernelKind::Generic), threads: Some(3), ..cpu }).unwrap();
        assert_eq!(one.iter().map(Contender::flags).collect::<Vec<_>>(), ["--device cpu --kernel generic --threads 3"]);
        let other = if cfg!(target_arch = "x86_64") { KernelKind::Neon } else { KernelKind::Avx2 };
        let error = Contender::all(Narrowed { kernel: Some(other), ..cpu }).unwrap_err().to_string();
        assert!(error.contains(other.name()) && error.contains("generic"), "{error}");
        if cfg!(not(feature = "cuda")) {
            let error = Contender::all(Narrowed { device: DeviceChoice::Cuda(0), ..cpu }).unwrap_err().to_string();
            assert!(error.contains("--features cuda"), "{error}");
        }
    }

    #[test]
    fn sequences_differ_where_one_of_them_ends_too() {
        assert_eq!(first_difference(&[1, 2, 3], &[1, 2, 3]), None);
        assert_eq!(first_difference(&[1, 2, 3], &[1, 9, 3]), Some(1));
        assert_eq!(first_difference(&[1, 2], &[1, 2, 3]), Some(2));
    }
}
