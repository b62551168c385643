// Prefill product: ternary matrix times many int8 rows on the int8 matrix units.
//
//   block tile: 128 weight rows x kTokens tokens, K in steps of one 256-column tile; 8 warps as 4 x 2, each 32 rows
//   x kTokens / 2 tokens. Weights stay packed in shared memory and are unpacked in registers, once per warp:
//   per 64 columns and 16 rows, 2 words -> 8 registers (8 AND, 6 shifts) feed 2 mma for each 8 tokens.
//   mma.sync.m16n8k32 on 8.0+, four m8n8k16 on 7.5 (intrinsics.cuh).
//
// Shared memory, kStages of:
//   weights   8 row tiles x 1024 bytes, as stored (lane reads are consecutive)
//   codes     kTokens rows x 256 bytes; 16-byte chunk c of row r lies at c ^ (r % 8): ldmatrix without conflicts
// Grid: (ceil(row tiles / 8), ceil(tokens / kTokens)); 256 threads.
// Weight rows beyond the matrix repeat its last tile and are not stored; tokens beyond the batch are zeros.
#include "layout.cuh"

using namespace bitnet;

struct GemmParams {
    const uint4* weights;
    const int8_t* q;      // [tokens, padded(k)]
    const float* sx;      // [tokens]
    const int* qsum;      // [tokens]
    float* out;           // [tokens, ld_out]
    Scales scales;
    int tokens, n, k;     // n: output values per token (pairs for gate/up)
    int ld_out;
    int activation;
};

static_assert(sizeof(GemmParams) == 88 && offsetof(GemmParams, scales) == 40 && offsetof(GemmParams, tokens) == 68 &&
                  offsetof(GemmParams, activation) == 84,
              "the host mirrors this struct");

enum GemmEpilogue : int { kGemmPlain, kGemmResidual, kGemmGated };
constexpr int kGemmRowTiles = 8;

template <int kTokens, int kStages, GemmEpilogue kEpilogue>
__device__ __forceinline__ void gemm_body(const GemmParams& p) {
    constexpr int kWeightBytes = kGemmRowTiles * kTileBytes, kStageBytes = kWeightBytes + kTokens * kTileCols;
    constexpr int kTokenTiles = kTokens / 16;  // of 8 tokens, per warp
    constexpr int kRows = kEpilogue == kGemmGated ? 8 : 16;
    unsigned char* shared = shared_memory();
    int thread = threadIdx.x, lane = thread & 31, warp = thread / 32;
    int warp_row = warp & 3, warp_token = warp >> 2;
    int k_tiles = tiles(p.k, kTileCols), padded = k_tiles * kTileCols;
    int row_tiles = tiles(p.n, kRows), tile0 = blockIdx.x * kGemmRowTiles, token0 = blockIdx.y * kTokens;
    let_next_kernel_start();
    wait_previous_kernel();

    auto fetch = [&](int step) {
        unsigned char* stage = shared + (step % kStages) * kStageBytes;
        for (int i = thread; i < kWeightBytes / 16; i += 256) {
            int tile = tile0 + i / kTileVectors;
            tile = tile < row_tiles ? tile : row_tiles - 1;
            cp_async16(stage + i * 16, p.weights + ((long long)tile * k_tiles + step) * kTileVectors + i % kTileVectors);
        }
        for (int i = thread; i < kTokens * 16; i += 256) {
            int row = i >> 4, chunk = i & 15;
            unsigned char* to = stage + kWeightBytes + row * kTileCols + ((chunk ^ (row & 7)) << 4);
            if (token0 + row < p.tokens)
                cp_async16(to, p.q + (long long)(token0 + row) * padded + step * kTileCols + chunk * 16);
            else
                cp_async16_zero(to);
        }
    };

    int acc[2][kTokenTiles][4];
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[r][n][i] = 0;

#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
        if (s < k_tiles) fetch(s);
        cp_async_commit();
    }
    for (int step = 0; step < k_tiles; ++step) {
        cp_async_wait<kStages - 2>();
        if (BITNET_BUG != 7) sync_block();
        if (step + kStages - 1 < k_tiles) fetch(step + kStages - 1);
        cp_async_commit();
        const unsigned char* stage = shared + (step % kStages) * kStageBytes;
        const uint4* weights = reinterpret_cast<const uint4*>(stage) + warp_row * 2 * kTileVectors + lane;
        uint4 packed[2][2];
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int h = 0; h < 2; ++h) packed[r][h] = weights[r * kTileVectors + h * 32];
        // Lane l addresses row l % 8 of unit l / 8 of the first 8 tokens of this warp.
        int row = warp_token * (kTokens / 2) + (lane & 7);
        const unsigned char* codes = stage + kWeightBytes + row * kTileCols;
        int unit = lane >> 3, twist = lane & 7;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            unsigned a[2][4][2];  // [row tile][unit][half]
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const uint4& v = packed[r][h];
                    unsigned w = j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
#pragma unroll
                    for (int i = 0; i < 4; ++i) a[r][i][h] = (w >> (2 * i)) & 0x03030303u;
                }
#pragma unroll
            for (int n = 0; n < kTokenTiles; ++n) {
                unsigned b[4];
                ldmatrix_x4(b, codes + n * 8 * kTileCols + (((j * 4 + unit) ^ (BITNET_BUG == 11 ? 0 : twist)) << 4));
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    mma_m16n8k32_us(acc[r][n], a[r][0][0], a[r][0][1], a[r][1][0], a[r][1][1], b[0], b[1]);
                    mma_m16n8k32_us(acc[r][n], a[r][2][0], a[r][2][1], a[r][3][0], a[r][3][1], b[2], b[3]);
                }
            }
        }
    }

    // The stages are done with: factors [kTokens][kSegments] and sums of codes [kTokens] take their place.
    sync_block();
    Factor* factors = reinterpret_cast<Factor*>(shared);
    int* sums = reinterpret_cast<int*>(factors + kTokens * kSegments);
    for (int i = thread; i < kTokens * kSegments; i += 256) {
        int at = i / kSegments, token = token0 + at;
        if (token >= p.tokens) break;
        factors[i] = factor(multiplier(p.scales, i % kSegments), load_fresh(p.sx + token));
        if (i % kSegments == 0) sums[at] = load_fresh(p.qsum + token);
    }
    if (BITNET_BUG != 15) sync_block();
    int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            int at = warp_token * (kTokens / 2) + n * 8 + t * 2 + e, token = token0 + at;
            if (token >= p.tokens) continue;
            const Factor* f = factors + at * kSegments;
            int sum = sums[at];
            float* out = p.out + (long long)token * p.ld_out;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int tile = tile0 + warp_row * 2 + r;
                if (kEpilogue == kGemmGated) {
                    int row = tile * 8 + g;
                    if (row >= p.n) continue;
                    float gate = dequantise(acc[r][n][e] - sum, f[0]), up = dequantise(acc[r][n][2 + e] - sum, f[1]);
                    out[row] = gated(gate, up, p.activation);
                } else {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        int row = tile * 16 + h * 8 + g;
                        if (row >= p.n) continue;
                        float y = dequantise(acc[r][n][2 * h + e] - sum, f[segment(p.scales, row)]);
                        out[row] = kEpilogue == kGemmResidual ? add_rn(out[row], y) : y;
                    }
                }
            }
        }
}

// _64: 64 tokens, 2 stages, 48 kB: every chip, and short batches. _128: 128 tokens, 2 stages, 80 kB: 8.0+.
#define BITNET_GEMM(NAME, EPILOGUE)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 2) NAME##_64(GemmParams p) { gemm_body<64, 2, EPILOGUE>(p); }        \
    extern "C" __global__ void __launch_bounds__(256, 2) NAME##_128(GemmParams p) { gemm_body<128, 2, EPILOGUE>(p); }
BITNET_GEMM(bitnet_gemm, kGemmPlain)
BITNET_GEMM(bitnet_gemm_residual, kGemmResidual)
BITNET_GEMM(bitnet_gemm_gated, kGemmGated)
