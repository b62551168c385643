//! The decoder without quantisers in f64, as plainly as it can be written.

use candle_bitnet::model::config::{Activation, ModelConfig};
use candle_bitnet::train::{Kind, Parameters};
use half::bf16;
use std::collections::HashMap;

pub struct Oracle<'a> {
    pub config: &'a ModelConfig,
    pub weights: HashMap<String, Vec<f64>>,
}

type Rows = Vec<Vec<f64>>;

impl<'a> Oracle<'a> {
    /// The weights as λ = 0 sees them: ternary layers' masters as the bf16 that a checkpoint holds.
    pub fn new(config: &'a ModelConfig, parameters: &Parameters) -> Self {
        let weights = parameters.list().iter().map(|p| {
            let seen = |v: &f32| match p.kind {
                Kind::Ternary => bf16::from_f32(*v).to_f64(),
                _ => f64::from(*v),
            };
            (p.name.clone(), crate::flat(&p.value).iter().map(seen).collect())
        });
        Self { config, weights: weights.collect() }
    }

    fn linear(&self, x: &Rows, name: &str) -> Rows {
        let (w, cols) = (&self.weights[name], x[0].len());
        let row = |x: &Vec<f64>| w.chunks(cols).map(|w| w.iter().zip(x).map(|(a, b)| a * b).sum()).collect();
        x.iter().map(row).collect()
    }

    fn norm(&self, x: &Rows, name: &str) -> Rows {
        let w = &self.weights[name];
        let row = |x: &Vec<f64>| {
            let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
            let r = 1.0 / (mean + f64::from(self.config.rms_norm_eps)).sqrt();
            x.iter().zip(w).map(|(v, w)| v * r * w).collect()
        };
        x.iter().map(row).collect()
    }

    fn rotated(&self, x: &[f64], position: usize) -> Vec<f64> {
        let (dim, half) = (x.len(), x.len() / 2);
        let mut out = vec![0.0; dim];
        for i in 0..half {
            let angle = position as f64 * self.config.rope_theta.powf(-2.0 * i as f64 / dim as f64);
            out[i] = x[i] * angle.cos() - x[i + half] * angle.sin();
            out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin();
        }
        out
    }

    fn attention(&self, q: &Rows, k: &Rows, v: &Rows) -> Rows {
        let (c, dim) = (self.config, self.config.head_dim);
        let head = |row: &[f64], h: usize| row[h * dim..(h + 1) * dim].to_vec();
        let mut out = Rows::new();
        for t in 0..q.len() {
            let mut row = Vec::new();
            for h in 0..c.num_heads {
                let kv = h / (c.num_heads / c.num_kv_heads);
                let query = self.rotated(&head(&q[t], h), t);
                let scores: Vec<f64> = (0..=t)
                    .map(|s| {
                        let key = self.rotated(&head(&k[s], kv), s);
                        query.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>() / (dim as f64).sqrt()
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let p: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f64 = p.iter().sum();
                row.extend((0..dim).map(|i| p.iter().zip(v).map(|(p, v)| p / sum * v[kv * dim + i]).sum::<f64>()));
            }
            out.push(row);
        }
        out
    }

    fn logits(&self, tokens: &[u32]) -> Rows {
        let c = self.config;
        let add = |x: &mut Rows, y: Rows| x.iter_mut().flatten().zip(y.iter().flatten()).for_each(|(x, y)| *x += y);
        let embedding = &self.weights["model.embed_tokens.weight"];
        let row = |id: &u32| embedding[*id as usize * c.hidden_size..][..c.hidden_size].to_vec();
        let mut x: Rows = tokens.iter().map(row).collect();
        for layer in 0..c.num_layers {
            let name = |path: &str| format!("model.layers.{layer}.{path}.weight");
            let h = self.norm(&x, &name("input_layernorm"));
            let part = |which: &str| self.linear(&h, &name(&format!("self_attn.{which}_proj")));
            let mut context = self.attention(&part("q"), &part("k"), &part("v"));
            if c.sub_norms {
                context = self.norm(&context, &name("self_attn.attn_sub_norm"));
            }
            add(&mut x, self.linear(&context, &name("self_attn.o_proj")));
            let h = self.norm(&x, &name("post_attention_layernorm"));
            let (gate, up) = (self.linear(&h, &name("mlp.gate_proj")), self.linear(&h, &name("mlp.up_proj")));
            let act = |g: f64| match c.activation {
                Activation::Relu2 => g.max(0.0).powi(2),
                Activation::Silu => g / (1.0 + (-g).exp()),
            };
            let product = |(g, u): (&Vec<f64>, &Vec<f64>)| g.iter().zip(u).map(|(g, u)| act(*g) * u).collect();
            let mut h: Rows = gate.iter().zip(&up).map(product).collect();
            if c.sub_norms {
                h = self.norm(&h, &name("mlp.ffn_sub_norm"));
            }
            add(&mut x, self.linear(&h, &name("mlp.down_proj")));
        }
        let x = self.norm(&x, "model.norm.weight");
        self.linear(&x, if c.tied_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" })
    }

    /// Sum of the cross-entropy over sequences of `length`.
    pub fn loss(&self, tokens: &[u32], length: usize, targets: &[Option<u32>]) -> f64 {
        let logits = tokens.chunks(length).flat_map(|sequence| self.logits(sequence));
        let nll = |(row, target): (Vec<f64>, &Option<u32>)| {
            target.map_or(0.0, |id| crate::oracle::negative_log_likelihood(&row, id as usize))
        };
        logits.zip(targets).map(nll).sum()
    }
}

pub fn negative_log_likelihood(row: &[f64], target: usize) -> f64 {
    let max = row.iter().copied().fold(f64::MIN, f64::max);
    max + row.iter().map(|v| (v - max).exp()).sum::<f64>().ln() - row[target]
}
