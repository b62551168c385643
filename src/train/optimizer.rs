//! AdamW over all parameters, in place on the CPU.

use super::parameters::{Kind, Parameters};
use crate::backend::cpu::autograd::{self, Moments};
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Device, InplaceOp2, InplaceOp3, Layout, Tensor};
use half::bf16;
use rayon::prelude::*;

/// What stays the same over a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Largest norm of the gradient; larger ones are scaled down to it.
    pub clip: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, clip: 1.0 }
    }
}

/// AdamW (Loshchilov and Hutter, 2019) with clipping by the global norm. Norms and embeddings do not decay.
#[derive(Debug)]
pub struct AdamW {
    options: AdamWOptions,
    /// First and second moments of each parameter, f32.
    moments: Vec<(Tensor, Tensor)>,
    steps: u64,
}

impl AdamW {
    /// Moments of zero.
    ///
    /// # Errors
    /// Of candle.
    pub fn new(parameters: &Parameters, options: AdamWOptions) -> Result<Self> {
        let zero = |p: &super::Parameter| Tensor::zeros(p.value.shape(), DType::F32, p.value.device());
        let pairs = parameters.list().iter().map(|p| Ok((zero(p)?, zero(p)?)));
        Ok(Self { options, moments: pairs.collect::<Result<_>>()?, steps: 0 })
    }

    /// Continues from saved moments.
    ///
    /// # Errors
    /// [`Error::Shape`] if they do not belong to these parameters.
    pub fn resume(
        parameters: &Parameters,
        options: AdamWOptions,
        moments: Vec<(Tensor, Tensor)>,
        steps: u64,
    ) -> Result<Self> {
        let fits = |(p, (m, v)): (&super::Parameter, &(Tensor, Tensor))| {
            m.dims() == p.value.dims() && v.dims() == p.value.dims() && m.dtype() == DType::F32
        };
        if moments.len() != parameters.list().len() || !parameters.list().iter().zip(&moments).all(fits) {
            return Err(Error::Shape { op: "AdamW", reason: "saved moments of another model".into() });
        }
        Ok(Self { options, moments, steps })
    }

    /// Moments of each parameter, in the parameters' order.
    pub fn moments(&self) -> &[(Tensor, Tensor)] {
        &self.moments
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One step with gradients that were summed over `count` targets. Returns the norm of the mean gradient before
    /// clipping; if it is not finite nothing is changed.
    ///
    /// # Errors
    /// Of candle.
    pub fn step(
        &mut self,
        parameters: &mut Parameters,
        gradients: &[Tensor],
        count: usize,
        lr: f64,
        weight_decay: f64,
        seed: u64,
    ) -> Result<f64> {
        let squares = gradients.par_iter().map(sum_of_squares).collect::<Result<Vec<f64>>>()?;
        let norm = squares.iter().sum::<f64>().sqrt() / count.max(1) as f64;
        if !norm.is_finite() {
            return Ok(norm);
        }
        let clip = if norm > self.options.clip { self.options.clip / norm } else { 1.0 };
        self.steps += 1;
        let power = |beta: f64| 1.0 / (1.0 - beta.powi(self.steps.min(i32::MAX as u64) as i32));
        let factor = (clip / count.max(1) as f64) as f32;
        let moments = |beta: f64, squared: bool| Moments { beta: beta as f32, factor, squared };
        let steps = self.steps;
        let update = |kind: Kind, i: usize| Update {
            first: moments(self.options.beta1, false),
            second: moments(self.options.beta2, true),
            step: autograd::AdamW {
                lr: lr as f32,
                weight_decay: match kind {
                    Kind::Ternary | Kind::LowRank => weight_decay as f32,
                    Kind::Dense | Kind::Norm => 0.0,
                },
                eps: self.options.eps as f32,
                correction1: power(self.options.beta1) as f32,
                correction2: power(self.options.beta2) as f32,
            },
            seed: autograd::seed_of(&[seed, steps, i as u64]),
        };
        let all = parameters.list_mut().par_iter_mut().zip(&mut self.moments).zip(gradients).enumerate();
        all.try_for_each(|(i, ((p, (m, v)), g))| -> Result<()> {
            let (update, g) = (update(p.kind, i), g.to_dtype(DType::F32)?.contiguous()?);
            match p.value.device().is_cpu() {
                true => update.in_place(&p.value, m, v, &g),
                false => update.composed(&mut p.value, m, v, &g),
            }
        })?;
        Ok(norm)
    }
}

/// One step of one parameter.
struct Update {
    first: Moments,
    second: Moments,
    step: autograd::AdamW,
    seed: u64,
}

impl Update {
    /// On the CPU: three passes over memory, nothing allocated.
    fn in_place(&self, value: &Tensor, m: &Tensor, v: &Tensor, g: &Tensor) -> Result<()> {
        m.inplace_op2(g, &self.first)?;
        v.inplace_op2(g, &self.second)?;
        Ok(value.inplace_op3(m, v, self)?)
    }

    /// On any device, of candle's operations.
    fn composed(&self, value: &mut Tensor, m: &mut Tensor, v: &mut Tensor, g: &Tensor) -> Result<()> {
        let (p, step) = (self.first, self.step);
        let g = (g * f64::from(p.factor))?;
        *m = ((&*m * f64::from(p.beta))? + (&g * f64::from(1.0 - p.beta))?)?;
        let beta = self.second.beta;
        *v = ((&*v * f64::from(beta))? + (g.sqr()? * f64::from(1.0 - beta))?)?;
        let root = ((&*v * f64::from(step.correction2))?.sqrt()? + f64::from(step.eps))?;
        let direction = (&*m * f64::from(step.correction1))?.div(&root)?;
        let before = value.to_dtype(DType::F32)?;
        let change = ((direction + (&before * f64::from(step.weight_decay))?)? * f64::from(step.lr))?;
        let exact = (before - change)?;
        *value = match value.dtype() {
            // candle has no random rounding, and rounding to the nearest would lose most updates: on the host, then.
            DType::BF16 => {
                let exact = exact.flatten_all()?.to_vec1::<f32>()?.into_iter().enumerate();
                let rounded: Vec<bf16> = exact.map(|(i, x)| autograd::round_stochastically(x, self.seed, i)).collect();
                Tensor::from_vec(rounded, value.shape(), &Device::Cpu)?.to_device(value.device())?
            }
            _ => exact,
        };
        Ok(())
    }
}

fn sum_of_squares(g: &Tensor) -> Result<f64> {
    if g.device().is_cpu() {
        let g = g.to_dtype(DType::F32)?.contiguous()?;
        let (storage, layout) = g.storage_and_layout();
        if let candle_core::Storage::Cpu(cpu) = &*storage {
            return Ok(autograd::sum_of_squares(crate::ops::contiguous(cpu, layout)?));
        }
    }
    Ok(f64::from(g.to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>()?))
}

impl InplaceOp2 for Moments {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> candle_core::Result<()> {
        let CpuStorage::F32(moment) = s1 else { candle_core::bail!("a moment that is not f32") };
        self.update(crate::ops::contiguous_mut(moment, l1)?, crate::ops::contiguous(s2, l2)?);
        Ok(())
    }
}

impl InplaceOp3 for Update {
    fn name(&self) -> &'static str {
        "adamw-update"
    }

    fn cpu_fwd(
        &self,
        s1: &mut CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<()> {
        let (m, v) = (crate::ops::contiguous(s2, l2)?, crate::ops::contiguous(s3, l3)?);
        match s1 {
            CpuStorage::F32(w) => self.step.update(crate::ops::contiguous_mut(w, l1)?, m, v),
            CpuStorage::BF16(w) => self.step.update_bf16(crate::ops::contiguous_mut(w, l1)?, m, v, self.seed),
            _ => candle_core::bail!("a master that is neither f32 nor bf16"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(seed: u64, scale: f32) -> Tensor {
        let value = |i: u64| (autograd::seed_of(&[seed, i]) >> 40) as f32 / 8_388_608.0 - 1.0;
        Tensor::from_vec((0..3 * 67).map(|i| value(i) * scale).collect::<Vec<f32>>(), (3, 67), &Device::Cpu).unwrap()
    }

    #[test]
    fn both_forms_of_an_update_agree() {
        for dtype in [DType::F32, DType::BF16] {
            let start = values(1, 1.0).to_dtype(dtype).unwrap();
            let copy = |t: &Tensor| t.copy().unwrap();
            let zeros = || Tensor::zeros((3, 67), DType::F32, &Device::Cpu).unwrap();
            let (a, mut b) = ((copy(&start), zeros(), zeros()), (copy(&start), zeros(), zeros()));
            let mut different = 0;
            for t in 1..=5 {
                let update = Update {
                    first: Moments { beta: 0.9, factor: 0.3, squared: false },
                    second: Moments { beta: 0.95, factor: 0.3, squared: true },
                    step: autograd::AdamW {
                        lr: 0.01,
                        weight_decay: 0.1,
                        eps: 1e-8,
                        correction1: 1.0 / (1.0 - 0.9f32.powi(t)),
                        correction2: 1.0 / (1.0 - 0.95f32.powi(t)),
                    },
                    seed: t as u64,
                };
                let g = values(t as u64 + 1, 5.0);
                update.in_place(&a.0, &a.1, &a.2, &g).unwrap();
                update.composed(&mut b.0, &mut b.1, &mut b.2, &g).unwrap();
                for (a, b) in [(&a.0, &b.0), (&a.1, &b.1), (&a.2, &b.2)] {
                    assert_eq!(a.dtype(), b.dtype());
                    let flat =
                        |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    for (a, b) in flat(a).into_iter().zip(flat(b)) {
                        // The same noise: a bf16 differs only where a last bit of f32 decided.
                        let near = (a - b).abs() <= 1e-5 * a.abs().max(0.1);
                        different += usize::from(!near);
                        assert!(near || dtype == DType::BF16, "{a} and {b}");
                    }
                }
            }
            assert!(different <= 5, "{dtype:?}: {different} values");
        }
    }
}
