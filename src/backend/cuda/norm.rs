//! RMSNorm alone, the gated activation alone, and columns put where they belong.

use super::launch::{Launch, MAX_GRID_YZ, arg};
use super::linear::activation;
use super::{Cuda, CudaView, CudaViewMut, int, plan, shape};
use crate::Result;
use crate::backend::cpu::Gate;

/// Threads of a block that takes columns of one token.
const COLUMN_THREADS: usize = 256;

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
        let cols = weight.len();
        if cols == 0 || !x.len().is_multiple_of(cols) || out.len() != x.len() {
            let reason = format!("{} elements in rows of {cols} into {}", x.len(), out.len());
            return Err(shape("rms_norm", reason));
        }
        let tokens = x.len() / cols;
        if tokens == 0 {
            return Ok(());
        }
        let launch = Launch::new("bitnet_rmsnorm", (tokens, 1, 1), plan::row_threads(cols))
            .shared(plan::RMS_NORM_SHARED)
            .bytes(2 * size_of::<f32>() * x.len());
        let (rows, k, none) = (int("rms_norm", "tokens", tokens)?, int("rms_norm", "columns", cols)?, 0u64);
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
        if cols == 0 || !out.len().is_multiple_of(cols) || gate_up.len() != 2 * out.len() {
            let reason = format!("{} elements in rows of 2 · {cols} into {}", gate_up.len(), out.len());
            return Err(shape("gated activation", reason));
        }
        let (tokens, n) = (out.len() / cols, int("gated activation", "columns", cols)?);
        let (from, to, activation) = (self.read(gate_up), self.write(out), activation(gate));
        for (first, count) in groups(tokens, MAX_GRID_YZ) {
            let row = (first * cols * size_of::<f32>()) as u64;
            let (from, to) = (from + 2 * row, to + row);
            let rows = int("gated activation", "tokens", count)?;
            let launch = Launch::new("bitnet_gated", (cols.div_ceil(COLUMN_THREADS), count, 1), COLUMN_THREADS)
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
        let launch = Launch::new("bitnet_place", (n.div_ceil(COLUMN_THREADS), tokens, 1), COLUMN_THREADS)
            .bytes((2 + usize::from(add)) * size_of::<f32>() * tokens * n);
        let op = "columns";
        let (rows, n, stride) = (int(op, "tokens", tokens)?, int(op, "columns", n)?, int(op, "columns", stride)?);
        let add = i32::from(add);
        // SAFETY: the arguments of bitnet_place; the caller vouches for the memory.
        unsafe { self.launch(launch, &mut [arg(&from), arg(&to), arg(&rows), arg(&n), arg(&stride), arg(&add)]) }
    }
}

/// Cuts `total` into runs of up to `most`: first and count of each.
pub(super) fn groups(total: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..total).step_by(most).map(move |first| (first, most.min(total - first)))
}

#[cfg(test)]
mod tests {
    use super::super::images::known;
    use super::groups;

    #[test]
    fn groups_cover_all() {
        assert_eq!(groups(0, 8).count(), 0);
        assert_eq!(groups(17, 8).collect::<Vec<_>>(), [(0, 8), (8, 8), (16, 1)]);
        assert_eq!(groups(8, 8).collect::<Vec<_>>(), [(0, 8)]);
    }

    #[test]
    fn kernels_are_there() {
        assert!(["bitnet_rmsnorm", "bitnet_gated", "bitnet_place"].iter().all(|k| known(k) == Some(false)));
    }
}
