//! Quantised products: up to 8 tokens by a decode product, which quantises inside where it has the room, more by a matrix
//! product.

use super::params::{Norm, Product as Params};
use super::scratch::Scratch;
use super::{Metal, MetalBuffer, MetalSlice, MetalTernary, aligned, plan};
use crate::Result;
use crate::backend::cpu::Gate;
use crate::backend::gpu::Launch;
use crate::backend::gpu::linear::{Epilogue, Product};
use crate::backend::gpu::plan::{by_tokens, form_of};

fn gemv_kernel(epilogue: Epilogue, quantises: bool, tokens: usize) -> &'static str {
    let names = match (epilogue, quantises) {
        (Epilogue::Store, true) => by_tokens!("bitnet_gemv_norm"),
        (Epilogue::Add, true) => by_tokens!("bitnet_gemv_norm_residual"),
        (Epilogue::Gated(_), true) => by_tokens!("bitnet_gemv_norm_gated"),
        (Epilogue::Store, false) => by_tokens!("bitnet_gemv"),
        (Epilogue::Add, false) => by_tokens!("bitnet_gemv_residual"),
        (Epilogue::Gated(_), false) => by_tokens!("bitnet_gemv_gated"),
    };
    form_of(names, tokens)
}

fn gemm_kernel(epilogue: Epilogue, wide: bool) -> &'static str {
    match (epilogue, wide) {
        (Epilogue::Store, false) => "bitnet_gemm",
        (Epilogue::Store, true) => "bitnet_gemm_64",
        (Epilogue::Add, false) => "bitnet_gemm_residual",
        (Epilogue::Add, true) => "bitnet_gemm_residual_64",
        (Epilogue::Gated(_), false) => "bitnet_gemm_gated",
        (Epilogue::Gated(_), true) => "bitnet_gemm_gated_64",
    }
}

/// A product, checked, with its operands.
struct Operands<'a> {
    product: Product<'a, MetalBuffer<u8>>,
    x: MetalSlice<'a>,
    norm: Option<(MetalSlice<'a>, f32)>,
    /// From the first output value of the first token on.
    out: MetalSlice<'a>,
}

impl Operands<'_> {
    fn params(&self) -> Result<Params> {
        let sizes = self.product.sizes(self.product.tokens)?;
        let (scales, has_norm) = (self.product.weight.scales(), i32::from(self.norm.is_some()));
        Ok(Params { scales, eps: self.norm.map_or(0.0, |(_, eps)| eps), sizes, has_norm })
    }

    fn weights(&self) -> MetalSlice<'_, u8> {
        self.product.weight.data().as_slice()
    }

    /// The norm's weight, or what is bound in its place.
    fn norm_weight(&self) -> MetalSlice<'_> {
        self.norm.map_or(self.x, |(weight, _)| weight)
    }
}

impl Metal {
    /// `W · quantise(norm(x))` in f32: columns `first_column ..` of rows of `width`, replaced or added to.
    ///
    /// `x` is f32 `[tokens, cols]`, the norm's weight f32 `[cols]` (RMSNorm, with its epsilon), `out` f32
    /// `[tokens, width]`, none of it part of another. `weight` is stacked.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for operands that do not fit, [`crate::Error::Device`] for what fails on the device.
    #[allow(clippy::too_many_arguments)]
    pub fn norm_linear(
        &self,
        weight: &MetalTernary,
        x: MetalSlice<'_>,
        norm: Option<(MetalSlice<'_>, f32)>,
        out: MetalSlice<'_>,
        first_column: usize,
        width: usize,
        add: bool,
    ) -> Result<()> {
        self.product("norm_linear", weight, x, norm, out, first_column, width, Epilogue::adds(add))
    }

    /// `act(gate) · up` in f32 `[tokens, n]`, gate and up being the products of a
    /// [`crate::backend::Arrangement::GateUp`] weight of 2 · n rows; input and norm as in [`Metal::norm_linear`].
    ///
    /// # Errors
    /// As [`Metal::norm_linear`].
    pub fn gated_linear(
        &self,
        gate: Gate,
        weight: &MetalTernary,
        x: MetalSlice<'_>,
        norm: Option<(MetalSlice<'_>, f32)>,
        out: MetalSlice<'_>,
    ) -> Result<()> {
        self.product("gated_linear", weight, x, norm, out, 0, weight.rows() / 2, Epilogue::Gated(gate))
    }

    #[allow(clippy::too_many_arguments)]
    fn product(
        &self,
        op: &'static str,
        weight: &MetalTernary,
        x: MetalSlice<'_>,
        norm: Option<(MetalSlice<'_>, f32)>,
        out: MetalSlice<'_>,
        first_column: usize,
        width: usize,
        epilogue: Epilogue,
    ) -> Result<()> {
        let norm_len = norm.map(|(w, _)| w.len());
        let product = Product::of(op, weight, epilogue, x.len(), norm_len, out.len(), first_column, width)?;
        let (tokens, n, k) = (product.tokens, product.n, product.k);
        if tokens == 0 {
            return Ok(());
        }
        let p = Operands { product, x, norm, out: out.slice(first_column..) };
        aligned(op, [x, p.norm_weight()])?;
        if tokens > plan::DECODE_TOKENS {
            return self.prefill(&p);
        }
        let plan = plan::gemv(self.chip.cores(), plan::row_tiles(n, epilogue.is_gated()), k, tokens);
        if plan.quantises { self.decode(&p, plan) } else { self.decode_quantised(&p, plan) }
    }

    /// One launch that normalises, quantises and multiplies.
    fn decode(&self, p: &Operands<'_>, plan: plan::Gemv) -> Result<()> {
        let Product { tokens, k, epilogue, .. } = p.product;
        let launch = Launch::new(gemv_kernel(epilogue, true, tokens), (plan.grid, 1, 1), plan::THREADS)
            .shared(plan.threadgroup)
            .bytes(p.product.moved(tokens, k * size_of::<f32>()));
        let bindings = [p.weights().input(), p.x.input(), p.norm_weight().input(), p.out.output()];
        // SAFETY: the bindings and parameters of bitnet_gemv_norm*: `product` checked that weight, input, norm and output
        // have the sizes that tokens, n, k and ld_out say.
        unsafe { self.launch(launch, &bindings, &p.params()?) }
    }

    /// Quantises all tokens into scratch memory, then a decode product.
    fn decode_quantised(&self, p: &Operands<'_>, plan: plan::Gemv) -> Result<()> {
        let kernel = gemv_kernel(p.product.epilogue, false, p.product.tokens);
        self.quantised(p, Launch::new(kernel, (plan.grid, 1, 1), plan::THREADS).shared(plan.threadgroup))
    }

    /// Quantises all tokens into scratch memory, then a matrix product.
    fn prefill(&self, p: &Operands<'_>) -> Result<()> {
        let Product { tokens, n, epilogue, .. } = p.product;
        let plan = plan::gemm(plan::row_tiles(n, epilogue.is_gated()), tokens);
        let kernel = gemm_kernel(epilogue, plan.wide);
        self.quantised(p, Launch::new(kernel, plan.grid, plan::GEMM_THREADS).shared(plan.threadgroup))
    }

    /// Quantises all tokens into scratch memory, then multiplies.
    fn quantised(&self, p: &Operands<'_>, launch: Launch) -> Result<()> {
        let scratch = &mut *self.scratch();
        let (q, stats) = self.quantise(p, scratch)?;
        let launch = launch.bytes(p.product.moved(p.product.tokens, 2 * plan::padded(p.product.k)));
        let bindings = [p.weights().input(), q.input(), stats.input(), p.out.output()];
        // SAFETY: as in `decode`, of bitnet_gemv* or bitnet_gemm*, which take the same; the scratch was filled by the kernel
        // before.
        unsafe { self.launch(launch, &bindings, &p.params()?) }
    }

    /// Codes and sums of all tokens, in scratch memory.
    fn quantise<'a>(
        &self,
        p: &Operands<'_>,
        scratch: &'a mut Scratch,
    ) -> Result<(MetalSlice<'a, u16>, MetalSlice<'a>)> {
        let Product { tokens, k, .. } = p.product;
        let codes = tokens.saturating_mul(plan::padded(k));
        let q = scratch.codes.first(self, codes, "quantised activations")?;
        let stats = scratch.stats.first(self, tokens.saturating_mul(plan::stats(k)), "activation sums")?;
        let (sizes, eps) = (p.product.sizes(tokens)?, p.norm.map_or(0.0, |(_, eps)| eps));
        let has_weight = i32::from(p.norm.is_some());
        let params = Norm { rows: sizes.tokens, k: sizes.k, eps, has_add: 0, has_weight };
        let launch = Launch::new("bitnet_norm_quantise", (tokens, 1, 1), plan::THREADS)
            .shared(plan::NORM_MEMORY)
            .bytes(tokens * k * size_of::<f32>() + 2 * codes);
        // x is only read, as there is nothing to add.
        let bindings = [p.x.input(), p.x.input(), p.norm_weight().input(), q.output(), stats.output()];
        // SAFETY: the bindings and parameters of bitnet_norm_quantise: x is [tokens, k] and the norm [k] (checked in
        // `product`); the scratch holds a padded row and its sums for each token.
        unsafe { self.launch(launch, &bindings, &params) }?;
        Ok((q, stats))
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernels::kernel;
    use super::*;

    #[test]
    fn every_form_has_its_kernel() {
        for epilogue in [Epilogue::Store, Epilogue::Add, Epilogue::Gated(Gate::Silu)] {
            for quantises in [false, true] {
                for tokens in 1..=8 {
                    let name = gemv_kernel(epilogue, quantises, tokens);
                    assert!(kernel(name).is_ok() && name.contains("_norm") == quantises, "{name}");
                    assert!(name.ends_with(&format!("_{}", [1, 2, 4, 4, 8, 8, 8, 8][tokens - 1])), "{name}");
                }
            }
            assert!(kernel(gemm_kernel(epilogue, false)).is_ok() && gemm_kernel(epilogue, true).ends_with("_64"));
        }
    }
}
