// The packed ternary matrix, shared by every kernel that reads weights.
//
// Tile: 16 rows x 256 columns, 1024 bytes. Tiles of one row tile are contiguous along K; row tiles follow.
//
//   tile (R, T) at byte ((R * k_tiles) + T) * 1024
//     half h = 0, 1           rows R*16 + h*8 + g
//       lane l = 0..31        g = l / 4, t = l % 4         16 bytes a lane: one 16-byte load
//         word j = 0..3       columns T*256 + j*64 ..
//           unit i = 0..3     bits 2i, 2i+1 of each byte: (w >> 2i) & 0x03030303
//             byte b = 0..3   column T*256 + j*64 + i*16 + t*4 + b
//
// A unit is four K-consecutive codes {0,1,2} (= w + 1), ready for dp4a against four consecutive int8
// activations, and exactly one register of an A fragment of mma.m16n8k32 (two units) or m8n8k16 (one), whose
// B fragment is then plain ldmatrix of row-major activations. Columns beyond K hold code 0 and meet activation
// 0; rows beyond N are never stored. Gate and up of a gated MLP are interleaved by 8 rows, gate in half 0 and
// up in half 1, so that one lane owns both values of an output.
//
// Instructions per 16 weights (one word) and lane: 1/4 load, 4 AND, 1 shift, 1 mma for up to 8 tokens.
#pragma once
#include "intrinsics.cuh"

#include <stddef.h>

namespace bitnet {

constexpr int kTileRows = 16;
constexpr int kTileCols = 256;
constexpr int kTileBytes = 1024;
constexpr int kTileVectors = kTileBytes / 16;
constexpr int kMaxDecodeTokens = 8;

__host__ __device__ inline int tiles(int n, int size) { return (n + size - 1) / size; }
__host__ __device__ inline int padded_cols(int k) { return tiles(k, kTileCols) * kTileCols; }

// How a source matrix's rows land in the packed one.
enum RowMap : int {
    kRowsStacked = 0,  // row r at row0 + r (q, k, v one under the other)
    kRowsGate = 1,     // row r at (r / 8) * 16 + r % 8
    kRowsUp = 2,       // row r at (r / 8) * 16 + 8 + r % 8
};

// Scales of a stacked matrix: segment s covers rows [end[s-1], end[s]). Gate/up: value[0] gate, value[1] up.
constexpr int kSegments = 4;
struct Scales {
    int end[kSegments - 1];  // rows at and above end[2] belong to segment 3
    float value[kSegments];  // multipliers
};
static_assert(sizeof(Scales) == 28 && offsetof(Scales, value) == 12, "the host mirrors this struct");

__device__ __forceinline__ int segment(const Scales& s, int row) {
    return (row >= s.end[0]) + (row >= s.end[1]) + (row >= s.end[2]);
}
__device__ __forceinline__ float multiplier(const Scales& s, int segment) {
    return segment == 0 ? s.value[0] : segment == 1 ? s.value[1] : segment == 2 ? s.value[2] : s.value[3];
}

// multiplier / s_x as the sum of two floats: 49 bits. What a division leaves over is exact, so no f64 is needed.
struct Factor {
    float hi, lo;
};
__device__ __forceinline__ Factor factor(float multiplier, float sx) {
    float hi = div_rn(multiplier, sx);
    return Factor{hi, div_rn(fma_rn(-hi, sx, multiplier), sx)};
}
// acc * multiplier / s_x, rounded once: to the bit what (float)(acc * ((double)multiplier / s_x)) is, but for one
// output in some millions. |acc| < 2^24 because K <= 132104, so it is exact as a float.
__device__ __forceinline__ float dequantise(int acc, Factor f) {
    float a = (float)acc, product = mul_rn(a, f.hi);
    if (BITNET_BUG == 14) return product;
    return add_rn(product, fma_rn(a, f.lo, fma_rn(a, f.hi, -product)));
}

// Activation of a gated MLP; f32 throughout (the square overflows f16 in real models).
enum Activation : int { kRelu2 = 0, kSilu = 1 };
__device__ __forceinline__ float gated(float gate, float up, int activation) {
    if (activation == kSilu) return mul_rn(div_rn(gate, add_rn(1.0f, expf(-gate))), up);
    float r = fmaxf(gate, 0.0f);
    return mul_rn(mul_rn(r, r), up);
}

}  // namespace bitnet
