// Repacks canonical codes (row-major, 4 columns a byte, first column in the low bits, rows padded to whole bytes) into
// the tiles of common.metal. Once per matrix, at load; `packed` is zero before.
//
// Thread ((row * k_tiles + T) * 4 + j) * 4 + t makes one word: for i = 0..3 the source byte of columns
// T * 256 + j * 64 + i * 16 + t * 4 ..+3, whose code b goes to bits 2i of byte b.
// Target row n = row0 + row (row_map 0), or 16 (row / 8) + row % 8 (1, gate), + 8 (2, up). Its word is
// ((n / 16 * k_tiles + T) * 64 + n / 8 % 2 * 32 + n % 8 * 4 + t) * 4 + j.
// Bytes a row: K / 4 read, K / 4 written.

struct PackParams {
    int rows, cols, row_bytes, row0, row_map;
};
static_assert(sizeof(PackParams) == 20, "the host mirrors this struct");

BITNET_KERNEL(256)
bitnet_pack(device const uchar* codes [[buffer(0)]], device uint* packed [[buffer(1)]], constant PackParams& p [[buffer(2)]],
            BITNET_GRID) {
    Position at = BITNET_AT;
    int k_tiles = tiles(p.cols, kTileCols);
    ulong word = ulong(at.group.x) * at.threads + at.tid;
    if (word >= ulong(p.rows) * ulong(k_tiles) * 16) return;
    int t = int(word & 3), j = int(word >> 2 & 3);
    ulong rest = word >> 4;
    int row = int(rest / ulong(k_tiles)), tile = int(rest - ulong(row) * ulong(k_tiles));
    device const uchar* source = codes + ulong(row) * ulong(p.row_bytes);
    uint out = 0;
    for (int i = 0; i < 4; ++i) {
        int col = tile * kTileCols + j * 64 + i * 16 + t * 4;
        if (col >= p.cols) continue;
        uint four = source[col >> 2];
        int valid = p.cols - col;
        if (valid < 4) four &= (1u << (2 * valid)) - 1;  // padding bits of the last byte are not trusted
        uint spread = (four & 3u) | (four & 0x0cu) << 6 | (four & 0x30u) << 12 | (four & 0xc0u) << 18;
        out |= spread << (2 * (BITNET_BUG == 13 ? i ^ 1 : i));
    }
    int target = p.row_map == 0 ? p.row0 + row : (row >> 3) * 16 + (p.row_map == 2 ? 8 : 0) + (row & 7);
    ulong vector = (ulong(target >> 4) * ulong(k_tiles) + ulong(tile)) * kTileVectors + ulong((target >> 3 & 1) * 32 + (target & 7) * 4 + t);
    packed[vector * 4 + ulong(j)] = out;
}
