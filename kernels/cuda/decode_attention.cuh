// Decode attention: rope, KV write, split-K flash decode and combine for one (token, KV head, split).
//
//   grid (kv_heads * head_blocks, splits, tokens), 128 threads. A block serves up to 4 query heads of one KV
//   head, so grouped heads share every KV read; positions are cut into `splits` runs. Runs beyond the sequence's
//   length leave at once: the length lives in device memory, so one captured graph serves a range of lengths.
//   The block whose run holds the new position rotates and stores its K and V. The last run to finish combines.
//
// Scores: 8 lanes a position, 4 elements a lane and step. Values: head_dim / 4 threads a position.
// Shared memory: (4 d) q + 2 d new K, V + 4 * 64 scores + 16 + 16 d partial sums, in floats.
#pragma once
#include "kv.cuh"

namespace bitnet {

constexpr int kHeadsPerBlock = 4;
constexpr int kAttentionThreads = 128;
constexpr int kPositionsPerTile = 64;

__host__ __device__ inline int head_blocks(int heads, int kv_heads) { return tiles(heads / kv_heads, kHeadsPerBlock); }
__host__ __device__ inline int decode_attention_shared(int head_dim) {
    return (kHeadsPerBlock * head_dim + 2 * head_dim + kHeadsPerBlock * kPositionsPerTile + 16 + 4 * kAttentionThreads * 4) * 4;
}

template <class T>
__device__ inline void decode_attention(const AttentionParams& p, int head_block, int split, int token, unsigned char* shared) {
    using Store = typename T::Store;
    int d = p.head_dim, half = d / 2, group = p.heads / p.kv_heads, blocks_per_kv = head_blocks(p.heads, p.kv_heads);
    int kv = head_block / blocks_per_kv, part = head_block % blocks_per_kv;
    int h0 = kv * group + part * kHeadsPerBlock;
    int heads = group - part * kHeadsPerBlock;
    heads = heads < kHeadsPerBlock ? heads : kHeadsPerBlock;
    int position = load_fresh(p.positions + token), slot = load_fresh(p.slots + token);
    int length = position + 1;
    int run = tiles(tiles(length, p.splits), 16) * 16;
    int runs = tiles(length, run);
    if (split >= runs) return;
    int begin = split * run, end = begin + run < length ? begin + run : length;

    float* q = reinterpret_cast<float*>(shared);
    Store* new_k = reinterpret_cast<Store*>(q + kHeadsPerBlock * d);
    Store* new_v = new_k + d;
    float* scores = q + kHeadsPerBlock * d + 2 * d;
    float* stats = scores + kHeadsPerBlock * kPositionsPerTile;  // [4] maximum, [4] sum, [1] flag
    float* sums = stats + 16;

    int thread = threadIdx.x, lane = thread & 31, warp = thread / 32, threads = kAttentionThreads;
    const float* cos_row = p.cos + (long long)position * half;
    const float* sin_row = p.sin + (long long)position * half;
    const float* row = p.qkv + (long long)token * (p.heads + 2 * p.kv_heads) * d;
    for (int i = thread; i < kHeadsPerBlock * d; i += threads) {
        int h = i / d, c = i - h * d;
        q[i] = h < heads ? rotated(row + (h0 + h) * d, c, half, cos_row, sin_row) * p.scale : 0.0f;
    }
    long long cache_row = (long long)p.kv_heads * d;
    Store* k_base = static_cast<Store*>(p.k_cache) + (long long)slot * p.max_positions * cache_row + kv * d;
    Store* v_base = static_cast<Store*>(p.v_cache) + (long long)slot * p.max_positions * cache_row + kv * d;
    if (end == length) {
        const float* k = row + (p.heads + kv) * d;
        const float* v = row + (p.heads + p.kv_heads + kv) * d;
        for (int c = thread; c < d; c += threads) {
            Store sk = T::store(rotated(k, c, half, cos_row, sin_row)), sv = T::store(load_fresh(v + c));
            new_k[c] = sk;
            new_v[c] = sv;
            if (part == 0) {
                k_base[position * cache_row + c] = sk;
                v_base[position * cache_row + c] = sv;
            }
        }
    }
    sync_block();

    float top[kHeadsPerBlock], total[kHeadsPerBlock];
    float4 acc[kHeadsPerBlock];
#pragma unroll
    for (int h = 0; h < kHeadsPerBlock; ++h) {
        top[h] = -INFINITY;
        total[h] = 0.0f;
        acc[h] = make_float4(0, 0, 0, 0);
    }
    int chunk_threads = d / 4, value_groups = threads / chunk_threads, value_group = thread / chunk_threads;
    int column = (thread - value_group * chunk_threads) * 4;
    for (int base = begin; base < end; base += kPositionsPerTile) {
        int count = end - base < kPositionsPerTile ? end - base : kPositionsPerTile;
        // Scores: every lane of a warp runs the same number of steps, so that the exchanges meet.
        for (int s = 0; s < kPositionsPerTile; s += threads / 8) {
            int i = s + thread / 8;
            if (s + (warp * 4) >= count) continue;
            float dot[kHeadsPerBlock] = {0, 0, 0, 0};
            if (i < count) {
                int at = base + i;
                const Store* k = at == position ? new_k : k_base + at * cache_row;
                for (int c = (lane & 7) * 4; c < d; c += 32) {
                    float4 kk = T::load4(k + c);
#pragma unroll
                    for (int h = 0; h < kHeadsPerBlock; ++h) {
                        float4 qq = *reinterpret_cast<const float4*>(q + h * d + c);
                        dot[h] += qq.x * kk.x + qq.y * kk.y + qq.z * kk.z + qq.w * kk.w;
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < kHeadsPerBlock; ++h) {
                dot[h] += shfl_xor(dot[h], 1);
                dot[h] += shfl_xor(dot[h], 2);
                dot[h] += shfl_xor(dot[h], 4);
                if ((lane & 7) == 0 && i < count) scores[h * kPositionsPerTile + i] = dot[h];
            }
        }
        sync_block();
        // Warp h turns head h's scores into weights relative to the new maximum.
        {
            float s0 = lane < count ? scores[warp * kPositionsPerTile + lane] : -INFINITY;
            float s1 = lane + 32 < count ? scores[warp * kPositionsPerTile + lane + 32] : -INFINITY;
            float m = fmaxf(s0, s1);
            for (int x = 16; x; x >>= 1) m = fmaxf(m, shfl_xor(m, x));
            float old = -INFINITY;
#pragma unroll
            for (int h = 0; h < kHeadsPerBlock; ++h)
                if (h == warp) old = top[h];
            m = fmaxf(m, old);
            s0 = lane < count ? expf(s0 - m) : 0.0f;
            s1 = lane + 32 < count ? expf(s1 - m) : 0.0f;
            scores[warp * kPositionsPerTile + lane] = s0;
            scores[warp * kPositionsPerTile + lane + 32] = s1;
            float sum = s0 + s1;
            for (int x = 16; x; x >>= 1) sum += shfl_xor(sum, x);
            if (lane == 0) {
                stats[warp] = m;
                stats[4 + warp] = sum;
            }
        }
        if (BITNET_BUG != 5) sync_block();
#pragma unroll
        for (int h = 0; h < kHeadsPerBlock; ++h) {
            float m = stats[h], keep = expf(top[h] - m);  // the first tile's exp(-inf) is 0
            top[h] = m;
            total[h] = total[h] * keep + stats[4 + h];
            acc[h] = make_float4(acc[h].x * keep, acc[h].y * keep, acc[h].z * keep, acc[h].w * keep);
        }
        if (value_group < value_groups)
            for (int i = value_group; i < count; i += value_groups) {
                int at = base + i;
                float4 vv = T::load4((at == position ? new_v : v_base + at * cache_row) + column);
#pragma unroll
                for (int h = 0; h < kHeadsPerBlock; ++h) {
                    float w = scores[h * kPositionsPerTile + i];
                    acc[h] = make_float4(acc[h].x + w * vv.x, acc[h].y + w * vv.y, acc[h].z + w * vv.z, acc[h].w + w * vv.w);
                }
            }
        sync_block();
    }
    if (value_group < value_groups)
#pragma unroll
        for (int h = 0; h < kHeadsPerBlock; ++h)
            *reinterpret_cast<float4*>(sums + (value_group * kHeadsPerBlock + h) * d + column) = acc[h];
    sync_block();
    float* out = p.out + (long long)token * p.heads * d;
    int stride = d + 2;
    for (int i = thread; i < heads * d; i += threads) {
        int h = i / d, c = i - h * d;
        float v = 0.0f;
        for (int g = 0; g < value_groups; ++g) v += sums[(g * kHeadsPerBlock + h) * d + c];
        float l = 0.0f;
#pragma unroll
        for (int x = 0; x < kHeadsPerBlock; ++x)
            if (x == h) l = total[x];
        if (runs == 1)
            out[(h0 + h) * d + c] = div_rn(v, l);
        else
            p.partial[(((long long)token * p.heads + h0 + h) * p.splits + split) * stride + c] = v;
    }
    if (runs == 1) return;
    if (thread < heads) {
        float m = 0.0f, l = 0.0f;
#pragma unroll
        for (int x = 0; x < kHeadsPerBlock; ++x)
            if (x == thread) m = top[x], l = total[x];
        float* s = p.partial + (((long long)token * p.heads + h0 + thread) * p.splits + split) * stride + d;
        s[0] = m;
        s[1] = l;
    }
    fence_device();
    sync_block();
    unsigned* counter = p.arrived + (long long)token * p.kv_heads * blocks_per_kv + head_block;
    if (thread == 0) stats[8] = atomic_add(counter, 1u) == (unsigned)(runs - 1) ? 1.0f : 0.0f;
    sync_block();
    if (stats[8] == 0.0f) return;
    if (thread == 0) *counter = 0;
    fence_device();
    // Each head's weights of the runs, then the weighted sum.
    float* weights = scores;  // [4][runs], runs <= 64
    if (warp < heads) {
        const float* s = p.partial + ((long long)token * p.heads + h0 + warp) * p.splits * stride + d;
        float m = -INFINITY;
        for (int r = lane; r < runs; r += 32) m = fmaxf(m, load_fresh(s + r * stride));
        for (int x = 16; x; x >>= 1) m = fmaxf(m, shfl_xor(m, x));
        float l = 0.0f;
        for (int r = lane; r < runs; r += 32) {
            float w = expf(load_fresh(s + r * stride) - m);
            weights[warp * kPositionsPerTile + r] = w;
            l += w * load_fresh(s + r * stride + 1);
        }
        for (int x = 16; x; x >>= 1) l += shfl_xor(l, x);
        if (lane == 0) stats[warp] = l;
    }
    sync_block();
    for (int i = thread; i < heads * d; i += threads) {
        int h = i / d, c = i - h * d;
        const float* s = p.partial + ((long long)token * p.heads + h0 + h) * p.splits * stride + c;
        float v = 0.0f;
        for (int r = 0; r < runs; ++r) v += weights[h * kPositionsPerTile + r] * load_fresh(s + r * stride);
        out[(h0 + h) * d + c] = div_rn(v, stats[h]);
    }
}

}  // namespace bitnet
