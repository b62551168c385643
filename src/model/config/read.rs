//! From JSON to [`ModelConfig`], key by key.

use super::*;
use crate::checkpoint::hub;
use crate::checkpoint::json::{self, Fields, Node};

/// Top-level keys that are read; all others are ignored.
const KEYS: [&str; 26] = [
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "tie_word_embeddings",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "num_local_experts",
    "num_experts",
    "quantization_config",
    "weight_bits",
    "input_bits",
    "bos_token_id",
    "eos_token_id",
];

pub(crate) const SUPPORTED: &str = "supported are BitNetForCausalLM (microsoft/bitnet-b1.58-2B-4T, packed or bf16), \
                         LlamaForCausalLM with quant_method bitnet (HF1BitLLM, Falcon3-1.58bit, Falcon-E) and \
                         BitnetForCausalLM (1bitLLM/bitnet_b1_58-large, -xl, -3B)";

pub(super) fn parse(path: &Path, text: &str) -> Result<ModelConfig> {
    let fields = json::parse(text, &KEYS).map_err(|e| Error::file(path, e))?;
    let read = Reader { path, fields: &fields, prefix: "" };
    let family = family(&read)?;
    let quantization = quantization(&read, family)?;
    unsupported(&read)?;

    let hidden_size = read.size("hidden_size", MAX_FEATURES, None)?;
    let num_heads = read.size("num_attention_heads", MAX_HEADS, None)?;
    let num_kv_heads = read.size("num_key_value_heads", MAX_HEADS, Some(num_heads))?;
    if !num_heads.is_multiple_of(num_kv_heads) {
        let reason = format!("{num_kv_heads} does not divide num_attention_heads, which is {num_heads}");
        return read.fail("num_key_value_heads", reason);
    }
    if read.get("head_dim").is_none() && !hidden_size.is_multiple_of(num_heads) {
        let reason = format!("missing, and hidden_size {hidden_size} is not a multiple of {num_heads} heads");
        return read.fail("head_dim", reason);
    }
    let head_dim = read.size("head_dim", MAX_HEAD_DIM, Some(hidden_size / num_heads))?;
    if !head_dim.is_multiple_of(2) {
        return read.fail("head_dim", format!("{head_dim} is odd; rotary embedding pairs the dimensions"));
    }
    if num_heads * head_dim > MAX_FEATURES {
        let reason = format!("{num_heads} heads of {head_dim} are more than {MAX_FEATURES} features");
        return read.fail("num_attention_heads", reason);
    }
    let vocab_size = read.size("vocab_size", MAX_VOCAB, None)?;
    let (activation, rms_norm_eps, rope_theta) = match family {
        Family::BitNet => (Activation::Relu2, 1e-5, 500_000.0),
        Family::Llama | Family::FirstReproduction => (Activation::Silu, 1e-6, 10_000.0),
    };
    Ok(ModelConfig {
        family,
        hidden_size,
        intermediate_size: read.size("intermediate_size", MAX_FEATURES, None)?,
        num_layers: read.size("num_hidden_layers", MAX_LAYERS, None)?,
        num_heads,
        num_kv_heads,
        head_dim,
        vocab_size,
        max_positions: read.size("max_position_embeddings", MAX_POSITIONS, Some(2048))?,
        rms_norm_eps: read.eps("rms_norm_eps", rms_norm_eps)?,
        rope_theta: rope(&read, rope_theta)?,
        tied_embeddings: read.flag("tie_word_embeddings", false)?,
        activation: hidden_act(&read, activation)?,
        sub_norms: family != Family::Llama,
        quantization,
        bos_token: read.tokens("bos_token_id", vocab_size)?.first().copied(),
        eos_tokens: read.tokens("eos_token_id", vocab_size)?,
    })
}

/// An object of the file; `prefix` leads to it.
#[derive(Clone, Copy)]
struct Reader<'a> {
    path: &'a Path,
    fields: &'a Fields,
    prefix: &'static str,
}

impl<'a> Reader<'a> {
    fn get(&self, key: &str) -> Option<&'a Node> {
        self.fields.get(key)
    }

    fn fail<T>(&self, key: &str, reason: impl Into<String>) -> Result<T> {
        Err(Error::config(self.path, format!("{}{key}", self.prefix), reason))
    }

    fn unexpected<T>(&self, key: &str, found: &Node, expected: &str) -> Result<T> {
        self.fail(key, format!("{} where {expected} is expected", found.describe()))
    }

    /// A whole number from 1 to `max`; the default has to be one too.
    fn size(&self, key: &str, max: usize, default: Option<usize>) -> Result<usize> {
        let found = match (self.get(key), default) {
            (Some(found), _) => found.clone(),
            (None, Some(default)) => Node::Int(i64::try_from(default).unwrap_or(i64::MAX)),
            (None, None) => return self.fail(key, "missing"),
        };
        match found {
            Node::Int(n) if (1..=max as i64).contains(&n) => Ok(n as usize),
            found => self.unexpected(key, &found, &format!("a whole number from 1 to {max}")),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Node::Bool(b)) => Ok(*b),
            Some(found) => self.unexpected(key, found, "true or false"),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Node::Text(s)) => Ok(Some(s)),
            Some(found) => self.unexpected(key, found, "a string"),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Node::Int(n)) => Ok(Some(*n as f64)),
            Some(Node::Float(x)) => Ok(Some(*x)),
            Some(found) => self.unexpected(key, found, "a number"),
        }
    }

    /// The eps of a norm: small, and still there as an f32.
    fn eps(&self, key: &str, default: f32) -> Result<f32> {
        match self.number(key)? {
            None => Ok(default),
            Some(x) if (1e-30..=0.1).contains(&x) => Ok(x as f32),
            Some(x) => self.fail(key, format!("{x} is not a sensible epsilon (1e-30 to 0.1)")),
        }
    }

    /// One token id, a list of them, or none.
    fn tokens(&self, key: &str, vocab_size: usize) -> Result<Vec<u32>> {
        let Some(found) = self.get(key) else { return Ok(Vec::new()) };
        let ids = match found {
            Node::List(ids) => ids.as_slice(),
            one => std::slice::from_ref(one),
        };
        if ids.len() > MAX_EOS_TOKENS {
            return self.fail(key, format!("{} ids; at most {MAX_EOS_TOKENS} are accepted", ids.len()));
        }
        let id = |node: &Node| match node {
            Node::Int(n) if (0..vocab_size as i64).contains(n) => Ok(*n as u32),
            found => self.unexpected(key, found, &format!("a token id below vocab_size ({vocab_size})")),
        };
        ids.iter().map(id).collect()
    }

    fn object(&self, key: &'static str, prefix: &'static str) -> Result<Option<Reader<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Node::Object(fields)) => Ok(Some(Reader { fields, prefix, ..*self })),
            Some(found) => self.unexpected(key, found, "an object"),
        }
    }
}

fn family(read: &Reader) -> Result<Family> {
    let key = "architectures";
    let found = match read.get(key) {
        None => return read.fail(key, format!("missing; {SUPPORTED}")),
        Some(Node::List(names)) => names.as_slice(),
        Some(one) => std::slice::from_ref(one),
    };
    match found {
        [Node::Text(name)] if name == "BitNetForCausalLM" => Ok(Family::BitNet),
        [Node::Text(name)] if name == "LlamaForCausalLM" => Ok(Family::Llama),
        [Node::Text(name)] if name == "BitnetForCausalLM" => Ok(Family::FirstReproduction),
        found => {
            let found = Node::List(found.to_vec()).describe();
            read.fail(key, format!("{found} is not supported; {SUPPORTED}"))
        }
    }
}

fn quantization(read: &Reader, family: Family) -> Result<Quantization> {
    if family == Family::FirstReproduction {
        for (key, supported) in [("weight_bits", 1), ("input_bits", 8)] {
            match read.get(key) {
                None => {}
                Some(Node::Int(n)) if *n == supported => {}
                Some(found) => return read.unexpected(key, found, &format!("{supported}, which is b1.58,")),
            }
        }
    }
    let Some(q) = read.object("quantization_config", "quantization_config.")? else {
        return match family {
            Family::FirstReproduction => Ok(Quantization::plain(Mode::Online, ScaleStyle::Multiply)),
            Family::Llama if is_prequantized(read.path) => Ok(Quantization::plain(Mode::Online, ScaleStyle::Multiply)),
            Family::Llama | Family::BitNet => Ok(Quantization::plain(Mode::Dequantized, ScaleStyle::Multiply)),
        };
    };
    match q.text("quant_method")? {
        Some("bitnet") => {}
        Some(other) => {
            let found = Node::Text(other.to_owned()).describe();
            return q.fail("quant_method", format!("{found} is not b1.58; {SUPPORTED}"));
        }
        None => return q.fail("quant_method", format!("missing, so this is not a b1.58 checkpoint; {SUPPORTED}")),
    }
    let scale_style = match q.text("linear_class")? {
        Some("autobitlinear") => ScaleStyle::Multiply,
        Some("bitlinear") | None => ScaleStyle::Divide,
        Some(other) => {
            let found = Node::Text(other.to_owned());
            return q.unexpected("linear_class", &found, "\"autobitlinear\" or \"bitlinear\"");
        }
    };
    let mode = match q.text("quantization_mode")? {
        Some("online") => Mode::Online,
        Some("offline") | None => Mode::Offline,
        Some(other) => {
            return q.unexpected("quantization_mode", &Node::Text(other.to_owned()), "\"offline\" or \"online\"");
        }
    };
    let key = "modules_to_not_convert";
    let modules = match q.get(key) {
        None => Vec::new(),
        Some(Node::List(names)) => {
            let text = |node: &Node| match node {
                Node::Text(name) => Ok(name.clone()),
                found => q.unexpected(key, found, "a module's name"),
            };
            names.iter().map(text).collect::<Result<_>>()?
        }
        Some(found) => return q.unexpected(key, found, "a list of module names"),
    };
    let use_rms_norm = q.flag("use_rms_norm", false)?;
    // Of norms that are not there it says nothing.
    let rms_norm_eps = Some(q.eps("rms_norm_eps", 1e-6)?).filter(|_| use_rms_norm).unwrap_or(1e-6);
    Quantization::new(mode, scale_style, use_rms_norm, rms_norm_eps, modules).or_else(|e| q.fail(key, e))
}

/// Whether the file lies in a hub's snapshot that the repository calls `prequantized`: that revision of Falcon-E holds
/// masters, and nothing in its files says so.
fn is_prequantized(path: &Path) -> bool {
    path.parent().is_some_and(|snapshot| hub::is_snapshot_of(snapshot, "prequantized"))
}

/// The base of the rotary embedding, from the top level or from `rope_parameters` (transformers 5).
fn rope(read: &Reader, default: f64) -> Result<f64> {
    let mut theta = read.number("rope_theta")?.map(|x| (*read, x));
    for (key, prefix) in [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")] {
        let Some(rope) = read.object(key, prefix)? else { continue };
        for kind in ["rope_type", "type"] {
            match rope.text(kind)? {
                None | Some("default") => {}
                Some(other) => {
                    let found = Node::Text(other.to_owned()).describe();
                    return rope
                        .fail(kind, format!("scaled rotary embedding {found} is not supported, only \"default\""));
                }
            }
        }
        whole_rotary(&rope)?;
        if let Some(x) = rope.number("rope_theta")? {
            theta = Some((rope, x));
        }
    }
    match theta {
        None => Ok(default),
        Some((_, x)) if x.is_finite() && (1.0..=1e12).contains(&x) => Ok(x),
        Some((at, x)) => at.fail("rope_theta", format!("{x} is out of range (1 to 1e12)")),
    }
}

fn whole_rotary(read: &Reader) -> Result<()> {
    match read.number("partial_rotary_factor")? {
        None | Some(1.0) => Ok(()),
        Some(x) => read.fail("partial_rotary_factor", format!("{x} is not supported, only 1")),
    }
}

fn hidden_act(read: &Reader, default: Activation) -> Result<Activation> {
    match read.text("hidden_act")? {
        None => Ok(default),
        Some("relu2") => Ok(Activation::Relu2),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some(other) => read.unexpected("hidden_act", &Node::Text(other.to_owned()), "\"relu2\" or \"silu\""),
    }
}

/// Keys that would change the model's arithmetic in ways that are not implemented.
fn unsupported(read: &Reader) -> Result<()> {
    for key in ["attention_bias", "mlp_bias"] {
        if read.flag(key, false)? {
            return read.fail(key, "true is not supported: no b1.58 family has biases");
        }
    }
    for key in ["num_local_experts", "num_experts"] {
        match read.get(key) {
            None | Some(Node::Int(0 | 1)) => {}
            Some(_) => return read.fail(key, "mixtures of experts are not supported"),
        }
    }
    whole_rotary(read)
}
