// The dense output head for 1..8 tokens, and the embedding gather.
//
// Rows [vocab, hidden] in bf16, f16, f32 or int8 with one f32 scale a row; activations f32 [tokens, hidden]; f32 sums. A simdgroup
// takes R rows at a time (8 for one and two tokens, else 4) so that every activation read serves R rows. Lane l reads vectors l,
// l + width, ... of 16 bytes of each row, and the same columns of x, from the cache (8 tokens of x would not fit into
// threadgroup memory). Row group v of R rows goes to simdgroup v % (simdgroups of the grid). Simdgroups of any width.
//
// Bytes: vocab * hidden * element, once. Per weight and token one FMA; to unpack: bf16 1 operation, f16 none, int8 3.

struct HeadParams {
    int tokens, hidden, vocab;
};
static_assert(sizeof(HeadParams) == 12, "the host mirrors this struct");

// Elements [4 e, 4 e + 4) of a vector of 16 bytes.
struct HeadBf16 {
    typedef Bf16 Element;
    enum { kPerVector = 8 };
    static float4 unpack(uint4 v, int e) {
        uint a = v[2 * e], b = v[2 * e + 1];
        return float4(as_type<float>(a << 16), as_type<float>(a & 0xffff0000u), as_type<float>(b << 16), as_type<float>(b & 0xffff0000u));
    }
};
struct HeadF16 {
    typedef F16 Element;
    enum { kPerVector = 8 };
    static float4 unpack(uint4 v, int e) {
        half2 a = as_type<half2>(v[2 * e]), b = as_type<half2>(v[2 * e + 1]);
        return float4(float(a.x), float(a.y), float(b.x), float(b.y));
    }
};
struct HeadF32 {
    typedef F32 Element;
    enum { kPerVector = 4 };
    static float4 unpack(uint4 v, int) { return as_type<float4>(v); }
};
struct HeadI8 {
    enum { kPerVector = 16 };
    // byte + 128 in the mantissa of 2^23: exact, and cheaper than a conversion
    static float4 unpack(uint4 v, int e) {
        uint u = v[e] ^ 0x80808080u;
        return float4(as_type<float>(0x4b000000u | (u & 255u)) - 8388736.0f, as_type<float>(0x4b000000u | ((u >> 8) & 255u)) - 8388736.0f,
                      as_type<float>(0x4b000000u | ((u >> 16) & 255u)) - 8388736.0f, as_type<float>(0x4b000000u | (u >> 24)) - 8388736.0f);
    }
};

template <typename W, int T>
inline void head(device const uint4* weights, device const float* scales, device const float* x, device float* logits,
                 constant HeadParams& p, bool scaled, thread const Position& at) {
    constexpr int R = T <= 2 ? 8 : 4, N = W::kPerVector;
    int vectors = p.hidden / N, row_groups = tiles(p.vocab, R);
    int simds = int(at.threads / at.width), stride = int(at.groups.x) * simds;
    for (int v = int(at.group.x) * simds + int(at.simd); v < row_groups; v += stride) {
        int row0 = v * R;
        device const uint4* w[R];
        float acc[R][T];
        BITNET_UNROLL
        for (int r = 0; r < R; ++r) {
            w[r] = weights + ulong(min(row0 + r, p.vocab - 1)) * ulong(vectors);
            BITNET_UNROLL
            for (int token = 0; token < T; ++token) acc[r][token] = 0.0f;
        }
        for (int c = int(at.lane); c < vectors; c += int(at.width)) {
            uint4 now[R];
            BITNET_UNROLL
            for (int r = 0; r < R; ++r) now[r] = w[r][c];
            BITNET_UNROLL
            for (int e = 0; e < N / 4; ++e) {
                float4 f[R];
                BITNET_UNROLL
                for (int r = 0; r < R; ++r) f[r] = W::unpack(now[r], e);
                BITNET_UNROLL
                for (int token = 0; token < T; ++token) {
                    int row = min(token, p.tokens - 1);
                    float4 a = ((device const float4*)(x + ulong(row) * ulong(p.hidden)))[c * (N / 4) + (BITNET_BUG == 12 ? 0 : e)];
                    BITNET_UNROLL
                    for (int r = 0; r < R; ++r)
                        acc[r][token] = fma(f[r].w, a.w, fma(f[r].z, a.z, fma(f[r].y, a.y, fma(f[r].x, a.x, acc[r][token]))));
                }
            }
        }
        BITNET_UNROLL
        for (int r = 0; r < R; ++r) {
            int row = row0 + r;
            BITNET_UNROLL
            for (int token = 0; token < T; ++token) {
                float sum = simd_sum(acc[r][token]);
                if (at.lane == 0 && row < p.vocab && token < p.tokens)
                    logits[ulong(token) * ulong(p.vocab) + ulong(row)] = scaled ? mul_rn(sum, scales[row]) : sum;
            }
        }
    }
}

#define BITNET_HEAD(NAME, TYPE, T)                                                                                         \
    BITNET_KERNEL(256)                                                                                                     \
    bitnet_head_##NAME##_##T(device const uint4* weights [[buffer(0)]], device const float* scales [[buffer(1)]],          \
                             device const float* x [[buffer(2)]], device float* logits [[buffer(3)]],                      \
                             constant HeadParams& p [[buffer(4)]], BITNET_GRID) {                                          \
        head<TYPE, T>(weights, scales, x, logits, p, TYPE::kPerVector == 16, BITNET_AT);                                   \
    }
#define BITNET_HEAD_ALL(T)            \
    BITNET_HEAD(bf16, HeadBf16, T)    \
    BITNET_HEAD(f16, HeadF16, T)      \
    BITNET_HEAD(f32, HeadF32, T)      \
    BITNET_HEAD(i8, HeadI8, T)
BITNET_HEAD_ALL(1)
BITNET_HEAD_ALL(2)
BITNET_HEAD_ALL(4)
BITNET_HEAD_ALL(8)

// x[token, :] = f32 of row ids[token]. Threadgroup = token, thread = columns tid + 256 n. An id outside the table (never from a
// checked host) reads row 0 rather than memory that is not there. Bytes a token: hidden * (element + 4).
#define BITNET_EMBED(NAME, ELEMENT, SCALED)                                                                                \
    BITNET_KERNEL(256)                                                                                                     \
    bitnet_embed_##NAME(device const ELEMENT::Store* table [[buffer(0)]], device const float* scales [[buffer(1)]],        \
                        device const int* ids [[buffer(2)]], device float* x [[buffer(3)]],                                \
                        constant HeadParams& p [[buffer(4)]], BITNET_GRID) {                                               \
        Position at = BITNET_AT;                                                                                               \
        int token = int(at.group.x);                                                                                       \
        if (token >= p.tokens) return;                                                                                     \
        int id = ids[token];                                                                                               \
        if (id < 0 || id >= p.vocab) id = 0;                                                                               \
        for (int i = int(at.tid); i < p.hidden; i += int(at.threads)) {                                                    \
            float v = ELEMENT::load(table[ulong(id) * ulong(p.hidden) + ulong(i)]);                                        \
            x[ulong(token) * ulong(p.hidden) + ulong(i)] = SCALED ? mul_rn(v, scales[id]) : v;                             \
        }                                                                                                                  \
    }
struct I8 {
    typedef char Store;
    static float load(char v) { return float(v); }
};
BITNET_EMBED(bf16, Bf16, false)
BITNET_EMBED(f16, F16, false)
BITNET_EMBED(f32, F32, false)
BITNET_EMBED(i8, I8, true)
