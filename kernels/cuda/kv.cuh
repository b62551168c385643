// Element types of the KV cache and of dense weights, and vectors of four of them.
#pragma once
#include "layout.cuh"

namespace bitnet {

struct F32 {
    using Store = float;
    static __device__ __forceinline__ float load(float v) { return v; }
    static __device__ __forceinline__ float store(float v) { return v; }
    static __device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
};
struct Bf16 {
    using Store = uint16_t;
    static __device__ __forceinline__ float load(uint16_t v) { return bf16_to_float(v); }
    static __device__ __forceinline__ uint16_t store(float v) { return float_to_bf16(v); }
    static __device__ __forceinline__ float4 load4(const uint16_t* p) {
        uint2 v = *reinterpret_cast<const uint2*>(p);
        return make_float4(bits_float(v.x << 16), bits_float(v.x & 0xffff0000u), bits_float(v.y << 16),
                           bits_float(v.y & 0xffff0000u));
    }
};
struct F16 {
    using Store = uint16_t;
    static __device__ __forceinline__ float load(uint16_t v) { return f16_to_float(v); }
    static __device__ __forceinline__ uint16_t store(float v) { return float_to_f16(v); }
    static __device__ __forceinline__ float4 load4(const uint16_t* p) {
        uint2 v = *reinterpret_cast<const uint2*>(p);
        return make_float4(f16_to_float((uint16_t)v.x), f16_to_float((uint16_t)(v.x >> 16)), f16_to_float((uint16_t)v.y),
                           f16_to_float((uint16_t)(v.y >> 16)));
    }
};

// rotate_half: pair (i, i + d/2); value of element i of a head.
__device__ __forceinline__ float rotated(const float* head, int i, int half, const float* cos_row, const float* sin_row) {
    if (i < half) return load_fresh(head + i) * cos_row[i] - load_fresh(head + i + half) * sin_row[i];
    int j = i - half;
    return load_fresh(head + i) * cos_row[j] + load_fresh(head + j) * sin_row[j];
}

// What every attention kernel needs to know. KV cache of one layer: [slot][position][kv_head][head_dim].
struct AttentionParams {
    const float* qkv;        // [tokens, (heads + 2 kv_heads) * head_dim]: q, k, v heads, not rotated
    const float* cos;        // [positions, head_dim / 2]
    const float* sin;
    const int* positions;    // [tokens] position of each token
    const int* slots;        // [tokens] KV slot of each token
    void* k_cache;
    void* v_cache;
    float* out;              // [tokens, heads * head_dim]
    float* partial;          // [tokens, heads, splits, head_dim + 2]; unused if splits = 1
    unsigned* arrived;       // [tokens, kv_heads * head blocks], 0 before and after
    int tokens, heads, kv_heads, head_dim, max_positions, splits;
    float scale;             // head_dim^-0.5
};
static_assert(sizeof(AttentionParams) == 112, "the host mirrors this struct");

struct PrefillParams {
    AttentionParams a;
    const int* starts;   // [sequences + 1] first token of each sequence in the batch
    int sequences;
};
static_assert(sizeof(PrefillParams) == 128, "the host mirrors this struct");

}  // namespace bitnet
