// The dense output head for 1..8 tokens, and the embedding gather.
//
// Rows [vocab, hidden] in bf16, f16, f32 or int8 with one f32 scale a row; activations f32 [tokens, hidden] are
// kept in shared memory; f32 accumulation. A warp takes 4 rows at a time so that each activation read from
// shared memory serves 4 rows; a lane reads 16 bytes of each row per step. Bytes: vocab * hidden * element.
// Shared memory: tokens * hidden_padded floats, hidden padded to 512 (zeros).
#include "kv.cuh"

using namespace bitnet;

constexpr int kHeadRows = 4;


struct HeadBf16 {
    static constexpr int kPerVector = 8;
    static __device__ __forceinline__ void unpack(const uint4& v, float (&f)[8]) {
        const unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            f[2 * i] = bits_float(w[i] << 16);
            f[2 * i + 1] = bits_float(w[i] & 0xffff0000u);
        }
    }
};
struct HeadF16 {
    static constexpr int kPerVector = 8;
    static __device__ __forceinline__ void unpack(const uint4& v, float (&f)[8]) {
        const unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            f[2 * i] = f16_to_float((uint16_t)w[i]);
            f[2 * i + 1] = f16_to_float((uint16_t)(w[i] >> 16));
        }
    }
};
struct HeadF32 {
    static constexpr int kPerVector = 4;
    static __device__ __forceinline__ void unpack(const uint4& v, float (&f)[4]) {
        f[0] = bits_float(v.x);
        f[1] = bits_float(v.y);
        f[2] = bits_float(v.z);
        f[3] = bits_float(v.w);
    }
};
struct HeadI8 {
    static constexpr int kPerVector = 16;
    static __device__ __forceinline__ void unpack(const uint4& v, float (&f)[16]) {
        const unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // byte + 128 in the mantissa of 2^23: exact, and far cheaper than a conversion instruction
            unsigned u = w[i] ^ 0x80808080u;
#pragma unroll
            for (int b = 0; b < 4; ++b) f[4 * i + b] = bits_float(0x4b000000u | ((u >> (8 * b)) & 255u)) - 8388736.0f;
        }
    }
};

struct HeadParams {
    const uint4* weights;   // [vocab, hidden] rows of hidden * element bytes, a multiple of 16
    const float* scales;    // [vocab] for int8 rows
    const float* x;         // [tokens, hidden]
    float* logits;          // [tokens, vocab]
    int tokens, hidden, vocab;
};

static_assert(sizeof(HeadParams) == 48, "the host mirrors this struct");

// Sums kCount values over the warp; lane l receives the sum of value l / (32 / kCount). Each exchange halves the
// values a lane still carries: kCount - 1 + log2(32 / kCount) shuffles in place of 5 kCount.
template <int kCount, int kMask = 16>
__device__ __forceinline__ float reduce_transposed(float* v, int lane) {
    if constexpr (kCount > 1) {
        constexpr int kHalf = kCount / 2;
        bool upper = lane & kMask;
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            float keep = upper ? v[i + kHalf] : v[i], give = upper ? v[i] : v[i + kHalf];
            v[i] = keep + shfl_xor(give, kMask);
        }
    } else {
        v[0] += shfl_xor(v[0], kMask);
    }
    if constexpr (kMask > 1)
        return reduce_transposed<(kCount > 1 ? kCount / 2 : 1), kMask / 2>(v, lane);
    else
        return v[0];
}

template <class T, int kTokens>
__device__ __forceinline__ void head_body(const HeadParams& p) {
    constexpr int kN = T::kPerVector;
    int vectors = p.hidden / kN, steps = tiles(vectors, 32), padded = steps * 32 * kN;
    float* x = reinterpret_cast<float*>(shared_memory());
    let_next_kernel_start();
    wait_previous_kernel();
    for (int i = threadIdx.x; i < kTokens * padded; i += blockDim.x) {
        int token = i / padded, c = i - token * padded;
        // Lane l reads floats [l * kN, +kN): store each step's vectors as kN / 4 planes of 32 float4, so that
        // a warp's reads are consecutive.
        int step = c / (32 * kN), inside = c - step * 32 * kN, l = inside / kN, e = inside - l * kN;
        int to = token * padded + step * 32 * kN + (e / 4) * 128 + l * 4 + (e & 3);
        x[to] = token < p.tokens && c < p.hidden ? load_fresh(p.x + (long long)token * p.hidden + c) : 0.0f;
    }
    sync_block();
    int lane = threadIdx.x & 31, warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, warps = gridDim.x * blockDim.x / 32;
    int groups = tiles(p.vocab, kHeadRows);
    for (int group = warp; group < groups; group += warps) {
        int row0 = group * kHeadRows;
        const uint4* w[kHeadRows];
#pragma unroll
        for (int r = 0; r < kHeadRows; ++r) {
            int row = row0 + r < p.vocab ? row0 + r : p.vocab - 1;
            w[r] = p.weights + (long long)row * vectors;
        }
        float acc[kHeadRows][kTokens];
#pragma unroll
        for (int r = 0; r < kHeadRows; ++r)
#pragma unroll
            for (int t = 0; t < kTokens; ++t) acc[r][t] = 0.0f;
        // One step ahead: 4 rows x 16 bytes a lane in flight while the last step is multiplied.
        uint4 next[kHeadRows];
#pragma unroll
        for (int r = 0; r < kHeadRows; ++r) next[r] = lane < vectors ? load_stream(w[r] + lane) : make_uint4(0, 0, 0, 0);
#pragma unroll 2
        for (int s = 0; s < steps; ++s) {
            uint4 now[kHeadRows];
            int v = (s + 1) * 32 + lane;
#pragma unroll
            for (int r = 0; r < kHeadRows; ++r) {
                now[r] = next[r];
                if (s + 1 < steps) next[r] = v < vectors ? load_stream(w[r] + v) : make_uint4(0, 0, 0, 0);
            }
            float f[kHeadRows][kN];
#pragma unroll
            for (int r = 0; r < kHeadRows; ++r) T::unpack(now[r], f[r]);
#pragma unroll
            for (int t = 0; t < kTokens; ++t)
#pragma unroll
                for (int e = 0; e < kN / 4; ++e) {
                    float4 xv = *reinterpret_cast<const float4*>(x + t * padded + s * 32 * kN + e * (BITNET_BUG == 12 ? 64 : 128) + lane * 4);
#pragma unroll
                    for (int r = 0; r < kHeadRows; ++r)
                        acc[r][t] = fmaf(f[r][4 * e + 3], xv.w, fmaf(f[r][4 * e + 2], xv.z, fmaf(f[r][4 * e + 1], xv.y, fmaf(f[r][4 * e], xv.x, acc[r][t]))));
                }
        }
        float sum = reduce_transposed<kHeadRows * kTokens>(&acc[0][0], lane);
        constexpr int kShare = 32 / (kHeadRows * kTokens);  // lanes that end with the same value
        int r = lane / kShare / kTokens, t = lane / kShare % kTokens, row = row0 + r;
        if (lane % kShare == 0 && row < p.vocab && t < p.tokens)
            p.logits[(long long)t * p.vocab + row] = p.scales ? sum * p.scales[row] : sum;
    }
}

// kTokens: the smallest of 1, 2, 4, 8 that holds `tokens`.
#define BITNET_HEAD(NAME, TYPE)                                                                              \
    extern "C" __global__ void __launch_bounds__(256) NAME##_1(HeadParams p) { head_body<TYPE, 1>(p); }      \
    extern "C" __global__ void __launch_bounds__(256) NAME##_2(HeadParams p) { head_body<TYPE, 2>(p); }      \
    extern "C" __global__ void __launch_bounds__(256) NAME##_4(HeadParams p) { head_body<TYPE, 4>(p); }      \
    extern "C" __global__ void __launch_bounds__(256) NAME##_8(HeadParams p) { head_body<TYPE, 8>(p); }
BITNET_HEAD(bitnet_head_bf16, HeadBf16)
BITNET_HEAD(bitnet_head_f16, HeadF16)
BITNET_HEAD(bitnet_head_f32, HeadF32)
BITNET_HEAD(bitnet_head_i8, HeadI8)

// x[token, :] = f32 of row ids[token]. Grid: tokens. An id outside the table (never from a checked host) reads
// row 0 rather than memory that is not there.
template <class T>
__device__ inline void embed(const void* table, const int* ids, float* x, int hidden, int vocab) {
    let_next_kernel_start();
    wait_previous_kernel();
    int id = load_fresh(ids + blockIdx.x);
    if (id < 0 || id >= vocab) id = 0;
    const typename T::Store* row = static_cast<const typename T::Store*>(table) + (long long)id * hidden;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) x[(long long)blockIdx.x * hidden + i] = T::load(row[i]);
}
#define BITNET_EMBED(NAME, TYPE)                                                                                       \
    extern "C" __global__ void __launch_bounds__(512) NAME(const void* table, const int* ids, float* x, int hidden,    \
                                                           int vocab) {                                               \
        embed<TYPE>(table, ids, x, hidden, vocab);                                                                     \
    }
BITNET_EMBED(bitnet_embed_f32, F32)
BITNET_EMBED(bitnet_embed_bf16, Bf16)
BITNET_EMBED(bitnet_embed_f16, F16)
extern "C" __global__ void __launch_bounds__(512)
    bitnet_embed_i8(const int8_t* table, const float* scales, const int* ids, float* x, int hidden, int vocab) {
    let_next_kernel_start();
    wait_previous_kernel();
    int id = load_fresh(ids + blockIdx.x);
    if (id < 0 || id >= vocab) id = 0;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x)
        x[(long long)blockIdx.x * hidden + i] = (float)table[(long long)id * hidden + i] * scales[id];
}
