// Metal's words as C++ for OpenCL, so that clang checks the kernels' address spaces, types and overloads without a Mac
// (kernels/emulator/address_spaces.sh). Declarations only: nothing of this runs. As plain C++14, which is what Metal's language
// is made from and OpenCL's is not, address spaces mean nothing and the rest is checked.
#pragma once
#ifdef __OPENCL_CPP_VERSION__
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#else
#define device
#define constant const
#define threadgroup
#define thread
typedef _Float16 half;
#endif
// A kernel is a plain function here (OpenCL refuses references in kernels); its attributes go.
#define BITNET_SHARED threadgroup uchar* shared
#define BITNET_KERNEL(THREADS) void
#define atomic_int metal_atomic_int
#define atomic_uint metal_atomic_uint
#define INFINITY (__builtin_inff())

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
#define BITNET_VECTORS(T)                                \
    typedef T T##2 __attribute__((ext_vector_type(2)));  \
    typedef T T##3 __attribute__((ext_vector_type(3)));  \
    typedef T T##4 __attribute__((ext_vector_type(4)));
BITNET_VECTORS(float)
BITNET_VECTORS(half)
BITNET_VECTORS(uint)
BITNET_VECTORS(ushort)
BITNET_VECTORS(ulong)


// Metal makes vectors with float4(...), which clang does not; a name followed by a parenthesis becomes a call.
float2 make_float2(float a, float b);
float4 make_float4(float a, float b, float c, float d);
float4 make_float4(float a);
float4 make_float4(half4 v);
half4 make_half4(half a, half b, half c, half d);
half4 make_half4(float4 v);
half2 make_half2(half a);
uint4 make_uint4(uint a);
ulong2 make_ulong2(ulong a);
#define float2(...) make_float2(__VA_ARGS__)
#define float4(...) make_float4(__VA_ARGS__)
#define half4(...) make_half4(__VA_ARGS__)
#define half2(...) make_half2(__VA_ARGS__)
#define uint4(...) make_uint4(__VA_ARGS__)
#define ulong2(...) make_ulong2(__VA_ARGS__)

namespace metal {

template <class To, class From>
To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
    return __builtin_bit_cast(To, from);
}
float fma(float a, float b, float c);
float4 fma(float4 a, float4 b, float4 c);
float rint(float a);
float fmax(float a, float b);
float fmin(float a, float b);
float fabs(float a);
int min(int a, int b);
uint min(uint a, uint b);
int max(int a, int b);
uint max(uint a, uint b);
uint popcount(uint u);
uint mulhi(uint a, uint b);
namespace precise {
float sqrt(float a);
float exp(float a);
}  // namespace precise

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

// 64-bit integers are not among the types that Metal exchanges.
#define BITNET_EXCHANGE(T)                    \
    T simd_shuffle(T v, ushort lane);         \
    T simd_shuffle_xor(T v, ushort mask);     \
    T simd_broadcast_first(T v);              \
    T simd_sum(T v);                          \
    T simd_max(T v);
BITNET_EXCHANGE(float)
BITNET_EXCHANGE(int)
BITNET_EXCHANGE(uint)
uint simd_prefix_exclusive_sum(uint v);
bool simd_any(bool p);

struct atomic_int {
    int value;
};
struct atomic_uint {
    uint value;
};
enum memory_order { memory_order_relaxed };
int atomic_fetch_add_explicit(threadgroup atomic_int* p, int v, memory_order);
uint atomic_fetch_add_explicit(threadgroup atomic_uint* p, uint v, memory_order);

// Stand-ins of two types that are neither structs (clang 14 cannot copy those without a generic address space) nor each other.
typedef half simdgroup_half8x8 __attribute__((ext_vector_type(16)));
typedef float simdgroup_float8x8 __attribute__((ext_vector_type(16)));
template <class T, int C, int R>
simdgroup_float8x8 make_filled_simdgroup_matrix(T v);
#define BITNET_MATRIX_LOAD(T, SPACE) \
    void simdgroup_load(thread simdgroup_##T##8x8& d, SPACE const T* from, ulong row, ulong2 origin = 0, bool transpose = false);
#define BITNET_MATRIX(T)                                                                                                       \
    BITNET_MATRIX_LOAD(T, threadgroup)                                                                                         \
    void simdgroup_store(simdgroup_##T##8x8 s, threadgroup T* to, ulong row, ulong2 origin = 0, bool transpose = false);        \
    void simdgroup_multiply(thread simdgroup_float8x8& d, simdgroup_##T##8x8 a, simdgroup_##T##8x8 b);                          \
    void simdgroup_multiply_accumulate(thread simdgroup_float8x8& d, simdgroup_##T##8x8 a, simdgroup_##T##8x8 b, simdgroup_float8x8 c);
BITNET_MATRIX(half)
BITNET_MATRIX(float)

}  // namespace metal
