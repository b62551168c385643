//! RMSNorm alone, the gated activation alone, and columns put where they belong.

use super::launch::{Launch, MAX_GRID_YZ};
use super::linear::activation;
use super::params::{Gated, Norm, Place};
use super::{Metal, MetalSlice, aligned, int, plan, shape};
use crate::Result;
use crate::backend::cpu::Gate;

impl Metal {
    /// RMSNorm of f32 rows as long as `weight`; `out` is as large as `x` and no part of it.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for operands that do not fit, [`crate::Error::Device`] for what fails on the device.
    pub fn rms_norm(&self, x: MetalSlice<'_>, weight: MetalSlice<'_>, eps: f32, out: MetalSlice<'_>) -> Result<()> {
        const OP: &str = "rms_norm";
        let cols = weight.len();
        if cols == 0 || !x.len().is_multiple_of(cols) || out.len() != x.len() {
            let reason = format!("{} elements in rows of {cols} into {}", x.len(), out.len());
            return Err(shape(OP, reason));
        }
        let tokens = x.len() / cols;
        if tokens == 0 {
            return Ok(());
        }
        aligned(OP, [x, weight, out])?;
        let launch = Launch::new("bitnet_rmsnorm", (tokens, 1, 1), plan::THREADS)
            .threadgroup(plan::NORM_MEMORY)
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
        if cols == 0 || !out.len().is_multiple_of(cols) || gate_up.len() != 2 * out.len() {
            let reason = format!("{} elements in rows of 2 · {cols} into {}", gate_up.len(), out.len());
            return Err(shape(OP, reason));
        }
        for (first, count) in groups(out.len() / cols, MAX_GRID_YZ) {
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

/// Cuts `total` into runs of up to `most`: first and count of each.
pub(super) fn groups(total: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..total).step_by(most).map(move |first| (first, most.min(total - first)))
}

#[cfg(test)]
mod tests {
    use super::super::kernels::kernel;
    use super::groups;

    #[test]
    fn groups_cover_all() {
        assert_eq!(groups(0, 8).count(), 0);
        assert_eq!(groups(17, 8).collect::<Vec<_>>(), [(0, 8), (8, 8), (16, 1)]);
    }

    #[test]
    fn kernels_are_there() {
        for name in ["bitnet_rmsnorm", "bitnet_norm_quantise", "bitnet_gated", "bitnet_place"] {
            assert!(kernel(name).is_ok(), "{name}");
        }
    }
}
