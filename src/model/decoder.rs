//! The decoder: one definition for BitNet (sub-norms, relu²) and Llama-style b1.58 models.

use super::config::{Activation, ModelConfig, Projection};
use super::source::WeightSource;
use super::workspace::{Activations, Outputs, Pass, Workspace};
use crate::backend::attention::{AttentionShape, RopeTable};
use crate::backend::cpu::Gate;
use crate::backend::{Backend, DenseType, DenseWeight, Rope};
use crate::nn::{HeadChoice, KvCache, Linear, LinearGroup, LinearParts, LowRank, OutputHead, RmsNorm};
use crate::ops::{self, AttentionInput, Output};
use crate::{Error, Result};
use candle_core::{Storage, Tensor};
use std::sync::{Arc, Mutex, PoisonError};

/// One sequence's part of a batch: tokens that follow its first `position` ones.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    /// The sequence's slot in the KV cache.
    pub slot: usize,
    /// Position of the first of `tokens`.
    pub position: usize,
    /// Tokens to append; one in decode, many in prefill.
    pub tokens: &'a [u32],
}

/// Which logits a forward pass computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// Those after each sequence's last token: `[sequences, vocab]`.
    Last,
    /// As [`Logits::Last`], where only the k largest of each sequence matter, of equal ones the first, k up to 64: others may
    /// be −∞ instead. With a screened head ([`OutputHead`]) and up to three sequences this reads less.
    Top(usize),
    /// Those after every token, sequences one after the other: `[tokens, vocab]`.
    All,
}

/// Bytes that a decoded token reads and a position keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// Packed ternary weights.
    pub ternary: usize,
    /// Output head, as far as a token reads it of which the largest logit is asked for.
    pub head: usize,
    /// Embedding, where it is not the head; a token reads one row of it.
    pub embedding: usize,
    /// Projections that are not ternary.
    pub dense: usize,
    /// The adapter's matrices.
    pub adapter: usize,
    /// Elements of keys and values of one position.
    pub kv_elements_per_position: usize,
}

#[derive(Debug)]
struct Layer {
    input_norm: RmsNorm,
    qkv: LinearGroup,
    attention_sub_norm: Option<RmsNorm>,
    output: Linear,
    post_attention_norm: RmsNorm,
    gate_up: LinearGroup,
    mlp_sub_norm: Option<RmsNorm>,
    down: Linear,
}

impl Layer {
    fn host_bytes(&self) -> impl Iterator<Item = &[u8]> {
        let qkv = self.qkv.host_bytes().into_iter().chain(self.output.host_bytes());
        let weights = qkv.chain(self.gate_up.host_bytes()).chain(self.down.host_bytes());
        weights.chain(self.adapters().filter_map(|a| a.weight().host_bytes()).flatten())
    }

    /// Whether a forward pass makes no tensor of its own.
    fn is_plain(&self) -> bool {
        [&self.qkv, &self.gate_up].iter().all(|g| g.is_plain()) && self.output.is_plain() && self.down.is_plain()
    }

    fn adapters(&self) -> impl Iterator<Item = &LowRank> {
        let groups = [&self.qkv, &self.gate_up].into_iter().flat_map(LinearGroup::adapters);
        groups.chain([&self.output, &self.down].into_iter().filter_map(Linear::adapter))
    }
}

/// A b1.58 decoder on one device.
#[derive(Debug)]
pub struct Decoder {
    backend: Backend,
    config: ModelConfig,
    shape: AttentionShape,
    rope: Rope,
    gate: Gate,
    embedding: Arc<DenseWeight>,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: OutputHead,
    /// The tensors of the pass in progress, which wait for the next one.
    workspace: Mutex<Workspace>,
}

impl Decoder {
    /// Loads and packs all weights. `context` positions are prepared for; `progress` is called after each layer.
    ///
    /// # Errors
    /// Those of the source; [`Error::Shape`] for shapes that no kernel runs.
    pub fn load(
        backend: &Backend,
        config: ModelConfig,
        source: &dyn WeightSource,
        context: usize,
        mut progress: impl FnMut(usize),
    ) -> Result<Self> {
        let shape = AttentionShape::new(config.num_heads, config.num_kv_heads, config.head_dim)?;
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let embedding = Arc::new(source.dense(backend, "model.embed_tokens.weight", vocab, hidden)?);
        let head = if config.tied_embeddings {
            Arc::clone(&embedding)
        } else {
            Arc::new(source.dense(backend, "lm_head.weight", vocab, hidden)?)
        };
        let norm =
            |name: &str, len: usize| RmsNorm::new(source.vector(name, len)?, config.rms_norm_eps, backend.device());
        let mut layers = Vec::with_capacity(config.num_layers);
        for index in 0..config.num_layers {
            layers.push(load_layer(backend, &config, source, index, &norm)?);
            progress(index + 1);
        }
        Ok(Self {
            rope: backend.rope(RopeTable::new(context, config.head_dim, config.rope_theta)?)?,
            workspace: Mutex::new(Workspace::new(backend, &config, shape)?),
            gate: match config.activation {
                Activation::Relu2 => Gate::Relu2,
                Activation::Silu => Gate::Silu,
            },
            norm: norm("model.norm.weight", hidden)?,
            backend: backend.clone(),
            config,
            shape,
            embedding,
            layers,
            head: OutputHead::new(head),
        })
    }

    /// The same decoder with another kind of output head; [`Self::load`] gives the stored one.
    ///
    /// # Errors
    /// As [`OutputHead::with_form`].
    pub fn with_head(self, choice: HeadChoice) -> Result<Self> {
        Ok(Self { head: self.head.with_form(&self.backend, choice)?, ..self })
    }

    /// The output head.
    pub fn head(&self) -> &OutputHead {
        &self.head
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device and its kernels.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Positions that a sequence can have.
    pub fn context(&self) -> usize {
        self.rope.positions()
    }

    /// A KV cache for this model.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the device refuses the memory.
    pub fn kv_cache(&self, dtype: DenseType, slots: usize) -> Result<KvCache> {
        self.kv_cache_of(dtype, slots, self.context())
    }

    /// A KV cache for sequences of at most `positions`, where the whole context is not needed.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the device refuses the memory.
    pub fn kv_cache_of(&self, dtype: DenseType, slots: usize, positions: usize) -> Result<KvCache> {
        KvCache::new(&self.backend, self.shape, dtype, self.layers.len(), slots, positions.min(self.context()))
    }

    /// What the weights occupy, by what reads them.
    pub fn footprint(&self) -> Footprint {
        let (mut ternary, mut dense) = (0, 0);
        let mut count = |bytes: usize, is_ternary: bool| *if is_ternary { &mut ternary } else { &mut dense } += bytes;
        for layer in &self.layers {
            for group in [&layer.qkv, &layer.gate_up] {
                let (t, d) = group.bytes();
                count(t, true);
                count(d, false);
            }
            for linear in [&layer.output, &layer.down] {
                count(linear.bytes(), linear.is_ternary());
            }
        }
        Footprint {
            ternary,
            dense,
            adapter: self.layers.iter().flat_map(Layer::adapters).map(|a| a.weight().bytes()).sum(),
            head: self.head.bytes(),
            embedding: if self.config.tied_embeddings { 0 } else { self.embedding.bytes() },
            kv_elements_per_position: 2 * self.layers.len() * self.shape.kv_heads * self.shape.head_dim,
        }
    }

    /// What a decoded token reads of the weights, in that order, as far as this machine's memory holds it.
    pub fn host_weights(&self) -> Vec<&[u8]> {
        self.layers.iter().flat_map(Layer::host_bytes).chain(self.head.host_bytes()).collect()
    }

    /// Appends each sequence's tokens at its position and returns logits, f32, in a tensor of their own.
    ///
    /// Sequences are independent: a token's logits do not depend on what else is in the batch, nor on how its
    /// sequence was cut into calls.
    ///
    /// # Errors
    /// [`Error::ContextFull`] if a sequence does not fit, [`Error::Request`] for an empty sequence, a slot that
    /// does not exist or is used twice, or a token outside the vocabulary; the cache is then unchanged.
    pub fn forward(&self, batch: &[Sequence<'_>], cache: &KvCache, logits: Logits) -> Result<Tensor> {
        self.compute(batch, cache, logits, |outputs| match outputs.kept {
            true => Ok(outputs.logits.force_contiguous()?),
            false => Ok(outputs.logits.clone()),
        })
    }

    /// As [`Decoder::forward`], but lends the logits to `read` instead of copying them. The next pass writes into the
    /// same tensor, so nobody may keep it; `read` must not start one on this decoder.
    ///
    /// # Errors
    /// As [`Decoder::forward`]; those of `read`.
    pub fn forward_with<R>(
        &self,
        batch: &[Sequence<'_>],
        cache: &KvCache,
        logits: Logits,
        read: impl FnOnce(&Tensor) -> Result<R>,
    ) -> Result<R> {
        self.compute(batch, cache, logits, |outputs| read(&outputs.logits))
    }

    fn compute<R>(
        &self,
        batch: &[Sequence<'_>],
        cache: &KvCache,
        logits: Logits,
        read: impl FnOnce(&Outputs) -> Result<R>,
    ) -> Result<R> {
        self.check(batch, cache)?;
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        let replayed = self.layers.iter().all(Layer::is_plain).then(|| cache.id());
        workspace.with(batch, logits, replayed, |pass| self.run(pass, cache, logits), read)
    }

    /// Why decode steps are computed anew each time, once, where the device could not record them.
    pub fn take_replay_failure(&self) -> Option<String> {
        self.workspace.lock().unwrap_or_else(PoisonError::into_inner).take_replay_failure()
    }

    /// The layers and the head: operations on tensors that exist, nothing else.
    fn run(&self, pass: Pass<'_>, cache: &KvCache, wanted: Logits) -> Result<()> {
        let Pass { batch, activations: Activations { x, qkv, context, hidden }, picks, outputs } = pass;
        let (backend, shape, rope) = (&self.backend, self.shape, &self.rope);
        ops::embed(backend, &self.embedding, batch, x)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let Some(kv) = cache.layer(index) else { break };
            layer.qkv.forward(backend, x, &layer.input_norm, Output::replace(qkv))?;
            ops::attention(backend, qkv, AttentionInput { shape, batch, rope, kv }, context)?;
            layer.output.forward(backend, context, layer.attention_sub_norm.as_ref(), Output::add_to(x))?;
            layer.gate_up.forward_gated(backend, self.gate, x, &layer.post_attention_norm, hidden)?;
            layer.down.forward(backend, hidden, layer.mlp_sub_norm.as_ref(), Output::add_to(x))?;
        }
        let Outputs { picked, last, logits, .. } = outputs;
        let hidden = match picks {
            [] => x,
            picks => {
                ops::select_rows(backend, x, picks, picked)?;
                picked
            }
        };
        self.norm.forward(backend, hidden, last)?;
        let top = match wanted {
            Logits::Top(k) => Some(k),
            Logits::Last | Logits::All => None,
        };
        self.head.forward(backend, last, top, logits)
    }

    fn check(&self, batch: &[Sequence<'_>], cache: &KvCache) -> Result<()> {
        if batch.is_empty() || batch.iter().any(|s| s.tokens.is_empty()) {
            return Err(Error::request("tokens", "at least one token is needed for each sequence"));
        }
        if cache.layers() != self.layers.len() {
            return Err(Error::Shape {
                op: "forward",
                reason: format!("a cache of {} layers for a model of {}", cache.layers(), self.layers.len()),
            });
        }
        let available = cache.capacity().min(self.context());
        for (i, s) in batch.iter().enumerate() {
            if s.slot >= cache.slots() || batch[..i].iter().any(|other| other.slot == s.slot) {
                let reason = format!("{} is used twice or not below {}", s.slot, cache.slots());
                return Err(Error::request("KV slot", reason));
            }
            let needed = s.position.saturating_add(s.tokens.len());
            if needed > available {
                return Err(Error::ContextFull { needed, available });
            }
            if let Some(id) = s.tokens.iter().find(|t| **t as usize >= self.config.vocab_size) {
                let reason = format!("{id} is outside the vocabulary of {}", self.config.vocab_size);
                return Err(Error::request("token id", reason));
            }
        }
        Ok(())
    }
}

/// Loads one layer; its projections are decoded in parallel and packed as soon as they are.
fn load_layer(
    backend: &Backend,
    config: &ModelConfig,
    source: &dyn WeightSource,
    index: usize,
    norm: &dyn Fn(&str, usize) -> Result<RmsNorm>,
) -> Result<Layer> {
    let decoded: [Mutex<Option<Result<_>>>; 7] = Default::default();
    backend.cpu().pool().run(Projection::ALL.len(), &|i| {
        let weight = source.linear(backend, index, Projection::ALL[i]);
        *decoded[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(weight);
    });
    let mut parts = Vec::with_capacity(7);
    let mut adapters = Vec::with_capacity(7);
    for (slot, which) in decoded.into_iter().zip(Projection::ALL) {
        let name = config.projection_name(index, which);
        let weight = slot.into_inner().unwrap_or_else(PoisonError::into_inner);
        let weight = weight.unwrap_or_else(|| source.linear(backend, index, which))?;
        let norm = match config.quantization.use_rms_norm && config.is_converted(&name) {
            false => None,
            true => {
                let (_, cols) = config.projection_shape(which);
                let weight = source.vector(&format!("{name}.rms_norm.weight"), cols)?;
                Some(RmsNorm::new(weight, config.quantization.rms_norm_eps, backend.device())?)
            }
        };
        parts.push(LinearParts { weight, norm });
        adapters.push(source.adapter(backend, index, which)?);
    }
    let (mut parts, mut adapters) = (parts.into_iter(), adapters.into_iter());
    let mut take = |n: usize| -> (Vec<LinearParts>, Vec<Option<LowRank>>) {
        (parts.by_ref().take(n).collect(), adapters.by_ref().take(n).collect())
    };
    let (qkv, mut output, gate_up, mut down) = (take(3), take(1), take(2), take(1));
    let one = |(parts, adapters): &mut (Vec<LinearParts>, Vec<Option<LowRank>>)| match parts.pop() {
        Some(p) => Linear::new(backend, p)?.with_adapter(adapters.pop().flatten()),
        None => Err(Error::Shape { op: "load", reason: "a layer has seven projections".into() }),
    };
    let group = |(parts, adapters)| LinearGroup::new(backend, parts)?.with_adapters(adapters);
    let gate_up = match gate_up.1.iter().any(Option::is_some) {
        true => group(gate_up)?,
        false => LinearGroup::gate_up(backend, gate_up.0)?,
    };
    let name = |path: &str| format!("model.layers.{index}.{path}.weight");
    let [attention_sub_norm, mlp_sub_norm] = config.family.sub_norms();
    let sub = |path: &str, len: usize| config.sub_norms.then(|| norm(&name(path), len)).transpose();
    Ok(Layer {
        input_norm: norm(&name("input_layernorm"), config.hidden_size)?,
        qkv: group(qkv)?,
        attention_sub_norm: sub(attention_sub_norm, config.q_size())?,
        output: one(&mut output)?,
        post_attention_norm: norm(&name("post_attention_layernorm"), config.hidden_size)?,
        gate_up,
        mlp_sub_norm: sub(mlp_sub_norm, config.intermediate_size)?,
        down: one(&mut down)?,
    })
}

/// Copies logits that a pass gave into a buffer that is kept between tokens.
///
/// # Errors
/// Of candle, if they are not f32 or cannot be copied to the host.
pub fn read_logits(logits: &Tensor, out: &mut Vec<f32>) -> Result<()> {
    let (storage, layout) = logits.storage_and_layout();
    if let (Storage::Cpu(cpu), Some((start, end))) = (&*storage, layout.contiguous_offsets()) {
        out.clear();
        out.extend_from_slice(&cpu.as_slice::<f32>()?[start..end]);
        return Ok(());
    }
    drop(storage);
    *out = logits.flatten_all()?.to_vec1()?;
    Ok(())
}
