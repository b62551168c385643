//! The kernels' sources, which are part of the program, and which library each kernel is in.
//!
//! A library is `common.metal` followed by one other file, compiled when one of its kernels is first needed.

use super::driver::Kernel;
use super::failure;
use crate::Result;
use crate::backend::gpu::plan::by_tokens;

/// Threads of a simdgroup.
#[cfg_attr(not(target_os = "macos"), allow(dead_code))]
pub(super) const SIMD_WIDTH: usize = 32;
/// Threadgroup memory that kernels may need.
pub(super) const MAX_THREADGROUP_MEMORY: usize = 32 << 10;

/// A source file with the beginnings of its kernels' names.
pub(super) struct Library {
    #[cfg_attr(not(target_os = "macos"), allow(dead_code))]
    pub name: &'static str,
    #[cfg_attr(not(target_os = "macos"), allow(dead_code))]
    source: &'static str,
    kernels: &'static [&'static str],
}

macro_rules! library {
    ($name:literal: $($kernel:literal)*) => {
        Library {
            name: $name,
            source: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/metal/", $name, ".metal")),
            kernels: &[$($kernel),*],
        }
    };
}

/// What every library begins with.
#[cfg_attr(not(target_os = "macos"), allow(dead_code))]
const COMMON: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/metal/common.metal"));

/// All libraries.
pub(super) const LIBRARIES: [Library; 8] = [
    library!("attention": "bitnet_rope_write_" "bitnet_decode_"),
    library!("gemm": "bitnet_gemm"),
    library!("gemv": "bitnet_gemv"),
    library!("head": "bitnet_head_" "bitnet_embed_"),
    library!("norm": "bitnet_norm_quantise" "bitnet_rmsnorm" "bitnet_gated" "bitnet_place"),
    library!("pack": "bitnet_pack"),
    library!("prefill_attention": "bitnet_prefill_attention_"),
    library!("sample": "bitnet_argmax" "bitnet_mark" "bitnet_sample_"),
];

/// What is compiled for a library.
#[cfg_attr(not(target_os = "macos"), allow(dead_code))]
pub(super) fn source(number: usize) -> String {
    format!("{COMMON}\n{}", LIBRARIES[number].source)
}

/// A kernel by its name.
///
/// # Errors
/// [`crate::Error::Unavailable`] if no library has one of such a name.
pub(super) fn kernel(name: &'static str) -> Result<Kernel> {
    let library = LIBRARIES.iter().position(|l| l.kernels.iter().any(|k| name.starts_with(k)));
    let library = library.ok_or_else(|| failure::unavailable(format!("Metal kernel {name}"), "this build has none"))?;
    Ok(Kernel { name, library })
}

/// Every kernel that the host launches.
pub(super) fn all() -> impl Iterator<Item = &'static str> {
    const BY_TOKENS: [[&str; 4]; 9] = [
        by_tokens!("bitnet_gemv"),
        by_tokens!("bitnet_gemv_residual"),
        by_tokens!("bitnet_gemv_gated"),
        by_tokens!("bitnet_gemv_norm"),
        by_tokens!("bitnet_gemv_norm_residual"),
        by_tokens!("bitnet_gemv_norm_gated"),
        by_tokens!("bitnet_head_f32"),
        by_tokens!("bitnet_head_f16"),
        by_tokens!("bitnet_head_bf16"),
    ];
    macro_rules! by_type {
        ($($name:literal)*) => {
            [$(concat!("bitnet_", $name, "_f32"), concat!("bitnet_", $name, "_f16"), concat!("bitnet_", $name, "_bf16"),)*]
        };
    }
    const BY_TYPE: [&str; 9] = by_type!("embed" "rope_write" "decode_attention");
    const PREFILL: [&str; 9] = [
        "bitnet_prefill_attention_f32_64",
        "bitnet_prefill_attention_f32_128",
        "bitnet_prefill_attention_f32_256",
        "bitnet_prefill_attention_f16_64",
        "bitnet_prefill_attention_f16_128",
        "bitnet_prefill_attention_f16_256",
        "bitnet_prefill_attention_bf16_64",
        "bitnet_prefill_attention_bf16_128",
        "bitnet_prefill_attention_bf16_256",
    ];
    const OTHERS: [&str; 17] = [
        "bitnet_argmax",
        "bitnet_argmax_pick",
        "bitnet_decode_combine",
        "bitnet_gated",
        "bitnet_gemm",
        "bitnet_gemm_64",
        "bitnet_gemm_gated",
        "bitnet_gemm_gated_64",
        "bitnet_gemm_residual",
        "bitnet_gemm_residual_64",
        "bitnet_mark",
        "bitnet_norm_quantise",
        "bitnet_pack",
        "bitnet_place",
        "bitnet_rmsnorm",
        "bitnet_sample_pick",
        "bitnet_sample_prepare",
    ];
    BY_TOKENS.into_iter().flatten().chain(BY_TYPE).chain(PREFILL).chain(OTHERS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_in_the_library_of_their_kind() {
        let library = |name| LIBRARIES[kernel(name).unwrap().library].name;
        assert_eq!(library("bitnet_gemv_norm_gated_8"), "gemv");
        assert_eq!(library("bitnet_gemm_residual"), "gemm");
        assert_eq!(library("bitnet_decode_combine"), "attention");
        assert_eq!(library("bitnet_prefill_attention_f32_64"), "prefill_attention");
        assert!(kernel("bitnet_unknown").is_err());
        let every: std::collections::BTreeSet<_> = all().collect();
        assert_eq!((every.len(), all().count()), (71, 71));
        assert!(every.iter().all(|name| kernel(name).is_ok()));
    }

    #[test]
    fn sources_are_as_the_interface_says() {
        for (i, library) in LIBRARIES.iter().enumerate() {
            let source = source(i);
            assert!(!library.source.contains("#include \""), "{}", library.name);
            assert!(library.kernels.iter().all(|k| source.contains(k)), "{}", library.name);
        }
    }
}
