// Attention as kernels: decode (decode_attention.cuh), rope + KV write for prefill, and a prefill attention in
// f32 that serves every head size and cache type.
#include "decode_attention.cuh"

using namespace bitnet;

#define BITNET_DECODE_ATTENTION(NAME, TYPE)                                                                     \
    extern "C" __global__ void __launch_bounds__(kAttentionThreads) NAME(AttentionParams p) {                   \
        let_next_kernel_start();                                                                                \
        wait_previous_kernel();                                                                                 \
        decode_attention<TYPE>(p, blockIdx.x, blockIdx.y, blockIdx.z, shared_memory());                         \
    }
BITNET_DECODE_ATTENTION(bitnet_decode_attention_f32, F32)
BITNET_DECODE_ATTENTION(bitnet_decode_attention_bf16, Bf16)
BITNET_DECODE_ATTENTION(bitnet_decode_attention_f16, F16)

// Prefill, first half: rotates q in place (scaled), rotates and stores K, stores V. Grid: tokens. A thread owns
// both elements of a pair, so the rotation can be in place.
template <class T>
__device__ inline void rope_write(const AttentionParams& p, float* qkv) {
    using Store = typename T::Store;
    int token = blockIdx.x, d = p.head_dim, half = d / 2;
    int position = p.positions[token], slot = p.slots[token];
    float* row = qkv + (long long)token * (p.heads + 2 * p.kv_heads) * d;
    const float* cos_row = p.cos + (long long)position * half;
    const float* sin_row = p.sin + (long long)position * half;
    long long at = ((long long)slot * p.max_positions + position) * p.kv_heads * d;
    Store* k_row = static_cast<Store*>(p.k_cache) + at;
    Store* v_row = static_cast<Store*>(p.v_cache) + at;
    for (int i = threadIdx.x; i < (p.heads + p.kv_heads) * half; i += blockDim.x) {
        int h = i / half, c = i - h * half;
        float* x = row + h * d + c;
        float a = x[0], b = x[half];
        float y0 = a * cos_row[c] - b * sin_row[c], y1 = b * cos_row[c] + a * sin_row[c];
        if (h < p.heads) {
            x[0] = y0 * p.scale;
            x[half] = y1 * p.scale;
        } else {
            k_row[(h - p.heads) * d + c] = T::store(y0);
            k_row[(h - p.heads) * d + c + half] = T::store(y1);
        }
    }
    const float* v = row + (p.heads + p.kv_heads) * d;
    for (int i = threadIdx.x; i < p.kv_heads * d; i += blockDim.x) v_row[i] = T::store(v[i]);
}
#define BITNET_ROPE_WRITE(NAME, TYPE)                                                                           \
    extern "C" __global__ void __launch_bounds__(256) NAME(AttentionParams p, float* qkv) {                     \
        let_next_kernel_start();                                                                                \
        wait_previous_kernel();                                                                                 \
        rope_write<TYPE>(p, qkv);                                                                               \
    }
BITNET_ROPE_WRITE(bitnet_rope_write_f32, F32)
BITNET_ROPE_WRITE(bitnet_rope_write_bf16, Bf16)
BITNET_ROPE_WRITE(bitnet_rope_write_f16, F16)

// Prefill, second half, any head size and cache type. Queries of one sequence are contiguous tokens.
//
//   grid (query tiles of 32, heads, sequences), 128 threads; keys in tiles of 32; online softmax.
//   thread = (query r = thread / 4, quarter u = thread % 4): scores of keys u, u + 4, ...; output columns
//   4u .. 4u + 3, then every 16th chunk of 4.
// Shared memory: (32 + 32) * (d + 4) + 32 * 36 floats; K, then V, share one buffer.
constexpr int kPrefillRows = 32;


template <class T>
__device__ inline void prefill_attention(const PrefillParams& pp) {
    using Store = typename T::Store;
    const AttentionParams& p = pp.a;
    int sequence = blockIdx.z, head = blockIdx.y;
    int first = pp.starts[sequence], count = pp.starts[sequence + 1] - first;
    int q0 = blockIdx.x * kPrefillRows;
    if (q0 >= count) return;
    int d = p.head_dim, stride = d + 4, kv = head / (p.heads / p.kv_heads);
    int base_position = p.positions[first], slot = p.slots[first];
    float* q = reinterpret_cast<float*>(shared_memory());
    float* kvs = q + kPrefillRows * stride;
    float* weights = kvs + kPrefillRows * stride;  // [32][36]
    constexpr int kWeightStride = 36;
    int thread = threadIdx.x, r = thread >> 2, u = thread & 3;
    int rows = count - q0 < kPrefillRows ? count - q0 : kPrefillRows;
    for (int i = thread; i < kPrefillRows * (d / 4); i += blockDim.x) {
        int row = i / (d / 4), c = (i - row * (d / 4)) * 4;
        float4 v = make_float4(0, 0, 0, 0);
        if (row < rows)
            v = *reinterpret_cast<const float4*>(p.qkv + (long long)(first + q0 + row) * (p.heads + 2 * p.kv_heads) * d + head * d + c);
        *reinterpret_cast<float4*>(q + row * stride + c) = v;
    }
    long long cache_row = (long long)p.kv_heads * d;
    const Store* k_base = static_cast<const Store*>(p.k_cache) + (long long)slot * p.max_positions * cache_row + kv * d;
    const Store* v_base = static_cast<const Store*>(p.v_cache) + (long long)slot * p.max_positions * cache_row + kv * d;
    int keys = base_position + q0 + rows;  // keys visible to the last row
    int limit = base_position + q0 + r;    // last key visible to this row
    float top = -INFINITY, total = 0.0f;
    constexpr int kChunks = 16;  // head_dim <= 256
    float4 acc[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) acc[i] = make_float4(0, 0, 0, 0);
    for (int base = 0; base < keys; base += kPrefillRows) {
        int n = keys - base < kPrefillRows ? keys - base : kPrefillRows;
        for (int i = thread; i < kPrefillRows * (d / 4); i += blockDim.x) {
            int row = i / (d / 4), c = (i - row * (d / 4)) * 4;
            *reinterpret_cast<float4*>(kvs + row * stride + c) =
                row < n ? T::load4(k_base + (base + row) * cache_row + c) : make_float4(0, 0, 0, 0);
        }
        sync_block();
        float s[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) s[i] = 0.0f;
        for (int c = 0; c < d; c += 4) {
            float4 a = *reinterpret_cast<const float4*>(q + r * stride + c);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float4 b = *reinterpret_cast<const float4*>(kvs + (u + 4 * i) * stride + c);
                s[i] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
            }
        }
        float m = top;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int key = base + u + 4 * i;
            if (key > limit || key >= keys) s[i] = -INFINITY;
            m = fmaxf(m, s[i]);
        }
        m = fmaxf(m, shfl_xor(m, 1));
        m = fmaxf(m, shfl_xor(m, 2));
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            s[i] = expf(s[i] - m);
            sum += s[i];
            weights[r * kWeightStride + u + 4 * i] = s[i];
        }
        sum += shfl_xor(sum, 1);
        sum += shfl_xor(sum, 2);
        float keep = expf(top - m);
        top = m;
        total = total * keep + sum;
        if (BITNET_BUG != 6) sync_block();  // K is done with
        for (int i = thread; i < kPrefillRows * (d / 4); i += blockDim.x) {
            int row = i / (d / 4), c = (i - row * (d / 4)) * 4;
            *reinterpret_cast<float4*>(kvs + row * stride + c) =
                row < n ? T::load4(v_base + (base + row) * cache_row + c) : make_float4(0, 0, 0, 0);
        }
        sync_block();
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            int c = u * 4 + i * 16;
            if (c < d) {
                acc[i] = make_float4(acc[i].x * keep, acc[i].y * keep, acc[i].z * keep, acc[i].w * keep);
                for (int key = 0; key < kPrefillRows; ++key) {
                    float w = weights[r * kWeightStride + key];
                    float4 v = *reinterpret_cast<const float4*>(kvs + key * stride + c);
                    acc[i] = make_float4(acc[i].x + w * v.x, acc[i].y + w * v.y, acc[i].z + w * v.z, acc[i].w + w * v.w);
                }
            }
        }
        sync_block();
    }
    if (r < rows) {
        float* out = p.out + (long long)(first + q0 + r) * p.heads * d + head * d;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            int c = u * 4 + i * 16;
            if (c < d)
                *reinterpret_cast<float4*>(out + c) = make_float4(div_rn(acc[i].x, total), div_rn(acc[i].y, total),
                                                                  div_rn(acc[i].z, total), div_rn(acc[i].w, total));
        }
    }
}
#define BITNET_PREFILL_ATTENTION(NAME, TYPE)                                                                    \
    extern "C" __global__ void __launch_bounds__(128) NAME(PrefillParams p) {                                   \
        let_next_kernel_start();                                                                                \
        wait_previous_kernel();                                                                                 \
        prefill_attention<TYPE>(p);                                                                             \
    }
BITNET_PREFILL_ATTENTION(bitnet_prefill_attention_f32, F32)
BITNET_PREFILL_ATTENTION(bitnet_prefill_attention_bf16, Bf16)
BITNET_PREFILL_ATTENTION(bitnet_prefill_attention_f16, F16)
