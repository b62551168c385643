//! `bitnet doctor`: what this machine has, and what would be chosen on it.

use super::model_args::RunArgs;
use super::preset::{self, Explained};
use super::{first_line, print};
use anyhow::Result;
use candle_bitnet::backend::cpu::{CpuOptions, KernelKind, Pool, bandwidth_buffer, read_bandwidth};
use candle_bitnet::backend::host;
use candle_bitnet::backend::topology::Topology;
use candle_bitnet::backend::{Arrangement, Backend, Gpu, auto_device, gpus, metal_gpus};
use candle_bitnet::bench::EnergyCounters;
use candle_bitnet::nn::HeadChoice;
use candle_bitnet::{DeviceChoice, Error, select_device};
use candle_core::Device;
use serde::Serialize;
use std::time::Duration;

/// Bytes that the bandwidth is measured on, and for how long.
const BANDWIDTH_BYTES: usize = 512 << 20;
const BANDWIDTH_TIME: Duration = Duration::from_millis(800);

/// Show what this machine has: CPU features, the kernel chosen and why, memory, bandwidth, devices
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    run: RunArgs,

    /// Compare every kernel of an Apple GPU with the CPU's, and print a table; an exit code of 1 says that one is wrong
    #[arg(long)]
    self_test: bool,

    /// Write JSON
    #[arg(long)]
    json: bool,
}

/// A kernel of this crate on this CPU.
#[derive(Debug, Serialize)]
struct Kernel {
    name: &'static str,
    needs: &'static str,
    usable: bool,
    chosen: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
}

/// Cores that this process may use, and what they mean for threads.
#[derive(Debug, Serialize)]
struct Cores {
    /// Those of which it may use a hardware thread.
    physical_cores: usize,
    /// Of a slower kind, not among these.
    #[serde(skip_serializing_if = "Option::is_none")]
    efficient_cores: Option<usize>,
    hardware_threads: usize,
    /// Those of the machine.
    machine_threads: usize,
    /// Cores' worth of time that a control group allows.
    #[serde(skip_serializing_if = "Option::is_none")]
    quota_cores: Option<f64>,
    numa_nodes: Vec<Node>,
    threads: usize,
    threads_why: String,
    /// Whether each worker is kept on a core of its own.
    threads_seated: bool,
}

/// A NUMA node, as far as this process may use it.
#[derive(Debug, Serialize)]
struct Node {
    node: usize,
    cores: usize,
}

/// A kind of device.
#[derive(Debug, Serialize)]
struct Kind {
    name: &'static str,
    built: bool,
    present: bool,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    gpus: Vec<Found>,
}

/// A GPU of this machine.
#[derive(Debug, Serialize)]
struct Found {
    device: String,
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    compute_capability: Option<String>,
    /// The newest that the driver knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    driver_cuda: Option<String>,
    /// Of an Apple GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    architecture: Option<String>,
    /// Of an Apple GPU, the most that it should be given of the machine's.
    memory_bytes: usize,
    free_bytes: Option<usize>,
    usable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// What --device auto stands for.
#[derive(Debug, Serialize)]
struct Auto {
    device: String,
    why: String,
}

/// The GPU that was asked for, or that auto stands for, at work.
#[derive(Debug, Serialize)]
struct Checked {
    device: String,
    self_check: String,
    /// A copy within its memory, bytes read and written.
    copy_gbps: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    self_test: Vec<Part>,
}

/// A part of the self-test.
#[derive(Debug, Serialize)]
struct Part {
    kernels: &'static str,
    cases: usize,
    /// Outputs a unit in the last place aside.
    aside: usize,
    seconds: f64,
    problem: Option<String>,
}

/// All that is printed.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    cpu: String,
    architecture: &'static str,
    #[serde(flatten)]
    cores: Cores,
    kernels: Vec<Kernel>,
    memory_bytes: Option<u64>,
    available_bytes: Option<u64>,
    /// Sustained with all threads.
    read_gbps: Option<f64>,
    /// CPU packages whose energy can be read.
    energy_packages: Option<usize>,
    /// Why it cannot.
    #[serde(skip_serializing_if = "Option::is_none")]
    energy_unreadable: Option<String>,
    presets: Vec<Explained>,
    preset_that_fits: String,
    devices: Vec<Kind>,
    auto: Auto,
    /// What --head auto stands for.
    head_auto: &'static str,
    self_check: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_check: Option<Checked>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let options = CpuOptions { kernel: args.run.kernel, threads: args.run.threads() };
    let (device, why) = auto_device();
    let gpu_check = match (args.run.device, device) {
        (asked, found) if args.self_test => {
            let asked = if asked == DeviceChoice::Auto { found } else { asked };
            Some(check_gpu(asked, options, true)?)
        }
        (DeviceChoice::Cpu, _) | (DeviceChoice::Auto, DeviceChoice::Cpu) => None,
        // Nobody asked for this one: what is wrong with it is an answer, not a failure.
        (DeviceChoice::Auto, found) => Some(check_gpu(found, options, false).unwrap_or_else(|e| Checked {
            device: found.to_string(),
            self_check: format!("failed: {}", first_line(&e)),
            copy_gbps: None,
            self_test: Vec::new(),
        })),
        (asked, _) => Some(check_gpu(asked, options, false)?),
    };
    let auto = Auto { device: device.to_string(), why };
    let why = if args.run.kernel.is_some() { "asked for with --kernel" } else { "the fastest usable" };
    let asked = match (args.run.threads, args.run.preset) {
        (Some(_), _) => Some("asked for with --threads".into()),
        (None, Some(preset)) => Some(format!("--preset {}", preset.name)),
        (None, None) => None,
    };
    let backend = Backend::new(&Device::Cpu, options)?;
    let cores = cores(Topology::here(), backend.cpu().pool(), asked);
    let report = report(&backend, cores, why, auto, gpu_check)?;
    let text = if args.json { serde_json::to_string_pretty(&report)? } else { describe(&report) };
    print(&text)?;
    let wrong = |part: &&Part| part.problem.is_some();
    match report.gpu_check.iter().flat_map(|check| &check.self_test).find(wrong) {
        Some(Part { kernels, problem: Some(problem), .. }) => {
            anyhow::bail!("self-test: {kernels}: {problem}; use --device cpu, and please report this")
        }
        _ => Ok(()),
    }
}

/// The cores, and why there are so many threads.
fn cores(here: &Topology, pool: &Pool, asked: Option<String>) -> Cores {
    Cores {
        physical_cores: here.cores(),
        efficient_cores: Some(here.efficient_cores()).filter(|n| *n > 0),
        hardware_threads: here.hardware_threads(),
        machine_threads: here.online_threads(),
        quota_cores: here.quota(),
        numa_nodes: here.nodes().into_iter().map(|(node, cores)| Node { node, cores }).collect(),
        threads: pool.threads(),
        threads_why: asked.unwrap_or_else(|| here.why()),
        threads_seated: pool.is_seated(),
    }
}

impl Cores {
    /// In two lines.
    fn describe(&self) -> String {
        let mut text = format!("cores        {} physical", self.physical_cores);
        text += &self.efficient_cores.map(|n| format!(" (and {n} of a slower kind)")).unwrap_or_default();
        text += &format!(", {} hardware threads", self.hardware_threads);
        if self.hardware_threads < self.machine_threads && self.efficient_cores.is_none() {
            text += &format!(" of the machine's {}", self.machine_threads);
        }
        text += &self.quota_cores.map(|quota| format!(", a quota of {quota:.1} cores")).unwrap_or_default();
        let threads = if self.threads == 1 { "1 thread".into() } else { format!("{} threads", self.threads) };
        let of_node = |node: &Node| format!("node {}: {}", node.node, node.cores);
        let nodes: Vec<_> = self.numa_nodes.iter().map(of_node).collect();
        let seats = match (nodes.len(), self.threads_seated) {
            (1, _) => "1 node".into(),
            (n, true) => format!("{n} nodes (cores of {}); each worker is kept on its core", nodes.join(", ")),
            (n, false) => {
                format!("{n} nodes (cores of {}); the threads fit on one, none is kept there", nodes.join(", "))
            }
        };
        format!("{text}; {threads}: {}\nNUMA         {seats}\n", self.threads_why)
    }
}

fn report(
    backend: &Backend,
    cores: Cores,
    why: &'static str,
    auto: Auto,
    gpu_check: Option<Checked>,
) -> Result<Report> {
    let cpu = backend.cpu();
    let usable = KernelKind::available();
    let kernels = KernelKind::ALL.map(|k| Kernel {
        name: k.name(),
        needs: k.needs(),
        usable: usable.contains(&k),
        chosen: k == cpu.kernel(),
        reason: (k == cpu.kernel()).then_some(why),
    });
    // A measurement needs memory to spare; without it the rest is still worth knowing.
    let read_gbps =
        bandwidth_buffer(cpu, BANDWIDTH_BYTES).ok().map(|b| read_bandwidth(cpu, &[&b], BANDWIDTH_TIME) / 1e9);
    let energy = EnergyCounters::open().map(|counters| counters.packages());
    let on_gpu = auto.device != DeviceChoice::Cpu.to_string();
    let (presets, preset_that_fits) = preset::explain(host::physical_cores(), host::total_bytes(), on_gpu);
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        cpu: host::cpu_name().unwrap_or_else(|| "unknown".into()),
        architecture: std::env::consts::ARCH,
        cores,
        kernels: kernels.into(),
        memory_bytes: host::total_bytes(),
        available_bytes: host::available_bytes(),
        read_gbps,
        energy_packages: energy.as_ref().ok().copied(),
        energy_unreadable: energy.err(),
        presets,
        preset_that_fits,
        devices: vec![
            Kind { name: "cpu", built: true, present: true, reason: None, gpus: Vec::new() },
            kind("cuda", cfg!(feature = "cuda"), gpus()),
            kind("metal", cfg!(feature = "metal"), metal_gpus()),
        ],
        auto,
        head_auto: HeadChoice::AUTO,
        self_check: self_check(backend).map(|()| "the chosen kernel equals the reference")?,
        gpu_check,
    })
}

/// A kind of GPU, those that the kernels do not run on too.
fn kind(name: &'static str, built: bool, found: Result<Vec<Gpu>, Error>) -> Kind {
    let version = |v: Option<(u32, u32)>| v.map(|(major, minor)| format!("{major}.{minor}"));
    let describe = |gpu: Gpu| Found {
        device: gpu.device.to_string(),
        compute_capability: version(gpu.compute),
        driver_cuda: version(gpu.driver),
        architecture: gpu.architecture.clone(),
        memory_bytes: gpu.total_memory,
        free_bytes: gpu.free_memory().ok(),
        usable: gpu.problem.is_none(),
        name: gpu.name,
        problem: gpu.problem,
    };
    let (gpus, reason) = match found {
        Ok(gpus) if gpus.is_empty() => (gpus, Some("the driver shows no GPU to this process".into())),
        Ok(gpus) => (gpus, None),
        Err(e) => (Vec::new(), Some(first_line(&e))),
    };
    Kind { name, built, present: !gpus.is_empty(), reason, gpus: gpus.into_iter().map(describe).collect() }
}

/// Opens a GPU, compares products or all kernels with the reference and measures a copy.
fn check_gpu(choice: DeviceChoice, options: CpuOptions, all_kernels: bool) -> Result<Checked> {
    let backend = Backend::new(&select_device(choice)?, options)?;
    self_check(&backend)?;
    let self_test = if all_kernels { self_test(&backend)? } else { Vec::new() };
    Ok(Checked {
        device: backend.device_name(),
        self_check: "its products equal the reference".into(),
        copy_gbps: backend.copy_bandwidth()?.map(|b| b / 1e9),
        self_test,
    })
}

/// Runs the kernel suite on the device.
#[cfg(feature = "metal")]
fn self_test(backend: &Backend) -> Result<Vec<Part>> {
    let Ok(metal) = backend.metal() else {
        let reason = format!("it is for Apple GPUs, and the device is {}; give --device metal", backend.device_name());
        return Err(Error::request("--self-test", reason).into());
    };
    let done = candle_bitnet::backend::metal::self_test(metal, |part| {
        eprintln!("{}: {} cases in {:.1} s", part.name, part.cases, part.time.as_secs_f64());
    })?;
    let part = |p: candle_bitnet::backend::metal::SelfTest| Part {
        kernels: p.name,
        cases: p.cases,
        aside: p.aside,
        seconds: p.time.as_secs_f64(),
        problem: p.problem,
    };
    Ok(done.into_iter().map(part).collect())
}

/// This build has no kernels that have a suite.
#[cfg(not(feature = "metal"))]
fn self_test(_: &Backend) -> Result<Vec<Part>> {
    Err(Error::request("--self-test", "it is for Apple GPUs: on macOS, build with --features metal").into())
}

/// Packs a small weight, which runs the CPU's kernel against the reference; a GPU's runs when it is opened.
fn self_check(backend: &Backend) -> Result<()> {
    use candle_bitnet::ternary::{PackedTernary, Scale};
    let weights: Vec<i8> = (0..16 * 300).map(|i| (i * 7 % 3) as i8 - 1).collect();
    backend.pack(&[PackedTernary::from_weights(16, 300, &weights, Scale::Multiply(1.0))?], Arrangement::Stacked)?;
    Ok(())
}

fn describe(r: &Report) -> String {
    let gb = |bytes: Option<u64>| bytes.map_or("unknown".into(), |b| format!("{:.1} GB", b as f64 / 1e9));
    let mut text = format!(
        "bitnet {}\nCPU          {} ({})\n{}\
         memory       {}, {} available\nread         {}\nenergy       {}\nself-check   {}\n\nkernels, fastest first:\n",
        r.version,
        r.cpu,
        r.architecture,
        r.cores.describe(),
        gb(r.memory_bytes),
        gb(r.available_bytes),
        r.read_gbps.map_or("not measured".into(), |g| format!("{g:.1} GB/s with {} threads", r.cores.threads)),
        match (r.energy_packages, &r.energy_unreadable) {
            (Some(n), _) => format!("readable, {n} CPU package{}", if n == 1 { "" } else { "s" }),
            (None, reason) => format!("not readable: {}", reason.as_deref().unwrap_or("unknown")),
        },
        r.self_check,
    );
    for k in &r.kernels {
        let state = match (k.reason, k.usable) {
            (Some(why), _) => format!("chosen: {why}"),
            (None, true) => "usable".into(),
            (None, false) => "not on this CPU".into(),
        };
        text += &format!("  {:13} {state} (needs {})\n", k.name, k.needs);
    }
    text += "\ndevices:\n";
    for d in &r.devices {
        let state = match (d.built, d.present, &d.reason) {
            (true, true, _) => "built in and present".into(),
            (true, false, Some(reason)) => format!("built in, none present: {reason}"),
            (true, false, None) => "built in, none present".into(),
            (false, _, Some(reason)) => format!("not in this build: {reason}"),
            (false, _, None) => "not in this build".into(),
        };
        text += &format!("  {:13} {state}\n", d.name);
        for gpu in &d.gpus {
            let free = gpu.free_bytes.map_or("unknown".into(), |b| gb(Some(b as u64)));
            let memory = gb(Some(gpu.memory_bytes as u64));
            text += &match (&gpu.compute_capability, &gpu.architecture) {
                (Some(compute), _) => format!(
                    "    {:11} {}, compute capability {compute}, {memory} of memory, {free} free, driver for CUDA {}\n",
                    gpu.device,
                    gpu.name,
                    gpu.driver_cuda.as_deref().unwrap_or("unknown"),
                ),
                (None, architecture) => format!(
                    "    {:11} {}, {}, recommended working set {memory}\n",
                    gpu.device,
                    gpu.name,
                    architecture.as_deref().unwrap_or("unknown"),
                ),
            };
            text += &gpu.problem.as_ref().map(|p| format!("    {:11} not usable: {p}\n", "")).unwrap_or_default();
        }
    }
    text += &format!("\nauto         {}: {}\n", r.auto.device, r.auto.why);
    text += &format!("head         auto: {}\n", r.head_auto);
    if let Some(gpu) = &r.gpu_check {
        let copy = gpu.copy_gbps.map(|g| format!("; a copy in its memory moves {g:.1} GB/s")).unwrap_or_default();
        text += &format!("GPU check    {}: {}{copy}\n", gpu.device, gpu.self_check);
        text += &table(&gpu.self_test);
    }
    text + &preset::describe(&r.presets, &r.preset_that_fits)
}

/// The self-test's parts, one a line.
fn table(parts: &[Part]) -> String {
    if parts.is_empty() {
        return String::new();
    }
    let mut text = format!("\n{:24} {:>6} {:>6} {:>8}  result\n", "self-test", "cases", "aside", "seconds");
    for p in parts {
        let result = p.problem.as_ref().map_or("equal".into(), |problem| format!("WRONG: {problem}"));
        text += &format!("{:24} {:>6} {:>6} {:>8.1}  {result}\n", p.kernels, p.cases, p.aside, p.seconds);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_explained() {
        let node = |node, cores| Node { node, cores };
        let two = Cores {
            physical_cores: 48,
            efficient_cores: None,
            hardware_threads: 96,
            machine_threads: 128,
            quota_cores: None,
            numa_nodes: vec![node(0, 32), node(1, 16)],
            threads: 48,
            threads_why: "one for each core that the affinity mask allows".into(),
            threads_seated: true,
        };
        assert_eq!(
            two.describe(),
            "cores        48 physical, 96 hardware threads of the machine's 128; 48 threads: one for each core that the \
             affinity mask allows\nNUMA         2 nodes (cores of node 0: 32, node 1: 16); each worker is kept on its core\n"
        );
        let few = Cores { threads: 1, threads_why: "asked for with --threads".into(), threads_seated: false, ..two };
        let text = few.describe();
        assert!(text.contains("; 1 thread: asked for") && text.contains("fit on one, none is kept"), "{text}");
        let container = Cores { quota_cores: Some(2.5), numa_nodes: vec![node(0, 48)], ..few };
        let text = container.describe();
        assert!(text.contains(", a quota of 2.5 cores; ") && text.ends_with("NUMA         1 node\n"), "{text}");
        let apple = Cores { efficient_cores: Some(4), hardware_threads: 8, quota_cores: None, ..container };
        assert!(apple.describe().contains("48 physical (and 4 of a slower kind), 8 hardware threads; "));
    }

    #[test]
    fn this_machine_has_cores() {
        let here = Topology::here();
        let cores = cores(here, &Pool::new(here.threads()), None);
        assert_eq!((cores.threads, cores.physical_cores), (here.threads(), here.cores()));
        assert_eq!(cores.threads_why, here.why());
        assert_eq!(cores.numa_nodes.iter().map(|node| node.cores).sum::<usize>(), cores.physical_cores);
    }
}
