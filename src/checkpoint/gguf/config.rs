//! What a GGUF file's metadata says, as the small files of Hugging Face's checkpoints, so that everything else reads
//! one kind of configuration.

use super::Gguf;
use super::names::hugging_face_name;
use super::value::Value;
use crate::backend::DenseType;
use crate::checkpoint::TensorInfo;
use crate::checkpoint::limits::{MAX_QUOTED, quoted};
use crate::{Error, Result};
use serde_json::{Map, Value as Json, json};

/// Architectures of b1.58 models, as `general.architecture` names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// `bitnet-b1.58`: microsoft's 2B-4T.
    BitNetB158,
    /// `bitnet-25`: the same, in older files.
    BitNet25,
    /// `bitnet`: 1bitLLM's first reproduction, as llama.cpp itself converts it. SiLU, sub-norms.
    BitNet,
    /// `llama`: Falcon3, Falcon-E, HF1BitLLM. SiLU, no sub-norms; rows of q and k interleaved.
    Llama,
}

impl Architecture {
    /// All four.
    pub const ALL: [Self; 4] = [Self::BitNetB158, Self::BitNet25, Self::BitNet, Self::Llama];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::BitNetB158 => "bitnet-b1.58",
            Self::BitNet25 => "bitnet-25",
            Self::BitNet => "bitnet",
            Self::Llama => "llama",
        }
    }

    /// `architectures`, `model_type` and `hidden_act` of config.json.
    fn hugging_face(self) -> [&'static str; 3] {
        match self {
            Self::BitNetB158 | Self::BitNet25 => ["BitNetForCausalLM", "bitnet", "relu2"],
            Self::BitNet => ["BitNetForCausalLM", "bitnet", "silu"],
            Self::Llama => ["LlamaForCausalLM", "llama", "silu"],
        }
    }

    /// The base of the rotary embedding where the file names none; llama.cpp's.
    const ROPE_BASE: f64 = 10_000.0;
}

/// The chat template that microsoft documents for 2B-4T (tokenizer_config.json of its safetensors repository). The one in
/// its GGUF files, "Human: … BITNETAssistant: ", is not what the model was trained with.
const DOCUMENTED_TEMPLATE: &str = "{% for message in messages %}{{ (bos_token if loop.first else '') + \
     (message['role'] | capitalize) + ': ' + (message['content'] | trim) + '<|eot_id|>' }}{% endfor %}\
     {% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";
/// What tells the wrong template.
const WRONG_TEMPLATE: &str = "BITNETAssistant";

impl Gguf {
    /// The architecture.
    ///
    /// # Errors
    /// [`Error::Config`] for one that has no b1.58 models, naming those that have.
    pub fn architecture(&self) -> Result<Architecture> {
        let key = "general.architecture";
        let name = self.text(key)?.ok_or_else(|| Error::config(self.path(), key, "missing"))?;
        Architecture::ALL.into_iter().find(|a| a.name() == name).ok_or_else(|| {
            let known = Architecture::ALL.map(Architecture::name).join(", ");
            let reason = format!("{:?} is not supported; b1.58 models are of {known}", quoted(name));
            Error::config(self.path(), key, reason)
        })
    }

    /// Query and key-value heads.
    pub(super) fn heads(&self, arch: Architecture) -> Result<(usize, usize)> {
        let heads = self.size(arch, "attention.head_count")?;
        let heads = self.required(arch, "attention.head_count", heads)?;
        Ok((heads, self.size(arch, "attention.head_count_kv")?.unwrap_or(heads)))
    }

    /// The text of a config.json. Ranges are left to its reader.
    ///
    /// # Errors
    /// [`Error::Config`] naming the metadata key for what is missing, of another type or not supported.
    pub fn config_json(&self) -> Result<String> {
        let arch = self.architecture()?;
        if let Some(parts) = self.uint("split.count")?.filter(|n| *n > 1) {
            let reason = format!("one of {parts} parts of a model; join them with `llama-gguf-split --merge`");
            return Err(Error::config(self.path(), "split.count", reason));
        }
        let required = |key: &str| self.required(arch, key, self.size(arch, key)?);
        let (hidden, (heads, kv_heads)) = (required("embedding_length")?, self.heads(arch)?);
        let [architecture, model_type, activation] = arch.hugging_face();
        let mut config = json!({
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_act": activation,
            "hidden_size": hidden,
            "intermediate_size": required("feed_forward_length")?,
            "num_hidden_layers": required("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": required("context_length")?,
            "rms_norm_eps": self.float(arch, "attention.layer_norm_rms_epsilon")?.ok_or_else(|| {
                Error::config(self.path(), self.key(arch, "attention.layer_norm_rms_epsilon"), "missing")
            })?,
            "rope_theta": self.float(arch, "rope.freq_base")?.unwrap_or(Architecture::ROPE_BASE),
            "vocab_size": self.vocab_size(arch)?,
            "tie_word_embeddings": self.is_tied(),
            "bos_token_id": self.token("bos")?,
            "eos_token_id": self.ends()?,
            "torch_dtype": "bfloat16",
            "quantization_config": {
                "quant_method": "bitnet",
                "linear_class": "autobitlinear",
                "quantization_mode": if self.has_masters() { "online" } else { "offline" },
            },
        });
        let derived = hidden.checked_div(heads).unwrap_or_default();
        let head_dim = self.size(arch, "attention.key_length")?;
        if let Some(dim) = head_dim {
            config["head_dim"] = dim.into();
        }
        let head_dim = head_dim.unwrap_or(derived);
        if let Some(dim) = self.size(arch, "attention.value_length")?.filter(|n| *n != head_dim) {
            let reason = format!("{dim}, but keys have {head_dim} dimensions: not supported");
            return Err(Error::config(self.path(), self.key(arch, "attention.value_length"), reason));
        }
        if let Some(dim) = self.size(arch, "rope.dimension_count")?.filter(|n| *n != head_dim) {
            let reason = format!("{dim} of {head_dim} dimensions: partial rotary embedding is not supported");
            return Err(Error::config(self.path(), self.key(arch, "rope.dimension_count"), reason));
        }
        let scaling = self.key(arch, "rope.scaling.type");
        match self.text(&scaling)? {
            None | Some("none" | "") => {}
            Some(kind) => {
                let reason = format!("scaled rotary embedding {:?} is not supported", quoted(kind));
                return Err(Error::config(self.path(), scaling, reason));
            }
        }
        if self.size(arch, "expert_count")?.is_some_and(|n| n > 1) {
            let key = self.key(arch, "expert_count");
            return Err(Error::config(self.path(), key, "mixtures of experts are not supported"));
        }
        Ok(format!("{config:#}\n"))
    }

    /// The text of a generation_config.json: what ends a text, and recommended sampling where the file has some.
    ///
    /// # Errors
    /// [`Error::Config`] for a value of another type.
    pub fn generation_json(&self) -> Result<String> {
        let mut config = json!({ "bos_token_id": self.token("bos")?, "eos_token_id": self.ends()? });
        for (key, name) in [
            ("temp", "temperature"),
            ("top_k", "top_k"),
            ("top_p", "top_p"),
            ("min_p", "min_p"),
            ("penalty_repeat", "repetition_penalty"),
        ] {
            let key = format!("general.sampling.{key}");
            match self.get(&key) {
                None => {}
                Some(Value::Signed(n)) => config[name] = (*n).max(0).into(),
                Some(Value::Unsigned(n)) => config[name] = (*n).into(),
                Some(Value::F32(x)) => config[name] = decimal(*x).into(),
                Some(Value::F64(x)) => config[name] = (*x).into(),
                Some(other) => return self.unexpected(&key, other, "a number"),
            }
        }
        if config.get("temperature").and_then(Json::as_f64).is_some_and(|t| t > 0.0) {
            config["do_sample"] = true.into();
        }
        Ok(format!("{config:#}\n"))
    }

    /// The text of a tokenizer_config.json: special tokens and the chat template, unless it is the one that is known to be
    /// wrong; then the documented one.
    ///
    /// # Errors
    /// [`Error::Config`] for a value of another type or a token that is not there.
    pub fn tokenizer_config_json(&self) -> Result<String> {
        let mut config = Map::new();
        for (key, id) in self.special_tokens()? {
            config.insert(key, id.into());
        }
        if let Some(template) = self.text("tokenizer.chat_template")? {
            let is_b158 = matches!(self.architecture(), Ok(Architecture::BitNetB158 | Architecture::BitNet25));
            let template = match is_b158 && template.contains(WRONG_TEMPLATE) {
                true => DOCUMENTED_TEMPLATE,
                false => template,
            };
            config.insert("chat_template".into(), template.into());
        }
        Ok(format!("{:#}\n", Json::Object(config)))
    }

    /// Keys such as `bos_token` with their tokens.
    ///
    /// # Errors
    /// As [`Gguf::tokenizer_config_json`].
    pub fn special_tokens(&self) -> Result<Vec<(String, String)>> {
        let mut found = Vec::new();
        for (key, name) in
            [("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")]
        {
            let Some(id) = self.token(key)? else { continue };
            let token = self.strings("tokenizer.ggml.tokens")?.and_then(|mut all| all.nth(id as usize));
            match token {
                Some(token) => found.push((name.to_owned(), token?.to_owned())),
                // A file without a tokenizer has nothing to name.
                None if self.get("tokenizer.ggml.tokens").is_none() => {}
                None => {
                    let key = format!("tokenizer.ggml.{key}_token_id");
                    return Err(Error::config(self.path(), key, format!("{id}, but there is no such token")));
                }
            }
        }
        Ok(found)
    }

    /// The id of a special token, such as `bos`.
    ///
    /// # Errors
    /// [`Error::Config`] for something else than a token id.
    pub fn token(&self, name: &str) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match self.get(&key) {
            // −1 stands for none.
            None | Some(Value::Signed(-1)) | Some(Value::Unsigned(0xffff_ffff)) => Ok(None),
            Some(_) => Ok(self.uint(&key)?),
        }
    }

    /// The tokens that end a text or a turn.
    fn ends(&self) -> Result<Vec<u32>> {
        let mut ends = Vec::new();
        for name in ["eos", "eot", "eom"] {
            ends.extend(self.token(name)?.filter(|id| !ends.contains(id)));
        }
        Ok(ends)
    }

    fn key(&self, arch: Architecture, key: &str) -> String {
        format!("{}.{key}", arch.name())
    }

    fn size(&self, arch: Architecture, key: &str) -> Result<Option<usize>> {
        let key = self.key(arch, key);
        // An array of equal numbers, one per layer, would be possible; no b1.58 model has one.
        Ok(self.uint(&key)?.map(|n| n as usize))
    }

    fn required(&self, arch: Architecture, key: &str, found: Option<usize>) -> Result<usize> {
        found.ok_or_else(|| Error::config(self.path(), self.key(arch, key), "missing"))
    }

    fn float(&self, arch: Architecture, key: &str) -> Result<Option<f64>> {
        let key = self.key(arch, key);
        match self.get(&key) {
            None => Ok(None),
            Some(Value::F32(x)) if x.is_finite() => Ok(Some(decimal(*x))),
            Some(Value::F64(x)) if x.is_finite() => Ok(Some(*x)),
            Some(other) => self.unexpected(&key, other, "a number"),
        }
    }

    /// A whole number of at most 32 bits.
    fn uint(&self, key: &str) -> Result<Option<u32>> {
        let expected = "a whole number of 32 bits";
        match self.get(key) {
            None => Ok(None),
            Some(found @ Value::Unsigned(n)) => {
                u32::try_from(*n).map(Some).or_else(|_| self.unexpected(key, found, expected))
            }
            Some(found @ Value::Signed(n)) => {
                u32::try_from(*n).map(Some).or_else(|_| self.unexpected(key, found, expected))
            }
            Some(other) => self.unexpected(key, other, expected),
        }
    }

    /// Rows of the embedding, whatever the metadata says of it.
    fn vocab_size(&self, arch: Architecture) -> Result<usize> {
        let Some(t) = self.header.tensors.iter().find(|t| t.name == "token_embd.weight") else {
            return Err(Error::tensor(self.path(), "token_embd.weight", "missing"));
        };
        let rows = t.shape.first().copied().unwrap_or_default();
        match self.size(arch, "vocab_size")? {
            Some(n) if n != rows => {
                let reason = format!("{n}, but token_embd.weight has {rows} rows");
                Err(Error::config(self.path(), self.key(arch, "vocab_size"), reason))
            }
            _ => Ok(rows),
        }
    }

    /// Whether the head is the embedding: there is none, or it is the same bytes again.
    fn is_tied(&self) -> bool {
        let find = |name: &str| self.header.tensors.iter().find(|t| t.name == name);
        let (Some(head), Some(embedding)) = (find("output.weight"), find("token_embd.weight")) else { return true };
        if (head.dtype, &head.shape) != (embedding.dtype, &embedding.shape) {
            return false;
        }
        let bytes = |t: &TensorInfo| self.file.bytes().get(t.range.clone()).unwrap_or_default();
        // In pieces that do not stay in memory; two heads differ in the first one.
        bytes(head).chunks(PIECE).zip(bytes(embedding).chunks(PIECE)).enumerate().all(|(i, (a, b))| {
            let same = a == b;
            for t in [head, embedding] {
                let start = t.range.start + i * PIECE;
                self.file.release(start..start + a.len());
            }
            same
        })
    }

    /// Whether linear layers are stored as masters: floating-point values of more than one magnitude, without a scale. The
    /// beginning of the first one tells; whatever it says, each weight is read as what it is.
    fn has_masters(&self) -> bool {
        let linear = |t: &&TensorInfo| hugging_face_name(&t.name).is_some_and(|n| n.ends_with("_proj.weight"));
        let Some(first) = self.header.tensors.iter().find(linear) else { return false };
        let Some(dtype) = DenseType::from_stored(first.dtype) else { return false };
        let scale = first.name.replace(".weight", ".scale");
        if self.header.tensors.iter().any(|t| t.name == scale) {
            return false;
        }
        let mut values = vec![0f32; SAMPLE.min(first.elements())];
        dtype.widen(self.file.bytes().get(first.range.clone()).unwrap_or_default(), &mut values);
        let mut magnitudes = values.into_iter().map(f32::abs).filter(|v| *v != 0.0);
        magnitudes.next().is_some_and(|m| magnitudes.any(|v| v != m))
    }

    pub(super) fn unexpected<T>(&self, key: &str, found: &Value, expected: &str) -> Result<T> {
        let found = match found {
            Value::Text(range) => {
                let text = self.file.bytes().get(range.clone()).unwrap_or_default();
                format!("{:?}", quoted(&String::from_utf8_lossy(text.get(..4 * MAX_QUOTED).unwrap_or(text))))
            }
            other => other.describe(),
        };
        Err(Error::config(self.path(), key, format!("{found} where {expected} is expected")))
    }
}

/// Values that tell masters from ternary weights.
const SAMPLE: usize = 4096;

/// Bytes that are compared at a time.
const PIECE: usize = 1 << 20;

/// The shortest decimal number that reads as this f32: 1e-5, not the f64 next to it.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}
