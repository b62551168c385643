// Prefill attention on the half-precision matrix units, for 16-bit KV caches and head sizes 64, 96, 128, 256 (8.0+).
//
// The cache holds bf16 (or f16) exactly; what would be rounded is q and the softmax weights. Each is therefore
// split into two halves, hi = round(x), lo = round(x - hi), and multiplied twice: 16 bits of precision in bf16, 22
// in f16, against 8 and 11, for twice the (small) matrix work. The result agrees with f32 attention to about 1e-5.
//
//   grid (query tiles of 64, heads, sequences), 128 threads: warp w owns queries 16 w .. 16 w + 15
//   keys in tiles of kKeys; K and V rows of 2 d + 16 bytes in shared memory (the 16 make ldmatrix conflict-free),
//   two stages of cp.async; scores and output stay in registers, online softmax in base 2
//
// Lane (g = lane / 4, t = lane % 4) holds rows g and g + 8 of scores [16][kKeys] and output [16][d].
// Shared memory: 4 * kKeys * (2 d + 16) bytes, for d = 256 65536 more (q as fragments, one 32-byte run a lane).
#include "kv.cuh"

using namespace bitnet;

template <class T>
__device__ __forceinline__ unsigned pack2(float a, float b) {
    return (unsigned)T::store(a) | (unsigned)T::store(b) << 16;
}
// hi and lo halves of a pair.
template <class T>
__device__ __forceinline__ void split2(float a, float b, unsigned& hi, unsigned& lo) {
    auto ha = T::store(a), hb = T::store(b);
    hi = (unsigned)ha | (unsigned)hb << 16;
    lo = pack2<T>(a - T::load(ha), b - T::load(hb));
}

template <class T, bool kBf16, int kDim, int kKeys>
__device__ __forceinline__ void prefill_mma(const PrefillParams& pp) {
    constexpr bool kQInRegisters = kDim <= 128;
    constexpr int kSteps = kDim / 16, kStride = 2 * kDim + 16, kTile = kKeys * kStride;
    let_next_kernel_start();
    wait_previous_kernel();
    const AttentionParams& p = pp.a;
    int sequence = blockIdx.z, head = blockIdx.y;
    int first = pp.starts[sequence], count = pp.starts[sequence + 1] - first;
    int q0 = blockIdx.x * 64;
    if (q0 >= count) return;
    int kv = head / (p.heads / p.kv_heads);
    int base_position = p.positions[first], slot = p.slots[first];
    int thread = threadIdx.x, lane = thread & 31, warp = thread / 32, g = lane >> 2, t = lane & 3;
    unsigned char* shared = shared_memory();

    long long cache_row = (long long)p.kv_heads * kDim;
    long long base = ((long long)slot * p.max_positions * p.kv_heads + kv) * kDim;
    const uint16_t* k_base = static_cast<const uint16_t*>(p.k_cache) + base;
    const uint16_t* v_base = static_cast<const uint16_t*>(p.v_cache) + base;
    int last_row = (count - q0 < 64 ? count - q0 : 64) - 1;
    int keys = base_position + q0 + last_row + 1;
    int key_tiles = tiles(keys, kKeys);

    auto fetch = [&](int tile) {
        unsigned char* stage = shared + (tile & 1) * 2 * kTile;
        for (int i = thread; i < kKeys * (kDim / 8); i += 128) {
            int row = i / (kDim / 8), chunk = i % (kDim / 8), key = tile * kKeys + row;
            unsigned char* to = stage + row * kStride + chunk * 16;
            if (key < keys) {
                cp_async16(to, k_base + key * cache_row + chunk * 8);
                cp_async16(to + kTile, v_base + key * cache_row + chunk * 8);
            } else {
                cp_async16_zero(to);  // weight 0 times a stale NaN would be NaN
                cp_async16_zero(to + kTile);
            }
        }
    };
    fetch(0);
    cp_async_commit();

    // q as A fragments: [step][rows g, g + 8][columns 2t.., 2t + 8..], hi and lo; scaled to base 2.
    unsigned q[kQInRegisters ? kSteps : 1][2][4];
    unsigned* q_shared = reinterpret_cast<unsigned*>(shared + 4 * kTile) + (warp * 32 + lane) * 8;
    constexpr int kQStep = 4 * 32 * 8;
    {
        constexpr float kLog2e = 1.4426950408889634f;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            unsigned f[2][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int row = q0 + warp * 16 + g + (i & 1) * 8;
                float2 v = make_float2(0, 0);
                if (row < count)
                    v = *reinterpret_cast<const float2*>(p.qkv + (long long)(first + row) * (p.heads + 2 * p.kv_heads) * kDim +
                                                         head * kDim + s * 16 + (i >> 1) * 8 + t * 2);
                split2<T>(v.x * kLog2e, v.y * kLog2e, f[0][i], f[1][i]);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (kQInRegisters)
                    q[s][i >> 2][i & 3] = f[i >> 2][i & 3];
                else
                    q_shared[s * kQStep + i] = f[i >> 2][i & 3];  // read by this very lane alone
            }
        }
    }

    float out[kDim / 8][4];
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    int limit0 = base_position + q0 + warp * 16 + g;  // last key of row g; row g + 8 sees 8 more

    for (int tile = 0; tile < key_tiles; ++tile) {
        cp_async_wait<0>();
        if (BITNET_BUG != 8) sync_block();
        if (tile + 1 < key_tiles) fetch(tile + 1);
        cp_async_commit();
        const unsigned char* k_tile = shared + (tile & 1) * 2 * kTile;
        const unsigned char* v_tile = k_tile + kTile;

        float s[kKeys / 8][4];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            unsigned a[2][4];
#pragma unroll
            for (int i = 0; i < 8; ++i) a[i >> 2][i & 3] = kQInRegisters ? q[kQInRegisters ? step : 0][i >> 2][i & 3] : q_shared[step * kQStep + i];
#pragma unroll
            for (int n = 0; n < kKeys / 8; n += 2) {
                // 16 keys x 16 columns: matrices (keys 0-7, columns 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15)
                unsigned b[4];
                ldmatrix_x4(b, k_tile + (n * 8 + (lane >> 4) * 8 + (lane & 7)) * kStride + step * 32 + (lane >> 3 & 1) * 16);
                mma_m16n8k16<kBf16>(s[n], a[1], b[0], b[1]);
                mma_m16n8k16<kBf16>(s[n], a[0], b[0], b[1]);
                mma_m16n8k16<kBf16>(s[n + 1], a[1], b[2], b[3]);
                mma_m16n8k16<kBf16>(s[n + 1], a[0], b[2], b[3]);
            }
        }

        float peak[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int key = tile * kKeys + n * 8 + t * 2 + (i & 1);
                if (key > limit0 + (i >> 1) * 8 + (BITNET_BUG == 10) || key >= keys) s[n][i] = -INFINITY;
                peak[i >> 1] = fmaxf(peak[i >> 1], s[n][i]);
            }
        float keep[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            peak[r] = fmaxf(peak[r], shfl_xor(peak[r], 1));
            peak[r] = fmaxf(peak[r], shfl_xor(peak[r], 2));
            keep[r] = exp2f(top[r] - peak[r]);  // key 0 is visible to every row, so peak is finite
            top[r] = peak[r];
            total[r] *= keep[r];
        }
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[n][i] = exp2f(s[n][i] - peak[i >> 1]);
                total[i >> 1] += s[n][i];
            }
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] *= keep[i >> 1];

#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step) {
            unsigned a[2][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = &s[step * 2 + (i >> 1)][(i & 1) * 2];
                split2<T>(pair[0], pair[1], a[0][i], a[1][i]);
            }
#pragma unroll
            for (int n = 0; n < kDim / 8; n += 2) {
                unsigned b[4];
                ldmatrix_x4_transposed(b, v_tile + (step * 16 + (lane >> 3 & 1) * 8 + (lane & 7)) * kStride + n * 16 + (lane >> 4) * 16);
                mma_m16n8k16<kBf16>(out[n], a[1], b[0], b[1]);
                mma_m16n8k16<kBf16>(out[n], a[0], b[0], b[1]);
                mma_m16n8k16<kBf16>(out[n + 1], a[1], b[2], b[3]);
                mma_m16n8k16<kBf16>(out[n + 1], a[0], b[2], b[3]);
            }
        }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        total[r] += shfl_xor(total[r], 1);
        total[r] += shfl_xor(total[r], 2);
        int row = q0 + warp * 16 + g + r * 8;
        if (row >= count) continue;
        float* to = p.out + (long long)(first + row) * p.heads * kDim + head * kDim + t * 2;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
            *reinterpret_cast<float2*>(to + n * 8) = make_float2(div_rn(out[n][2 * r], total[r]), div_rn(out[n][2 * r + 1], total[r]));
    }
}

#define BITNET_PREFILL_MMA(DIM, KEYS)                                                                                     \
    extern "C" __global__ void __launch_bounds__(128) bitnet_prefill_attention_mma_bf16_##DIM(PrefillParams p) {        \
        prefill_mma<Bf16, true, DIM, KEYS>(p);                                                                            \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(128) bitnet_prefill_attention_mma_f16_##DIM(PrefillParams p) {         \
        prefill_mma<F16, false, DIM, KEYS>(p);                                                                            \
    }
BITNET_PREFILL_MMA(64, 64)
BITNET_PREFILL_MMA(96, 64)
BITNET_PREFILL_MMA(128, 64)
BITNET_PREFILL_MMA(256, 32)
