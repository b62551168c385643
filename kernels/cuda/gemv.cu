// Decode products as kernels. Grid: any number of blocks up to the number of row tiles (blocks beyond it leave
// at once); block b of G owns row tiles [b * R / G, (b + 1) * R / G). Block: 32..512 threads.
//
// Input:    f32 rows, normalised and quantised here (norm weight or null), or codes from bitnet_norm_quantise.
// Epilogue: plain store, add to the residual, or gated activation of interleaved gate/up rows.
// Bytes: rows * padded(k) / 4 of weights, plus tokens * 4k of input per block from L2.
#include "gemv.cuh"

using namespace bitnet;

struct GemvParams {
    const uint4* weights;   // packed tiles
    const float* x;         // f32 [tokens, k]; null when q is given
    const float* norm;      // [k] RMSNorm weight or null
    const int8_t* q;        // codes [tokens, padded(k)], with sx and qsum [tokens]
    const float* sx;
    const int* qsum;
    float* out;             // f32 [tokens, ld_out]
    Scales scales;
    float eps;
    int tokens, n, k;       // n: output values per token (pairs for gate/up)
    int ld_out;
    int activation;
};

static_assert(sizeof(GemvParams) == 112 && offsetof(GemvParams, scales) == 56 && offsetof(GemvParams, eps) == 84 &&
                  offsetof(GemvParams, tokens) == 88 && offsetof(GemvParams, activation) == 104,
              "the host mirrors this struct");

enum Epilogue : int { kPlain, kResidual, kGated };

template <bool kQuantise, Epilogue kEpilogue>
__device__ __forceinline__ void gemv_body(const GemvParams& p) {
    constexpr int kDepth = 2;
    int lane = threadIdx.x & 31;
    int k_tiles = tiles(p.k, kTileCols), padded = k_tiles * kTileCols;
    int row_tiles = tiles(p.n, kEpilogue == kGated ? 8 : 16);
    int r0 = (int)((long long)row_tiles * blockIdx.x / gridDim.x);
    int nr = (int)((long long)row_tiles * (blockIdx.x + 1) / gridDim.x) - r0;
    let_next_kernel_start();
    if (nr == 0) return;
    GemvShared s = gemv_shared(shared_memory(), p.tokens, padded, nr);
    WarpTiles<kDepth> work;
    work.start(p.weights, k_tiles, r0, nr, lane);  // weights do not depend on the previous kernel
    for (int i = threadIdx.x; i < nr * kTileRows * 8; i += blockDim.x) s.sums[i] = 0;
    wait_previous_kernel();
    if (kQuantise) {
        QuantiseRows a{p.x, nullptr, nullptr, p.norm, p.eps, p.tokens, p.k, p.k, (p.k & 3) == 0};
        quantise_rows(a, s.x, s.stride, padded, s.sx, s.qsum, s.scratch);
    } else {
        for (int i = threadIdx.x; i < p.tokens * (padded / 16); i += blockDim.x) {
            int token = i / (padded / 16), c = i - token * (padded / 16);
            *reinterpret_cast<float4*>(s.x + token * s.stride + c * 16) =
                load_fresh(reinterpret_cast<const float4*>(p.q + (long long)token * padded) + c);
        }
        if ((int)threadIdx.x < p.tokens) {
            s.sx[threadIdx.x] = load_fresh(p.sx + threadIdx.x);
            s.qsum[threadIdx.x] = load_fresh(p.qsum + threadIdx.x);
        }
    }
    if (BITNET_BUG != 2) sync_block();
    if (p.tokens == 1)
        work.run<true>(s.x, s.stride, p.tokens, s.sums, lane);
    else
        work.run<false>(s.x, s.stride, p.tokens, s.sums, lane);
    // One factor per token and segment, where the quantisation is done with its scratch.
    Factor* factors = reinterpret_cast<Factor*>(s.scratch);
    if ((int)threadIdx.x < p.tokens * kSegments)
        factors[threadIdx.x] = factor(multiplier(p.scales, threadIdx.x % kSegments), s.sx[threadIdx.x / kSegments]);
    if (BITNET_BUG != 3) sync_block();
    constexpr int kRows = kEpilogue == kGated ? 8 : 16;
    for (int i = threadIdx.x; i < nr * kRows * p.tokens; i += blockDim.x) {
        int row = i % (nr * kRows), token = i / (nr * kRows);
        int n = r0 * kRows + row;
        if (n >= p.n) continue;
        float* out = p.out + (long long)token * p.ld_out + n;
        const Factor* f = factors + token * kSegments;
        int q = s.qsum[token];
        if (kEpilogue == kGated) {
            const int* sum = s.sums + (row / 8) * 128 + (row % 8) * 8 + token;
            float gate = dequantise(sum[0] - q, f[0]), up = dequantise(sum[BITNET_BUG == 4 ? 56 : 64] - q, f[1]);
            *out = gated(gate, up, p.activation);
        } else {
            float y = dequantise(s.sums[row * 8 + token] - q, f[segment(p.scales, n)]);
            *out = kEpilogue == kResidual ? add_rn(load_fresh(out), y) : y;
        }
    }
}

#define BITNET_GEMV(NAME, QUANTISE, EPILOGUE)                                          \
    extern "C" __global__ void __launch_bounds__(512, 2) NAME(GemvParams p) {          \
        gemv_body<QUANTISE, EPILOGUE>(p);                                              \
    }
BITNET_GEMV(bitnet_gemv, false, kPlain)
BITNET_GEMV(bitnet_gemv_residual, false, kResidual)
BITNET_GEMV(bitnet_gemv_gated, false, kGated)
BITNET_GEMV(bitnet_gemv_norm, true, kPlain)
BITNET_GEMV(bitnet_gemv_norm_residual, true, kResidual)
BITNET_GEMV(bitnet_gemv_norm_gated, true, kGated)
