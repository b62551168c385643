//! What is reported of a model and this machine.

use super::baseline::Baseline;
use super::operations::{self, Operation};
use serde::Serialize;

/// All that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The model's name.
    pub model: String,
    /// Where it ran.
    pub device: String,
    /// The ternary kernel.
    pub kernel: String,
    /// Of the CPU; none on a GPU.
    pub threads: Option<usize>,
    /// The CPU's name.
    pub cpu: Option<String>,
    /// Sequences that are decoded together.
    pub batch: usize,
    /// Of each sequence.
    pub prefill_tokens: usize,
    /// Steps of each sequence.
    pub decode_tokens: usize,
    /// Tokens a second of all sequences, median.
    pub prefill_tps: f64,
    /// Least and most of the repetitions.
    pub prefill_tps_range: [f64; 2],
    /// Tokens a second of all sequences, median.
    pub decode_tps: f64,
    /// Least and most of the repetitions.
    pub decode_tps_range: [f64; 2],
    /// Stored bytes that a token reads which is decoded alone.
    pub bytes_per_token: usize,
    /// Of these, packed ternary weights.
    pub bytes_per_token_ternary: usize,
    /// Measured: of a screened head with the rows that it computes; in a batch, of the step.
    pub bytes_per_token_head: usize,
    /// How the output head is computed.
    pub head: String,
    /// Rows of a screened head of which more bits were read than of all, mean over the tokens. None where nothing was
    /// screened.
    pub head_rows_refined: Option<f64>,
    /// Likewise, rows that were computed from the stored weights.
    pub head_rows_rescored: Option<f64>,
    /// Of these, projections that are not ternary.
    pub bytes_per_token_dense: usize,
    /// Of these, the adapter.
    pub bytes_per_token_adapter: usize,
    /// Mean over the decoded positions.
    pub bytes_per_token_kv: usize,
    /// Of all weights in memory, an embedding that is not the head as well.
    pub weight_bytes: usize,
    /// Of a step of all sequences: the weights once, and every sequence's keys and values.
    pub bytes_per_step: usize,
    /// Stored bytes that decode reads in a second, in GB.
    pub decode_gbps: f64,
    /// How fast the same threads read the same weights, computing nothing; after each repetition, median. None on a GPU.
    pub read_gbps: Option<f64>,
    /// How fast a copy reads and writes the GPU's memory; after each repetition, median. None on the CPU.
    pub copy_gbps: Option<f64>,
    /// Of the bandwidth.
    pub decode_share: f64,
    /// Of this process in the host's memory.
    pub resident_bytes: Option<u64>,
    /// In use of the GPU's memory, by all processes.
    pub device_bytes: Option<usize>,
    /// Of the GPU's memory.
    pub device_total_bytes: Option<usize>,
    /// From opening the checkpoint to the last packed weight.
    pub load_seconds: f64,
    /// Type of the KV cache.
    pub kv_type: &'static str,
    /// Where it can be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub energy: Option<Energy>,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub energy_unreadable: Option<String>,
    /// The dense model of the same shape, measured after this one had left the memory.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub baselines: Vec<Baseline>,
    /// Of a decode step, in a run of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<Vec<Operation>>,
}

/// Energy of the CPU's packages, with everything in them that ran meanwhile; on a GPU its own is not in it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Energy {
    /// CPU packages that are counted.
    pub packages: usize,
    /// Median of the repetitions.
    pub prefill_joules_per_token: f64,
    /// Median of the repetitions.
    pub decode_joules_per_token: f64,
    /// Mean power of a decode, median of the repetitions.
    pub decode_watts: f64,
}

impl std::fmt::Display for Energy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let packages =
            if self.packages == 1 { "the CPU package".into() } else { format!("{} CPU packages", self.packages) };
        write!(
            f,
            "{:.3} J a token decoded, {:.3} J prefilled; {:.1} W of {packages}",
            self.decode_joules_per_token, self.prefill_joules_per_token, self.decode_watts
        )
    }
}

impl Report {
    /// What is printed of energy, whether it was read or not.
    pub(super) fn energy_line(energy: Option<&Energy>, unreadable: Option<&str>) -> String {
        match (energy, unreadable) {
            (Some(energy), _) => format!("energy    {energy}\n"),
            (None, Some(reason)) => format!("energy    not readable: {reason}\n"),
            (None, None) => String::new(),
        }
    }

    /// For people.
    pub fn describe(&self) -> String {
        let mb = |bytes: usize| bytes as f64 / 1e6;
        let (each, step) = match self.batch {
            1 => (String::new(), String::new()),
            n => (format!("{n} × "), format!("a step    {:.1} MB for {n} sequences\n", mb(self.bytes_per_step))),
        };
        let bandwidth = match (self.copy_gbps, self.read_gbps) {
            (Some(copied), _) => format!("{copied:.1} GB/s that a copy in its memory moves here"),
            (None, read) => {
                let n = self.threads.unwrap_or(1);
                let threads = if n == 1 { "1 thread reads".into() } else { format!("{n} threads read") };
                format!("{:.1} GB/s that {threads} here", read.unwrap_or_default())
            }
        };
        let device = match (self.device_bytes, self.device_total_bytes) {
            (Some(used), Some(total)) => {
                format!("device    {:.2} of {:.1} GB of memory in use\n", used as f64 / 1e9, total as f64 / 1e9)
            }
            _ => String::new(),
        };
        let rescored = match (self.head_rows_refined, self.head_rows_rescored) {
            (Some(refined), Some(rescored)) => {
                format!("screened  {rescored:.1} rows of the head computed a token, {refined:.1} looked at twice\n")
            }
            _ => String::new(),
        };
        let text = format!(
            "{}: {} kernel {}{}, KV {}{}\n\
             load      {:.2} s\n\
             prefill   {:.1} tokens/s ({:.1} to {:.1}), {each}{} tokens\n\
             decode    {:.2} tokens/s ({:.2} to {:.2}), {each}{} tokens\n\
             a token   {:.1} MB: ternary {:.1}, head {:.1} ({}), other {:.1}, KV {:.1}\n\
             {rescored}\
             {step}bandwidth {:.1} GB/s of the {bandwidth}: {:.0} %\n\
             {device}resident  {}\n",
            self.model,
            self.device,
            self.kernel,
            self.threads.map(|n| format!(", {n} thread{}", if n == 1 { "" } else { "s" })).unwrap_or_default(),
            self.kv_type,
            self.cpu.as_ref().map(|c| format!("; {c}")).unwrap_or_default(),
            self.load_seconds,
            self.prefill_tps,
            self.prefill_tps_range[0],
            self.prefill_tps_range[1],
            self.prefill_tokens,
            self.decode_tps,
            self.decode_tps_range[0],
            self.decode_tps_range[1],
            self.decode_tokens,
            mb(self.bytes_per_token),
            mb(self.bytes_per_token_ternary),
            mb(self.bytes_per_token_head),
            self.head,
            mb(self.bytes_per_token_dense + self.bytes_per_token_adapter),
            mb(self.bytes_per_token_kv),
            self.decode_gbps,
            100.0 * self.decode_share,
            self.resident_bytes.map_or("unknown".into(), |b| format!("{:.0} MB", b as f64 / 1e6)),
        );
        let text = text
            + &Self::energy_line(self.energy.as_ref(), self.energy_unreadable.as_deref())
            + &self.baselines.iter().map(|b| b.describe(self)).collect::<String>();
        let step_ms = 1e3 * self.batch as f64 / self.decode_tps;
        text + &self.profile.as_ref().map(|p| operations::describe(p, step_ms)).unwrap_or_default()
    }
}
