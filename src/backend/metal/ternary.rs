//! Ternary weights in the memory of the CPU and the GPU, packed by the GPU, and the check that its products are right.

use super::{Metal, MetalBuffer};
use crate::Result;
use crate::backend::Arrangement;
use crate::backend::gpu::SelfCheck;
use crate::backend::gpu::ternary::{self, Packing, Ternary};
use crate::ternary::PackedTernary;

/// One to four ternary matrices over the same input.
pub type MetalTernary = Ternary<MetalBuffer<u8>>;

impl Metal {
    /// Packs the canonical codes of weights that share their input where they stay, one matrix at a time, on the device. Waits
    /// for it.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if there is none or more than four, their columns differ or exceed 132104, or gate and up are
    /// not two of one shape; [`crate::Error::Unavailable`] if memory is short.
    pub fn pack(&self, weights: &[PackedTernary], arrangement: Arrangement) -> Result<MetalTernary> {
        let packing = Packing::new(weights, arrangement)?;
        let data = self.zeroed::<u8>(packing.bytes, "packed weights")?;
        let scratch = &mut *self.scratch();
        for (w, params) in weights.iter().zip(&packing.matrices) {
            let staged = scratch.canonical.at_least(self, w.codes().len(), "weights to pack")?;
            self.copy_in(w.codes(), staged, 0)?;
            let bindings = [staged.slice(..w.codes().len()).input(), data.as_slice().output()];
            // SAFETY: the bindings and parameters of bitnet_pack: rows · row_bytes bytes of codes, and the tiles of all
            // rows, of which this matrix's were counted.
            unsafe { self.launch(ternary::launch(w), &bindings, params) }?;
        }
        self.synchronize()?;
        Ok(packing.into(data))
    }

    /// Runs small products, by the decode and by the prefill kernel, and compares every sum with the reference.
    pub(super) fn self_check(&self) -> Result<()> {
        let check = SelfCheck::new();
        let packed = self.pack(&[check.weights()?], Arrangement::Stacked)?;
        let input = self.upload(&check.x, "the self-check")?;
        let output = self.zeroed::<f32>(SelfCheck::TOKENS * SelfCheck::ROWS, "the self-check")?;
        for (kernel, tokens) in [("bitnet_gemv_norm_4", 3), ("bitnet_gemm", SelfCheck::TOKENS)] {
            let (x, count) = (input.slice(..tokens * SelfCheck::COLS), tokens * SelfCheck::ROWS);
            self.norm_linear(&packed, x, None, output.slice(..count), 0, SelfCheck::ROWS, false)?;
            check.compare(kernel, &self.download(&output, count)?)?;
        }
        Ok(())
    }
}
