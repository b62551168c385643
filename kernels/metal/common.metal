// What every file here begins with: the host puts this text before one or all of the others and compiles that.
//
// Compile with math mode safe: `/` and precise::sqrt are then correctly rounded, and no sum or product is rearranged.
// Every rounding that is part of the numbers' contract goes through the functions below; contraction is off besides.
//
// The packed ternary matrix is CUDA's (../cuda/layout.cuh). Tile (R, T): 16 rows x 256 columns, 1024 bytes, at
// (R * k_tiles + T) * 1024. Of its 64 vectors of 16 bytes, vector h * 32 + lane holds row h * 8 + g, g = lane / 4, and of its
// columns those with t = lane % 4:
//
//     word j = 0..3, byte b = 0..3, bits 2i, 2i + 1, i = 0..3     code {0,1,2} of column  j * 64 + i * 16 + t * 4 + b
//
// Quantised activations: q half [tokens, padded] (codes -127..127 are exact), zero beyond k, and per token a row of stats,
// f32 [4 + 8 k_tiles]: s_x, the sum of the codes, 0, 0, then for tile T, half h, t the weighted sums of gemv.metal.
#if defined(BITNET_EMULATOR)
#include "../emulator/metal.h"
#elif defined(BITNET_ADDRESS_SPACES)
#include "../emulator/opencl.h"
#else
#include <metal_stdlib>
#endif
using namespace metal;

#pragma STDC FP_CONTRACT OFF

// Tests plant one defect (a barrier removed, an index off by one) and require the suites to fail: the emulator makes this a
// variable. 0 in what ships, where these conditions vanish.
#ifndef BITNET_BUG
#define BITNET_BUG 0
#endif

#define BITNET_UNROLL _Pragma("clang loop unroll(full)")

// The last parameters of every kernel, and what functions pass on of them.
#define BITNET_GRID                                                                                                \
    uint3 group_ [[threadgroup_position_in_grid]], uint3 groups_ [[threadgroups_per_grid]],                        \
        uint3 size_ [[threads_per_threadgroup]], uint tid_ [[thread_index_in_threadgroup]],                        \
        uint lane_ [[thread_index_in_simdgroup]], uint simd_ [[simdgroup_index_in_threadgroup]],                   \
        uint width_ [[threads_per_simdgroup]]
#define BITNET_AT Position{group_, groups_, size_.x, tid_, lane_, simd_, width_}
#ifndef BITNET_KERNEL
#define BITNET_KERNEL(THREADS) [[kernel, max_total_threads_per_threadgroup(THREADS)]] void
#endif
#ifndef BITNET_SHARED
#define BITNET_SHARED threadgroup uchar* shared [[threadgroup(0)]]
#endif

struct Position {
    uint3 group, groups;
    uint threads, tid, lane, simd, width;
};

constant constexpr int kTileRows = 16;
constant constexpr int kTileCols = 256;
constant constexpr int kTileVectors = 64;
constant constexpr int kSegments = 4;
constant constexpr int kStatsHead = 4;
constant constexpr int kTileStats = 8;

inline int tiles(int n, int size) { return (n + size - 1) / size; }
inline int stats_stride(int k_tiles) { return kStatsHead + kTileStats * k_tiles; }

inline void sync_threads() { threadgroup_barrier(mem_flags::mem_threadgroup); }
inline void sync_lanes() { simdgroup_barrier(mem_flags::mem_threadgroup); }

inline float mul_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }
inline float div_rn(float a, float b) { return a / b; }
inline float exp_of(float a) { return precise::exp(a); }

// Scales of a stacked matrix: segment s covers rows [end[s-1], end[s]). Gate/up: value[0] gate, value[1] up.
struct Scales {
    int end[kSegments - 1];
    float value[kSegments];
};
static_assert(sizeof(Scales) == 28, "the host mirrors this struct");

inline int segment(constant Scales& s, int row) { return (row >= s.end[0]) + (row >= s.end[1]) + (row >= s.end[2]); }

// multiplier / s_x as the sum of two floats: 49 bits. What a division leaves over is exact, so no f64 is needed.
typedef float2 Factor;
inline Factor factor(float multiplier, float sx) {
    float hi = div_rn(multiplier, sx);
    return float2(hi, div_rn(fma(-hi, sx, multiplier), sx));
}
// acc * multiplier / s_x, rounded once: to the bit what (float)(acc * ((double)multiplier / s_x)) is, but for one output in
// some millions. |acc| < 2^24 because K <= 132104, so it is exact as a float.
inline float dequantise(float acc, Factor f) {
    float product = mul_rn(acc, f.x);
    if (BITNET_BUG == 14) return product;
    return add_rn(product, fma(acc, f.y, fma(acc, f.x, -product)));
}

// Activation of a gated MLP; f32 throughout (the square overflows f16 in real models).
inline float gated(float gate, float up, int activation) {
    if (activation == 1) return mul_rn(div_rn(gate, add_rn(1.0f, exp_of(-gate))), up);
    float r = fmax(gate, 0.0f);
    return mul_rn(mul_rn(r, r), up);
}

// Element types of the KV cache and of dense weights, and four consecutive ones. bf16 is a ushort: Metal has the type from
// 3.1 on only.
inline float bf16_to_float(ushort h) { return as_type<float>(uint(h) << 16); }
inline ushort float_to_bf16(float f) {
    uint u = as_type<uint>(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return ushort((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
struct F32 {
    typedef float Store;
    static float load(float v) { return v; }
    static float store(float v) { return v; }
    static float4 load4(device const float* p) { return *(device const float4*)p; }
    static float4 load4_shared(threadgroup const float* p) { return *(threadgroup const float4*)p; }
};
struct Bf16 {
    typedef ushort Store;
    static float load(ushort v) { return bf16_to_float(v); }
    static ushort store(float v) { return float_to_bf16(v); }
    static float4 wide(ushort4 v) { return float4(bf16_to_float(v.x), bf16_to_float(v.y), bf16_to_float(v.z), bf16_to_float(v.w)); }
    static float4 load4(device const ushort* p) { return wide(*(device const ushort4*)p); }
    static float4 load4_shared(threadgroup const ushort* p) { return wide(*(threadgroup const ushort4*)p); }
};
struct F16 {
    typedef half Store;
    static float load(half v) { return float(v); }
    static half store(float v) { return half(v); }
    static float4 load4(device const half* p) { return float4(*(device const half4*)p); }
    static float4 load4_shared(threadgroup const half* p) { return float4(*(threadgroup const half4*)p); }
};

// RMSNorm and per-token int8 quantisation of one row by a whole threadgroup of 256, for the norm kernel and, redundantly per
// threadgroup, for the decode products: reading 10 kB from the cache again costs less than another launch.
//
//   n = x * w * r,  r = 1 / sqrt(mean(x^2) + eps)      s_x = 127 / max(absmax(n), 1e-5)      q = rne(n * s_x)
//
// n is rounded as (x * w) * r. Rounding is monotonic, so absmax(n) = absmax(x * w) * r exactly, and the sum of squares and
// the maximum come out of one pass and one barrier. The second pass reads the row again, from the cache.
//
// Chunk c = 4 columns = tid + 256 n. Column 4c lies in tile T = c / 64, word j = c / 16 % 4, unit i = c / 4 % 4, t = c % 4. A
// simdgroup holds 32 consecutive chunks, half h = c / 32 % 2 of a tile; lanes equal in t add up 4^(5-i) * (q0 + .. + q3)
// and the first four of them store it.
constant constexpr int kQuantiseScratch = 128;

inline float4 load_chunk(device const float* row, int chunk, int k, bool vectors) {
    if (vectors) return ((device const float4*)row)[chunk];
    int c = chunk * 4;
    return float4(row[c], c + 1 < k ? row[c + 1] : 0.0f, c + 2 < k ? row[c + 2] : 0.0f, c + 3 < k ? row[c + 3] : 0.0f);
}
inline void store_chunk(device float* row, int chunk, int k, bool vectors, float4 v) {
    if (vectors) {
        ((device float4*)row)[chunk] = v;
        return;
    }
    int c = chunk * 4;
    row[c] = v.x;
    if (c + 1 < k) row[c + 1] = v.y;
    if (c + 2 < k) row[c + 2] = v.z;
    if (c + 3 < k) row[c + 3] = v.w;
}
inline float4 times(float4 a, float4 b) { return float4(mul_rn(a.x, b.x), mul_rn(a.y, b.y), mul_rn(a.z, b.z), mul_rn(a.w, b.w)); }

struct Row {
    int k;
    float eps;
    bool has_add, has_weight;
};
// A code: what is not a number (a row with an infinity) becomes 0, as on the other devices.
inline float code(float v, float scale) {
    float q = rint(mul_rn(v, scale));
    return q >= -127.0f && q <= 127.0f ? q : 0.0f;
}

// x (+= add, stored): codes to q (half4 chunks), s_x and sums to stats. The caller adds the barrier that makes them visible.
template <typename Q, typename S>
inline void quantise_row(thread const Row& a, device float* x, device const float* add, device const float* weight, Q q, S stats,
                         threadgroup uchar* scratch, thread const Position& at) {
    threadgroup float* part_sum = (threadgroup float*)scratch;
    threadgroup float* part_max = part_sum + 8;
    threadgroup int* part_q = (threadgroup int*)(part_max + 8);
    bool vectors = (a.k & 3) == 0;
    int chunks = tiles(a.k, 4), padded_chunks = tiles(a.k, kTileCols) * (kTileCols / 4);
    float squares = 0.0f, peak = 0.0f;
    for (int c = int(at.tid); c < chunks; c += 256) {
        float4 v = load_chunk(x, c, a.k, vectors);
        if (a.has_add) {
            float4 d = load_chunk(add, c, a.k, vectors);
            v = float4(add_rn(v.x, d.x), add_rn(v.y, d.y), add_rn(v.z, d.z), add_rn(v.w, d.w));
            store_chunk(x, c, a.k, vectors, v);
        }
        if (a.has_weight) {
            squares = fma(v.w, v.w, fma(v.z, v.z, fma(v.y, v.y, fma(v.x, v.x, squares))));
            v = times(v, load_chunk(weight, c, a.k, vectors));
        }
        peak = fmax(peak, fmax(fmax(fabs(v.x), fabs(v.y)), fmax(fabs(v.z), fabs(v.w))));
    }
    squares = simd_sum(squares);
    peak = simd_max(peak);
    if (at.lane == 0) {
        part_sum[at.simd] = squares;
        part_max[at.simd] = peak;
    }
    if (BITNET_BUG != 1) sync_threads();
    squares = 0.0f;
    peak = 0.0f;
    for (int s = 0; s < 8; ++s) {
        squares = add_rn(squares, part_sum[s]);
        peak = fmax(peak, part_max[s]);
    }
    float r = 1.0f;
    if (a.has_weight) {
        r = div_rn(1.0f, precise::sqrt(add_rn(div_rn(squares, float(a.k)), a.eps)));
        peak = mul_rn(peak, r);
    }
    float scale = div_rn(127.0f, fmax(peak, 1e-5f));
    int total = 0;
    for (int c = int(at.tid); c < padded_chunks; c += 256) {
        float4 v = float4(0.0f);
        if (c < chunks) {
            v = load_chunk(x, c, a.k, vectors);  // with `add`, this thread's own store
            if (a.has_weight) {
                v = times(v, load_chunk(weight, c, a.k, vectors));
                v = float4(mul_rn(v.x, r), mul_rn(v.y, r), mul_rn(v.z, r), mul_rn(v.w, r));
            }
            v = float4(code(v.x, scale), code(v.y, scale), code(v.z, scale), code(v.w, scale));
        }
        q[c] = half4(v);
        int sum = int(v.x + v.y + v.z + v.w);
        total += sum;
        float weighted = float(sum * (1024 >> (2 * (c >> 2 & 3))));
        weighted += simd_shuffle_xor(weighted, 4);
        weighted += simd_shuffle_xor(weighted, 8);
        weighted += simd_shuffle_xor(weighted, 16);
        if (at.lane < 4) stats[kStatsHead + kTileStats * (c >> 6) + 4 * (c >> 5 & 1) + int(at.lane)] = weighted;
    }
    total = simd_sum(total);
    if (at.lane == 0) part_q[at.simd] = total;
    sync_threads();
    if (at.tid == 0) {
        total = 0;
        for (int s = 0; s < 8; ++s) total += part_q[s];
        stats[0] = scale;
        stats[1] = float(total);
        stats[2] = 0.0f;
        stats[3] = 0.0f;
    }
}
