//! Ternary weights in device memory, packed by the device, and the check that its products are right.

use super::launch::arg;
use super::{Cuda, CudaSlice};
use crate::Result;
use crate::backend::Arrangement;
use crate::backend::gpu::SelfCheck;
use crate::backend::gpu::ternary::{self, Packing, Ternary};
use crate::ternary::PackedTernary;

/// One to four ternary matrices over the same input, in device memory.
pub type CudaTernary = Ternary<CudaSlice<u8>>;

impl Cuda {
    /// Uploads the canonical codes of weights that share their input, one matrix at a time, and packs them on the device. Waits
    /// for it.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if there is none or more than four, their columns differ or exceed 132104, or gate and up are
    /// not two of one shape; [`crate::Error::Unavailable`] if memory is short.
    pub fn pack(&self, weights: &[PackedTernary], arrangement: Arrangement) -> Result<CudaTernary> {
        let packing = Packing::new(weights, arrangement)?;
        let mut data = self.zeroed::<u8>(packing.bytes, "packed weights")?;
        let packed = self.write(&mut data);
        for (w, p) in weights.iter().zip(&packing.matrices) {
            let codes = self.upload(w.codes(), "weights to pack")?;
            let from = self.read(&codes);
            let arguments = &mut [
                arg(&from),
                arg(&packed),
                arg(&p.rows),
                arg(&p.cols),
                arg(&p.row_bytes),
                arg(&p.row0),
                arg(&p.row_map),
            ];
            // SAFETY: the arguments of bitnet_pack; `codes` holds rows · row_bytes bytes and is released in the stream's
            // order; `data` holds the tiles of all rows, of which this matrix's were counted.
            unsafe { self.launch(ternary::launch(w), arguments) }?;
        }
        // Products fetch weights before they wait for the kernel before them, so packing must be over by then.
        self.synchronize()?;
        Ok(packing.into(data))
    }

    /// Runs small products, by the decode and by the prefill kernel, and compares every sum with the reference.
    pub(super) fn self_check(&self) -> Result<()> {
        let check = SelfCheck::new();
        let packed = self.pack(&[check.weights()?], Arrangement::Stacked)?;
        let input = self.upload(&check.x, "the self-check")?;
        let mut output = self.zeroed::<f32>(SelfCheck::TOKENS * SelfCheck::ROWS, "the self-check")?;
        for (kernel, tokens) in [("bitnet_gemv_norm", 3), ("bitnet_gemm_64", SelfCheck::TOKENS)] {
            let (x, mut out) = (input.slice(..tokens * SelfCheck::COLS), output.slice_mut(..tokens * SelfCheck::ROWS));
            self.norm_linear(&packed, &x, None, &mut out, 0, SelfCheck::ROWS, false)?;
            check.compare(kernel, &self.download(&out.as_view(), "the self-check")?)?;
        }
        Ok(())
    }
}
