// Ternary matrix times 1..8 int8 vectors: the decode product. One block owns a contiguous run of row tiles.
//
//   block's tiles, K-major:   f = column tile * nr + row tile      (nr row tiles of this block)
//   warp w of W takes f in [w * T / W, (w + 1) * T / W): equal bytes per warp whatever N and K are, split-K
//   across warps whenever a block has few rows. Consecutive f share the activations' fragments, which stay in
//   registers. Partial sums are integers: warps add them into shared memory in any order, bit-exactly.
//
// Shared memory: activations [tokens][padded_k + 16] bytes (16 of padding make ldmatrix free of bank conflicts),
// then sums [nr][16 rows][8 tokens] i32, then scratch: of the quantisation, then the factors [tokens][4 segments].
//
// Per 1 kB tile a lane does: 2 16-byte loads, 32 AND, 8 shifts, 8 mma (or 32 dp4a for one token).
#pragma once
#include "layout.cuh"
#include "quantise.cuh"

namespace bitnet {

// 4 column groups (64 columns each) x 4 units of activations: one lane's B fragments for a whole tile.
struct TileActivations {
    unsigned unit[4][4];
};

__device__ __forceinline__ void load_activations(TileActivations& b, const int8_t* x, int stride, int tokens, int tile,
                                                 int lane) {
    int row = lane & 7;
    row = row < tokens ? row : tokens - 1;  // unused columns of the product repeat the last token
    const int8_t* p = x + row * stride + tile * kTileCols + (lane >> 3) * 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) ldmatrix_x4(b.unit[j], p + j * 64);
}

// Sums of one lane. mma: rows g and g + 8 (halves), tokens 2t and 2t + 1, over codes scaled by 1 (low) and 4
// (high, masked in place). dp4a: this lane's share of rows g and g + 8 for token 0.
struct TileSums {
    int low[4], high[4];
};

template <bool kDot>
__device__ __forceinline__ void multiply_tile(TileSums& s, const uint4& h0, const uint4& h1, const TileActivations& b) {
    const unsigned a0[4] = {h0.x, h0.y, h0.z, h0.w}, a1[4] = {h1.x, h1.y, h1.z, h1.w};
    constexpr unsigned kLow = 0x03030303u, kHigh = 0x0c0c0c0cu;
    if (kDot) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            s.low[0] = dp4a_us(a0[j] & kLow, b.unit[j][0], s.low[0]);
            s.low[1] = dp4a_us(a1[j] & kLow, b.unit[j][0], s.low[1]);
            s.high[0] = dp4a_us(a0[j] & kHigh, b.unit[j][1], s.high[0]);
            s.high[1] = dp4a_us(a1[j] & kHigh, b.unit[j][1], s.high[1]);
            unsigned c0 = a0[j] >> 4, c1 = a1[j] >> 4;
            s.low[2] = dp4a_us(c0 & kLow, b.unit[j][2], s.low[2]);
            s.low[3] = dp4a_us(c1 & kLow, b.unit[j][2], s.low[3]);
            s.high[2] = dp4a_us(c0 & kHigh, b.unit[j][3], s.high[2]);
            s.high[3] = dp4a_us(c1 & kHigh, b.unit[j][3], s.high[3]);
        }
    } else {
        // One mma takes the same unit of two column groups, so that both halves of its K share a scale.
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            mma_m16n8k32_us(s.low, a0[j] & kLow, a1[j] & kLow, a0[j + 1] & kLow, a1[j + 1] & kLow, b.unit[j][0],
                            b.unit[j + 1][0]);
            mma_m16n8k32_us(s.high, a0[j] & kHigh, a1[j] & kHigh, a0[j + 1] & kHigh, a1[j + 1] & kHigh, b.unit[j][1],
                            b.unit[j + 1][1]);
            unsigned c0 = a0[j] >> 4, c1 = a1[j] >> 4, d0 = a0[j + 1] >> 4, d1 = a1[j + 1] >> 4;
            mma_m16n8k32_us(s.low, c0 & kLow, c1 & kLow, d0 & kLow, d1 & kLow, b.unit[j][2], b.unit[j + 1][2]);
            mma_m16n8k32_us(s.high, c0 & kHigh, c1 & kHigh, d0 & kHigh, d1 & kHigh, b.unit[j][3], b.unit[j + 1][3]);
        }
    }
}

__device__ __forceinline__ void clear(TileSums& s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s.low[i] = s.high[i] = 0;
}

// Adds one row tile's sums to shared memory [16][8].
template <bool kDot>
__device__ __forceinline__ void flush_sums(TileSums& s, int* sums, int tokens, int lane) {
    int g = lane >> 2, t = lane & 3;
    if (kDot) {
        int r0 = s.low[0] + s.low[2] + ((s.high[0] + s.high[2]) >> 2);
        int r1 = s.low[1] + s.low[3] + ((s.high[1] + s.high[3]) >> 2);
        r0 += shfl_xor(r0, 1);
        r1 += shfl_xor(r1, 1);
        r0 += shfl_xor(r0, 2);
        r1 += shfl_xor(r1, 2);
        if (t == 0) {
            atomic_add(sums + g * 8, r0);
            atomic_add(sums + (g + 8) * 8, r1);
        }
    } else if (2 * t < tokens) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (2 * t + (i & 1) < tokens)
                atomic_add(sums + (g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1), s.low[i] + (s.high[i] >> 2));
    }
    clear(s);
}

// A walk over a block's tiles in the order f above, without a division per tile.
struct TileCursor {
    const uint4* at = nullptr;
    int row = 0, tile = 0;

    __device__ __forceinline__ void start(const uint4* first, int f, int nr, int row_stride) {
        tile = f / nr;
        row = f - tile * nr;
        at = first + (long long)row * row_stride + tile * kTileVectors;
    }
    __device__ __forceinline__ void next(int nr, int row_stride) {
        at += row_stride;
        if (++row == nr) {
            row = 0;
            ++tile;
            at += kTileVectors - (long long)nr * row_stride;
        }
    }
};

// One warp's share of the block's tiles; the first kDepth tiles may be loaded long before they are used.
template <int kDepth>
struct WarpTiles {
    int nr, row_stride, begin, end;
    TileCursor use, fetch;
    uint4 h0[kDepth], h1[kDepth];

    __device__ __forceinline__ void load(int slot) {
        h0[slot] = load_stream(fetch.at);
        h1[slot] = load_stream(fetch.at + 32);
        fetch.next(nr, row_stride);
    }
    __device__ __forceinline__ void start(const uint4* matrix, int k_tiles, int r0, int nr_, int lane) {
        int warps = blockDim.x / 32, warp = threadIdx.x / 32;
        nr = nr_;
        row_stride = k_tiles * kTileVectors;
        int total = nr * k_tiles;
        begin = total * warp / warps;
        end = total * (warp + 1) / warps;
        if (begin == end) return;
        const uint4* first = matrix + (long long)r0 * row_stride + lane;
        use.start(first, begin, nr, row_stride);
        fetch = use;
#pragma unroll
        for (int d = 0; d < kDepth; ++d)
            if (begin + d < end) load(d);
        // The rest of this warp's weights can already travel to L2: 8 lines of 128 bytes a tile.
        TileCursor ahead = fetch;
        for (int f = begin + kDepth; f < end; ++f) {
            if (lane < 8) prefetch_l2(ahead.at - lane + lane * 8);
            ahead.next(nr, row_stride);
        }
    }
    template <bool kDot>
    __device__ __forceinline__ void run(const int8_t* x, int stride, int tokens, int* sums, int lane) {
        TileActivations b;
        TileSums s;
        clear(s);
        int have = -1;
        for (int base = begin; base < end; base += kDepth) {
#pragma unroll
            for (int d = 0; d < kDepth; ++d) {
                int f = base + d;
                if (f < end) {
                    if (use.tile != have) {
                        load_activations(b, x, stride, tokens, use.tile, lane);
                        have = use.tile;
                    }
                    multiply_tile<kDot>(s, h0[d], h1[d], b);
                    if (f + kDepth < end) load(d);
                    if (nr > 1 || f + 1 == end) flush_sums<kDot>(s, sums + use.row * kTileRows * 8, tokens, lane);
                    use.next(nr, row_stride);
                }
            }
        }
    }
};

// Shared-memory plan of a decode product.
struct GemvShared {
    int8_t* x;
    int stride;
    int* sums;
    unsigned char* scratch;
    float* sx;
    int* qsum;
};
__device__ __forceinline__ GemvShared gemv_shared(unsigned char* base, int tokens, int padded, int nr) {
    GemvShared s;
    s.x = reinterpret_cast<int8_t*>(base);
    s.stride = padded + 16;
    s.sums = reinterpret_cast<int*>(base + tokens * s.stride);
    s.sx = reinterpret_cast<float*>(s.sums + nr * kTileRows * 8);
    s.qsum = reinterpret_cast<int*>(s.sx + kMaxDecodeTokens);
    s.scratch = reinterpret_cast<unsigned char*>(s.qsum + kMaxDecodeTokens);
    return s;
}
static_assert(kMaxDecodeTokens * kSegments * sizeof(Factor) <= kQuantiseScratch, "the factors fit in the scratch");

}  // namespace bitnet
