//! Quantised products: up to 8 tokens by one kernel that quantises inside, more by a quantiser and a matrix product.

use super::launch::{Launch, arg};
use super::params::{GemmParams, GemvParams};
use super::{Cuda, CudaTernary, CudaView, CudaViewMut, aligned, int, plan, shape};
use crate::Result;
use crate::backend::Arrangement;
use crate::backend::cpu::Gate;

/// What becomes of a product's results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Epilogue {
    Store,
    Add,
    Gated(Gate),
}

impl Epilogue {
    fn gemv(self) -> &'static str {
        match self {
            Self::Store => "bitnet_gemv_norm",
            Self::Add => "bitnet_gemv_norm_residual",
            Self::Gated(_) => "bitnet_gemv_norm_gated",
        }
    }

    fn gemm(self, wide: bool) -> &'static str {
        match (self, wide) {
            (Self::Store, false) => "bitnet_gemm_64",
            (Self::Store, true) => "bitnet_gemm_128",
            (Self::Add, false) => "bitnet_gemm_residual_64",
            (Self::Add, true) => "bitnet_gemm_residual_128",
            (Self::Gated(_), false) => "bitnet_gemm_gated_64",
            (Self::Gated(_), true) => "bitnet_gemm_gated_128",
        }
    }

    fn activation(self) -> i32 {
        match self {
            Self::Gated(gate) => activation(gate),
            Self::Store | Self::Add => 0,
        }
    }
}

/// A gated activation as kernels know it.
pub(super) fn activation(gate: Gate) -> i32 {
    match gate {
        Gate::Relu2 => 0,
        Gate::Silu => 1,
    }
}

/// One product, checked: addresses and sizes.
struct Product<'a> {
    weight: &'a CudaTernary,
    x: u64,
    norm: u64,
    eps: f32,
    /// The first output value of the first token.
    out: u64,
    tokens: usize,
    /// Output values of a token.
    n: usize,
    /// Elements between the outputs of two tokens.
    stride: usize,
    epilogue: Epilogue,
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
        let epilogue = if add { Epilogue::Add } else { Epilogue::Store };
        self.product("norm_linear", weight, x, norm, out, first_column, width, epilogue)
    }

    /// `act(gate) · up` in f32 `[tokens, n]`, gate and up being the products of a [`Arrangement::GateUp`] weight of 2 · n
    /// rows; input and norm as in [`Cuda::norm_linear`].
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
        let (gated, k) = (matches!(epilogue, Epilogue::Gated(_)), weight.cols());
        let n = if gated { weight.rows() / 2 } else { weight.rows() };
        let tokens = x.len() / k;
        let fits = gated == (weight.arrangement() == Arrangement::GateUp)
            && x.len() == tokens * k
            && tokens.checked_mul(width) == Some(out.len())
            && first_column.checked_add(n).is_some_and(|end| end <= width)
            && norm.is_none_or(|(w, _)| w.len() == k);
        if !fits {
            let reason = format!(
                "{:?} weight [{}, {k}], {} inputs, norm of {:?}, {} outputs in rows of {width} from column {first_column}",
                weight.arrangement(),
                weight.rows(),
                x.len(),
                norm.map(|(w, _)| w.len()),
                out.len()
            );
            return Err(shape(op, reason));
        }
        if tokens == 0 {
            return Ok(());
        }
        let (x, norm_weight) = (self.read(x), norm.map_or(0, |(w, _)| self.read(w)));
        if k.is_multiple_of(4) {
            aligned(op, [x, norm_weight])?;
        }
        let product = Product {
            weight,
            x,
            norm: norm_weight,
            eps: norm.map_or(0.0, |(_, eps)| eps),
            out: self.write(out) + (first_column * size_of::<f32>()) as u64,
            tokens,
            n,
            stride: width,
            epilogue,
        };
        if tokens <= plan::DECODE_TOKENS
            && let Some(plan) = plan::gemv(&self.chip, plan::row_tiles(n, gated), k, tokens)
        {
            return self.decode(op, &product, plan);
        }
        self.prefill(op, &product)
    }

    /// As many launches as shared memory makes of up to 8 tokens.
    fn decode(&self, op: &'static str, p: &Product<'_>, plan: plan::Gemv) -> Result<()> {
        let (k, tiles) = (p.weight.cols(), plan::row_tiles(p.n, matches!(p.epilogue, Epilogue::Gated(_))));
        for first in (0..p.tokens).step_by(plan.tokens) {
            let tokens = plan.tokens.min(p.tokens - first);
            // The same grid with fewer tokens takes less shared memory.
            let plan::Gemv { grid, block, shared, .. } =
                if tokens == plan.tokens { plan } else { plan::gemv(&self.chip, tiles, k, tokens).unwrap_or(plan) };
            let params = GemvParams {
                weights: self.read(p.weight.data()),
                x: p.x + (first * k * size_of::<f32>()) as u64,
                norm: p.norm,
                q: 0,
                sx: 0,
                qsum: 0,
                out: p.out + (first * p.stride * size_of::<f32>()) as u64,
                scales: p.weight.scales(),
                eps: p.eps,
                tokens: int(op, "tokens", tokens)?,
                n: int(op, "outputs", p.n)?,
                k: int(op, "columns", k)?,
                ld_out: int(op, "columns", p.stride)?,
                activation: p.epilogue.activation(),
            };
            let bytes = p.weight.bytes() + tokens * (k + p.n) * size_of::<f32>();
            let launch = Launch::new(p.epilogue.gemv(), (grid, 1, 1), block).shared(shared).bytes(bytes);
            // SAFETY: the kernel takes one GemvParams; `product` checked that weight, input, norm and output have the
            // sizes that tokens, n, k and ld_out say, and the tokens of this launch are among them.
            unsafe { self.launch(launch, &mut [arg(&params)]) }?;
        }
        Ok(())
    }

    /// Quantises all tokens into scratch memory, then multiplies.
    fn prefill(&self, op: &'static str, p: &Product<'_>) -> Result<()> {
        let Product { tokens, n, .. } = *p;
        let k = p.weight.cols();
        let gated = matches!(p.epilogue, Epilogue::Gated(_));
        let scratch = &mut *self.scratch();
        let codes = tokens.saturating_mul(plan::padded(k));
        let q = scratch.codes.address(self, codes, "quantised activations")?;
        let sx = scratch.scales.address(self, tokens, "activation scales")?;
        let qsum = scratch.sums.address(self, tokens, "activation sums")?;
        let (rows, cols, none) = (int(op, "tokens", tokens)?, int(op, "columns", k)?, 0u64);
        let launch = Launch::new("bitnet_norm_quantise", (tokens, 1, 1), plan::row_threads(k))
            .shared(plan::QUANTISE_SHARED)
            .bytes(tokens * k * size_of::<f32>() + codes);
        let arguments = &mut [
            arg(&p.x),
            arg(&none),
            arg(&p.norm),
            arg(&p.eps),
            arg(&rows),
            arg(&cols),
            arg(&q),
            arg(&sx),
            arg(&qsum),
        ];
        // SAFETY: the arguments of bitnet_norm_quantise; x is [tokens, k] (checked in `product`) and only read, as there
        // is nothing to add; the scratch holds a padded row, a scale and a sum for each token.
        unsafe { self.launch(launch, arguments) }?;
        let plan = plan::gemm(&self.chip, plan::row_tiles(n, gated), tokens);
        let params = GemmParams {
            weights: self.read(p.weight.data()),
            q,
            sx,
            qsum,
            out: p.out,
            scales: p.weight.scales(),
            tokens: rows,
            n: int(op, "outputs", n)?,
            k: cols,
            ld_out: int(op, "columns", p.stride)?,
            activation: p.epilogue.activation(),
        };
        let bytes = p.weight.bytes() + codes + tokens * n * size_of::<f32>();
        let launch =
            Launch::new(p.epilogue.gemm(plan.wide), plan.grid, plan::GEMM_THREADS).shared(plan.shared).bytes(bytes);
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
            assert_eq!(known(epilogue.gemv()), Some(true));
            assert_eq!(known(epilogue.gemm(false)), Some(false));
            assert_eq!(known(epilogue.gemm(true)), Some(true));
        }
        assert_eq!([Gate::Relu2, Gate::Silu].map(activation), [0, 1]);
        assert_eq!(known("bitnet_norm_quantise"), Some(false));
    }
}
