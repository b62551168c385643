// What goes on between products: norm and quantisation, the norm alone, the gated activation, placing columns.
//
// norm_quantise, one threadgroup of 256 per row: see quantise_row in common.metal.
// Bytes per row: 8k read (4k more with add, and 4k written), 2 padded + 16 + padded / 8 written. Prefill and decode beyond the
// tokens that a fused product holds.

struct NormParams {
    int rows, k;
    float eps;
    int has_add, has_weight;
};
static_assert(sizeof(NormParams) == 20, "the host mirrors this struct");

BITNET_KERNEL(256)
bitnet_norm_quantise(device float* x [[buffer(0)]], device const float* add [[buffer(1)]],
                     device const float* weight [[buffer(2)]], device half4* q [[buffer(3)]],
                     device float* stats [[buffer(4)]], constant NormParams& p [[buffer(5)]], BITNET_SHARED, BITNET_GRID) {
    Position at = BITNET_AT;
    int row = int(at.group.x), k_tiles = tiles(p.k, kTileCols);
    if (row >= p.rows) return;
    ulong first = ulong(row) * ulong(p.k);
    quantise_row(Row{p.k, p.eps, p.has_add != 0, p.has_weight != 0}, x + first, add + first, weight,
                 q + ulong(row) * ulong(k_tiles * (kTileCols / 4)), stats + ulong(row) * ulong(stats_stride(k_tiles)), shared, at);
}

// f32 RMSNorm alone: y = (x [+= add]) * weight * r, for the head. One threadgroup of 256 per row; simdgroups of any width.
// Thread tid has columns tid + 256 n. Bytes per row: 12k (8k more with add).
BITNET_KERNEL(256)
bitnet_rmsnorm(device float* x [[buffer(0)]], device const float* add [[buffer(1)]], device const float* weight [[buffer(2)]],
               device float* y [[buffer(3)]], constant NormParams& p [[buffer(4)]], BITNET_SHARED, BITNET_GRID) {
    Position at = BITNET_AT;
    int row = int(at.group.x);
    if (row >= p.rows) return;
    threadgroup float* part = (threadgroup float*)shared;
    ulong first = ulong(row) * ulong(p.k);
    float squares = 0.0f;
    for (int i = int(at.tid); i < p.k; i += int(at.threads)) {
        float v = x[first + ulong(i)];
        if (p.has_add) {
            v = add_rn(v, add[first + ulong(i)]);
            x[first + ulong(i)] = v;
        }
        squares = fma(v, v, squares);
    }
    squares = simd_sum(squares);
    if (at.lane == 0) part[at.simd] = squares;
    if (BITNET_BUG != 15) sync_threads();
    squares = 0.0f;
    for (uint s = 0; s < at.threads / at.width; ++s) squares = add_rn(squares, part[s]);
    float r = div_rn(1.0f, precise::sqrt(add_rn(div_rn(squares, float(p.k)), p.eps)));
    for (int i = int(at.tid); i < p.k; i += int(at.threads)) {
        float v = x[first + ulong(i)];
        if (p.has_weight) v = mul_rn(v, weight[i]);
        y[first + ulong(i)] = mul_rn(v, r);
    }
}

// out = act(gate) * up of rows [gate | up], n values each: where the two came from products of their own (a low-rank update,
// a dense matrix). Thread (group.x * 256 + tid, group.y) is (column, token).
struct GatedParams {
    int tokens, n, activation;
};
static_assert(sizeof(GatedParams) == 12, "the host mirrors this struct");

BITNET_KERNEL(256)
bitnet_gated(device const float* gate_up [[buffer(0)]], device float* out [[buffer(1)]], constant GatedParams& p [[buffer(2)]],
             BITNET_GRID) {
    Position at = BITNET_AT;
    int i = int(at.group.x * at.threads + at.tid), token = int(at.group.y);
    if (i >= p.n || token >= p.tokens) return;
    device const float* row = gate_up + ulong(token) * 2 * ulong(p.n);
    out[ulong(token) * ulong(p.n) + ulong(i)] = gated(row[i], row[p.n + i], p.activation);
}

// Rows [tokens, n] into (add 0) or onto (add 1) columns of wider rows; `to` is the first of them. Same grid.
struct PlaceParams {
    int tokens, n, ld_to, add;
};
static_assert(sizeof(PlaceParams) == 16, "the host mirrors this struct");

BITNET_KERNEL(256)
bitnet_place(device const float* from [[buffer(0)]], device float* to [[buffer(1)]], constant PlaceParams& p [[buffer(2)]],
             BITNET_GRID) {
    Position at = BITNET_AT;
    int i = int(at.group.x * at.threads + at.tid), token = int(at.group.y);
    if (i >= p.n || token >= p.tokens) return;
    float v = from[ulong(token) * ulong(p.n) + ulong(i)];
    device float* out = to + ulong(token) * ulong(p.ld_to) + ulong(i);
    *out = p.add ? add_rn(*out, v) : v;
}
