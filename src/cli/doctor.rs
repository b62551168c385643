//! `bitnet doctor`: what this machine has, and what would be chosen on it.

use super::model_args::RunArgs;
use super::print;
use anyhow::Result;
use candle_bitnet::backend::cpu::{CpuOptions, KernelKind, bandwidth_buffer, read_bandwidth};
use candle_bitnet::backend::host;
use candle_bitnet::backend::{Arrangement, Backend};
use candle_bitnet::select_device;
use serde::Serialize;
use std::time::Duration;

/// Bytes that the bandwidth is measured on, and for how long.
const BANDWIDTH_BYTES: usize = 512 << 20;
const BANDWIDTH_TIME: Duration = Duration::from_millis(800);

/// Show what this machine has: CPU features, the kernel chosen and why, memory, read bandwidth, devices
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
struct Device {
    name: &'static str,
    built: bool,
    present: bool,
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
    devices: Vec<Device>,
    self_check: &'static str,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let device = select_device(args.run.device)?;
    let options = CpuOptions { kernel: args.run.kernel, threads: args.run.threads };
    let backend = Backend::new(&device, options)?;
    let why = if args.run.kernel.is_some() { "asked for with --kernel" } else { "the fastest usable" };
    let report = report(&backend, why)?;
    let text = if args.json { serde_json::to_string_pretty(&report)? } else { describe(&report) };
    print(&text)
}

fn report(backend: &Backend, why: &'static str) -> Result<Report> {
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
            Device { name: "cpu", built: true, present: true },
            Device { name: "cuda", built: false, present: false },
            Device { name: "metal", built: false, present: false },
        ],
        self_check: self_check(backend)?,
    })
}

/// Packs a small weight, which runs the kernel against the reference.
fn self_check(backend: &Backend) -> Result<&'static str> {
    use candle_bitnet::ternary::{PackedTernary, Scale};
    let weights: Vec<i8> = (0..16 * 300).map(|i| (i * 7 % 3) as i8 - 1).collect();
    backend.pack(&[PackedTernary::from_weights(16, 300, &weights, Scale::Multiply(1.0))?], Arrangement::Stacked)?;
    Ok("the chosen kernel equals the reference")
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
        let state = match (d.built, d.present) {
            (true, true) => "built in and present",
            (true, false) => "built in, none present",
            (false, _) => "not in this build",
        };
        text += &format!("  {:13} {state}\n", d.name);
    }
    text
}
