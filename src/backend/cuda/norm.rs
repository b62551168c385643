//! RMSNorm alone, the gated activation alone, and columns put where they belong.

use super::launch::arg;
use super::{Cuda, CudaView, CudaViewMut, plan};
use crate::Result;
use crate::backend::cpu::Gate;
use crate::backend::gpu::norm::{activation, gated_tokens, norm_tokens};
use crate::backend::gpu::{Launch, MAX_GRID_YZ, groups, int};

impl Cuda {
    /// RMSNorm of f32 rows as long as `weight`; `out` is as large as `x` and no part of it.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for operands that do not fit, [`crate::Error::Device`] for what fails on the device.
    pub fn rms_norm(
        &self,
        x: &CudaView<'_, f32>,
        weight: &CudaView<'_, f32>,
        eps: f32,
        out: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        const OP: &str = "rms_norm";
        let cols = weight.len();
        let tokens = norm_tokens(OP, x.len(), cols, out.len())?;
        if tokens == 0 {
            return Ok(());
        }
        let launch = Launch::new("bitnet_rmsnorm", (tokens, 1, 1), plan::row_threads(cols))
            .shared(plan::RMS_NORM_SHARED)
            .bytes(2 * size_of::<f32>() * x.len());
        let (rows, k, none) = (int(OP, "tokens", tokens)?, int(OP, "columns", cols)?, 0u64);
        let (x, weight, y) = (self.read(x), self.read(weight), self.write(out));
        let arguments = &mut [arg(&x), arg(&none), arg(&weight), arg(&eps), arg(&rows), arg(&k), arg(&y)];
        // SAFETY: the arguments of bitnet_rmsnorm; x and y are [rows, k], weight [k], checked above; x is only read, as
        // there is nothing to add.
        unsafe { self.launch(launch, arguments) }
    }

    /// The gated activation of f32 rows `[gate | up]` of 2 · `cols`: f32 `[tokens, cols]`.
    ///
    /// # Errors
    /// As [`Cuda::rms_norm`].
    pub fn gated(
        &self,
        gate: Gate,
        gate_up: &CudaView<'_, f32>,
        cols: usize,
        out: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        const OP: &str = "gated activation";
        let tokens = gated_tokens(OP, gate_up.len(), cols, out.len())?;
        let n = int(OP, "columns", cols)?;
        let (from, to, activation) = (self.read(gate_up), self.write(out), activation(gate));
        for (first, count) in groups(tokens, MAX_GRID_YZ) {
            let row = (first * cols * size_of::<f32>()) as u64;
            let (from, to) = (from + 2 * row, to + row);
            let rows = int(OP, "tokens", count)?;
            let launch = Launch::new("bitnet_gated", (cols.div_ceil(plan::THREADS), count, 1), plan::THREADS)
                .bytes(3 * size_of::<f32>() * count * cols);
            // SAFETY: the arguments of bitnet_gated; `count` rows of 2 · cols and of cols lie behind the addresses, as
            // all tokens' do by the check above.
            unsafe { self.launch(launch, &mut [arg(&from), arg(&to), arg(&rows), arg(&n), arg(&activation)]) }?;
        }
        Ok(())
    }

    /// Puts `tokens` rows of `n` values at `from` into columns of rows of `stride` values, the first of them at `to`.
    ///
    /// # Safety
    /// The addresses are of f32 memory of this device as large as that, and stay so until the kernel has run.
    pub(super) unsafe fn place(
        &self,
        from: u64,
        to: u64,
        tokens: usize,
        n: usize,
        stride: usize,
        add: bool,
    ) -> Result<()> {
        let launch = Launch::new("bitnet_place", (n.div_ceil(plan::THREADS), tokens, 1), plan::THREADS)
            .bytes((2 + usize::from(add)) * size_of::<f32>() * tokens * n);
        let op = "columns";
        let (rows, n, stride) = (int(op, "tokens", tokens)?, int(op, "columns", n)?, int(op, "columns", stride)?);
        let add = i32::from(add);
        // SAFETY: the arguments of bitnet_place; the caller vouches for the memory.
        unsafe { self.launch(launch, &mut [arg(&from), arg(&to), arg(&rows), arg(&n), arg(&stride), arg(&add)]) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::images::known;

    #[test]
    fn kernels_are_there() {
        assert!(["bitnet_rmsnorm", "bitnet_gated", "bitnet_place"].iter().all(|k| known(k) == Some(false)));
    }
}
