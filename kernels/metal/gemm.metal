// Ternary matrix times many vectors of int8 codes: the prefill product, on simdgroup matrices. Codes become halves {-1, 0, 1},
// the int8 codes are halves already; products and f32 sums are integers below 2^24 (K <= 132104), so the result is exact in
// whatever order the hardware adds.
//
// Threadgroup (gx, gy), 128 threads: row tiles 4 gx .. + 3 (64 rows) x tokens N gy .. + N - 1, N = 32 or 64. Per 64 columns (word j of
// tile T):
//
//   W [64 rows][72]  half    thread tid has vectors tid and tid + 128 of the 4 x 64 of column tile T, in registers for its four
//                            words; vector v: row v / 64 * 16 + v / 32 % 2 * 8 + v % 32 / 4, columns i * 16 + v % 4 * 4 ..+3
//   X [N tokens][72] half    thread tid copies 16 bytes: token c / 8, columns c % 8 * 8 ..+7, for c = tid + 128 n; zeros beyond `tokens`
//
// Simdgroup s: rows 32 (s % 2) ..+31, tokens N / 2 (s / 2) ..: N / 16 x 4 matrices D[token][row] += X[token][k] W[row][k]^T, 8 steps
// of k. Rows of 72 halves (144 bytes) keep 16-byte alignment and spread the banks. Then, over the same memory: D f32 [N][68],
// factors [N][4].
//
// Threadgroup memory: max(9216 + 144 N, 272 N + 32 N) = 13824 bytes for 32, 19456 for 64. Instructions per weight and N tokens: ~3 to
// unpack and store, N / 64 of a matrix step with 0.75 (32) or 0.5 (64) loads each. Bytes: weights once per N tokens (from the
// cache), activations 2 padded per 64 rows.

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

constant constexpr int kGemmStride = 72;
constant constexpr int kGemmOut = 68;

template <Epilogue kEpilogue, int N>
inline void gemm(device const uint4* weights, device const half* q, device const float* stats, device float* out,
                 constant ProductParams& p, threadgroup uchar* shared, thread const Position& at) {
    int row_tiles = tiles(p.n, kEpilogue == kGated ? 8 : 16), k_tiles = tiles(p.k, kTileCols);
    int tid = int(at.tid), tile0 = int(at.group.x) * 4, token0 = int(at.group.y) * N;
    threadgroup half* w_tile = (threadgroup half*)shared;
    threadgroup half* x_tile = w_tile + 64 * kGemmStride;
    int rows0 = int(at.simd % 2) * 32, tokens0 = int(at.simd / 2) * (N / 2);
    constexpr int kA = N / 16;  // matrices of 8 tokens
    simdgroup_float8x8 sums[kA][4];
    BITNET_UNROLL
    for (int a = 0; a < kA; ++a) {
        BITNET_UNROLL
        for (int b = 0; b < 4; ++b) sums[a][b] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    for (int tile = 0; tile < k_tiles; ++tile) {
        uint4 mine[2];
        BITNET_UNROLL
        for (int n = 0; n < 2; ++n) {
            int v = tid + 128 * n, row_tile = min(tile0 + v / 64, row_tiles - 1);  // rows that are not there are not stored
            mine[n] = weights[(ulong(row_tile) * ulong(k_tiles) + ulong(tile)) * kTileVectors + ulong(v % 64)];
        }
        BITNET_UNROLL
        for (int j = 0; j < 4; ++j) {
            if (tile * kTileCols + j * 64 >= p.k) break;
            BITNET_UNROLL
            for (int n = 0; n < 2; ++n) {
                int v = tid + 128 * n;
                threadgroup half* to = w_tile + (v / 64 * 16 + v / 32 % 2 * 8 + v % 32 / 4) * kGemmStride + v % 4 * 4;
                BITNET_UNROLL
                for (int i = 0; i < 4; ++i) {
                    // 1024 + code, less 1025: bytes 0 and 2, then 1 and 3
                    uint four = mine[n][j] >> (2 * i);
                    half2 even = as_type<half2>((four & 0x00030003u) | 0x64006400u) - half2(half(1025.0f));
                    half2 odd = as_type<half2>((four >> 8 & 0x00030003u) | 0x64006400u) - half2(half(1025.0f));
                    *(threadgroup half4*)(to + i * 16) = half4(even.x, odd.x, even.y, odd.y);
                }
            }
            BITNET_UNROLL
            for (int n = 0; n < N / 16; ++n) {
                int c = tid + 128 * n, token = token0 + c / 8;
                uint4 v = uint4(0u);
                if (token < p.tokens)
                    v = *(device const uint4*)(q + ulong(token) * ulong(k_tiles * kTileCols) + ulong(tile * kTileCols + j * 64 + c % 8 * 8));
                *(threadgroup uint4*)(x_tile + c / 8 * kGemmStride + c % 8 * 8) = v;
            }
            sync_threads();
            BITNET_UNROLL
            for (int step = 0; step < 8; ++step) {
                simdgroup_half8x8 x[kA], w[4];
                BITNET_UNROLL
                for (int a = 0; a < kA; ++a)
                    simdgroup_load(x[a], (threadgroup const half*)x_tile + (tokens0 + a * 8) * kGemmStride + step * 8, kGemmStride);
                BITNET_UNROLL
                for (int b = 0; b < 4; ++b)
                    simdgroup_load(w[b], (threadgroup const half*)w_tile + (rows0 + b * 8) * kGemmStride + step * 8, kGemmStride, ulong2(0), true);
                BITNET_UNROLL
                for (int a = 0; a < kA; ++a) {
                    BITNET_UNROLL
                    for (int b = 0; b < 4; ++b) simdgroup_multiply_accumulate(sums[a][b], x[a], w[b], sums[a][b]);
                }
            }
            if (BITNET_BUG != 20) sync_threads();
        }
    }
    threadgroup float* d = (threadgroup float*)shared;
    threadgroup Factor* factors = (threadgroup Factor*)(d + N * kGemmOut);
    BITNET_UNROLL
    for (int a = 0; a < kA; ++a) {
        BITNET_UNROLL
        for (int b = 0; b < 4; ++b) simdgroup_store(sums[a][b], d + (tokens0 + a * 8) * kGemmOut + rows0 + b * 8, kGemmOut);
    }
    int stride = stats_stride(k_tiles), tokens = min(p.tokens - token0, N);
    for (int i = tid; i < tokens * kSegments; i += 128)
        factors[i] = factor(p.scales.value[i % kSegments], stats[ulong(token0 + i / kSegments) * ulong(stride)]);
    sync_threads();
    constexpr int kRows = kEpilogue == kGated ? 32 : 64;
    for (int i = tid; i < tokens * kRows; i += 128) {
        int token = i / kRows, row = i - token * kRows, n = int(at.group.x) * kRows + row;
        if (n >= p.n) continue;
        device float* to = out + ulong(token0 + token) * ulong(p.ld_out) + ulong(n);
        threadgroup const Factor* f = factors + token * kSegments;
        threadgroup const float* sum = d + token * kGemmOut;
        if (kEpilogue == kGated) {
            int at_row = row / 8 * 16 + row % 8;
            *to = gated(dequantise(sum[at_row], f[0]), dequantise(sum[at_row + 8], f[1]), p.activation);
        } else {
            float y = dequantise(sum[row], f[segment(p.scales, n)]);
            *to = kEpilogue == kResidual ? add_rn(*to, y) : y;
        }
    }
}

#define BITNET_GEMM(SUFFIX, EPILOGUE, N)                                                                           \
    BITNET_KERNEL(128)                                                                                             \
    bitnet_gemm##SUFFIX(device const uint4* weights [[buffer(0)]], device const half* q [[buffer(1)]],             \
                        device const float* stats [[buffer(2)]], device float* out [[buffer(3)]],                  \
                        constant ProductParams& p [[buffer(4)]], BITNET_SHARED, BITNET_GRID) {                     \
        gemm<EPILOGUE, N>(weights, q, stats, out, p, shared, BITNET_AT);                                           \
    }
BITNET_GEMM(, kPlain, 32)
BITNET_GEMM(_residual, kResidual, 32)
BITNET_GEMM(_gated, kGated, 32)
BITNET_GEMM(_64, kPlain, 64)
BITNET_GEMM(_residual_64, kResidual, 64)
BITNET_GEMM(_gated_64, kGated, 64)
