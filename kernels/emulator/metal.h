// A CPU stand-in for the part of <metal_stdlib> that kernels/metal uses, on the machine of fibers.h.
//
// Address spaces are empty words here (kernels/emulator/address_spaces.sh lets a compiler check them); attributes in
// double brackets are unknown to C++ and ignored. Half is _Float16, denormals and all.
#pragma once
#include "fibers.h"

#include <type_traits>
#include <utility>

#define kernel
#define device
#define constant const
#define threadgroup
#define thread
#define BITNET_SHARED unsigned char* shared  // its attribute is spelled like an address space

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;

namespace metal {

// Vectors: what the kernels use of them.
template <class T, int N>
struct alignas(sizeof(T) * N) vec;
#define BITNET_VEC_COMMON(N)                                              \
    T& operator[](int i) { return (&x)[i]; }                              \
    const T& operator[](int i) const { return (&x)[i]; }                  \
    vec() = default;
template <class T>
struct alignas(sizeof(T) * 2) vec<T, 2> {
    T x, y;
    BITNET_VEC_COMMON(2)
    vec(T a, T b) : x(a), y(b) {}
    explicit vec(T a) : x(a), y(a) {}
    template <class U>
    explicit vec(const vec<U, 2>& v) : x(T(v.x)), y(T(v.y)) {}
};
template <class T>
struct vec<T, 3> {
    T x, y, z;
    BITNET_VEC_COMMON(3)
    vec(T a, T b, T c) : x(a), y(b), z(c) {}
};
template <class T>
struct alignas(sizeof(T) * 4) vec<T, 4> {
    T x, y, z, w;
    BITNET_VEC_COMMON(4)
    vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
    explicit vec(T a) : x(a), y(a), z(a), w(a) {}
    template <class U>
    explicit vec(const vec<U, 4>& v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
};
#undef BITNET_VEC_COMMON
#define BITNET_VEC_OP(OP)                                                                                              \
    template <class T>                                                                                                 \
    inline vec<T, 4> operator OP(const vec<T, 4>& a, const vec<T, 4>& b) {                                             \
        return {T(a.x OP b.x), T(a.y OP b.y), T(a.z OP b.z), T(a.w OP b.w)};                                           \
    }                                                                                                                  \
    template <class T>                                                                                                 \
    inline vec<T, 2> operator OP(const vec<T, 2>& a, const vec<T, 2>& b) {                                             \
        return {T(a.x OP b.x), T(a.y OP b.y)};                                                                         \
    }
BITNET_VEC_OP(+)
BITNET_VEC_OP(-)
BITNET_VEC_OP(*)
BITNET_VEC_OP(/)
#undef BITNET_VEC_OP

typedef vec<float, 2> float2;
typedef vec<float, 4> float4;
typedef vec<half, 2> half2;
typedef vec<half, 4> half4;
typedef vec<uint, 2> uint2;
typedef vec<uint, 3> uint3;
typedef vec<uint, 4> uint4;
typedef vec<ushort, 4> ushort4;
typedef vec<ulong, 2> ulong2;

template <class To, class From>
inline To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
    To to;
    std::memcpy(static_cast<void*>(&to), &from, sizeof to);
    return to;
}

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float4 fma(float4 a, float4 b, float4 c) { return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y), fma(a.z, b.z, c.z), fma(a.w, b.w, c.w)}; }
inline float rint(float a) { return std::nearbyintf(a); }
inline float fmax(float a, float b) { return std::fmax(a, b); }
inline float fmin(float a, float b) { return std::fmin(a, b); }
inline float fabs(float a) { return std::fabs(a); }
template <class T>
inline T max(T a, T b) { return a < b ? b : a; }
template <class T>
inline T min(T a, T b) { return b < a ? b : a; }
inline uint popcount(uint u) { return uint(__builtin_popcount(u)); }
inline uint mulhi(uint a, uint b) { return uint(ulong(a) * b >> 32); }
namespace precise {
inline float sqrt(float a) { return std::sqrt(a); }
inline float exp(float a) { return std::exp(a); }
}  // namespace precise

// Barriers. One within a simdgroup orders its lanes only.
enum class mem_flags { mem_none, mem_device, mem_threadgroup, mem_device_and_threadgroup };
inline mem_flags operator|(mem_flags, mem_flags) { return mem_flags::mem_device_and_threadgroup; }
inline void threadgroup_barrier(mem_flags) { emu::sync_block(); }
inline void simdgroup_barrier(mem_flags) {
    ++emu::current->race.warp_epoch;
    emu::sync_warp();
}

// Lane exchange.
template <class T>
inline T simd_shuffle(T v, ushort lane) { return emu::shfl(v, lane); }
template <class T>
inline T simd_shuffle_xor(T v, ushort mask) { return emu::shfl(v, int(emu::current->lane) ^ mask); }
template <class T>
inline T simd_broadcast_first(T v) { return emu::shfl(v, 0); }
// Sums as a tree; hardware does not say in which order it adds.
template <class T>
inline T simd_sum(T v) {
    for (uint m = emu::machine().options.width / 2; m; m >>= 1) v += simd_shuffle_xor(v, ushort(m));
    return v;
}
template <class T>
inline T simd_max(T v) {
    for (uint m = emu::machine().options.width / 2; m; m >>= 1) {
        T other = simd_shuffle_xor(v, ushort(m));
        v = other > v || v != v ? other : v;
    }
    return v;
}
inline uint simd_prefix_exclusive_sum(uint v) {
    auto all = emu::exchange(&v, sizeof v, 9);
    uint sum = 0, one;
    for (uint l = 0; l < emu::current->lane; ++l) {
        std::memcpy(&one, all[l], sizeof one);
        sum += one;
    }
    emu::sync_warp();
    return sum;
}
inline bool simd_any(bool p) {
    auto all = emu::exchange(&p, 1, 10);
    bool any = false;
    for (uint l = 0; l < emu::machine().options.width; ++l) any |= all[l][0] != 0;
    return any;
}

// Atomics, relaxed: all that kernels use. Those of threadgroup memory only.
template <class T>
struct atomic_of {
    T value;
};
typedef atomic_of<int> atomic_int;
typedef atomic_of<uint> atomic_uint;
enum memory_order { memory_order_relaxed };
template <class T>
__attribute__((no_sanitize("thread"), noinline)) T atomic_fetch_add_explicit(atomic_of<T>* p, T v, memory_order) {
    emu::race_access(p, sizeof(T), true, true);
    T old = p->value;
    p->value += v;
    return old;
}

// 8 x 8 matrices spread over a simdgroup of 32. Which lane holds what is not specified, and kernels must not know: lane l
// holds elements 2 l and 2 l + 1 here, and element by element what another assignment would compute.
template <class T, int C, int R>
struct simdgroup_matrix {
    static_assert(C == 8 && R == 8, "the only size there is");
    T e[2];
};
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;

inline void need_32() {
    if (emu::machine().options.width != 32) emu::fail("simdgroup matrices need simdgroups of 32");
}
template <class T, int C, int R>
inline simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T v) {
    need_32();
    return {{v, v}};
}
template <class T>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, const T* from, ulong elements_per_row = 8, ulong2 origin = ulong2(0),
                           bool transpose = false) {
    need_32();
    for (uint i = 0; i < 2; ++i) {
        uint at = 2 * emu::current->lane + i, row = at / 8, col = at % 8;
        if (transpose) std::swap(row, col);
        d.e[i] = from[(origin.y + row) * elements_per_row + origin.x + col];
    }
}
template <class T>
inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& s, T* to, ulong elements_per_row = 8, ulong2 origin = ulong2(0),
                            bool transpose = false) {
    need_32();
    for (uint i = 0; i < 2; ++i) {
        uint at = 2 * emu::current->lane + i, row = at / 8, col = at % 8;
        if (transpose) std::swap(row, col);
        to[(origin.y + row) * elements_per_row + origin.x + col] = s.e[i];
    }
}
// d = a b + c in f32, products added in ascending k.
template <class A, class B>
inline void simdgroup_multiply_accumulate(simdgroup_float8x8& d, const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b, const simdgroup_float8x8& c) {
    float mine[4] = {float(a.e[0]), float(a.e[1]), float(b.e[0]), float(b.e[1])};
    auto all = reinterpret_cast<const float(*)[emu::kSlotBytes / 4]>(emu::exchange(mine, sizeof mine, 11));
    uint lane = emu::current->lane, row = lane / 4, col = lane % 4 * 2;
    for (uint i = 0; i < 2; ++i) {
        float sum = c.e[i];
        for (uint k = 0; k < 8; ++k) sum = std::fma(all[row * 4 + k / 2][k % 2], all[k * 4 + col / 2][2 + i], sum);
        d.e[i] = sum;
    }
}
template <class A, class B>
inline void simdgroup_multiply(simdgroup_float8x8& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b) {
    simdgroup_multiply_accumulate(d, a, b, simdgroup_float8x8{{0.0f, 0.0f}});
}

}  // namespace metal

// Launching by position: buffers in the order of the kernel's parameters, the parameter struct last of them, then perhaps
// threadgroup memory (the only non-const uchar*), then what BITNET_GRID of common.metal names.
namespace emu {

constexpr size_t kGridArguments = 7;
constexpr unsigned kThreadgroupMemory = 32768;

// What a kernel wants bound.
struct Signature {
    unsigned buffers = 0;
    size_t params = 0;  // bytes of the parameter struct, the last buffer
    bool shared = false;
};

template <class A>
constexpr bool is_params = std::is_reference_v<A>;
template <class... A>
Signature signature(void (*)(A...)) {
    constexpr size_t n = sizeof...(A);
    bool params[n] = {is_params<A>...};
    size_t sizes[n] = {sizeof(std::remove_reference_t<A>)...};
    Signature s;
    for (size_t i = 0; i < n; ++i)
        if (params[i]) s.buffers = unsigned(i + 1), s.params = sizes[i];
    s.shared = n - s.buffers == kGridArguments + 1;
    return s;
}

template <class A>
A argument(size_t i, size_t buffers, bool shared, void* const* bound) {
    if constexpr (std::is_reference_v<A>) {
        return *static_cast<std::remove_reference_t<A>*>(bound[i]);
    } else if constexpr (std::is_pointer_v<A>) {
        return i < buffers ? static_cast<A>(bound[i]) : (A)current->block->shared;
    } else if constexpr (std::is_same_v<A, metal::uint3>) {
        Machine& m = machine();
        const Dim3& d = i == buffers + shared ? current->block->id : i == buffers + shared + 1 ? m.grid : m.block_dim;
        return metal::uint3(d.x, d.y, d.z);
    } else {
        unsigned width = machine().options.width, at = current->tid.x;
        switch (i - buffers - shared) {
            case 3: return at;
            case 4: return at % width;
            case 5: return at / width;
            default: return width;
        }
    }
}
template <class... A, size_t... I>
void call(void (*k)(A...), const Signature& s, void* const* bound, std::index_sequence<I...>) {
    k(argument<A>(I, s.buffers, s.shared, bound)...);
}
// Runs a kernel over a grid of threadgroups.
template <class... A>
void dispatch(void (*k)(A...), const std::vector<void*>& bound, Dim3 grid, unsigned threads, unsigned shared_bytes) {
    Signature s = signature(k);
    if (bound.size() != s.buffers) fail("a kernel was launched with another number of buffers than it has");
    if (shared_bytes > kThreadgroupMemory) fail("more threadgroup memory than 32768 bytes");
    launch(grid, threads, shared_bytes, false, [&] { call(k, s, bound.data(), std::index_sequence_for<A...>{}); });
}

}  // namespace emu
