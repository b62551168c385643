// Prefill attention in f32 on simdgroup matrices, any head size up to 256 and cache type; after rope_write, which leaves q rotated
// and scaled. Queries of one sequence are contiguous tokens, at contiguous positions.
//
// Threadgroup (query tile, head, sequence); a simdgroup has 8 queries: Q = 32 per threadgroup (4 simdgroups) for D <= 128, 16 (2) for
// D = 256. D is head_dim's bucket; columns beyond head_dim are zero. Keys in tiles of kKeys = 32, 16, 8 for D = 64, 128, 256:
//
//   q   f32 [Q][D + 4]      kv  f32 [kKeys][D + 4], K and then V      s  f32 [Q][kKeys + 4] scores, then weights
//   g   f32 [Q / 8][8][8]   a diagonal matrix per simdgroup: what its rows' sums are multiplied by when a maximum rises
//
//   S[8 q][8 keys] += Q[8][8] K[8 keys][8]^T over D;  O[8 q][8 columns] = g O + P[8][8 keys] V[8 keys][8] over keys
//
// Online softmax: lane (r = lane / 4, u = lane % 4) of a simdgroup has its row r and keys u, u + 4, ...; which lane holds what of a
// matrix is not specified, so scores and factors go through threadgroup memory.
//
// Threadgroup memory (floats): Q (D + 4) + kKeys (D + 4) + Q (kKeys + 4) + 8 Q. Bytes: K and V once per query tile. Per (query, key): 2 D
// multiply-adds on matrices, an exponential.
#ifndef BITNET_ATTENTION_PARAMS
#define BITNET_ATTENTION_PARAMS
struct AttentionParams {
    int tokens, heads, kv_heads, head_dim, max_positions, splits;
    float scale;  // of q: head_dim^-0.5
};
static_assert(sizeof(AttentionParams) == 28, "the host mirrors this struct");
#endif

// Rows [0, count) of the cache, zero beyond and in columns beyond head_dim.
template <typename E, int D, int kKeys, int kThreads>
inline void load_keys(threadgroup float* to, device const typename E::Store* from, ulong row_stride, int count, int d, int tid) {
    for (int i = tid; i < kKeys * (D / 4); i += kThreads) {
        int row = i / (D / 4), c = (i - row * (D / 4)) * 4;
        *(threadgroup float4*)(to + row * (D + 4) + c) = row < count && c < d ? E::load4(from + ulong(row) * row_stride + ulong(c)) : float4(0.0f);
    }
}

template <typename E, int D, int kQueries, int kKeys>
inline void prefill_attention(device const float* qkv, device const int* positions, device const int* slots,
                              device const int* starts, device const typename E::Store* k_cache,
                              device const typename E::Store* v_cache, device float* out, constant AttentionParams& p,
                              threadgroup uchar* shared, thread const Position& at) {
    constexpr int kStride = D + 4, kScores = kKeys + 4, kThreads = kQueries * 4;
    int sequence = int(at.group.z), head = int(at.group.y), d = p.head_dim;
    int first = starts[sequence], count = starts[sequence + 1] - first, q0 = int(at.group.x) * kQueries;
    if (q0 >= count) return;
    int rows = min(count - q0, kQueries), kv = head / (p.heads / p.kv_heads), position = positions[first];
    int tid = int(at.tid), lane = int(at.lane), row0 = int(at.simd) * 8;
    threadgroup float* q = (threadgroup float*)shared;
    threadgroup float* keys = q + kQueries * kStride;
    threadgroup float* scores = keys + kKeys * kStride + row0 * kScores;                             // this simdgroup's 8 rows
    threadgroup float* diagonal = keys + kKeys * kStride + kQueries * kScores + int(at.simd) * 64;
    for (int i = tid; i < kQueries * (D / 4); i += kThreads) {
        int row = i / (D / 4), c = (i - row * (D / 4)) * 4;
        float4 v = float4(0.0f);
        if (row < rows && c < d)
            v = *(device const float4*)(qkv + ulong(first + q0 + row) * ulong((p.heads + 2 * p.kv_heads) * d) + ulong(head * d + c));
        *(threadgroup float4*)(q + row * kStride + c) = v;
    }
    q += row0 * kStride;
    diagonal[lane] = 0.0f;
    diagonal[lane + 32] = 0.0f;
    ulong cache_row = ulong(p.kv_heads * d), base = ulong(slots[first]) * ulong(p.max_positions) * cache_row + ulong(kv * d);
    int r = lane / 4, u = lane % 4;
    int visible = position + q0 + rows;       // keys visible to the last row
    int limit = position + q0 + row0 + r;     // last key visible to this lane's row
    float top = -INFINITY, total = 0.0f;
    simdgroup_float8x8 sums[D / 8];
    BITNET_UNROLL
    for (int i = 0; i < D / 8; ++i) sums[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (int key0 = 0; key0 < visible; key0 += kKeys) {
        int n = min(visible - key0, kKeys);
        load_keys<E, D, kKeys, kThreads>(keys, k_cache + base + ulong(key0) * cache_row, cache_row, n, d, tid);
        sync_threads();
        BITNET_UNROLL
        for (int b = 0; b < kKeys / 8; ++b) {
            simdgroup_float8x8 dots = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
            for (int c = 0; c < D; c += 8) {
                if (c >= d) break;
                simdgroup_float8x8 left, right;
                simdgroup_load(left, (threadgroup const float*)q + c, kStride);
                simdgroup_load(right, (threadgroup const float*)keys + b * 8 * kStride + c, kStride, ulong2(0), true);
                simdgroup_multiply_accumulate(dots, left, right, dots);
            }
            simdgroup_store(dots, scores + b * 8, kScores);
        }
        sync_lanes();
        float s[kKeys / 4], m = top;
        BITNET_UNROLL
        for (int i = 0; i < kKeys / 4; ++i) {
            int key = key0 + u + 4 * i;
            s[i] = key > limit + (BITNET_BUG == 10) || key >= visible ? -INFINITY : scores[r * kScores + u + 4 * i];
            m = fmax(m, s[i]);
        }
        m = fmax(m, simd_shuffle_xor(m, 1));
        m = fmax(m, simd_shuffle_xor(m, 2));  // finite: key 0 is visible to every row
        float sum = 0.0f;
        BITNET_UNROLL
        for (int i = 0; i < kKeys / 4; ++i) {
            s[i] = exp_of(s[i] - m);
            sum += s[i];
            scores[r * kScores + u + 4 * i] = s[i];
        }
        sum += simd_shuffle_xor(sum, 1);
        sum += simd_shuffle_xor(sum, 2);
        float keep = exp_of(top - m);  // the first tile's exp(-inf) is 0
        top = m;
        total = fma(total, keep, sum);
        if (u == 0) diagonal[r * 9] = keep;
        bool risen = simd_any(keep != 1.0f);
        if (BITNET_BUG != 6) sync_threads();  // K is done with, weights and factors are there
        load_keys<E, D, kKeys, kThreads>(keys, v_cache + base + ulong(key0) * cache_row, cache_row, n, d, tid);
        sync_threads();
        if (risen) {
            simdgroup_float8x8 factors;
            simdgroup_load(factors, (threadgroup const float*)diagonal, 8);
            BITNET_UNROLL
            for (int i = 0; i < D / 8; ++i)
                if (i * 8 < d) {
                    simdgroup_float8x8 scaled;
                    simdgroup_multiply(scaled, factors, sums[i]);
                    sums[i] = scaled;
                }
        }
        BITNET_UNROLL
        for (int b = 0; b < kKeys / 8; ++b) {
            simdgroup_float8x8 weights;
            simdgroup_load(weights, (threadgroup const float*)scores + b * 8, kScores);
            BITNET_UNROLL
            for (int i = 0; i < D / 8; ++i)
                if (i * 8 < d) {
                    simdgroup_float8x8 values;
                    simdgroup_load(values, (threadgroup const float*)keys + b * 8 * kStride + i * 8, kStride);
                    simdgroup_multiply_accumulate(sums[i], weights, values, sums[i]);
                }
        }
        sync_threads();
    }
    // Over this simdgroup's own rows of q.
    BITNET_UNROLL
    for (int i = 0; i < D / 8; ++i)
        if (i * 8 < d) simdgroup_store(sums[i], q + i * 8, kStride);
    sync_lanes();
    if (row0 + r < rows) {
        device float* to = out + (ulong(first + q0 + row0 + r) * ulong(p.heads) + ulong(head)) * ulong(d);
        for (int c = u * 4; c < d; c += 16) {
            float4 v = *(threadgroup const float4*)(q + r * kStride + c);
            *(device float4*)(to + c) = float4(div_rn(v.x, total), div_rn(v.y, total), div_rn(v.z, total), div_rn(v.w, total));
        }
    }
}

#define BITNET_PREFILL(NAME, E, D, QUERIES, KEYS)                                                                          \
    BITNET_KERNEL(QUERIES * 4)                                                                                             \
    bitnet_prefill_attention_##NAME##_##D(                                                                                 \
        device const float* qkv [[buffer(0)]], device const int* positions [[buffer(1)]],                                  \
        device const int* slots [[buffer(2)]], device const int* starts [[buffer(3)]],                                     \
        device const E::Store* k_cache [[buffer(4)]], device const E::Store* v_cache [[buffer(5)]],                        \
        device float* out [[buffer(6)]], constant AttentionParams& p [[buffer(7)]], BITNET_SHARED, BITNET_GRID) {          \
        prefill_attention<E, D, QUERIES, KEYS>(qkv, positions, slots, starts, k_cache, v_cache, out, p, shared, BITNET_AT);\
    }
#define BITNET_PREFILL_ALL(NAME, E)       \
    BITNET_PREFILL(NAME, E, 64, 32, 32)   \
    BITNET_PREFILL(NAME, E, 128, 32, 16)  \
    BITNET_PREFILL(NAME, E, 256, 16, 8)
BITNET_PREFILL_ALL(f32, F32)
BITNET_PREFILL_ALL(bf16, Bf16)
BITNET_PREFILL_ALL(f16, F16)
