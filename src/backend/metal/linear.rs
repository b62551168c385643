//! Quantised products: up to 8 tokens by a decode product, which quantises inside where it has the room, more by a matrix
//! product.

use super::kernels::{by_tokens, form_of};
use super::launch::Launch;
use super::params::{Norm, Product as Params};
use super::scratch::Scratch;
use super::{Metal, MetalSlice, MetalTernary, aligned, int, plan, shape};
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
    fn gemv(self, quantises: bool, tokens: usize) -> &'static str {
        let names = match (self, quantises) {
            (Self::Store, true) => by_tokens!("bitnet_gemv_norm"),
            (Self::Add, true) => by_tokens!("bitnet_gemv_norm_residual"),
            (Self::Gated(_), true) => by_tokens!("bitnet_gemv_norm_gated"),
            (Self::Store, false) => by_tokens!("bitnet_gemv"),
            (Self::Add, false) => by_tokens!("bitnet_gemv_residual"),
            (Self::Gated(_), false) => by_tokens!("bitnet_gemv_gated"),
        };
        form_of(names, tokens)
    }

    fn gemm(self, wide: bool) -> &'static str {
        match (self, wide) {
            (Self::Store, false) => "bitnet_gemm",
            (Self::Store, true) => "bitnet_gemm_64",
            (Self::Add, false) => "bitnet_gemm_residual",
            (Self::Add, true) => "bitnet_gemm_residual_64",
            (Self::Gated(_), false) => "bitnet_gemm_gated",
            (Self::Gated(_), true) => "bitnet_gemm_gated_64",
        }
    }

    fn is_gated(self) -> bool {
        matches!(self, Self::Gated(_))
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

/// One product, checked.
struct Product<'a> {
    op: &'static str,
    weight: &'a MetalTernary,
    x: MetalSlice<'a>,
    norm: Option<(MetalSlice<'a>, f32)>,
    /// From the first output value of the first token on.
    out: MetalSlice<'a>,
    tokens: usize,
    /// Output values of a token.
    n: usize,
    /// Elements between the outputs of two tokens.
    stride: usize,
    epilogue: Epilogue,
}

impl Product<'_> {
    fn params(&self) -> Result<Params> {
        let op = self.op;
        Ok(Params {
            scales: self.weight.scales(),
            eps: self.norm.map_or(0.0, |(_, eps)| eps),
            tokens: int(op, "tokens", self.tokens)?,
            n: int(op, "outputs", self.n)?,
            k: int(op, "columns", self.weight.cols())?,
            ld_out: int(op, "columns", self.stride)?,
            activation: self.epilogue.activation(),
            has_norm: i32::from(self.norm.is_some()),
        })
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
        let epilogue = if add { Epilogue::Add } else { Epilogue::Store };
        self.product("norm_linear", weight, x, norm, out, first_column, width, epilogue)
    }

    /// `act(gate) · up` in f32 `[tokens, n]`, gate and up being the products of a [`Arrangement::GateUp`] weight of 2 · n
    /// rows; input and norm as in [`Metal::norm_linear`].
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
        let k = weight.cols();
        let n = if epilogue.is_gated() { weight.rows() / 2 } else { weight.rows() };
        let tokens = x.len() / k;
        let fits = epilogue.is_gated() == (weight.arrangement() == Arrangement::GateUp)
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
        aligned(op, [x, norm.map_or(x, |(weight, _)| weight)])?;
        let out = out.slice(first_column..);
        let p = Product { op, weight, x, norm, out, tokens, n, stride: width, epilogue };
        if tokens > plan::DECODE_TOKENS {
            return self.prefill(&p);
        }
        let plan = plan::gemv(self.chip.cores(), plan::row_tiles(n, epilogue.is_gated()), k, tokens);
        if plan.quantises { self.decode(&p, plan) } else { self.decode_quantised(&p, plan) }
    }

    /// One launch that normalises, quantises and multiplies.
    fn decode(&self, p: &Product<'_>, plan: plan::Gemv) -> Result<()> {
        let Product { tokens, n, .. } = *p;
        let bytes = p.weight.bytes() + tokens * (p.weight.cols() + n) * size_of::<f32>();
        let launch = Launch::new(p.epilogue.gemv(true, tokens), (plan.grid, 1, 1), plan::THREADS)
            .threadgroup(plan.threadgroup)
            .bytes(bytes);
        let bindings = [p.weight.data().as_slice().input(), p.x.input(), p.norm_weight().input(), p.out.output()];
        // SAFETY: the bindings and parameters of bitnet_gemv_norm*: `product` checked that weight, input, norm and output
        // have the sizes that tokens, n, k and ld_out say.
        unsafe { self.launch(launch, &bindings, &p.params()?) }
    }

    /// Quantises all tokens into scratch memory, then a decode product.
    fn decode_quantised(&self, p: &Product<'_>, plan: plan::Gemv) -> Result<()> {
        let scratch = &mut *self.scratch();
        let (q, stats) = self.quantise(p, scratch)?;
        let bytes = p.weight.bytes() + p.tokens * (2 * plan::padded(p.weight.cols()) + p.n * size_of::<f32>());
        let launch = Launch::new(p.epilogue.gemv(false, p.tokens), (plan.grid, 1, 1), plan::THREADS)
            .threadgroup(plan.threadgroup)
            .bytes(bytes);
        let bindings = [p.weight.data().as_slice().input(), q.input(), stats.input(), p.out.output()];
        // SAFETY: as in `decode`; the scratch was filled by the kernel before.
        unsafe { self.launch(launch, &bindings, &p.params()?) }
    }

    /// Quantises all tokens into scratch memory, then a matrix product.
    fn prefill(&self, p: &Product<'_>) -> Result<()> {
        let scratch = &mut *self.scratch();
        let (q, stats) = self.quantise(p, scratch)?;
        let bytes = p.weight.bytes() + p.tokens * (2 * plan::padded(p.weight.cols()) + p.n * size_of::<f32>());
        let plan = plan::gemm(plan::row_tiles(p.n, p.epilogue.is_gated()), p.tokens);
        let launch = Launch::new(p.epilogue.gemm(plan.wide), plan.grid, plan::GEMM_THREADS)
            .threadgroup(plan.threadgroup)
            .bytes(bytes);
        let bindings = [p.weight.data().as_slice().input(), q.input(), stats.input(), p.out.output()];
        // SAFETY: as in `decode_quantised`.
        unsafe { self.launch(launch, &bindings, &p.params()?) }
    }

    /// Codes and sums of all tokens, in scratch memory.
    fn quantise<'a>(&self, p: &Product<'_>, scratch: &'a mut Scratch) -> Result<(MetalSlice<'a, u16>, MetalSlice<'a>)> {
        let (k, tokens) = (p.weight.cols(), p.tokens);
        let codes = tokens.saturating_mul(plan::padded(k));
        let q = scratch.codes.first(self, codes, "quantised activations")?;
        let stats = scratch.stats.first(self, tokens.saturating_mul(plan::stats(k)), "activation sums")?;
        let params = Norm {
            rows: int(p.op, "tokens", tokens)?,
            k: int(p.op, "columns", k)?,
            eps: p.norm.map_or(0.0, |(_, eps)| eps),
            has_add: 0,
            has_weight: i32::from(p.norm.is_some()),
        };
        let launch = Launch::new("bitnet_norm_quantise", (tokens, 1, 1), plan::THREADS)
            .threadgroup(plan::NORM_MEMORY)
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
                    let name = epilogue.gemv(quantises, tokens);
                    assert!(kernel(name).is_ok() && name.contains("_norm") == quantises, "{name}");
                    assert!(name.ends_with(&format!("_{}", [1, 2, 4, 4, 8, 8, 8, 8][tokens - 1])), "{name}");
                }
            }
            assert!(kernel(epilogue.gemm(false)).is_ok() && epilogue.gemm(true).ends_with("_64"));
        }
        assert_eq!([Gate::Relu2, Gate::Silu].map(activation), [0, 1]);
    }
}
