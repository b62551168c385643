// Everything the kernels take from the machine, under one roof: barriers, lane exchange, dot products,
// matrix units, asynchronous copies, rounding. Two implementations: the GPU (here) and the CPU emulator
// (../emulator/cuda.h), so that the same kernel sources run in tests where there is no GPU.
#pragma once

#ifdef BITNET_EMULATOR
#include "../emulator/cuda.h"
#else
// Tests plant one defect (a barrier removed, an index off by one) and require the suites to fail: the emulator makes this a
// variable. 0 in what ships, where these conditions vanish.
#define BITNET_BUG 0

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace bitnet {

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char bitnet_shared[];
    return bitnet_shared;
}
__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
template <class T>
__device__ __forceinline__ T shfl(T v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
template <class T>
__device__ __forceinline__ T shfl_xor(T v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

// Bit l: lane l's predicate.
__device__ __forceinline__ unsigned warp_votes(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
__device__ __forceinline__ int count_bits(unsigned u) { return __popc(u); }

// Unsigned bytes of a times signed bytes of b.
__device__ __forceinline__ int dp4a_us(unsigned a, unsigned b, int c) {
    int d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
// C[8x8] += A[8x16] u8 * B[16x8] s8, the only int8 shape of 7.5.
__device__ __forceinline__ void mma_m8n8k16_us(int& c0, int& c1, unsigned a, unsigned b) {
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+r"(c0), "+r"(c1) : "r"(a), "r"(b));
}
#if __CUDA_ARCH__ >= 800
// C[16x8] += A[16x32] u8 * B[32x8] s8.
__device__ __forceinline__ void mma_m16n8k32_us(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                                unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#else
#define BITNET_MMA_75 1
#endif
// Four 8x16-byte matrices from shared memory; lane l gives the address of row l % 8 of matrix l / 8 and
// receives bytes 4 (l % 4) .. +3 of row l / 4 of each.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// The same, each matrix of 8x8 16-bit elements transposed: a lane receives elements (2t, g) and (2t + 1, g).
__device__ __forceinline__ void ldmatrix_x4_transposed(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// C[16x8] += A[16x16] * B[16x8], bf16 or f16 in, f32 accumulators (8.0+; on 7.5 nothing, and the host must not
// choose a kernel that needs it).
template <bool kBf16>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    if (kBf16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

__device__ __forceinline__ void cp_async16(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
#else
    *(uint4*)to = *(const uint4*)from;
#endif
}
__device__ __forceinline__ void cp_async16_zero(void* to) { *(uint4*)to = make_uint4(0, 0, 0, 0); }
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Weights: read once, never written while a kernel runs, not worth a line of L1.
__device__ __forceinline__ uint4 load_stream(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
// Values another block may have written: from L2, never from a stale line of L1.
__device__ __forceinline__ float4 load_fresh(const float4* p) { return __ldcg(p); }
__device__ __forceinline__ float load_fresh(const float* p) { return __ldcg(p); }
__device__ __forceinline__ int load_fresh(const int* p) { return __ldcg(p); }
__device__ __forceinline__ unsigned load_fresh(const unsigned* p) { return __ldcg(p); }
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Programmatic dependent launch (9.0+): a kernel launched with the attribute may start before its
// predecessor ends; it must wait before it reads what the predecessor wrote. Elsewhere no-ops.
__device__ __forceinline__ void wait_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void fence_device() { __threadfence(); }

template <class T>
__device__ __forceinline__ T atomic_add(T* p, T v) { return atomicAdd(p, v); }
__device__ __forceinline__ unsigned atomic_max(unsigned* p, unsigned v) { return atomicMax(p, v); }
__device__ __forceinline__ unsigned long long atomic_max(unsigned long long* p, unsigned long long v) {
    return atomicMax(p, v);
}

// A barrier over all blocks of a cooperative launch. `counter` starts at 0 in every launch and only grows,
// so no reset can race with a late reader; every block adds 1, and waits for the next multiple of the grid.
__device__ __forceinline__ void sync_grid(unsigned* counter) {
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned blocks = gridDim.x;
        unsigned ticket;
        asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(ticket) : "l"(counter) : "memory");
        unsigned target = ticket - ticket % blocks + blocks;
        unsigned seen;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        } while ((int)(seen - target) < 0);
    }
    __syncthreads();
}

// Rounding spelled out: no contraction into FMA, no approximate division.
__device__ __forceinline__ float div_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
// a * b + c, rounded once.
__device__ __forceinline__ float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float sqrt_rn(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ int float_to_int_rn(float a) { return __float2int_rn(a); }
__device__ __forceinline__ unsigned float_bits(float a) { return __float_as_uint(a); }
__device__ __forceinline__ float bits_float(unsigned u) { return __uint_as_float(u); }

__device__ __forceinline__ float bf16_to_float(uint16_t h) { return __uint_as_float((unsigned)h << 16); }
__device__ __forceinline__ uint16_t float_to_bf16(float f) { return __bfloat16_as_ushort(__float2bfloat16_rn(f)); }
__device__ __forceinline__ float f16_to_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }
__device__ __forceinline__ uint16_t float_to_f16(float f) { return __half_as_ushort(__float2half_rn(f)); }

}  // namespace bitnet
#endif

#ifdef BITNET_MMA_75
namespace bitnet {
// The same product on 7.5: the registers of one m16n8k32 are those of four m8n8k16.
__device__ __forceinline__ void mma_m16n8k32_us(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                                unsigned b0, unsigned b1) {
    mma_m8n8k16_us(c[0], c[1], a0, b0);
    mma_m8n8k16_us(c[2], c[3], a1, b0);
    mma_m8n8k16_us(c[0], c[1], a2, b1);
    mma_m8n8k16_us(c[2], c[3], a3, b1);
}
}  // namespace bitnet
#endif
