//! What `bench` reports of a model and this machine.

use super::operations::{self, Operation};
use crate::cli::on_threads;
use serde::Serialize;

/// All that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub device: String,
    pub kernel: String,
    /// Of the CPU; none on a GPU.
    pub threads: Option<usize>,
    pub cpu: Option<String>,
    /// Sequences that are decoded together.
    pub batch: usize,
    /// Of each sequence.
    pub prefill_tokens: usize,
    pub decode_tokens: usize,
    /// Tokens a second of all sequences, median.
    pub prefill_tps: f64,
    pub prefill_tps_range: [f64; 2],
    pub decode_tps: f64,
    pub decode_tps_range: [f64; 2],
    /// Stored bytes that a token reads which is decoded alone.
    pub bytes_per_token: usize,
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
    pub bytes_per_token_dense: usize,
    pub bytes_per_token_adapter: usize,
    /// Mean over the decoded positions.
    pub bytes_per_token_kv: usize,
    /// Of a step of all sequences: the weights once, and every sequence's keys and values.
    pub bytes_per_step: usize,
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
    pub device_total_bytes: Option<usize>,
    pub load_seconds: f64,
    pub kv_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<Vec<Operation>>,
}

impl Report {
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
            on_threads(self.threads),
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
        let step_ms = 1e3 * self.batch as f64 / self.decode_tps;
        text + &self.profile.as_ref().map(|p| operations::describe(p, step_ms)).unwrap_or_default()
    }
}
