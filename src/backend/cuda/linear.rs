//! Quantised products: up to 8 tokens by one kernel that quantises inside, more by a quantiser and a matrix product.

use super::launch::arg;
use super::params::{GemmParams, GemvParams};
use super::{Cuda, CudaSlice, CudaTernary, CudaView, CudaViewMut, aligned, plan};
use crate::Result;
use crate::backend::cpu::Gate;
use crate::backend::gpu::Launch;
use crate::backend::gpu::linear::{Epilogue, Product};

fn gemv_kernel(epilogue: Epilogue) -> &'static str {
    match epilogue {
        Epilogue::Store => "bitnet_gemv_norm",
        Epilogue::Add => "bitnet_gemv_norm_residual",
        Epilogue::Gated(_) => "bitnet_gemv_norm_gated",
    }
}

fn gemm_kernel(epilogue: Epilogue, wide: bool) -> &'static str {
    match (epilogue, wide) {
        (Epilogue::Store, false) => "bitnet_gemm_64",
        (Epilogue::Store, true) => "bitnet_gemm_128",
        (Epilogue::Add, false) => "bitnet_gemm_residual_64",
        (Epilogue::Add, true) => "bitnet_gemm_residual_128",
        (Epilogue::Gated(_), false) => "bitnet_gemm_gated_64",
        (Epilogue::Gated(_), true) => "bitnet_gemm_gated_128",
    }
}

/// Addresses of a product's operands; the norm's is 0 if there is none.
#[derive(Clone, Copy)]
struct Operands {
    x: u64,
    norm: u64,
    eps: f32,
    /// The first output value of the first token.
    out: u64,
}

impl Cuda {
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
        weight: &CudaTernary,
        x: &CudaView<'_, f32>,
        norm: Option<(&CudaView<'_, f32>, f32)>,
        out: &mut CudaViewMut<'_, f32>,
        first_column: usize,
        width: usize,
        add: bool,
    ) -> Result<()> {
        self.product("norm_linear", weight, x, norm, out, first_column, width, Epilogue::adds(add))
    }

    /// `act(gate) · up` in f32 `[tokens, n]`, gate and up being the products of a
    /// [`crate::backend::Arrangement::GateUp`] weight of 2 · n rows; input and norm as in [`Cuda::norm_linear`].
    ///
    /// # Errors
    /// As [`Cuda::norm_linear`].
    pub fn gated_linear(
        &self,
        gate: Gate,
        weight: &CudaTernary,
        x: &CudaView<'_, f32>,
        norm: Option<(&CudaView<'_, f32>, f32)>,
        out: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        self.product("gated_linear", weight, x, norm, out, 0, weight.rows() / 2, Epilogue::Gated(gate))
    }

    #[allow(clippy::too_many_arguments)]
    fn product(
        &self,
        op: &'static str,
        weight: &CudaTernary,
        x: &CudaView<'_, f32>,
        norm: Option<(&CudaView<'_, f32>, f32)>,
        out: &mut CudaViewMut<'_, f32>,
        first_column: usize,
        width: usize,
        epilogue: Epilogue,
    ) -> Result<()> {
        let norm_len = norm.map(|(w, _)| w.len());
        let p = Product::of(op, weight, epilogue, x.len(), norm_len, out.len(), first_column, width)?;
        if p.tokens == 0 {
            return Ok(());
        }
        let at = Operands {
            x: self.read(x),
            norm: norm.map_or(0, |(w, _)| self.read(w)),
            eps: norm.map_or(0.0, |(_, eps)| eps),
            out: self.write(out) + (first_column * size_of::<f32>()) as u64,
        };
        if p.k.is_multiple_of(4) {
            aligned(op, [at.x, at.norm])?;
        }
        if p.tokens <= plan::DECODE_TOKENS
            && let Some(plan) = plan::gemv(&self.chip, plan::row_tiles(p.n, epilogue.is_gated()), p.k, p.tokens)
        {
            return self.decode(&p, at, plan);
        }
        self.prefill(&p, at)
    }

    /// As many launches as shared memory makes of up to 8 tokens.
    fn decode(&self, p: &Product<'_, CudaSlice<u8>>, at: Operands, plan: plan::Gemv) -> Result<()> {
        let (k, tiles) = (p.k, plan::row_tiles(p.n, p.epilogue.is_gated()));
        for first in (0..p.tokens).step_by(plan.tokens) {
            let tokens = plan.tokens.min(p.tokens - first);
            // The same grid with fewer tokens takes less shared memory.
            let plan::Gemv { grid, block, shared, .. } =
                if tokens == plan.tokens { plan } else { plan::gemv(&self.chip, tiles, k, tokens).unwrap_or(plan) };
            let params = GemvParams {
                weights: self.read(p.weight.data()),
                x: at.x + (first * k * size_of::<f32>()) as u64,
                norm: at.norm,
                q: 0,
                sx: 0,
                qsum: 0,
                out: at.out + (first * p.stride * size_of::<f32>()) as u64,
                scales: p.weight.scales(),
                eps: at.eps,
                sizes: p.sizes(tokens)?,
            };
            let bytes = p.moved(tokens, k * size_of::<f32>());
            let launch = Launch::new(gemv_kernel(p.epilogue), (grid, 1, 1), block).shared(shared).bytes(bytes);
            // SAFETY: the kernel takes one GemvParams; `product` checked that weight, input, norm and output have the
            // sizes that tokens, n, k and ld_out say, and the tokens of this launch are among them.
            unsafe { self.launch(launch, &mut [arg(&params)]) }?;
        }
        Ok(())
    }

    /// Quantises all tokens into scratch memory, then multiplies.
    fn prefill(&self, p: &Product<'_, CudaSlice<u8>>, at: Operands) -> Result<()> {
        let (tokens, k) = (p.tokens, p.k);
        let scratch = &mut *self.scratch();
        let codes = tokens.saturating_mul(plan::padded(k));
        let q = scratch.codes.address(self, codes, "quantised activations")?;
        let sx = scratch.scales.address(self, tokens, "activation scales")?;
        let qsum = scratch.sums.address(self, tokens, "activation sums")?;
        let (sizes, none) = (p.sizes(tokens)?, 0u64);
        let launch = Launch::new("bitnet_norm_quantise", (tokens, 1, 1), plan::row_threads(k))
            .shared(plan::QUANTISE_SHARED)
            .bytes(tokens * k * size_of::<f32>() + codes);
        let arguments = &mut [
            arg(&at.x),
            arg(&none),
            arg(&at.norm),
            arg(&at.eps),
            arg(&sizes.tokens),
            arg(&sizes.k),
            arg(&q),
            arg(&sx),
            arg(&qsum),
        ];
        // SAFETY: the arguments of bitnet_norm_quantise; x is [tokens, k] (checked in `product`) and only read, as there
        // is nothing to add; the scratch holds a padded row, a scale and a sum for each token.
        unsafe { self.launch(launch, arguments) }?;
        let plan = plan::gemm(&self.chip, plan::row_tiles(p.n, p.epilogue.is_gated()), tokens);
        let (weights, scales) = (self.read(p.weight.data()), p.weight.scales());
        let params = GemmParams { weights, q, sx, qsum, out: at.out, scales, sizes };
        let launch = Launch::new(gemm_kernel(p.epilogue, plan.wide), plan.grid, plan::GEMM_THREADS)
            .shared(plan.shared)
            .bytes(p.moved(tokens, plan::padded(k)));
        // SAFETY: the kernel takes one GemmParams; the scratch was filled by the kernel before, and `product` checked
        // weight and output.
        unsafe { self.launch(launch, &mut [arg(&params)]) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::images::known;
    use super::*;

    #[test]
    fn every_form_has_its_kernel() {
        for epilogue in [Epilogue::Store, Epilogue::Add, Epilogue::Gated(Gate::Silu)] {
            assert_eq!(known(gemv_kernel(epilogue)), Some(true));
            assert_eq!(known(gemm_kernel(epilogue, false)), Some(false));
            assert_eq!(known(gemm_kernel(epilogue, true)), Some(true));
        }
        assert_eq!(known("bitnet_norm_quantise"), Some(false));
    }
}
