// Decode attention: rope, KV write, split-K flash decode for one (token, KV head, split), and the combination of the splits.
// Rope and KV write for prefill.
//
// A head's vector x of d elements is rotated in pairs (i, i + d/2): x[i] cos - x[i + d/2] sin, x[i + d/2] cos + x[i] sin, with row
// `position` of cos and sin [positions, d / 2]. qkv [tokens][heads + 2 kv_heads][d]; KV cache [slot][max_positions][kv_head][d].
#ifndef BITNET_ATTENTION_PARAMS
#define BITNET_ATTENTION_PARAMS
struct AttentionParams {
    int tokens, heads, kv_heads, head_dim, max_positions, splits;
    float scale;  // of q: head_dim^-0.5
};
static_assert(sizeof(AttentionParams) == 28, "the host mirrors this struct");
#endif

constant constexpr int kHeadsPerGroup = 4;
constant constexpr int kAttentionThreads = 128;
constant constexpr int kPositionsPerTile = 64;

// Element i of a rotated head.
inline float rotated(device const float* head, int i, int half_dim, device const float* cos_row, device const float* sin_row) {
    int j = i < half_dim ? i : i - half_dim;
    float c = cos_row[j], s = sin_row[j];
    return i < half_dim ? fma(head[j], c, -mul_rn(head[j + half_dim], s)) : fma(head[j + half_dim], c, mul_rn(head[j], s));
}

// Positions of a sequence of `length` in one split, and how many splits have any.
inline int run_of(int length, int splits) { return tiles(tiles(length, splits), 16) * 16; }

// Position (kv_heads * blocks, splits, tokens), blocks = ceil(heads / kv_heads / 4); 128 threads. A threadgroup serves query heads
// h0 .. h0 + 3 of one KV head, h0 = kv * group + part * 4, so that grouped heads share every KV read, and positions
// [split * run, + run). The one whose run holds the new position rotates and stores its K and V; it is read from threadgroup
// memory, never back from the cache.
//
// Per tile of 64 positions: scores, position = 16 s + tid / 8, elements (tid % 8) * 4 + 32 n; weights, simdgroup h = head h,
// positions lane and lane + 32; values, columns 4 (tid % (d / 4)) ..+3, positions tid / (d / 4) + n * (128 / (d / 4)).
//
// Threadgroup memory in floats: q [4][d], new K and V [2][d], weights [4][64], maxima [4], sums [4] (16 in all), partial sums 2048.
// Bytes: 2 run kv_heads d element per threadgroup, once. Per K element and head 1 FMA, per V element and head 1 FMA.
template <typename E>
inline void decode_attention(device const float* qkv, device const float* cos_table, device const float* sin_table,
                             device const int* positions, device const int* slots, device typename E::Store* k_cache,
                             device typename E::Store* v_cache, device float* out, device float* partial,
                             constant AttentionParams& p, threadgroup uchar* shared, thread const Position& at) {
    typedef typename E::Store Store;
    int d = p.head_dim, half_dim = d / 2, group = p.heads / p.kv_heads, blocks = tiles(group, kHeadsPerGroup);
    int token = int(at.group.z), split = int(at.group.y), kv = int(at.group.x) / blocks, part = int(at.group.x) - kv * blocks;
    int h0 = kv * group + part * kHeadsPerGroup, heads = min(group - part * kHeadsPerGroup, kHeadsPerGroup);
    int position = positions[token], length = position + 1, run = run_of(length, p.splits), runs = tiles(length, run);
    if (split >= runs) return;
    int begin = split * run, end = min(begin + run, length);

    threadgroup float* q = (threadgroup float*)shared;
    threadgroup Store* new_k = (threadgroup Store*)(q + kHeadsPerGroup * d);
    threadgroup Store* new_v = new_k + d;
    threadgroup float* scores = q + kHeadsPerGroup * d + 2 * d;
    threadgroup float* stats = scores + kHeadsPerGroup * kPositionsPerTile;
    threadgroup float* sums = stats + 16;

    int tid = int(at.tid), lane = int(at.lane), simd = int(at.simd);
    device const float* cos_row = cos_table + ulong(position) * ulong(half_dim);
    device const float* sin_row = sin_table + ulong(position) * ulong(half_dim);
    device const float* row = qkv + ulong(token) * ulong((p.heads + 2 * p.kv_heads) * d);
    for (int i = tid; i < kHeadsPerGroup * d; i += kAttentionThreads) {
        int h = i / d, c = i - h * d;
        q[i] = h < heads ? mul_rn(rotated(row + (h0 + h) * d, c, half_dim, cos_row, sin_row), p.scale) : 0.0f;
    }
    ulong cache_row = ulong(p.kv_heads * d);
    ulong first = ulong(slots[token]) * ulong(p.max_positions) * cache_row + ulong(kv * d);
    device Store* k_base = k_cache + first;
    device Store* v_base = v_cache + first;
    if (end == length) {
        device const float* k = row + (p.heads + kv) * d;
        device const float* v = row + (p.heads + p.kv_heads + kv) * d;
        for (int c = tid; c < d; c += kAttentionThreads) {
            Store sk = E::store(rotated(k, c, half_dim, cos_row, sin_row)), sv = E::store(v[c]);
            new_k[c] = sk;
            new_v[c] = sv;
            if (part == 0) {
                k_base[ulong(position) * cache_row + ulong(c)] = sk;
                v_base[ulong(position) * cache_row + ulong(c)] = sv;
            }
        }
    }
    sync_threads();

    float top[kHeadsPerGroup], total[kHeadsPerGroup];
    float4 acc[kHeadsPerGroup];
    BITNET_UNROLL
    for (int h = 0; h < kHeadsPerGroup; ++h) {
        top[h] = -INFINITY;
        total[h] = 0.0f;
        acc[h] = float4(0.0f);
    }
    int chunk_threads = d / 4, value_groups = kAttentionThreads / chunk_threads, value_group = tid / chunk_threads;
    int column = (tid - value_group * chunk_threads) * 4;
    for (int base = begin; base < end; base += kPositionsPerTile) {
        int count = min(end - base, kPositionsPerTile);
        // Every lane of a simdgroup runs the same number of steps, so that the exchanges meet.
        for (int s = 0; s < kPositionsPerTile; s += kAttentionThreads / 8) {
            int i = s + tid / 8;
            if (s + simd * 4 >= count) continue;
            float dots[kHeadsPerGroup] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (i < count) {
                int here = base + i;
                device const Store* k = k_base + ulong(here) * cache_row;
                for (int c = (lane & 7) * 4; c < d; c += 32) {
                    float4 kk = here == position ? E::load4_shared(new_k + c) : E::load4(k + c);
                    BITNET_UNROLL
                    for (int h = 0; h < kHeadsPerGroup; ++h) {
                        float4 qq = *(threadgroup const float4*)(q + h * d + c);
                        dots[h] = fma(qq.w, kk.w, fma(qq.z, kk.z, fma(qq.y, kk.y, fma(qq.x, kk.x, dots[h]))));
                    }
                }
            }
            BITNET_UNROLL
            for (int h = 0; h < kHeadsPerGroup; ++h) {
                dots[h] += simd_shuffle_xor(dots[h], 1);
                dots[h] += simd_shuffle_xor(dots[h], 2);
                dots[h] += simd_shuffle_xor(dots[h], 4);
                if ((lane & 7) == 0 && i < count) scores[h * kPositionsPerTile + i] = dots[h];
            }
        }
        sync_threads();
        // Simdgroup h turns head h's scores into weights relative to the new maximum.
        {
            threadgroup float* mine = scores + simd * kPositionsPerTile;
            float s0 = lane < count ? mine[lane] : -INFINITY, s1 = lane + 32 < count ? mine[lane + 32] : -INFINITY;
            float old = -INFINITY;
            BITNET_UNROLL
            for (int h = 0; h < kHeadsPerGroup; ++h)
                if (h == simd) old = top[h];
            float m = fmax(simd_max(fmax(s0, s1)), old);
            s0 = lane < count ? exp_of(s0 - m) : 0.0f;
            s1 = lane + 32 < count ? exp_of(s1 - m) : 0.0f;
            mine[lane] = s0;
            mine[lane + 32] = s1;
            float sum = simd_sum(s0 + s1);
            if (lane == 0) {
                stats[simd] = m;
                stats[4 + simd] = sum;
            }
        }
        if (BITNET_BUG != 5) sync_threads();
        BITNET_UNROLL
        for (int h = 0; h < kHeadsPerGroup; ++h) {
            float m = stats[h], keep = exp_of(top[h] - m);  // the first tile's exp(-inf) is 0
            top[h] = m;
            total[h] = fma(total[h], keep, stats[4 + h]);
            acc[h] = acc[h] * float4(keep);
        }
        if (value_group < value_groups)
            for (int i = value_group; i < count; i += value_groups) {
                int here = base + i;
                float4 vv = here == position ? E::load4_shared(new_v + column) : E::load4(v_base + ulong(here) * cache_row + ulong(column));
                BITNET_UNROLL
                for (int h = 0; h < kHeadsPerGroup; ++h) acc[h] = fma(float4(scores[h * kPositionsPerTile + i]), vv, acc[h]);
            }
        sync_threads();
    }
    if (value_group < value_groups) {
        BITNET_UNROLL
        for (int h = 0; h < kHeadsPerGroup; ++h) *(threadgroup float4*)(sums + (value_group * kHeadsPerGroup + h) * d + column) = acc[h];
    }
    sync_threads();
    // Head h of a run of several leaves its unnormalised sum, its maximum and its weight in partial [tokens][heads][splits][d + 2].
    int stride = d + 2;
    for (int i = tid; i < heads * d; i += kAttentionThreads) {
        int h = i / d, c = i - h * d;
        float v = 0.0f, m = 0.0f, l = 0.0f;
        for (int g = 0; g < value_groups; ++g) v += sums[(g * kHeadsPerGroup + h) * d + c];
        BITNET_UNROLL
        for (int x = 0; x < kHeadsPerGroup; ++x) {
            m = x == h ? top[x] : m;
            l = x == h ? total[x] : l;
        }
        ulong head = ulong(token) * ulong(p.heads) + ulong(h0 + h);
        if (runs == 1) {
            out[head * ulong(d) + ulong(c)] = div_rn(v, l);
        } else {
            device float* to = partial + (head * ulong(p.splits) + ulong(split)) * ulong(stride);
            to[c] = v;
            if (c == 0) {
                to[d] = m;
                to[d + 1] = l;
            }
        }
    }
}

// out[head] = sum_r e^(m_r - m) v_r / sum_r e^(m_r - m) l_r over the runs r. Position (heads, tokens), 128 threads, thread = columns
// tid + 128 n. A sequence of one run has its result already. Threadgroup memory: weights [64] and their sum.
// Bytes: runs (d + 2) * 4 per head.
BITNET_KERNEL(128)
bitnet_decode_combine(device const float* partial [[buffer(0)]], device const int* positions [[buffer(1)]],
                      device float* out [[buffer(2)]], constant AttentionParams& p [[buffer(3)]], BITNET_SHARED, BITNET_GRID) {
    Position at = BITNET_AT;
    int head = int(at.group.x), token = int(at.group.y), d = p.head_dim, stride = d + 2;
    int length = positions[token] + 1, runs = tiles(length, run_of(length, p.splits));
    if (runs == 1) return;
    threadgroup float* weights = (threadgroup float*)shared;
    ulong row = ulong(token) * ulong(p.heads) + ulong(head);
    device const float* from = partial + row * ulong(p.splits) * ulong(stride);
    if (at.simd == 0) {
        float m = -INFINITY, l = 0.0f;
        for (int r = int(at.lane); r < runs; r += int(at.width)) m = fmax(m, from[r * stride + d]);
        m = simd_max(m);
        for (int r = int(at.lane); r < runs; r += int(at.width)) {
            float w = exp_of(from[r * stride + d] - m);
            weights[r] = w;
            l = fma(w, from[r * stride + d + 1], l);
        }
        l = simd_sum(l);
        if (at.lane == 0) weights[64] = l;
    }
    if (BITNET_BUG != 8) sync_threads();
    for (int c = int(at.tid); c < d; c += int(at.threads)) {
        float v = 0.0f;
        for (int r = 0; r < runs; ++r) v = fma(weights[r], from[r * stride + c], v);
        out[row * ulong(d) + ulong(c)] = div_rn(v, weights[64]);
    }
}

// Prefill, first half: rotates q in place (scaled), rotates and stores K, stores V. Threadgroup = token. A thread owns both
// elements of a pair, so the rotation can be in place: pair i = head * d/2 + c for tid + 256 n. Bytes per token:
// (2 heads + 2 kv_heads) d * 4 + 2 kv_heads d element.
template <typename E>
inline void rope_write(device float* qkv, device const float* cos_table, device const float* sin_table, device const int* positions,
                       device const int* slots, device typename E::Store* k_cache, device typename E::Store* v_cache,
                       constant AttentionParams& p, thread const Position& at) {
    int token = int(at.group.x), d = p.head_dim, half_dim = d / 2;
    if (token >= p.tokens) return;
    int position = positions[token];
    device float* row = qkv + ulong(token) * ulong((p.heads + 2 * p.kv_heads) * d);
    device const float* cos_row = cos_table + ulong(position) * ulong(half_dim);
    device const float* sin_row = sin_table + ulong(position) * ulong(half_dim);
    ulong to = (ulong(slots[token]) * ulong(p.max_positions) + ulong(position)) * ulong(p.kv_heads * d);
    for (int i = int(at.tid); i < (p.heads + p.kv_heads) * half_dim; i += int(at.threads)) {
        int h = i / half_dim, c = i - h * half_dim;
        device float* x = row + h * d;
        float y0 = rotated(x, c, half_dim, cos_row, sin_row), y1 = rotated(x, c + half_dim, half_dim, cos_row, sin_row);
        if (h < p.heads) {
            x[c] = mul_rn(y0, p.scale);
            x[c + half_dim] = mul_rn(y1, p.scale);
        } else {
            ulong k = to + ulong((h - p.heads) * d + c);
            k_cache[k] = E::store(y0);
            k_cache[k + ulong(half_dim)] = E::store(y1);
        }
    }
    device const float* v = row + (p.heads + p.kv_heads) * d;
    for (int i = int(at.tid); i < p.kv_heads * d; i += int(at.threads)) v_cache[to + ulong(i)] = E::store(v[i]);
}

#define BITNET_ATTENTION(NAME, E)                                                                                          \
    BITNET_KERNEL(128)                                                                                                     \
    bitnet_decode_attention_##NAME(                                                                                        \
        device const float* qkv [[buffer(0)]], device const float* cos_table [[buffer(1)]],                                \
        device const float* sin_table [[buffer(2)]], device const int* positions [[buffer(3)]],                            \
        device const int* slots [[buffer(4)]], device E::Store* k_cache [[buffer(5)]],                                     \
        device E::Store* v_cache [[buffer(6)]], device float* out [[buffer(7)]], device float* partial [[buffer(8)]],      \
        constant AttentionParams& p [[buffer(9)]], BITNET_SHARED, BITNET_GRID) {                                           \
        decode_attention<E>(qkv, cos_table, sin_table, positions, slots, k_cache, v_cache, out, partial, p, shared,        \
                            BITNET_AT);                                                                                    \
    }                                                                                                                      \
    BITNET_KERNEL(256)                                                                                                     \
    bitnet_rope_write_##NAME(                                                                                              \
        device float* qkv [[buffer(0)]], device const float* cos_table [[buffer(1)]],                                      \
        device const float* sin_table [[buffer(2)]], device const int* positions [[buffer(3)]],                            \
        device const int* slots [[buffer(4)]], device E::Store* k_cache [[buffer(5)]],                                     \
        device E::Store* v_cache [[buffer(6)]], constant AttentionParams& p [[buffer(7)]], BITNET_GRID) {                  \
        rope_write<E>(qkv, cos_table, sin_table, positions, slots, k_cache, v_cache, p, BITNET_AT);                        \
    }
BITNET_ATTENTION(f32, F32)
BITNET_ATTENTION(bf16, Bf16)
BITNET_ATTENTION(f16, F16)
