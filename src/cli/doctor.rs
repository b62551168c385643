//! `bitnet doctor`: what this machine has, and what would be chosen on it.

use super::model_args::RunArgs;
use super::{first_line, print};
use anyhow::Result;
use candle_bitnet::backend::cpu::{CpuOptions, KernelKind, bandwidth_buffer, read_bandwidth};
use candle_bitnet::backend::host;
use candle_bitnet::backend::{Arrangement, Backend, Gpu, auto_device, gpus};
use candle_bitnet::{DeviceChoice, select_device};
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
    compute_capability: String,
    /// The newest that the driver knows.
    driver_cuda: String,
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
}

/// All that is printed.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    cpu: String,
    architecture: &'static str,
    physical_cores: usize,
    hardware_threads: usize,
    threads: usize,
    kernels: Vec<Kernel>,
    memory_bytes: Option<u64>,
    available_bytes: Option<u64>,
    /// Sustained with all threads.
    read_gbps: Option<f64>,
    devices: Vec<Kind>,
    auto: Auto,
    self_check: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_check: Option<Checked>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let options = CpuOptions { kernel: args.run.kernel, threads: args.run.threads };
    let (device, why) = auto_device();
    let gpu_check = match (args.run.device, device) {
        (DeviceChoice::Cpu, _) | (DeviceChoice::Auto, DeviceChoice::Cpu) => None,
        // Nobody asked for this one: what is wrong with it is an answer, not a failure.
        (DeviceChoice::Auto, found) => Some(check_gpu(found, options).unwrap_or_else(|e| Checked {
            device: found.to_string(),
            self_check: format!("failed: {}", first_line(&e)),
            copy_gbps: None,
        })),
        (asked, _) => Some(check_gpu(asked, options)?),
    };
    let auto = Auto { device: device.to_string(), why };
    let why = if args.run.kernel.is_some() { "asked for with --kernel" } else { "the fastest usable" };
    let report = report(&Backend::new(&Device::Cpu, options)?, why, auto, gpu_check)?;
    let text = if args.json { serde_json::to_string_pretty(&report)? } else { describe(&report) };
    print(&text)
}

fn report(backend: &Backend, why: &'static str, auto: Auto, gpu_check: Option<Checked>) -> Result<Report> {
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
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        cpu: host::cpu_name().unwrap_or_else(|| "unknown".into()),
        architecture: std::env::consts::ARCH,
        physical_cores: host::physical_cores(),
        hardware_threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        threads: cpu.pool().threads(),
        kernels: kernels.into(),
        memory_bytes: host::total_bytes(),
        available_bytes: host::available_bytes(),
        read_gbps,
        devices: vec![
            Kind { name: "cpu", built: true, present: true, reason: None, gpus: Vec::new() },
            cuda(),
            Kind { name: "metal", built: false, present: false, reason: None, gpus: Vec::new() },
        ],
        auto,
        self_check: self_check(backend).map(|()| "the chosen kernel equals the reference")?,
        gpu_check,
    })
}

/// NVIDIA's GPUs, those that the kernels do not run on too.
fn cuda() -> Kind {
    let found = |gpu: Gpu| Found {
        device: gpu.device.to_string(),
        compute_capability: format!("{}.{}", gpu.compute.0, gpu.compute.1),
        driver_cuda: format!("{}.{}", gpu.driver.0, gpu.driver.1),
        memory_bytes: gpu.total_memory,
        free_bytes: gpu.free_memory().ok(),
        usable: gpu.problem.is_none(),
        name: gpu.name,
        problem: gpu.problem,
    };
    let (gpus, reason) = match gpus() {
        Ok(gpus) if gpus.is_empty() => (gpus, Some("the driver shows no GPU to this process".into())),
        Ok(gpus) => (gpus, None),
        Err(e) => (Vec::new(), Some(first_line(&e))),
    };
    let built = cfg!(feature = "cuda");
    Kind { name: "cuda", built, present: !gpus.is_empty(), reason, gpus: gpus.into_iter().map(found).collect() }
}

/// Opens a GPU, compares products with the reference and measures a copy.
fn check_gpu(choice: DeviceChoice, options: CpuOptions) -> Result<Checked> {
    let backend = Backend::new(&select_device(choice)?, options)?;
    self_check(&backend)?;
    Ok(Checked {
        device: backend.device_name(),
        self_check: "its products equal the reference".into(),
        copy_gbps: backend.copy_bandwidth()?.map(|b| b / 1e9),
    })
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
        "bitnet {}\nCPU          {} ({})\ncores        {} physical, {} hardware threads; {} used\n\
         memory       {}, {} available\nread         {}\nself-check   {}\n\nkernels, fastest first:\n",
        r.version,
        r.cpu,
        r.architecture,
        r.physical_cores,
        r.hardware_threads,
        r.threads,
        gb(r.memory_bytes),
        gb(r.available_bytes),
        r.read_gbps.map_or("not measured".into(), |g| format!("{g:.1} GB/s with {} threads", r.threads)),
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
            text += &format!(
                "    {:11} {}, compute capability {}, {} of memory, {free} free, driver for CUDA {}\n",
                gpu.device,
                gpu.name,
                gpu.compute_capability,
                gb(Some(gpu.memory_bytes as u64)),
                gpu.driver_cuda,
            );
            text += &gpu.problem.as_ref().map(|p| format!("    {:11} not usable: {p}\n", "")).unwrap_or_default();
        }
    }
    text += &format!("\nauto         {}: {}\n", r.auto.device, r.auto.why);
    if let Some(gpu) = &r.gpu_check {
        let copy = gpu.copy_gbps.map(|g| format!("; a copy in its memory moves {g:.1} GB/s")).unwrap_or_default();
        text += &format!("GPU check    {}: {}{copy}\n", gpu.device, gpu.self_check);
    }
    text
}
