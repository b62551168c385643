// Repacks canonical codes (row-major, 4 columns a byte, first column in the low bits, rows padded to whole
// bytes) into the tiles of layout.cuh. Run once per matrix at load.
//
// One thread makes one 32-bit word (16 codes): thread = ((row * k_tiles + T) * 4 + j) * 4 + t. It gathers four
// units of four columns, one source byte each, and transposes unit i, byte b to bits 2i of byte b.
#include "layout.cuh"

using namespace bitnet;

extern "C" __global__ void __launch_bounds__(256)
    bitnet_pack(const uint8_t* __restrict__ codes, unsigned* __restrict__ packed, int rows, int cols, int row_bytes,
                int row0, int row_map) {
    let_next_kernel_start();
    wait_previous_kernel();
    int k_tiles = tiles(cols, kTileCols);
    long long word = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (word >= (long long)rows * k_tiles * 16) return;
    int t = (int)(word & 3), j = (int)(word >> 2 & 3);
    long long rest = word >> 4;
    int tile = (int)(rest % k_tiles), row = (int)(rest / k_tiles);
    const uint8_t* source = codes + (long long)row * row_bytes;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        int col = tile * kTileCols + j * 64 + i * 16 + t * 4;
        if (col >= cols) continue;
        unsigned four = source[col >> 2];
        int valid = cols - col;
        if (valid < 4) four &= (1u << (2 * valid)) - 1;  // padding bits of the last byte are not trusted
        unsigned spread = (four & 3) | (four & 0x0c) << 6 | (four & 0x30) << 12 | (four & 0xc0) << 18;
        out |= spread << (2 * (BITNET_BUG == 13 ? i ^ 1 : i));
    }
    int target = row_map == kRowsStacked ? row0 + row : (row >> 3) * 16 + (row_map == kRowsUp ? 8 : 0) + (row & 7);
    int half = target >> 3 & 1, g = target & 7;
    long long vector = ((long long)(target >> 4) * k_tiles + tile) * kTileVectors + half * 32 + g * 4 + t;
    packed[vector * 4 + j] = out;
}
