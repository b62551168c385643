//! The dense model that the baseline measures: candle-transformers' Llama.

use super::super::spread::Spread;
use super::Plan;
use crate::Result;
use crate::backend::host;
use crate::model::config::ModelConfig;
use candle_core::{D, DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use candle_transformers::models::llama::{Cache, Config, Llama};
use half::bf16;
use std::time::Instant;

/// Random numbers that the weights repeat: how fast a product is does not depend on them.
const PATTERN: usize = 1 << 16;
/// Tokens of the prefill and steps before the first repetition, at most.
const WARM_UP: (usize, usize) = (16, 1);

/// Repetitions of prefill and decode: tokens a second of each, and what is resident at the end.
pub(super) fn run(config: &ModelConfig, dtype: DType, plan: Plan) -> Result<(Spread, Spread, Option<u64>)> {
    let Plan { pp, tg, batch, reps, .. } = plan;
    let config = Config {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        vocab_size: config.vocab_size,
        num_hidden_layers: config.num_layers,
        num_attention_heads: config.num_heads,
        num_key_value_heads: config.num_kv_heads,
        use_flash_attn: false,
        rms_norm_eps: config.rms_norm_eps.into(),
        rope_theta: config.rope_theta as f32,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        // candle compares it with the number of KV heads as well.
        max_position_embeddings: (pp + tg).max(config.num_kv_heads),
        tie_word_embeddings: config.tied_embeddings,
    };
    let weights = VarBuilder::from_backend(Box::new(Repeated::new()), dtype, Device::Cpu);
    let model = Llama::load(weights, &config)?;
    let cache = || Cache::new(true, dtype, &config, &Device::Cpu);
    let mut prefills = Vec::new();
    let mut decodes = Vec::new();
    let mut resident = None;
    let (warm_pp, warm_tg) = (pp.min(WARM_UP.0), tg.min(WARM_UP.1));
    for (pp, tg, counts) in std::iter::once((warm_pp, warm_tg, false)).chain((0..reps).map(|_| (pp, tg, true))) {
        let mut cache = cache()?;
        let prompt: Vec<u32> = (0..batch * pp).map(|i| ((i * 7919) % config.vocab_size) as u32).collect();
        let prompt = Tensor::from_vec(prompt, (batch, pp), &Device::Cpu)?;
        let start = Instant::now();
        let mut tokens = next(&model.forward(&prompt, 0, &mut cache)?, batch)?;
        let prefilled = Instant::now();
        for position in pp..pp + tg {
            tokens = next(&model.forward(&tokens, position, &mut cache)?, batch)?;
        }
        let decoded = prefilled.elapsed();
        if counts {
            prefills.push((batch * pp) as f64 / (prefilled - start).as_secs_f64());
            decodes.push((batch * tg) as f64 / decoded.as_secs_f64());
            resident = host::resident_bytes();
        }
    }
    Ok((Spread::of(prefills), Spread::of(decodes), resident))
}

/// The most likely tokens `[batch, 1]`.
fn next(logits: &Tensor, batch: usize) -> candle_core::Result<Tensor> {
    logits.argmax(D::Minus1)?.reshape((batch, 1))
}

/// Weights of any name and shape: small random numbers that repeat; ones for norms, so that activations stay in range.
struct Repeated {
    pattern: Vec<f32>,
}

impl Repeated {
    fn new() -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        // An odd length, so that rows differ.
        Self { pattern: (0..PATTERN - 1).map(|_| 0.05 * next()).collect() }
    }

    fn repeated<T: Copy>(&self, len: usize, convert: impl Fn(f32) -> T) -> candle_core::Result<Vec<T>> {
        let pattern: Vec<T> = self.pattern.iter().map(|v| convert(*v)).collect();
        let mut values = Vec::new();
        values.try_reserve_exact(len).map_err(candle_core::Error::wrap)?;
        while values.len() < len {
            let rest = (len - values.len()).min(pattern.len());
            values.extend_from_slice(pattern.get(..rest).unwrap_or_default());
        }
        Ok(values)
    }
}

impl SimpleBackend for Repeated {
    fn get(&self, shape: Shape, _: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        match (shape.rank(), dtype) {
            (1, _) => Tensor::ones(shape, dtype, device),
            (_, DType::BF16) => Tensor::from_vec(self.repeated(shape.elem_count(), bf16::from_f32)?, shape, device),
            _ => Tensor::from_vec(self.repeated(shape.elem_count(), |v| v)?, shape, device)?.to_dtype(dtype),
        }
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("{name}: a random weight needs a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_repeat_and_are_no_zeros() {
        let weights = Repeated::new();
        let get = |shape: (usize, usize), dtype| weights.get(shape.into(), "w", Init::Const(0.0), dtype, &Device::Cpu);
        let w = get((300, 700), DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(w[PATTERN - 1..PATTERN + 9], w[..10]);
        assert!(w.iter().all(|v| v.abs() <= 0.025) && w.iter().filter(|v| **v == 0.0).count() < 10);
        assert_eq!(get((3, 5), DType::BF16).unwrap().dtype(), DType::BF16);
        let norm = weights.get(4.into(), "n", Init::Const(0.0), DType::BF16, &Device::Cpu).unwrap();
        assert_eq!(norm.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap(), [1.0; 4]);
        assert!(weights.contains_tensor("w") && weights.get_unchecked("w", DType::F32, &Device::Cpu).is_err());
    }
}
