//! `adapter_config.json`, typed and checked.
//!
//! Follows `LoraConfig` in peft's `tuners/lora/config.py` (0.21). A key that changes what is computed must be at the
//! value of plain LoRA; so must a key that is not known here, for nobody can say what it changes.

use super::modules::{Modules, Pattern};
use crate::checkpoint::json::{self, Fields, Node};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Largest rank.
pub const MAX_RANK: usize = 1 << 14;
/// Largest magnitude of `lora_alpha`.
const MAX_ALPHA: f64 = 1e6;
/// Patterns of ranks and alphas that are not plain names: each is compiled.
const MAX_REGEXES: usize = 64;

/// Keys that are read.
const READ: [&str; 14] = [
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "init_lora_weights",
    "base_model_name_or_path",
];

/// Keys that say how the adapter was made, or apply only with others that are refused.
const WITHOUT_EFFECT: [&str; 14] = [
    "task_type",
    "inference_mode",
    "revision",
    "auto_mapping",
    "peft_version",
    "megatron_core",
    "eva_config",
    "corda_config",
    "loftq_config",
    "lora_ga_config",
    "runtime_config",
    "velora_config",
    "qalora_group_size",
    "ensure_weight_tying",
];

/// What LoRA does to which modules: `y = W h + scaling · B (A h)`.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// `r`, the inner dimension, where `rank_pattern` does not say otherwise.
    pub rank: usize,
    /// `lora_alpha`: the scaling is `alpha / rank`.
    pub alpha: f32,
    /// `use_rslora`: the scaling is `alpha / sqrt(rank)` instead.
    pub use_rslora: bool,
    /// `lora_dropout`, of training only.
    pub dropout: f32,
    /// `base_model_name_or_path`.
    pub base_model: Option<String>,
    targets: Modules,
    excluded: Option<Modules>,
    layers: Option<Vec<usize>>,
    ranks: Vec<(Pattern, usize)>,
    alphas: Vec<(Pattern, f32)>,
}

impl AdapterConfig {
    /// LoRA on the modules whose name is, or ends after a dot in, one of `target_modules` (`q_proj` and the like).
    pub fn new(rank: usize, alpha: f32, target_modules: Vec<String>) -> Self {
        Self {
            rank,
            alpha,
            use_rslora: false,
            dropout: 0.0,
            base_model: None,
            targets: Modules::Named(target_modules),
            excluded: None,
            layers: None,
            ranks: Vec::new(),
            alphas: Vec::new(),
        }
    }

    /// Reads the text of an `adapter_config.json`; `path` names it in errors.
    ///
    /// # Errors
    /// [`Error::File`] for malformed JSON, [`Error::Config`] naming the key for anything missing, out of range or
    /// other than plain LoRA.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let fields = json::parse_all(text).map_err(|e| Error::file(path, e))?;
        let read = Reader { path, fields: &fields };
        read.lora()?;
        read.others()?;
        let targets = match read.modules("target_modules")? {
            Some(Modules::Named(names)) if names.is_empty() => {
                return read.fail("target_modules", "names no module");
            }
            Some(targets) => targets,
            None => return read.fail("target_modules", "missing; it must name the modules, as PEFT saves it"),
        };
        let layers = read.layers()?;
        if layers.is_some() && !matches!(targets, Modules::Named(_)) {
            return read.fail("layers_to_transform", "needs a list of target_modules");
        }
        let (rank, alpha) = (read.rank("r", read.get("r"))?, read.alpha("lora_alpha", read.get("lora_alpha"))?);
        let config = Self {
            rank,
            alpha,
            use_rslora: read.flag("use_rslora")?,
            dropout: match read.get("lora_dropout") {
                None => 0.0,
                Some(node) => match node.number() {
                    Some(p) if (0.0..=1.0).contains(&p) => p as f32,
                    _ => return read.unexpected("lora_dropout", node, "a number from 0 to 1"),
                },
            },
            base_model: match read.get("base_model_name_or_path") {
                None => None,
                Some(Node::Text(name)) => Some(name.clone()),
                Some(node) => return read.unexpected("base_model_name_or_path", node, "a name"),
            },
            targets,
            // PEFT takes an empty list or string as none.
            excluded: read.modules("exclude_modules")?.filter(|m| *m != Modules::Named(Vec::new())),
            layers,
            ranks: read.patterns("rank_pattern", |node| read.rank("rank_pattern", Some(node)))?,
            alphas: read.patterns("alpha_pattern", |node| read.alpha("alpha_pattern", Some(node)))?,
        };
        Ok(config)
    }

    /// Whether the module has an adapter.
    pub fn targets(&self, module: &str) -> bool {
        !self.excluded.as_ref().is_some_and(|m| m.contain(module, None))
            && self.targets.contain(module, self.layers.as_deref())
    }

    /// The inner dimension of a module's adapter.
    pub fn rank_of(&self, module: &str) -> usize {
        self.ranks.iter().find(|(p, _)| p.matches(module)).map_or(self.rank, |(_, rank)| *rank)
    }

    /// What a module's `B · A · h` is multiplied by.
    pub fn scaling_of(&self, module: &str) -> f32 {
        let alpha = self.alphas.iter().find(|(p, _)| p.matches(module)).map_or(self.alpha, |(_, alpha)| *alpha);
        let rank = self.rank_of(module) as f64;
        (f64::from(alpha) / if self.use_rslora { rank.sqrt() } else { rank }) as f32
    }

    /// The text of an `adapter_config.json` that [`AdapterConfig::parse`] and PEFT read.
    pub fn to_json(&self) -> String {
        let modules = |modules: &Modules| match modules {
            Modules::AllLinear => "all-linear".into(),
            Modules::Named(names) => Value::from(names.clone()),
            Modules::Matching(pattern) => pattern.text().into(),
        };
        let ranks: Map<_, _> = self.ranks.iter().map(|(p, rank)| (p.text().to_owned(), Value::from(*rank))).collect();
        let alphas: Map<_, _> = self.alphas.iter().map(|(p, a)| (p.text().to_owned(), number(*a))).collect();
        let json = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "inference_mode": true,
            "r": self.rank,
            "lora_alpha": number(self.alpha),
            "lora_dropout": number(self.dropout),
            "use_rslora": self.use_rslora,
            "target_modules": modules(&self.targets),
            "exclude_modules": self.excluded.as_ref().map(modules),
            "layers_to_transform": self.layers,
            "layers_pattern": null,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "modules_to_save": null,
            "use_dora": false,
        });
        format!("{json:#}\n")
    }
}

/// A whole number as such; others through text, so that 0.1 is not written as the f64 next to the f32.
fn number(x: f32) -> Value {
    if x.fract() == 0.0 && x.abs() <= MAX_ALPHA as f32 {
        return Value::from(x as i64);
    }
    x.to_string().parse::<f64>().unwrap_or_default().into()
}

impl Node {
    fn number(&self) -> Option<f64> {
        match self {
            Self::Int(n) => Some(*n as f64),
            Self::Float(x) => Some(*x),
            _ => None,
        }
    }

    /// Whether it is what a feature that is not used is saved as.
    fn is_off(&self) -> bool {
        match self {
            Self::Null | Self::Bool(false) => true,
            Self::List(items) => items.is_empty(),
            Self::Object(fields) => fields.iter().next().is_none(),
            _ => false,
        }
    }
}

struct Reader<'a> {
    path: &'a Path,
    fields: &'a Fields,
}

impl<'a> Reader<'a> {
    fn get(&self, key: &str) -> Option<&'a Node> {
        self.fields.get(key)
    }

    fn fail<T>(&self, key: &str, reason: impl Into<String>) -> Result<T> {
        Err(Error::config(self.path, crate::checkpoint::limits::quoted(key), reason))
    }

    fn unexpected<T>(&self, key: &str, found: &Node, expected: &str) -> Result<T> {
        self.fail(key, format!("{} where {expected} is expected", found.describe()))
    }

    /// That this is LoRA without anything that is stored or computed elsewhere.
    fn lora(&self) -> Result<()> {
        match self.get("peft_type") {
            Some(Node::Text(t)) if t == "LORA" => {}
            Some(found) => return self.fail("peft_type", format!("{} is not LORA", found.describe())),
            None => return self.fail("peft_type", "missing, so this is not a PEFT adapter"),
        }
        match self.get("bias") {
            None => {}
            Some(Node::Text(t)) if t == "none" => {}
            Some(found) => return self.unexpected("bias", found, "\"none\" (b1.58 layers have no bias)"),
        }
        // These start from A and B that are not zero together and take their product out of the base's weights.
        match self.get("init_lora_weights") {
            None | Some(Node::Bool(_)) => Ok(()),
            Some(Node::Text(t)) if ["gaussian", "eva", "orthogonal"].contains(&t.as_str()) => Ok(()),
            Some(found) => {
                let reason = "may have changed the base's weights; convert the adapter to plain LoRA with PEFT";
                self.fail("init_lora_weights", format!("{} {reason}", found.describe()))
            }
        }
    }

    /// That every key that is not read is without effect, or off.
    fn others(&self) -> Result<()> {
        for (key, node) in self.fields.iter() {
            if READ.contains(&key) || WITHOUT_EFFECT.contains(&key) || node.is_off() {
                continue;
            }
            let what = match key {
                "modules_to_save" | "trainable_token_indices" => "weights that the adapter replaces are not supported",
                "use_dora" => "DoRA is not supported",
                "fan_in_fan_out" => "weights that are stored transposed are not supported",
                _ => "only plain LoRA is supported, and this may change what is computed",
            };
            return self.fail(key, format!("{}: {what}", node.describe()));
        }
        Ok(())
    }

    fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(Node::Bool(b)) => Ok(*b),
            Some(found) => self.unexpected(key, found, "true or false"),
        }
    }

    fn rank(&self, key: &str, node: Option<&Node>) -> Result<usize> {
        match node {
            Some(Node::Int(n)) if (1..=MAX_RANK as i64).contains(n) => Ok(*n as usize),
            Some(found) => self.unexpected(key, found, &format!("a whole number from 1 to {MAX_RANK}")),
            None => self.fail(key, "missing"),
        }
    }

    fn alpha(&self, key: &str, node: Option<&Node>) -> Result<f32> {
        match node.map(|n| (n, n.number())) {
            Some((_, Some(x))) if x.abs() <= MAX_ALPHA => Ok(x as f32),
            Some((found, _)) => self.unexpected(key, found, &format!("a number of at most {MAX_ALPHA}")),
            None => self.fail(key, "missing"),
        }
    }

    fn modules(&self, key: &str) -> Result<Option<Modules>> {
        match self.get(key) {
            None => Ok(None),
            Some(Node::Text(text)) if text.is_empty() => Ok(Some(Modules::Named(Vec::new()))),
            // Of what is excluded, PEFT takes every string as a regular expression.
            Some(Node::Text(text)) if key == "target_modules" && text.eq_ignore_ascii_case("all-linear") => {
                Ok(Some(Modules::AllLinear))
            }
            Some(Node::Text(text)) => match Pattern::whole(text) {
                Ok(pattern) => Ok(Some(Modules::Matching(pattern))),
                Err(e) => self.fail(key, e),
            },
            Some(Node::List(names)) => {
                let name = |node: &Node| match node {
                    Node::Text(name) if !name.is_empty() => Ok(name.clone()),
                    found => self.unexpected(key, found, "a module's name"),
                };
                names.iter().map(name).collect::<Result<_>>().map(Modules::Named).map(Some)
            }
            Some(found) => self.unexpected(key, found, "a list of module names or a regular expression"),
        }
    }

    fn layers(&self) -> Result<Option<Vec<usize>>> {
        let key = "layers_to_transform";
        let Some(found) = self.get(key) else { return Ok(None) };
        let layers = match found {
            Node::List(items) => items.as_slice(),
            one => std::slice::from_ref(one),
        };
        let index = |node: &Node| match node {
            Node::Int(n) if *n >= 0 => Ok(*n as usize),
            found => self.unexpected(key, found, "a layer's index"),
        };
        let layers = layers.iter().map(index).collect::<Result<Vec<_>>>()?;
        match self.get("layers_pattern") {
            None => {}
            Some(Node::List(items)) if items.is_empty() || *items == [Node::Text("layers".into())] => {}
            Some(Node::Text(t)) if t.is_empty() || t == "layers" => {}
            Some(found) if !layers.is_empty() => return self.unexpected("layers_pattern", found, "\"layers\""),
            Some(_) => {}
        }
        // PEFT takes an empty list as all.
        Ok(Some(layers).filter(|l| !l.is_empty()))
    }

    fn patterns<T>(&self, key: &str, value: impl Fn(&Node) -> Result<T>) -> Result<Vec<(Pattern, T)>> {
        let fields = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(Node::Object(fields)) => fields,
            Some(found) => return self.unexpected(key, found, "an object of patterns"),
        };
        let mut patterns = Vec::new();
        let mut regexes = 0;
        for (text, node) in fields.iter() {
            let pattern = Pattern::ending(text).or_else(|e| self.fail(key, e))?;
            regexes += usize::from(pattern.is_regex());
            if regexes > MAX_REGEXES {
                return self.fail(key, format!("more than {MAX_REGEXES} regular expressions; name the modules"));
            }
            patterns.push((pattern, value(node)?));
        }
        Ok(patterns)
    }
}
