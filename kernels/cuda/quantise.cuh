// RMSNorm and per-token int8 quantisation of up to a block's worth of rows, used by the norm kernel and,
// redundantly per block, by the decode GEMV: reading 10 kB from L2 again costs less than another launch.
//
//   n = x * w * r,  r = 1 / sqrt(mean(x^2) + eps)      s_x = 127 / max(absmax(n), 1e-5)      q = rne(n * s_x)
//
// n is rounded as (x * w) * r. Rounding is monotonic, so absmax(n) = absmax(x * w) * r exactly, and the sum of
// squares and the maximum come out of one pass and one barrier.
//
// Rows are dealt to groups of warps; within a row, thread i takes float4 chunks i, i + group, ... and keeps the
// first kCached in registers.
#pragma once
#include "layout.cuh"

namespace bitnet {

constexpr int kCachedChunks = 4;
constexpr int kQuantiseScratch = 3 * 32 * 4;  // bytes

__device__ __forceinline__ float4 load_chunk(const float* row, int chunk, int k, bool vectors) {
    if (vectors) return load_fresh(reinterpret_cast<const float4*>(row) + chunk);
    float4 v = make_float4(0, 0, 0, 0);
    int c = chunk * 4;
    v.x = load_fresh(row + c);
    if (c + 1 < k) v.y = load_fresh(row + c + 1);
    if (c + 2 < k) v.z = load_fresh(row + c + 2);
    if (c + 3 < k) v.w = load_fresh(row + c + 3);
    return v;
}
__device__ __forceinline__ void store_chunk(float* row, int chunk, int k, bool vectors, float4 v) {
    if (vectors) {
        reinterpret_cast<float4*>(row)[chunk] = v;
        return;
    }
    int c = chunk * 4;
    row[c] = v.x;
    if (c + 1 < k) row[c + 1] = v.y;
    if (c + 2 < k) row[c + 2] = v.z;
    if (c + 3 < k) row[c + 3] = v.w;
}

struct QuantiseRows {
    const float* x;       // [rows, k], stride ld floats
    const float* add;     // [rows, k] or null: x += add first, written back to `sum`
    float* sum;           // may be x; null keeps the sum in registers only if nothing else needs it
    const float* weight;  // [k] or null: no norm, quantise x itself
    float eps;
    int rows, k, ld;
    bool aligned;         // every row pointer and k allow float4
};

// Writes q (rows of `stride` bytes, zero up to `padded`), sx and qsum per row. The caller adds the barrier
// that makes them visible. All threads of the block must call it.
__device__ inline void quantise_rows(const QuantiseRows& a, int8_t* q, int stride, int padded, float* sx, int* qsum,
                                     unsigned char* scratch) {
    float* part_sum = reinterpret_cast<float*>(scratch);
    float* part_max = part_sum + 32;
    int* part_q = reinterpret_cast<int*>(part_max + 32);
    int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    int at_once = a.rows < warps ? a.rows : warps;
    int per_row = warps / at_once;
    int group = warp / per_row, first_warp = group * per_row;
    int threads = per_row * 32, thread = threadIdx.x - first_warp * 32;
    int chunks = tiles(a.k, 4), padded_chunks = padded / 4;
    for (int base = 0; base < a.rows; base += at_once) {
        int row = base + group;
        bool active = group < at_once && row < a.rows;
        const float* x = a.x + (long long)row * a.ld;
        float4 cached[kCachedChunks];
        float squares = 0.0f, peak = 0.0f;
        if (active) {
#pragma unroll
            for (int i = 0; i < kCachedChunks; ++i) cached[i] = make_float4(0, 0, 0, 0);
            for (int i = 0; thread + i * threads < chunks; ++i) {
                int c = thread + i * threads;
                float4 v = load_chunk(x, c, a.k, a.aligned);
                if (a.add) {
                    float4 d = load_chunk(a.add + (long long)row * a.ld, c, a.k, a.aligned);
                    v = make_float4(add_rn(v.x, d.x), add_rn(v.y, d.y), add_rn(v.z, d.z), add_rn(v.w, d.w));
                    store_chunk(a.sum + (long long)row * a.ld, c, a.k, a.aligned, v);
                }
                if (a.weight) {
                    // fma spelled out: the fused and the separate kernel must agree to the bit
                    squares = fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, squares))));
                    float4 w = load_chunk(a.weight, c, a.k, a.aligned);
                    v = make_float4(mul_rn(v.x, w.x), mul_rn(v.y, w.y), mul_rn(v.z, w.z), mul_rn(v.w, w.w));
                }
                peak = fmaxf(peak, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
#pragma unroll
                for (int s = 0; s < kCachedChunks; ++s)
                    if (s == i) cached[s] = v;
            }
        }
        for (int m = 16; m; m >>= 1) {
            squares += shfl_xor(squares, m);
            peak = fmaxf(peak, shfl_xor(peak, m));
        }
        if (lane == 0) {
            part_sum[warp] = squares;
            part_max[warp] = peak;
        }
        if (BITNET_BUG != 1) sync_block();
        float scale = 1.0f;
        int total = 0;
        if (active) {
            squares = 0.0f;
            peak = 0.0f;
            for (int w = first_warp; w < first_warp + per_row; ++w) {
                squares += part_sum[w];
                peak = fmaxf(peak, part_max[w]);
            }
            float r = 1.0f;
            if (a.weight) {
                r = div_rn(1.0f, sqrt_rn(div_rn(squares, (float)a.k) + a.eps));
                peak = mul_rn(peak, r);
            }
            scale = div_rn(127.0f, fmaxf(peak, 1e-5f));
            unsigned* out = reinterpret_cast<unsigned*>(q + (long long)row * stride);
            for (int i = 0; thread + i * threads < padded_chunks; ++i) {
                int c = thread + i * threads;
                unsigned word = 0;
                if (c < chunks) {
                    float4 v;
                    if (i < kCachedChunks) {
#pragma unroll
                        for (int s = 0; s < kCachedChunks; ++s)
                            if (s == i) v = cached[s];
                    } else {
                        // The sum with `add` was written by this very thread: no barrier needed.
                        v = load_chunk(a.add ? a.sum + (long long)row * a.ld : x, c, a.k, a.aligned);
                        if (a.weight) {
                            float4 w = load_chunk(a.weight, c, a.k, a.aligned);
                            v = make_float4(mul_rn(v.x, w.x), mul_rn(v.y, w.y), mul_rn(v.z, w.z), mul_rn(v.w, w.w));
                        }
                    }
                    if (a.weight) v = make_float4(mul_rn(v.x, r), mul_rn(v.y, r), mul_rn(v.z, r), mul_rn(v.w, r));
                    int q0 = float_to_int_rn(mul_rn(v.x, scale)), q1 = float_to_int_rn(mul_rn(v.y, scale));
                    int q2 = float_to_int_rn(mul_rn(v.z, scale)), q3 = float_to_int_rn(mul_rn(v.w, scale));
                    total += q0 + q1 + q2 + q3;
                    word = (q0 & 255u) | (q1 & 255u) << 8 | (q2 & 255u) << 16 | (unsigned)q3 << 24;
                }
                out[c] = word;
            }
        }
        for (int m = 16; m; m >>= 1) total += shfl_xor(total, m);
        if (lane == 0) part_q[warp] = total;
        sync_block();
        if (active && thread == 0) {
            total = 0;
            for (int w = first_warp; w < first_warp + per_row; ++w) total += part_q[w];
            sx[row] = scale;
            qsum[row] = total;
        }
    }
}

}  // namespace bitnet
