//! RMSNorm alone, the gated activation alone, and columns put where they belong.

use super::params::{Gated, Norm, Place};
use super::{Metal, MetalSlice, aligned, plan};
use crate::Result;
use crate::backend::cpu::Gate;
use crate::backend::gpu::norm::{activation, gated_tokens, norm_tokens};
use crate::backend::gpu::{Launch, MAX_GRID_YZ, groups, int, shape};

impl Metal {
    /// RMSNorm of f32 rows as long as `weight`; `out` is as large as `x` and no part of it.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for operands that do not fit, [`crate::Error::Device`] for what fails on the device.
    pub fn rms_norm(&self, x: MetalSlice<'_>, weight: MetalSlice<'_>, eps: f32, out: MetalSlice<'_>) -> Result<()> {
        const OP: &str = "rms_norm";
        let cols = weight.len();
        let tokens = norm_tokens(OP, x.len(), cols, out.len())?;
        if tokens == 0 {
            return Ok(());
        }
        aligned(OP, [x, weight, out])?;
        let launch = Launch::new("bitnet_rmsnorm", (tokens, 1, 1), plan::THREADS)
            .shared(plan::NORM_MEMORY)
            .bytes(2 * size_of::<f32>() * x.len());
        let (rows, k) = (int(OP, "tokens", tokens)?, int(OP, "columns", cols)?);
        let params = Norm { rows, k, eps, has_add: 0, has_weight: 1 };
        // SAFETY: the bindings and parameters of bitnet_rmsnorm; x and out are [rows, k], weight [k], checked above; x is
        // only read, as there is nothing to add.
        unsafe { self.launch(launch, &[x.input(), x.input(), weight.input(), out.output()], &params) }
    }

    /// The gated activation of f32 rows `[gate | up]` of 2 · `cols`: f32 `[tokens, cols]`.
    ///
    /// # Errors
    /// As [`Metal::rms_norm`].
    pub fn gated(&self, gate: Gate, gate_up: MetalSlice<'_>, cols: usize, out: MetalSlice<'_>) -> Result<()> {
        const OP: &str = "gated activation";
        let tokens = gated_tokens(OP, gate_up.len(), cols, out.len())?;
        for (first, count) in groups(tokens, MAX_GRID_YZ) {
            let (from, to) = (gate_up.slice(2 * first * cols..), out.slice(first * cols..));
            let (tokens, n) = (int(OP, "tokens", count)?, int(OP, "columns", cols)?);
            let launch = Launch::new("bitnet_gated", (cols.div_ceil(plan::THREADS), count, 1), plan::THREADS)
                .bytes(3 * size_of::<f32>() * count * cols);
            let params = Gated { tokens, n, activation: activation(gate) };
            // SAFETY: the bindings and parameters of bitnet_gated; `count` rows of 2 · cols and of cols are there, as all
            // tokens' are by the check above.
            unsafe { self.launch(launch, &[from.input(), to.output()], &params) }?;
        }
        Ok(())
    }

    /// Puts `tokens` rows of `n` values at the start of rows of `stride` values, replacing or adding; the last row of `to`
    /// may end after them.
    ///
    /// # Errors
    /// As [`Metal::rms_norm`].
    pub(super) fn place(
        &self,
        from: MetalSlice<'_>,
        to: MetalSlice<'_>,
        tokens: usize,
        n: usize,
        stride: usize,
        add: bool,
    ) -> Result<()> {
        const OP: &str = "columns";
        let end = tokens.checked_sub(1).and_then(|last| last.checked_mul(stride)).and_then(|at| at.checked_add(n));
        if tokens.checked_mul(n).is_none_or(|size| size > from.len())
            || end.is_none_or(|end| end > to.len())
            || n > stride
        {
            let reason =
                format!("{tokens} rows of {n} of {} values into {} with rows of {stride}", from.len(), to.len());
            return Err(shape(OP, reason));
        }
        let launch = Launch::new("bitnet_place", (n.div_ceil(plan::THREADS), tokens, 1), plan::THREADS)
            .bytes((2 + usize::from(add)) * size_of::<f32>() * tokens * n);
        let (rows, n, ld_to) = (int(OP, "tokens", tokens)?, int(OP, "columns", n)?, int(OP, "columns", stride)?);
        let params = Place { tokens: rows, n, ld_to, add: i32::from(add) };
        // SAFETY: the bindings and parameters of bitnet_place, checked above.
        unsafe { self.launch(launch, &[from.input(), to.output()], &params) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernels::kernel;

    #[test]
    fn kernels_are_there() {
        for name in ["bitnet_rmsnorm", "bitnet_norm_quantise", "bitnet_gated", "bitnet_place"] {
            assert!(kernel(name).is_ok(), "{name}");
        }
    }
}
