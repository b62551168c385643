//! The full-precision baseline: candle-transformers' dense Llama of the same shape with random weights, measured in the
//! same run, after the ternary model has left the memory. The feature `baseline` brings that model.

#[cfg(feature = "baseline")]
mod dense;
#[cfg(not(feature = "baseline"))]
mod dense {
    use super::*;

    pub(super) fn run(_: &ModelConfig, _: DType, _: Plan) -> Result<(Spread, Spread, Option<u64>)> {
        Err(left_out())
    }
}

use super::measure::Plan;
use super::memory;
use super::report::Report;
#[cfg(not(feature = "baseline"))]
use super::spread::Spread;
use crate::model::config::ModelConfig;
use crate::{Error, Result};
use candle_core::DType;
use serde::Serialize;

/// Type of the baseline's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BaselineType {
    /// Four bytes a weight.
    F32,
    /// Two bytes a weight, which candle widens to f32 for every product on a CPU.
    BF16,
}

impl BaselineType {
    /// The name that `--baseline` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::BF16 => "bf16",
        }
    }

    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::BF16 => DType::BF16,
        }
    }
}

impl std::str::FromStr for BaselineType {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        [Self::F32, Self::BF16]
            .into_iter()
            .find(|t| t.name() == s)
            .ok_or_else(|| Error::request("--baseline", format!("'{s}' is not one of f32, bf16")))
    }
}

/// What the dense model of the same shape did, and how the ternary one compares.
#[derive(Debug, Clone, Serialize)]
pub struct Baseline {
    /// What computed.
    pub program: &'static str,
    /// Type of weights, activations and KV cache.
    pub dtype: BaselineType,
    /// Threads that candle computes products with.
    pub threads: usize,
    /// Tokens a second of all sequences, median.
    pub prefill_tps: f64,
    /// Least and most of the repetitions.
    pub prefill_tps_range: [f64; 2],
    /// Tokens a second of all sequences, median.
    pub decode_tps: f64,
    /// Least and most of the repetitions.
    pub decode_tps_range: [f64; 2],
    /// Of all weights.
    pub weight_bytes: u64,
    /// Of this process in the host's memory, after the last repetition.
    pub resident_bytes: Option<u64>,
    /// Times as fast is the ternary model's prefill.
    pub prefill_speedup: f64,
    /// Times as fast is the ternary model's decode.
    pub decode_speedup: f64,
    /// Times as many bytes have the dense weights.
    pub weight_ratio: f64,
    /// Times as many bytes are resident.
    pub resident_ratio: Option<f64>,
}

impl Baseline {
    /// Refuses what [`Self::measure`] would refuse, before anything is loaded.
    ///
    /// # Errors
    /// As [`Self::measure`].
    pub fn check(config: &ModelConfig, dtype: BaselineType, plan: Plan, on_cpu: bool) -> Result<()> {
        if cfg!(not(feature = "baseline")) {
            return Err(left_out());
        }
        if !on_cpu {
            return Err(not_on_the_cpu());
        }
        if config.head_dim * config.num_heads != config.hidden_size {
            let (heads, width) = (config.num_heads, config.head_dim);
            let reason = format!(
                "{heads} heads of {width} are not the hidden size {}, and candle-transformers' Llama has no other",
                config.hidden_size
            );
            return Err(Error::request("--baseline", reason));
        }
        memory::ensure(&format!("the {} baseline", dtype.name()), bytes_needed(config, dtype, plan))
    }

    /// Measures the dense model of this shape on the CPU as `plan` says; `report` is the ternary model's, which must have
    /// left the memory.
    ///
    /// # Errors
    /// [`Error::Request`] for a model on a GPU or a shape that candle-transformers' Llama cannot have,
    /// [`Error::Unavailable`] if memory will not hold it or the program was built without it; those of candle.
    pub fn measure(config: &ModelConfig, dtype: BaselineType, plan: Plan, report: &Report) -> Result<Self> {
        let Some(threads) = report.threads else { return Err(not_on_the_cpu()) };
        Self::check(config, dtype, plan, true)?;
        // As many threads as the ternary model had. candle cuts a product into as many parts as it believes in.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|e| Error::Unavailable {
            what: format!("a pool of {threads} threads"),
            reason: format!("{e}; ask for fewer --threads"),
        })?;
        let (prefill, decode, resident_bytes) = pool.install(|| dense::run(config, dtype.dtype(), plan))?;
        let weight_bytes = config.parameters() * dtype.dtype().size_in_bytes() as u64;
        Ok(Self {
            program: "candle-transformers llama",
            dtype,
            threads: threads.min(candle_core::utils::get_num_threads()),
            prefill_speedup: report.prefill_tps / prefill.median,
            decode_speedup: report.decode_tps / decode.median,
            weight_ratio: weight_bytes as f64 / report.weight_bytes as f64,
            resident_ratio: resident_bytes.zip(report.resident_bytes).map(|(dense, ours)| dense as f64 / ours as f64),
            prefill_tps: prefill.median,
            prefill_tps_range: [prefill.min, prefill.max],
            decode_tps: decode.median,
            decode_tps_range: [decode.min, decode.max],
            weight_bytes,
            resident_bytes,
        })
    }

    /// For people; `ours` is the ternary model's report.
    pub(super) fn describe(&self, ours: &Report) -> String {
        let size = |bytes: u64| match bytes {
            0..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
            _ => format!("{:.2} GB", bytes as f64 / 1e9),
        };
        let resident = match (self.resident_bytes, self.resident_ratio) {
            (Some(bytes), Some(ratio)) => format!("; resident {}, ×{ratio:.1}", size(bytes)),
            _ => String::new(),
        };
        format!(
            "\nagainst a dense model of this shape: {}, {}, {} thread{}\n\
             prefill   {:.1} tokens/s ({:.1} to {:.1}): ternary is ×{:.1}\n\
             decode    {:.2} tokens/s ({:.2} to {:.2}): ternary is ×{:.1}\n\
             weights   {} instead of {}: ×{:.1}{resident}\n",
            self.program,
            self.dtype.name(),
            self.threads,
            if self.threads == 1 { "" } else { "s" },
            self.prefill_tps,
            self.prefill_tps_range[0],
            self.prefill_tps_range[1],
            self.prefill_speedup,
            self.decode_tps,
            self.decode_tps_range[0],
            self.decode_tps_range[1],
            self.decode_speedup,
            size(self.weight_bytes),
            size(ours.weight_bytes as u64),
            self.weight_ratio,
        )
    }
}

fn not_on_the_cpu() -> Error {
    Error::request("--baseline", "it is measured on the CPU: add --device cpu")
}

fn left_out() -> Error {
    Error::Unavailable {
        what: "the dense baseline".into(),
        reason: "this program was built without it: build with cargo's feature `baseline`, which is on by default"
            .into(),
    }
}

/// Weights, keys and values with the copies that growing them makes, scores of all heads, and what bf16 is widened into.
fn bytes_needed(config: &ModelConfig, dtype: BaselineType, plan: Plan) -> u64 {
    let size = dtype.dtype().size_in_bytes() as u64;
    let (pp, length, batch) = (plan.pp as u64, (plan.pp + plan.tg) as u64, plan.batch as u64);
    let groups = (config.num_heads / config.num_kv_heads.max(1)) as u64;
    let kv = 2 * config.kv_size() as u64 * length * batch * size;
    let kv = kv * (config.num_layers as u64 + 2 * groups);
    let scores = 4 * batch * config.num_heads as u64 * pp * pp * 4;
    let largest = (config.vocab_size as u64).max(config.intermediate_size as u64) * config.hidden_size as u64;
    let widened = if dtype == BaselineType::BF16 { 4 * largest } else { 0 };
    config.parameters() * size + kv + scores + widened
}

#[cfg(all(test, feature = "baseline"))]
mod tests {
    use super::*;
    use crate::model::presets::Preset;

    #[test]
    fn memory_is_counted_before_anything_is_made() {
        let config = Preset::find("2b4t").unwrap().config();
        let plan = Plan { pp: 512, tg: 64, batch: 1, reps: 1, profile: false };
        let needed = |dtype| bytes_needed(&config, dtype, plan) as f64 / 1e9;
        assert!((9.6..10.5).contains(&needed(BaselineType::F32)), "{}", needed(BaselineType::F32));
        let refused = Baseline::check(&config, BaselineType::F32, plan, false).unwrap_err();
        assert!(refused.to_string().contains("--device cpu"), "{refused}");
        let wide = ModelConfig { head_dim: 64, ..config.clone() };
        let refused = Baseline::check(&wide, BaselineType::F32, plan, true).unwrap_err().to_string();
        assert!(refused.contains("20 heads of 64 are not the hidden size 2560"), "{refused}");
        let endless = ModelConfig { num_layers: 1 << 20, ..config.clone() };
        let refused = Baseline::check(&endless, BaselineType::F32, plan, true).unwrap_err();
        assert!(matches!(refused, Error::Unavailable { .. }), "{refused}");
        assert!((6.1..7.0).contains(&needed(BaselineType::BF16)), "{}", needed(BaselineType::BF16));
        assert!("f16".parse::<BaselineType>().unwrap_err().to_string().contains("f32, bf16"));
    }
}
