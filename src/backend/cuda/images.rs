//! The kernels' machine code, as the build script compiled it, and its functions by name.

use super::{Chip, failure};
use crate::Result;
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute;
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaStream};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use std::collections::HashMap;

/// Bytes of shared memory that every kernel may have without asking.
pub(super) const PLAIN_SHARED: usize = 48 << 10;

/// A source with its image, its kernels, and those among them that may need more than [`PLAIN_SHARED`].
struct Source {
    name: &'static str,
    image: &'static [u8],
    kernels: &'static [&'static str],
    large: &'static [&'static str],
}

macro_rules! source {
    ($name:literal, [$($kernel:literal)*], [$($large:literal)*]) => {
        Source {
            name: $name,
            image: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")),
            kernels: &[$($kernel,)*],
            large: &[$($large,)*],
        }
    };
}

const SOURCES: [Source; 8] = [
    source!(
        "attention",
        [
            "bitnet_decode_attention_f32" "bitnet_decode_attention_bf16" "bitnet_decode_attention_f16"
            "bitnet_rope_write_f32" "bitnet_rope_write_bf16" "bitnet_rope_write_f16"
        ],
        ["bitnet_prefill_attention_f32" "bitnet_prefill_attention_bf16" "bitnet_prefill_attention_f16"]
    ),
    source!(
        "gemm",
        ["bitnet_gemm_64" "bitnet_gemm_residual_64" "bitnet_gemm_gated_64"],
        ["bitnet_gemm_128" "bitnet_gemm_residual_128" "bitnet_gemm_gated_128"]
    ),
    source!(
        "gemv",
        [],
        ["bitnet_gemv_norm" "bitnet_gemv_norm_residual" "bitnet_gemv_norm_gated"]
    ),
    source!(
        "head",
        ["bitnet_embed_f32" "bitnet_embed_bf16" "bitnet_embed_f16"],
        [
            "bitnet_head_f32_1" "bitnet_head_f32_2" "bitnet_head_f32_4" "bitnet_head_f32_8"
            "bitnet_head_bf16_1" "bitnet_head_bf16_2" "bitnet_head_bf16_4" "bitnet_head_bf16_8"
            "bitnet_head_f16_1" "bitnet_head_f16_2" "bitnet_head_f16_4" "bitnet_head_f16_8"
        ]
    ),
    source!("norm", ["bitnet_norm_quantise" "bitnet_rmsnorm" "bitnet_gated" "bitnet_place"], []),
    source!("pack", ["bitnet_pack"], []),
    source!(
        "prefill_attention",
        [],
        [
            "bitnet_prefill_attention_mma_bf16_64" "bitnet_prefill_attention_mma_bf16_96"
            "bitnet_prefill_attention_mma_bf16_128" "bitnet_prefill_attention_mma_bf16_256"
            "bitnet_prefill_attention_mma_f16_64" "bitnet_prefill_attention_mma_f16_96"
            "bitnet_prefill_attention_mma_f16_128" "bitnet_prefill_attention_mma_f16_256"
        ]
    ),
    source!("sample", ["bitnet_argmax" "bitnet_mark" "bitnet_sample_prepare" "bitnet_sample_pick"], []),
];

/// All kernels by name.
pub(super) struct Functions(HashMap<&'static str, CudaFunction>);

impl Functions {
    /// Loads every image and looks up every function.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] for an image that the driver refuses or a function that is not in it.
    pub(super) fn load(stream: &CudaStream, chip: &Chip) -> Result<Self> {
        let most = i32::try_from(chip.shared_per_block).unwrap_or(i32::MAX);
        let mut functions = HashMap::new();
        for source in SOURCES {
            let what = format!("the kernels of {}.cu for {}", source.name, chip.name);
            // An image says itself how long it is; the zero ends it for whoever reads it as text.
            let image = [source.image, &[0]].concat();
            let module = stream.context().load_module(Ptx::from_binary(image));
            let module = module.map_err(|e| failure::driver(stream, &what, e))?;
            for kernel in source.kernels.iter().chain(source.large) {
                let missing = |e| failure::driver(stream, &format!("kernel {kernel} of {}.cu", source.name), e);
                functions.insert(*kernel, module.load_function(kernel).map_err(missing)?);
            }
            if chip.shared_per_block <= PLAIN_SHARED {
                continue;
            }
            for kernel in source.large {
                let Some(function) = functions.get(kernel) else { continue };
                let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                let refused = |e| failure::driver(stream, &format!("{most} bytes of shared memory for {kernel}"), e);
                function.set_attribute(attribute, most).map_err(refused)?;
            }
        }
        Ok(Self(functions))
    }

    /// A kernel by its name.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if this build has no such kernel.
    pub(super) fn get(&self, kernel: &str) -> Result<&CudaFunction> {
        self.0.get(kernel).ok_or_else(|| failure::unavailable(format!("CUDA kernel {kernel}"), "this build has none"))
    }
}

#[cfg(test)]
/// Whether a kernel of this name is looked up, and whether it may have all of a chip's shared memory.
pub(super) fn known(kernel: &str) -> Option<bool> {
    let large = SOURCES.iter().any(|s| s.large.contains(&kernel));
    (large || SOURCES.iter().any(|s| s.kernels.contains(&kernel))).then_some(large)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_in_the_sources() {
        let mut all: Vec<_> = SOURCES.iter().flat_map(|s| s.kernels.iter().chain(s.large)).collect();
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
        assert_eq!(known("bitnet_gemm_64"), Some(false));
        assert_eq!(known("bitnet_gemm_128"), Some(true));
        assert_eq!(known("bitnet_gemm_256"), None);
    }
}
