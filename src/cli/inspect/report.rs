//! What `bitnet inspect` finds out.

mod gguf;

use candle_bitnet::Result;
use candle_bitnet::checkpoint::{Checkpoint, LinearWeight, ScaleStyle};
use candle_bitnet::model::config::{Mode, ModelConfig, Projection};
use candle_bitnet::model::ternary_of;
use candle_bitnet::ternary::PackedTernary;
use gguf::GgufReport;
use indicatif::HumanBytes;
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// A scale this many times above or below the median of its kind is worth a remark.
const SCALE_OUTLIER: f32 = 8.0;

/// Everything, in the order in which it is printed. JSON keys are the field names.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    path: String,
    family: &'static str,
    layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    context_length: usize,
    activation: &'static str,
    sub_norms: bool,
    tied_embeddings: bool,
    rope_theta: f64,
    rms_norm_eps: f32,
    quantization_mode: &'static str,
    weight_scale: &'static str,
    use_rms_norm: bool,
    parameters: u64,
    ternary_parameters: u64,
    files: Vec<FileReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gguf: Option<GgufReport>,
    tensors: usize,
    stored_bytes: BTreeMap<&'static str, u64>,
    projections: Vec<ProjectionReport>,
    resident: Resident,
    warnings: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensor_list: Option<Vec<TensorReport>>,
}

#[derive(Debug, Serialize)]
struct FileReport {
    path: String,
    bytes: u64,
    tensors: usize,
}

#[derive(Debug, Serialize)]
struct TensorReport {
    name: String,
    /// The name in a GGUF file.
    #[serde(skip_serializing_if = "Option::is_none")]
    stored_name: Option<String>,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: u64,
    file: usize,
}

/// One kind of projection over all layers.
#[derive(Debug, Serialize)]
struct ProjectionReport {
    name: &'static str,
    rows: usize,
    cols: usize,
    ternary_layers: usize,
    dense_layers: usize,
    stored_bytes: u64,
    stored_bits_per_weight: f64,
    /// Share of zeros among the ternary weights.
    zeros: f64,
    /// What multiplies the integer product.
    multiplier_min: f32,
    multiplier_median: f32,
    multiplier_max: f32,
}

/// Bytes in memory after loading.
#[derive(Debug, Serialize)]
struct Resident {
    ternary_bytes: u64,
    embedding_bytes: u64,
    head_bytes: u64,
    dense_linear_bytes: u64,
    norm_bytes: u64,
    total_bytes: u64,
    kv_bytes_per_position_f32: u64,
    kv_bytes_per_position_bf16: u64,
    kv_bytes_per_position_f16: u64,
}

/// What one projection of one layer turned out to be.
struct Linear {
    which: Projection,
    name: String,
    stored: u64,
    ternary: Option<Ternary>,
}

struct Ternary {
    histogram: [usize; 3],
    multiplier: f32,
    resident: u64,
    constant_rows: usize,
}

impl Report {
    /// Reads every weight once.
    pub(super) fn of(checkpoint: &Checkpoint, list: bool) -> Result<Self> {
        let (path, text) = checkpoint.config();
        let config = ModelConfig::parse(path, text)?;
        let mut warnings = Vec::new();
        let named = |names: &[&str]| match names {
            [first, _, _, _, _, ..] => format!("{first} and {} more", names.len() - 1),
            few => few.join(", "),
        };
        let unexplained = config.unexplained(checkpoint.names());
        if !unexplained.is_empty() {
            let found = named(&unexplained);
            warnings.push(format!("tensors without a meaning in this family (a model will refuse them): {found}"));
        }
        if config.tied_embeddings && checkpoint.contains("lm_head.weight") {
            warnings.push("lm_head.weight is there, but tie_word_embeddings makes the embedding the head".into());
        }

        let all: Vec<(usize, Projection)> =
            (0..config.num_layers).flat_map(|layer| Projection::ALL.map(|which| (layer, which))).collect();
        let linears: Vec<Linear> =
            all.par_iter().map(|(layer, which)| linear(checkpoint, &config, *layer, *which)).collect::<Result<_>>()?;
        let mut norm_bytes = 4 * checkpoint.vector("model.norm.weight", config.hidden_size)?.len() as u64;
        for (name, len) in (0..config.num_layers).flat_map(|layer| config.norms(layer)) {
            norm_bytes += 4 * checkpoint.vector(&name, len)?.len() as u64;
        }
        if config.quantization.use_rms_norm {
            for (layer, which) in &all {
                let (name, (_, cols)) = (config.projection_name(*layer, *which), config.projection_shape(*which));
                if config.is_converted(&name) {
                    norm_bytes += 4 * checkpoint.vector(&format!("{name}.rms_norm.weight"), cols)?.len() as u64;
                }
            }
        }
        let matrix = |name| checkpoint.matrix(name, config.vocab_size, config.hidden_size);
        let embedding_bytes = matrix("model.embed_tokens.weight")?.resident_bytes() as u64;
        let head_bytes = match config.tied_embeddings {
            true => 0,
            false => matrix("lm_head.weight")?.resident_bytes() as u64,
        };
        let gguf = checkpoint.source().gguf()?.map(|file| GgufReport::of(&file, checkpoint)).transpose()?;
        gguf.iter().for_each(|g| g.remarks(&mut warnings));

        let projections: Vec<_> = Projection::ALL.iter().map(|p| ProjectionReport::of(&config, *p, &linears)).collect();
        for (projection, which) in projections.iter().zip(Projection::ALL) {
            projection.remarks(&linears, which, &mut warnings);
        }
        let ternary = |f: fn(&Ternary) -> u64| linears.iter().filter_map(|l| l.ternary.as_ref()).map(f).sum::<u64>();
        let dense = linears.iter().filter(|l| l.ternary.is_none()).map(|l| l.stored).sum();
        let kv = 2 * config.num_layers as u64 * config.kv_size() as u64;
        let mut resident = Resident {
            ternary_bytes: ternary(|t| t.resident),
            embedding_bytes,
            head_bytes,
            dense_linear_bytes: dense,
            norm_bytes,
            total_bytes: 0,
            kv_bytes_per_position_f32: 4 * kv,
            kv_bytes_per_position_bf16: 2 * kv,
            kv_bytes_per_position_f16: 2 * kv,
        };
        resident.total_bytes = resident.ternary_bytes + embedding_bytes + head_bytes + dense + norm_bytes;

        let mut stored_bytes = BTreeMap::new();
        for t in checkpoint.tensors() {
            *stored_bytes.entry(t.dtype.name()).or_default() += t.range.len() as u64;
        }
        let file = |(i, file): (usize, &std::sync::Arc<_>)| file_report(checkpoint, i, file);
        Ok(Self {
            path: checkpoint.source().to_string(),
            family: config.family.architecture(),
            layers: config.num_layers,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            heads: config.num_heads,
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            vocab_size: config.vocab_size,
            context_length: config.max_positions,
            activation: config.activation.name(),
            sub_norms: config.sub_norms,
            tied_embeddings: config.tied_embeddings,
            rope_theta: config.rope_theta,
            rms_norm_eps: config.rms_norm_eps,
            quantization_mode: match config.quantization.mode {
                Mode::Offline => "offline",
                Mode::Online => "online",
                Mode::Dequantized => "dequantized",
            },
            weight_scale: match config.quantization.scale_style {
                ScaleStyle::Multiply => "multiply",
                ScaleStyle::Divide => "divide",
            },
            use_rms_norm: config.quantization.use_rms_norm,
            parameters: config.parameters(),
            ternary_parameters: ternary(|t| t.histogram.iter().sum::<usize>() as u64),
            files: checkpoint.files().iter().enumerate().map(file).collect(),
            gguf,
            tensors: checkpoint.tensors().len(),
            stored_bytes,
            projections,
            resident,
            warnings,
            tensor_list: list.then(|| tensor_list(checkpoint)),
        })
    }
}

fn file_report(checkpoint: &Checkpoint, index: usize, file: &candle_bitnet::backend::host::MappedFile) -> FileReport {
    FileReport {
        path: file.path().display().to_string(),
        bytes: file.bytes().len() as u64,
        tensors: checkpoint.tensors().filter(|t| t.file == index).count(),
    }
}

fn tensor_list(checkpoint: &Checkpoint) -> Vec<TensorReport> {
    let report = |t: &candle_bitnet::checkpoint::TensorInfo| TensorReport {
        name: t.name.clone(),
        stored_name: t.stored_name.clone(),
        dtype: t.dtype.name(),
        shape: t.shape.clone(),
        bytes: t.range.len() as u64,
        file: t.file,
    };
    checkpoint.tensors().map(report).collect()
}

/// Reads one projection; masters are quantised as loading would.
fn linear(checkpoint: &Checkpoint, config: &ModelConfig, layer: usize, which: Projection) -> Result<Linear> {
    let name = config.projection_name(layer, which);
    let (rows, cols) = config.projection_shape(which);
    let weight = checkpoint.linear(&name, rows, cols, config.quantization.scale_style)?;
    let part = |suffix: &str| checkpoint.tensor(&format!("{name}.{suffix}")).map_or(0, |t| t.bytes().len() as u64);
    let stored = part("weight") + part("weight_scale");
    let ternary = match weight {
        LinearWeight::Ternary(packed) => Some(packed),
        LinearWeight::Dense(view) if config.is_converted(&name) => {
            Some(ternary_of(&view, &format!("{name}.weight"), config.quantization.mode)?)
        }
        LinearWeight::Dense(_) => None,
    };
    let measure = |packed: PackedTernary| Ternary {
        histogram: packed.histogram(),
        multiplier: packed.scale().multiplier(),
        resident: (packed.rows() * packed.row_bytes()) as u64,
        constant_rows: (0..packed.rows()).filter(|r| is_constant(packed.row(*r), cols)).count(),
    };
    Ok(Linear { which, name, stored, ternary: ternary.map(measure) })
}

/// Whether a canonical row repeats one code.
fn is_constant(row: &[u8], cols: usize) -> bool {
    let whole = cols / 4;
    let Some(first) = row.first().map(|b| b & 3) else { return false };
    let byte = first * 0x55;
    let tail = byte & !(0xffu8 << (2 * (cols % 4)));
    row.iter().enumerate().all(|(i, b)| *b == if i < whole { byte } else { tail })
}

impl ProjectionReport {
    fn of(config: &ModelConfig, which: Projection, linears: &[Linear]) -> Self {
        let (rows, cols) = config.projection_shape(which);
        let mine: Vec<&Linear> = linears.iter().filter(|l| l.which == which).collect();
        let ternary: Vec<&Ternary> = mine.iter().filter_map(|l| l.ternary.as_ref()).collect();
        let mut multipliers: Vec<f32> = ternary.iter().map(|t| t.multiplier).collect();
        multipliers.sort_by(f32::total_cmp);
        let at = |i: usize| multipliers.get(i).copied().unwrap_or_default();
        let zeros: usize = ternary.iter().map(|t| t.histogram[1]).sum();
        let stored_bytes: u64 = mine.iter().map(|l| l.stored).sum();
        let weights = |n: usize| (n as f64 * rows as f64 * cols as f64).max(1.0);
        Self {
            name: which.path(),
            rows,
            cols,
            ternary_layers: ternary.len(),
            dense_layers: mine.len() - ternary.len(),
            stored_bytes,
            stored_bits_per_weight: 8.0 * stored_bytes as f64 / weights(mine.len()),
            zeros: zeros as f64 / weights(ternary.len()),
            multiplier_min: at(0),
            multiplier_median: at(multipliers.len().saturating_sub(1) / 2),
            multiplier_max: at(multipliers.len().saturating_sub(1)),
        }
    }

    /// Appends what looks wrong about this kind.
    fn remarks(&self, linears: &[Linear], which: Projection, warnings: &mut Vec<String>) {
        let mut constant = (0, 0);
        for linear in linears.iter().filter(|l| l.which == which) {
            let Some(t) = &linear.ternary else { continue };
            if t.histogram[0] + t.histogram[2] == 0 {
                warnings.push(format!("{}: every weight is zero", linear.name));
            } else if t.histogram[1] == 0 {
                warnings.push(format!("{}: no weight is zero: is this a ternary weight?", linear.name));
            } else if t.constant_rows > 0 {
                constant = (constant.0 + 1, constant.1 + t.constant_rows);
            }
            let ratio = t.multiplier / self.multiplier_median;
            if !(SCALE_OUTLIER.recip()..=SCALE_OUTLIER).contains(&ratio) {
                let (m, median) = (t.multiplier, self.multiplier_median);
                warnings.push(format!("{}: scale {m:.3e}, while the median of its kind is {median:.3e}", linear.name));
            }
        }
        if constant.1 > 0 {
            let (layers, rows) = constant;
            warnings.push(format!("{}: {rows} rows in {layers} layers repeat one weight", self.name));
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = |n: u64| HumanBytes(n).to_string();
        let tied = if self.tied_embeddings { "tied" } else { "untied" };
        let sub_norms = if self.sub_norms { ", sub-norms" } else { "" };
        let inner = if self.use_rms_norm { ", a norm in every BitLinear" } else { "" };
        writeln!(f, "{}", self.path)?;
        writeln!(f, "family          {} ({}{sub_norms}{inner})", self.family, self.activation)?;
        writeln!(
            f,
            "shape           {} layers, hidden {}, MLP {}, {} heads of {} ({} KV), vocabulary {} ({tied})",
            self.layers,
            self.hidden_size,
            self.intermediate_size,
            self.heads,
            self.head_dim,
            self.kv_heads,
            self.vocab_size
        )?;
        writeln!(
            f,
            "context         {} positions, RoPE base {}, norm eps {}",
            self.context_length, self.rope_theta, self.rms_norm_eps
        )?;
        writeln!(f, "parameters      {} ({} ternary)", grouped(self.parameters), grouped(self.ternary_parameters))?;
        let origin = match self.quantization_mode {
            "online" => "masters, quantised at load",
            "dequantized" => "values -s, 0 and s, taken apart at load",
            _ => "packed",
        };
        writeln!(f, "weights         {origin}; weight_scale: {}", self.weight_scale)?;
        let types: Vec<_> = self.stored_bytes.iter().map(|(t, n)| format!("{t} {}", bytes(*n))).collect();
        writeln!(f, "stored          {} tensors: {}", self.tensors, types.join(", "))?;
        for file in &self.files {
            writeln!(f, "                {} ({}, {} tensors)", file.path, bytes(file.bytes), file.tensors)?;
        }
        if let Some(gguf) = &self.gguf {
            write!(f, "{gguf}")?;
        }
        writeln!(
            f,
            "\nprojection          shape           layers  stored      bits/weight  zeros   scale (median, range)"
        )?;
        for p in &self.projections {
            let shape = format!("{}×{}", p.rows, p.cols);
            let layers = match p.dense_layers {
                0 => p.ternary_layers.to_string(),
                dense => format!("{}+{dense}d", p.ternary_layers),
            };
            writeln!(
                f,
                "{:18}  {shape:14}  {layers:6}  {:10}  {:11.2}  {:5.1}%  {:.3e} ({:.3e} to {:.3e})",
                p.name,
                bytes(p.stored_bytes),
                p.stored_bits_per_weight,
                100.0 * p.zeros,
                p.multiplier_median,
                p.multiplier_min,
                p.multiplier_max
            )?;
        }
        let r = &self.resident;
        writeln!(f, "\nresident        {} without KV cache", bytes(r.total_bytes))?;
        writeln!(f, "  ternary       {}", bytes(r.ternary_bytes))?;
        let also = if self.tied_embeddings { " (also the output head)" } else { "" };
        writeln!(f, "  embedding     {}{also}", bytes(r.embedding_bytes))?;
        if r.head_bytes > 0 {
            writeln!(f, "  output head   {}", bytes(r.head_bytes))?;
        }
        if r.dense_linear_bytes > 0 {
            writeln!(f, "  dense linear  {}", bytes(r.dense_linear_bytes))?;
        }
        writeln!(f, "  norms         {}", bytes(r.norm_bytes))?;
        writeln!(
            f,
            "KV cache        {} per position in f32, {} in bf16 or f16",
            bytes(r.kv_bytes_per_position_f32),
            bytes(r.kv_bytes_per_position_bf16)
        )?;
        for (i, warning) in self.warnings.iter().enumerate() {
            writeln!(f, "{}{warning}", if i == 0 { "\nsuspicious      " } else { "                " })?;
        }
        for (i, t) in self.tensor_list.iter().flatten().enumerate() {
            if i == 0 {
                writeln!(f)?;
            }
            let name = t.stored_name.as_deref().unwrap_or(&t.name);
            writeln!(f, "{name:60} {:7} {:18} {}", t.dtype, format!("{:?}", t.shape), bytes(t.bytes))?;
        }
        Ok(())
    }
}

/// Digits in groups of three.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_bitnet::checkpoint::StoredType;
    use candle_bitnet::checkpoint::write::{Entry, write_checkpoint};
    use std::path::{Path, PathBuf};

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
    }

    fn report(dir: &Path) -> Report {
        Report::of(&Checkpoint::open(dir).unwrap(), true).unwrap()
    }

    #[test]
    fn fixtures_are_described() {
        let packed = report(&fixture("a1_packed"));
        assert_eq!(
            (packed.family, packed.weight_scale, packed.quantization_mode),
            ("BitNetForCausalLM", "multiply", "offline")
        );
        let linears = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 344 * 128);
        assert_eq!((packed.ternary_parameters, packed.resident.ternary_bytes), (linears, linears / 4));
        assert_eq!(packed.resident.kv_bytes_per_position_f32, 2 * 2 * 64 * 4);
        assert_eq!(packed.resident.embedding_bytes, 384 * 128 * 2);
        assert!(packed.projections.iter().all(|p| (0.1..0.6).contains(&p.zeros)), "{:?}", packed.projections);
        assert!((packed.projections[0].stored_bits_per_weight - 2.0).abs() < 0.01);
        assert_eq!(packed.tensor_list.as_ref().map(Vec::len), Some(38));
        let text = packed.to_string();
        for part in ["BitNetForCausalLM", "relu2", "mlp.gate_proj", "344×128", "multiply", "per position in f32"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        let masters = report(&fixture("a1_bf16"));
        assert_eq!(masters.ternary_parameters, packed.ternary_parameters);
        assert_eq!(masters.projections[5].zeros, packed.projections[5].zeros);
        assert_eq!(masters.projections[0].stored_bits_per_weight, 16.0);
        let a2 = report(&fixture("a2_packed_gqa_untied_sharded"));
        assert_eq!((a2.files.len(), a2.resident.head_bytes), (3, 512 * 256 * 2));
        assert!(a2.to_string().contains("output head"));
        let a3 = report(&fixture("a3_llama"));
        assert_eq!((a3.weight_scale, a3.sub_norms), ("divide", false));
        assert!(a3.projections.iter().all(|p| p.multiplier_max < 1.0), "divide-style scales are shown as multipliers");
        let json = serde_json::to_value(&a3).unwrap();
        assert_eq!(json["resident"]["total_bytes"], a3.resident.total_bytes);
    }

    #[test]
    fn what_looks_wrong_is_remarked() {
        // The fixture with one weight zeroed, one scale blown up and one tensor too many.
        let source = Checkpoint::open(&fixture("a1_packed")).unwrap();
        let mut entries = vec![Entry::from_bytes("model.extra", StoredType::U8, [1], vec![0])];
        for t in source.tensors() {
            let mut bytes = source.tensor(&t.name).unwrap().bytes().to_vec();
            match t.name.as_str() {
                "model.layers.0.mlp.up_proj.weight" => bytes.fill(0x55),
                "model.layers.1.mlp.gate_proj.weight_scale" => bytes[1] = 0x45,
                "model.layers.1.self_attn.q_proj.weight" => bytes[..128].fill(0x55),
                _ => {}
            }
            entries.push(Entry::from_bytes(&t.name, t.dtype, t.shape.as_slice(), bytes));
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), source.config().1).unwrap();
        write_checkpoint(dir.path(), entries, u64::MAX, &mut |_| {}).unwrap();
        let warnings = report(dir.path()).warnings.join("\n");
        for part in [
            "model.extra",
            "layers.0.mlp.up_proj: every weight is zero",
            "layers.1.mlp.gate_proj: scale",
            "self_attn.q_proj: 4 rows in 1 layers",
        ] {
            assert!(warnings.contains(part), "{part} in {warnings}");
        }
        assert!(report(&fixture("a1_packed")).warnings.is_empty());
    }

    #[test]
    fn constant_rows_are_seen_through_the_padding() {
        assert!(is_constant(&[0x55, 0x01], 5) && is_constant(&[0xaa], 4) && is_constant(&[0x00, 0x00], 7));
        assert!(!is_constant(&[0x55, 0x00], 5) && !is_constant(&[0x54], 4));
        assert_eq!((grouped(0), grouped(1234567), grouped(123)), ("0".into(), "1,234,567".into(), "123".into()));
    }
}
