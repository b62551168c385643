// Ternary matrix times 1..8 vectors of int8 codes: the decode product. No int8 dot before M5, and converting integers to
// floats is slow; so codes become floats by their bits, and f32 adds integers, exactly.
//
//   e = (word >> 8s & 0x00030003 << 2i) | magic(i)      two halves, worth 4^(5-i) + code each: the code stands 2i bits
//                                                        above the mantissa's end, and the exponent is 10 - 2i
//   magic = 0x6400 - 0x800 i (both halves)              half of s = 0: byte 0 (low), byte 2 (high); s = 1: bytes 1 and 3
//   sum += float(e) * float(q)                          one instruction: the f32 FMA takes 16-bit operands
//
// For each tile, lane and token that adds D = sum 4^(5-i) q too much. stats holds it (in two halves, as norm_quantise adds it
// up); it is taken off first. |D| <= 64 * 340 * 127 < 2.8e6 and a lane's own sum is at most 2 * 127 * 132104 / 4 < 8.4e6, so
// everything stays an integer below 2^24, in any order. Then -1 for every code: minus the sum of q, once per row.
//
// Threadgroup: row tiles [row_tiles * g / G, row_tiles * (g + 1) / G), nr of them, taken in pairs: unit u = pair * k_tiles +
// column tile. Simdgroup s of 8 takes units [U s / 8, U (s + 1) / 8): equal bytes whatever N and K are, K split where rows are few, each
// pair's tiles one stream. Lane (g = lane / 4, t = lane % 4) has rows 8 h + g of the pair's four halves h and columns t of each unit;
// lanes equal in g add up by two exchanges, simdgroups by threadgroup atomics, as integers.
//
// Threadgroup memory: sums i32 [nr][16][T]; factors [T][4]; for _norm forms q half [tokens][padded], stats, scratch of 128 bytes.
//
// Per 16 weights (a word) and lane: 1/4 16-byte load, 1 shift, 8 AND, 8 OR, 16 T FMA, T half4 loads (shared by the four rows: 4T / 4).

#ifndef BITNET_PRODUCT_PARAMS
#define BITNET_PRODUCT_PARAMS
struct ProductParams {
    Scales scales;
    float eps;       // _norm forms
    int tokens, n, k;
    int ld_out;
    int activation;  // gated forms
    int has_norm;    // _norm forms: 0 quantises x itself
};
static_assert(sizeof(ProductParams) == 56, "the host mirrors this struct");

enum Epilogue { kPlain, kResidual, kGated };
#endif

// acc[h][token] += this lane's share of a unit. q4: the tile's first chunk of token 0; sums: the tile's in stats.
template <int T, typename Q, typename S>
inline void multiply_unit(thread float (&acc)[4][T], thread const uint4* w, Q q4, uint q_stride, S sums, uint sums_stride,
                          uint tokens, uint t) {
    BITNET_UNROLL
    for (int token = 0; token < T; ++token) {
        uint row = min(uint(token), tokens - 1);  // columns of the product beyond `tokens` repeat the last
        float d = sums[row * sums_stride + t] + sums[row * sums_stride + 4 + t];
        BITNET_UNROLL
        for (int h = 0; h < 4; ++h) acc[h][token] -= d;
    }
    BITNET_UNROLL
    for (int j = 0; j < 4; ++j) {
        BITNET_UNROLL
        for (int i = 0; i < 4; ++i) {
            uint mask = 0x00030003u << (2 * i), magic = 0x64006400u - 0x08000800u * uint(i);
            half2 low[4], high[4];
            BITNET_UNROLL
            for (int h = 0; h < 4; ++h) {
                low[h] = as_type<half2>((w[h][j] & mask) | magic);
                high[h] = as_type<half2>(((w[h][j] >> (BITNET_BUG == 11 ? 6 : 8)) & mask) | magic);
            }
            BITNET_UNROLL
            for (int token = 0; token < T; ++token) {
                half4 x = q4[min(uint(token), tokens - 1) * q_stride + uint(j * 16 + i * 4) + t];
                BITNET_UNROLL
                for (int h = 0; h < 4; ++h) {
                    float a = fma(float(low[h].x), float(x.x), acc[h][token]);
                    a = fma(float(high[h].x), float(x.y), a);
                    a = fma(float(low[h].y), float(x.z), a);
                    acc[h][token] = fma(float(high[h].y), float(x.w), a);
                }
            }
        }
    }
}

template <int T, typename Q, typename S>
inline void multiply_units(device const uint4* weights, Q q4, uint q_stride, S stats, uint stats_stride,
                           threadgroup atomic_int* sums, int tokens, int k_tiles, int r0, int nr, thread const Position& at) {
    int units = tiles(nr, 2) * k_tiles;
    int u = int(long(units) * long(at.simd) / 8), end = int(long(units) * long(at.simd + 1) / 8);
    if (BITNET_BUG == 7 && at.simd == 7) end -= 1;
    uint t = at.lane & 3, g = at.lane >> 2;
    while (u < end) {
        int pair = u / k_tiles, tile = u - pair * k_tiles;
        int last = min(k_tiles, tile + end - u);
        bool two = 2 * pair + 1 < nr;
        device const uint4* a = weights + (ulong(r0 + 2 * pair) * ulong(k_tiles) + ulong(tile)) * kTileVectors + at.lane;
        device const uint4* b = two ? a + ulong(k_tiles) * kTileVectors : a;
        u += last - tile;
        float acc[4][T];
        BITNET_UNROLL
        for (int h = 0; h < 4; ++h) {
            BITNET_UNROLL
            for (int token = 0; token < T; ++token) acc[h][token] = 0.0f;
        }
        for (; tile < last; ++tile) {
            uint4 w[4] = {a[0], a[32], b[0], b[32]};
            multiply_unit<T>(acc, w, q4 + tile * (kTileCols / 4), q_stride, stats + kStatsHead + tile * kTileStats, stats_stride,
                             uint(tokens), t);
            a += kTileVectors;
            b += kTileVectors;
        }
        BITNET_UNROLL
        for (int token = 0; token < T; ++token) {
            int mine = 0;
            BITNET_UNROLL
            for (int h = 0; h < 4; ++h) {
                int sum = int(acc[h][token]);
                sum += simd_shuffle_xor(sum, 1);
                sum += simd_shuffle_xor(sum, 2);
                if (uint(h) == t) mine = sum;
            }
            if (t < 2 || two) {
                uint row = (uint(2 * pair) + t / 2) * 16 + (t & 1) * 8 + g;
                atomic_fetch_add_explicit(sums + row * T + uint(token), mine, memory_order_relaxed);
            }
        }
    }
}

struct GemvShared {
    threadgroup int* sums;
    threadgroup Factor* factors;
    threadgroup uchar* rest;
};
template <int T>
inline GemvShared gemv_shared(threadgroup uchar* shared, int row_tiles, uint groups) {
    threadgroup Factor* factors = (threadgroup Factor*)(shared + tiles(row_tiles, int(groups)) * kTileRows * 4 * T);
    return GemvShared{(threadgroup int*)shared, factors, (threadgroup uchar*)(factors + T * kSegments)};
}

// Everything after the activations are quantised: products, then outputs. stats: row `token` at token * stats_stride(k_tiles).
template <Epilogue kEpilogue, int T, typename Q, typename S>
inline void gemv_rows(device const uint4* weights, Q q4, S stats, device float* out, constant ProductParams& p, thread const GemvShared& s,
                      int r0, int nr, thread const Position& at) {
    int k_tiles = tiles(p.k, kTileCols), stride = stats_stride(k_tiles);
    for (int i = int(at.tid); i < p.tokens * kSegments; i += int(at.threads))
        s.factors[i] = factor(p.scales.value[i % kSegments], stats[i / kSegments * stride]);
    multiply_units<T>(weights, q4, uint(k_tiles * (kTileCols / 4)), stats, uint(stride), (threadgroup atomic_int*)s.sums, p.tokens,
                      k_tiles, r0, nr, at);
    if (BITNET_BUG != 3) sync_threads();
    int rows = nr * (kEpilogue == kGated ? 8 : 16);
    for (int i = int(at.tid); i < rows * p.tokens; i += int(at.threads)) {
        int token = i / rows, row = i - token * rows;
        int n = r0 * (kEpilogue == kGated ? 8 : 16) + row;
        if (n >= p.n) continue;
        device float* to = out + ulong(token) * ulong(p.ld_out) + ulong(n);
        threadgroup const Factor* f = s.factors + token * kSegments;
        int q = int(stats[token * stride + 1]);
        if (kEpilogue == kGated) {
            threadgroup const int* sum = s.sums + ((row / 8) * 16 + row % 8) * T + token;
            float gate = dequantise(float(sum[0] - q), f[0]);
            float up = dequantise(float(sum[(BITNET_BUG == 4 ? 7 : 8) * T] - q), f[1]);
            *to = gated(gate, up, p.activation);
        } else {
            float y = dequantise(float(s.sums[row * T + token] - q), f[segment(p.scales, n)]);
            *to = kEpilogue == kResidual ? add_rn(*to, y) : y;
        }
    }
}

template <Epilogue kEpilogue, int T>
inline void gemv(device const uint4* weights, device const half4* q4, device const float* stats, device float* out,
                 constant ProductParams& p, threadgroup uchar* shared, thread const Position& at) {
    int row_tiles = tiles(p.n, kEpilogue == kGated ? 8 : 16);
    int r0 = int(long(row_tiles) * long(at.group.x) / long(at.groups.x));
    int nr = int(long(row_tiles) * long(at.group.x + 1) / long(at.groups.x)) - r0;
    GemvShared s = gemv_shared<T>(shared, row_tiles, at.groups.x);
    for (int i = int(at.tid); i < nr * kTileRows * T; i += int(at.threads)) s.sums[i] = 0;
    if (BITNET_BUG != 2) sync_threads();
    gemv_rows<kEpilogue, T>(weights, q4, stats, out, p, s, r0, nr, at);
}

template <Epilogue kEpilogue, int T>
inline void gemv_norm(device const uint4* weights, device const float* x, device const float* norm, device float* out,
                      constant ProductParams& p, threadgroup uchar* shared, thread const Position& at) {
    int row_tiles = tiles(p.n, kEpilogue == kGated ? 8 : 16);
    int r0 = int(long(row_tiles) * long(at.group.x) / long(at.groups.x));
    int nr = int(long(row_tiles) * long(at.group.x + 1) / long(at.groups.x)) - r0;
    int k_tiles = tiles(p.k, kTileCols), chunks = k_tiles * (kTileCols / 4), stride = stats_stride(k_tiles);
    GemvShared s = gemv_shared<T>(shared, row_tiles, at.groups.x);
    threadgroup half4* q4 = (threadgroup half4*)s.rest;
    threadgroup float* stats = (threadgroup float*)(q4 + p.tokens * chunks);
    threadgroup uchar* scratch = (threadgroup uchar*)(stats + p.tokens * stride);
    for (int i = int(at.tid); i < nr * kTileRows * T; i += int(at.threads)) s.sums[i] = 0;
    for (int token = 0; token < p.tokens; ++token)
        quantise_row(Row{p.k, p.eps, false, p.has_norm != 0}, (device float*)x + ulong(token) * ulong(p.k), x, norm,
                     q4 + token * chunks, stats + token * stride, scratch, at);
    if (BITNET_BUG != 2) sync_threads();
    gemv_rows<kEpilogue, T>(weights, (threadgroup const half4*)q4, (threadgroup const float*)stats, out, p, s, r0, nr, at);
}

#define BITNET_GEMV(SUFFIX, EPILOGUE, T)                                                                                   \
    BITNET_KERNEL(256)                                                                                                     \
    bitnet_gemv##SUFFIX##_##T(device const uint4* weights [[buffer(0)]], device const half4* q [[buffer(1)]],              \
                              device const float* stats [[buffer(2)]], device float* out [[buffer(3)]],                    \
                              constant ProductParams& p [[buffer(4)]], BITNET_SHARED, BITNET_GRID) {                       \
        gemv<EPILOGUE, T>(weights, q, stats, out, p, shared, BITNET_AT);                                                   \
    }                                                                                                                      \
    BITNET_KERNEL(256)                                                                                                     \
    bitnet_gemv_norm##SUFFIX##_##T(device const uint4* weights [[buffer(0)]], device const float* x [[buffer(1)]],         \
                                   device const float* norm [[buffer(2)]], device float* out [[buffer(3)]],                \
                                   constant ProductParams& p [[buffer(4)]], BITNET_SHARED, BITNET_GRID) {                  \
        gemv_norm<EPILOGUE, T>(weights, x, norm, out, p, shared, BITNET_AT);                                               \
    }
#define BITNET_GEMV_ALL(T)                    \
    BITNET_GEMV(, kPlain, T)                  \
    BITNET_GEMV(_residual, kResidual, T)      \
    BITNET_GEMV(_gated, kGated, T)
BITNET_GEMV_ALL(1)
BITNET_GEMV_ALL(2)
BITNET_GEMV_ALL(4)
BITNET_GEMV_ALL(8)
