// A CPU stand-in for the part of CUDA that kernels/cuda uses, on the machine of fibers.h.
#pragma once
#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }
inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
inline float2 make_float2(float a, float b) { return {a, b}; }

#define threadIdx (emu::current->tid)
#define blockIdx (emu::current->block->id)
#define blockDim (emu::machine().block_dim)
#define gridDim (emu::machine().grid)

namespace bitnet {

inline unsigned char* shared_memory() { return emu::current->block->shared; }
inline void sync_block() { emu::sync_block(); }
inline void sync_warp() {
    ++emu::current->race.warp_epoch;
    emu::sync_warp();
}
inline void sync_grid(unsigned*) { emu::sync_grid(); }
template <class T>
inline T shfl(T v, int lane) { return emu::shfl(v, lane); }
template <class T>
inline T shfl_xor(T v, int mask) { return emu::shfl(v, int(emu::current->lane) ^ mask); }

inline unsigned warp_votes(bool predicate) {
    auto all = emu::exchange(&predicate, 1, 8);
    unsigned u = 0;
    for (int l = 0; l < 32; ++l) u |= unsigned(all[l][0] != 0) << l;
    return u;
}
inline int count_bits(unsigned u) { return __builtin_popcount(u); }

inline int dp4a_us(unsigned a, unsigned b, int c) {
    for (int i = 0; i < 4; ++i) c += int((a >> 8 * i) & 255) * int(int8_t((b >> 8 * i) & 255));
    return c;
}

// The fragment layouts of the PTX manual: lane = 4 * group + t. BITNET_MMA_75 leaves the large shape to
// intrinsics.cuh, which builds it from the small one as on compute capability 7.5.
#ifndef BITNET_MMA_75
inline void mma_m16n8k32_us(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
    auto all = reinterpret_cast<const unsigned(*)[emu::kSlotBytes / 4]>(emu::exchange(mine, sizeof mine, 3));
    int group = emu::current->lane >> 2, t = emu::current->lane & 3;
    for (int r = 0; r < 2; ++r)
        for (int n = 0; n < 2; ++n) {
            int sum = c[r * 2 + n];
            for (int k = 0; k < 8; ++k)
                sum = dp4a_us(all[group * 4 + (k & 3)][r + 2 * (k >> 2)], all[(t * 2 + n) * 4 + (k & 3)][4 + (k >> 2)], sum);
            c[r * 2 + n] = sum;
        }
}
#endif
inline void mma_m8n8k16_us(int& c0, int& c1, unsigned a, unsigned b) {
    unsigned mine[2] = {a, b};
    auto all = reinterpret_cast<const unsigned(*)[emu::kSlotBytes / 4]>(emu::exchange(mine, sizeof mine, 4));
    int group = emu::current->lane >> 2, t = emu::current->lane & 3;
    for (int k = 0; k < 4; ++k) {
        c0 = dp4a_us(all[group * 4 + k][0], all[t * 8 + k][1], c0);
        c1 = dp4a_us(all[group * 4 + k][0], all[t * 8 + 4 + k][1], c1);
    }
}
// Four 8x16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8.
inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    auto all = emu::exchange(&row, sizeof row, 5);
    int group = emu::current->lane >> 2, t = emu::current->lane & 3;
    for (int i = 0; i < 4; ++i) {
        const unsigned char* p;
        std::memcpy(&p, all[i * 8 + group], sizeof p);
        if (reinterpret_cast<uintptr_t>(p) & 15) emu::fail("ldmatrix: a row is not aligned to 16 bytes");
        std::memcpy(&r[i], p + 4 * t, 4);
    }
    // Real lanes read at issue; a later write by a faster lane must not be seen.
    emu::sync_warp();
}

inline void ldmatrix_x4_transposed(unsigned (&r)[4], const void* row) {
    auto all = emu::exchange(&row, sizeof row, 6);
    int group = emu::current->lane >> 2, t = emu::current->lane & 3;
    for (int i = 0; i < 4; ++i) {
        r[i] = 0;
        for (int e = 0; e < 2; ++e) {
            const unsigned char* p;
            std::memcpy(&p, all[i * 8 + 2 * t + e], sizeof p);
            if (reinterpret_cast<uintptr_t>(p) & 15) emu::fail("ldmatrix: a row is not aligned to 16 bytes");
            uint16_t v;
            std::memcpy(&v, p + 2 * group, 2);
            r[i] |= unsigned(v) << (16 * e);
        }
    }
    emu::sync_warp();
}
inline float bf16_to_float(uint16_t h);
inline float f16_to_float(uint16_t h);
template <bool kBf16>
inline void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    float mine[12];
    for (int i = 0; i < 12; ++i) {
        uint16_t h = uint16_t((i < 8 ? a[i >> 1] : i < 10 ? b0 : b1) >> (16 * (i & 1)));
        mine[i] = kBf16 ? bf16_to_float(h) : f16_to_float(h);
    }
    auto all = reinterpret_cast<const float(*)[emu::kSlotBytes / 4]>(emu::exchange(mine, sizeof mine, 7));
    int group = emu::current->lane >> 2, t = emu::current->lane & 3;
    for (int r = 0; r < 2; ++r)
        for (int n = 0; n < 2; ++n) {
            double sum = c[r * 2 + n];
            for (int k = 0; k < 16; ++k)
                sum += double(all[group * 4 + (k >> 1 & 3)][2 * (r + 2 * (k >> 3)) + (k & 1)]) * all[(t * 2 + n) * 4 + (k >> 1 & 3)][8 + 2 * (k >> 3) + (k & 1)];
            c[r * 2 + n] = float(sum);
        }
}

inline void check16(const void* p, const char* what) {
    if (reinterpret_cast<uintptr_t>(p) & 15) emu::fail(what);
}
inline void cp_async16(void* to, const void* from) {
    check16(to, "cp.async: destination is not aligned to 16 bytes");
    check16(from, "cp.async: source is not aligned to 16 bytes");
    // The copy may land at any time from here to the wait: a write now, and another when it is waited for.
    emu::race_access(from, 16, false, false);
    emu::race_access(to, 16, true, false);
    emu::current->open.push_back({to, from, 16, 0});
}
inline void cp_async16_zero(void* to) {
    check16(to, "cp.async: destination is not aligned to 16 bytes");
    emu::race_access(to, 16, true, false);
    emu::current->open.push_back({to, to, 0, 16});
}
inline void cp_async_commit() {
    emu::current->groups.push_back(std::move(emu::current->open));
    emu::current->open.clear();
}
template <int N>
inline void cp_async_wait() { emu::finish_copies(N); }

inline uint4 load_stream(const uint4* p) {
    check16(p, "16-byte load is not aligned");
    return *p;
}
inline float4 load_fresh(const float4* p) {
    check16(p, "16-byte load is not aligned");
    return *p;
}
inline float load_fresh(const float* p) { return *p; }
inline int load_fresh(const int* p) { return *p; }
inline unsigned load_fresh(const unsigned* p) { return *p; }
inline void prefetch_l2(const void*) {}
inline void wait_previous_kernel() {}
inline void let_next_kernel_start() {}
inline void fence_device() {}

#define BITNET_UNWATCHED __attribute__((no_sanitize("thread"), noinline))
inline void note_atomic(void* p, size_t bytes) {
    emu::race_access(p, bytes, true, true);
    auto c = static_cast<unsigned char*>(p), shared = emu::current->block->shared;
    if (c < shared || c >= shared + emu::current->block->shared_bytes) emu::current->block->met_others = true;
}
template <class T>
BITNET_UNWATCHED T atomic_add(T* p, T v) {
    note_atomic(p, sizeof(T));
    T old = *p;
    *p += v;
    return old;
}
template <class T>
BITNET_UNWATCHED T atomic_max(T* p, T v) {
    note_atomic(p, sizeof(T));
    T old = *p;
    *p = v > old ? v : old;
    return old;
}

inline float div_rn(float a, float b) { return a / b; }
inline float mul_rn(float a, float b) { volatile float r = a * b; return r; }
inline float add_rn(float a, float b) { volatile float r = a + b; return r; }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float sqrt_rn(float a) { return std::sqrt(a); }
inline int float_to_int_rn(float a) { return int(std::nearbyintf(a)); }
inline unsigned float_bits(float a) { unsigned u; std::memcpy(&u, &a, 4); return u; }
inline float bits_float(unsigned u) { float a; std::memcpy(&a, &u, 4); return a; }

inline float bf16_to_float(uint16_t h) { return bits_float(unsigned(h) << 16); }
inline uint16_t float_to_bf16(float f) {
    unsigned u = float_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline float f16_to_float(uint16_t h) { _Float16 x; std::memcpy(&x, &h, 2); return float(x); }
inline uint16_t float_to_f16(float f) { _Float16 x = _Float16(f); uint16_t h; std::memcpy(&h, &x, 2); return h; }

}  // namespace bitnet
