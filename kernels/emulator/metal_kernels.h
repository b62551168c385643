// Every Metal kernel in one C++ translation unit, and their names.
#pragma once
#include "../metal/common.metal"
// in the order in which they could be concatenated: none needs another
#include "../metal/attention.metal"
#include "../metal/gemm.metal"
#include "../metal/gemv.metal"
#include "../metal/head.metal"
#include "../metal/norm.metal"
#include "../metal/pack.metal"
#include "../metal/prefill_attention.metal"
#include "../metal/sample.metal"

#define BITNET_METAL_K3(K, NAME) K(NAME##_f32) K(NAME##_bf16) K(NAME##_f16)
#define BITNET_METAL_K1248(K, NAME) K(NAME##_1) K(NAME##_2) K(NAME##_4) K(NAME##_8)
#define BITNET_METAL_PRODUCT(K, NAME) \
    BITNET_METAL_K1248(K, NAME) BITNET_METAL_K1248(K, NAME##_residual) BITNET_METAL_K1248(K, NAME##_gated)
#define BITNET_METAL_PREFILL(K, T) \
    K(bitnet_prefill_attention_##T##_64) K(bitnet_prefill_attention_##T##_128) K(bitnet_prefill_attention_##T##_256)
#define BITNET_METAL_KERNELS(K)                                                                                     \
    K(bitnet_pack) K(bitnet_norm_quantise) K(bitnet_rmsnorm) K(bitnet_gated) K(bitnet_place)                        \
    BITNET_METAL_PRODUCT(K, bitnet_gemv) BITNET_METAL_PRODUCT(K, bitnet_gemv_norm)                                  \
    BITNET_METAL_K3(K, bitnet_decode_attention) K(bitnet_decode_combine) BITNET_METAL_K3(K, bitnet_rope_write)      \
    BITNET_METAL_K1248(K, bitnet_head_bf16) BITNET_METAL_K1248(K, bitnet_head_f16)                                  \
    BITNET_METAL_K1248(K, bitnet_head_f32) BITNET_METAL_K1248(K, bitnet_head_i8)                                    \
    K(bitnet_embed_bf16) K(bitnet_embed_f16) K(bitnet_embed_f32) K(bitnet_embed_i8)                                 \
    K(bitnet_argmax) K(bitnet_argmax_pick) K(bitnet_mark) K(bitnet_sample_prepare) K(bitnet_sample_pick)                                                                          \
    K(bitnet_gemm) K(bitnet_gemm_residual) K(bitnet_gemm_gated) K(bitnet_gemm_64) K(bitnet_gemm_residual_64) K(bitnet_gemm_gated_64)                                                     \
    BITNET_METAL_PREFILL(K, f32) BITNET_METAL_PREFILL(K, bf16) BITNET_METAL_PREFILL(K, f16)
