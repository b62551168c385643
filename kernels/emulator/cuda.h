// A CPU stand-in for the part of CUDA that kernels/cuda uses.
//
// One fiber per GPU thread. A fiber runs until it must wait for others (block barrier, warp
// operation, grid barrier) and is resumed when the rendezvous is complete. Between two
// rendezvous points a warp runs alone and to the end, in an order that `Options::order`
// permutes: a missing barrier therefore shows as a wrong result, not as a lucky one.
// Asynchronous copies are carried out as late as the program allows, at the wait, for the same reason.
//
// Switching uses _setjmp/_longjmp (no system call); makecontext only creates the stacks.
#pragma once
#undef _FORTIFY_SOURCE
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "races.h"

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

namespace emu {

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
    Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulator: %s\n", what);
    std::fflush(stderr);
    std::_Exit(3);
}

constexpr int kSlotBytes = 64;

struct Warp {
    unsigned lanes = 0, arrived = 0;
    uint64_t generation = 0;
    int op[2] = {0, 0};
    alignas(16) unsigned char slot[2][32][kSlotBytes];
};

struct Block {
    Dim3 id;
    unsigned threads = 0, arrived = 0, exited = 0;
    uint64_t generation = 0;
    bool met_others = false;  // an atomic on global memory was done: see races.h
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
    std::vector<Warp> warps;
};

struct Copy {
    void* to;
    const void* from;
    unsigned bytes, zero_fill;
};

struct Thread {
    Dim3 tid;
    Block* block = nullptr;
    Warp* warp = nullptr;
    unsigned lane = 0;
    jmp_buf context;
    bool started = false, done = true;
    // What the fiber waits for: `*wait_on` moving past `wait_for`.
    const uint64_t* wait_on = nullptr;
    uint64_t wait_for = 0;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
    RaceThread race{};
    void* stack = nullptr;
    ucontext_t start;
};

struct Options {
    // 0: warps and lanes ascending; 1: descending; n > 1: a permutation seeded by n.
    unsigned order = 0;
};

struct Machine {
    Options options;
    Thread* current = nullptr;
    Dim3 grid, block_dim;
    jmp_buf scheduler;
    std::function<void()> body;
    std::vector<std::unique_ptr<Thread>> pool;
    unsigned grid_arrived = 0, grid_blocks = 0;
    uint64_t grid_generation = 0;
    uint64_t switches = 0;
    uint32_t launches = 0;
};
inline Machine the_machine;
inline Machine& machine() { return the_machine; }
inline Thread* current = nullptr;

__attribute__((noinline)) inline void yield_to_scheduler() {
    Thread* self = current;
    if (_setjmp(self->context) == 0) _longjmp(machine().scheduler, 1);
}

inline void fiber_main() {
    for (;;) {
        machine().body();
        current->done = true;
        yield_to_scheduler();
    }
}

inline void wait_past(const uint64_t* counter, uint64_t value) {
    Thread* self = current;
    self->wait_on = counter;
    self->wait_for = value;
    while (*counter <= value) yield_to_scheduler();
    self->wait_on = nullptr;
}

inline void sync_block() {
    Block* b = current->block;
    ++current->race.block_epoch;
    uint64_t g = b->generation;
    if (++b->arrived == b->threads) {
        b->arrived = 0;
        ++b->generation;
        return;
    }
    wait_past(&b->generation, g);
}

inline int sync_block_or(int predicate);

// Every lane deposits `bytes` of `mine`; all lanes then see the 32 deposits.
inline const unsigned char (*exchange(const void* mine, unsigned bytes, int op))[kSlotBytes] {
    Warp* w = current->warp;
    if (w->lanes != 32) fail("warp operation in a warp that is not full");
    uint64_t g = w->generation;
    int side = int(g & 1);
    if (w->arrived == 0) w->op[side] = op;
    if (w->op[side] != op) fail("lanes of one warp met in different warp operations");
    std::memcpy(w->slot[side][current->lane], mine, bytes);
    if (++w->arrived == 32) {
        w->arrived = 0;
        ++w->generation;
    } else {
        wait_past(&w->generation, g);
    }
    return w->slot[side];
}

inline void sync_warp() {
    char c = 0;
    exchange(&c, 1, 1);
}

template <class T>
inline T shfl(T v, int source) {
    auto all = exchange(&v, sizeof(T), 2);
    T r;
    std::memcpy(&r, all[source & 31], sizeof(T));
    return r;
}

// Grid barrier; the launch must be cooperative.
inline void sync_grid() {
    Machine& m = machine();
    if (!m.grid_blocks) fail("grid barrier in a launch that is not cooperative");
    sync_block();
    ++current->race.grid_epoch;
    uint64_t g = m.grid_generation;
    if (current->tid.x == 0) {
        if (++m.grid_arrived == m.grid_blocks) {
            m.grid_arrived = 0;
            ++m.grid_generation;
        } else {
            wait_past(&m.grid_generation, g);
        }
    }
    sync_block();
}

inline void finish_copies(size_t may_stay) {
    auto& g = current->groups;
    while (g.size() > may_stay) {
        for (const Copy& c : g.front()) {
            race_access(c.to, c.bytes + c.zero_fill, true, false);
            std::memcpy(c.to, c.from, c.bytes);
            std::memset(static_cast<char*>(c.to) + c.bytes, 0, c.zero_fill);
        }
        g.erase(g.begin());
    }
}

inline void permute(std::vector<unsigned>& v, unsigned n, unsigned order) {
    v.resize(n);
    for (unsigned i = 0; i < n; ++i) v[i] = order == 1 ? n - 1 - i : i;
    if (order > 1) {
        uint64_t s = order * 0x9E3779B97F4A7C15ull;
        for (unsigned i = n; i > 1; --i) {
            s = s * 6364136223846793005ull + 1442695040888963407ull;
            std::swap(v[i - 1], v[(s >> 33) % i]);
        }
    }
}

inline void run_blocks(std::vector<Block*>& blocks, unsigned threads) {
    Machine& m = machine();
    size_t total = blocks.size() * threads;
    while (m.pool.size() < total) {
        auto t = std::make_unique<Thread>();
        constexpr size_t kStack = 128 * 1024;
        t->stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (t->stack == MAP_FAILED) fail("no memory for a fiber stack");
        getcontext(&t->start);
        t->start.uc_stack.ss_sp = t->stack;
        t->start.uc_stack.ss_size = kStack;
        t->start.uc_link = nullptr;
        makecontext(&t->start, fiber_main, 0);
        m.pool.push_back(std::move(t));
    }
    for (size_t i = 0; i < total; ++i) {
        Thread& t = *m.pool[i];
        Block* b = blocks[i / threads];
        unsigned r = unsigned(i % threads);
        t.tid = Dim3(r, 0, 0);
        t.block = b;
        t.warp = &b->warps[r / 32];
        t.lane = r % 32;
        t.done = false;
        t.wait_on = nullptr;
        t.groups.clear();
        t.open.clear();
        t.race = RaceThread{m.launches, b->id.x + m.grid.x * (b->id.y + m.grid.y * b->id.z), r, unsigned(i / 32), 0, 0, 0, &b->met_others};
    }
    unsigned warps = unsigned(total / 32);
    std::vector<unsigned> warp_order, lane_order;
    permute(warp_order, warps, m.options.order);
    permute(lane_order, 32, m.options.order);
    size_t left = total;
    while (left) {
        bool moved = false;
        for (unsigned wi : warp_order) {
            bool warp_moved = true;
            while (warp_moved) {
                warp_moved = false;
                for (unsigned li : lane_order) {
                    Thread& t = *m.pool[size_t(wi) * 32 + li];
                    if (t.done || (t.wait_on && *t.wait_on <= t.wait_for)) continue;
                    current = &t;
#ifdef BITNET_RACES
                    race_now = &t.race;
#endif
                    ++m.switches;
                    if (_setjmp(m.scheduler) == 0) {
                        if (t.started) _longjmp(t.context, 1);
                        t.started = true;
                        setcontext(&t.start);
                    }
                    warp_moved = moved = true;
                    if (t.done) --left;
                }
            }
        }
#ifdef BITNET_RACES
        race_now = nullptr;
#endif
        if (!moved && left) fail("deadlock: threads wait at a barrier that others never reach");
    }
}

// Runs `body` once per thread. Blocks run one after another, or all at once if `cooperative`.
inline void launch(Dim3 grid, unsigned threads, size_t shared_bytes, bool cooperative, std::function<void()> body) {
    Machine& m = machine();
    if (threads == 0 || threads % 32 || threads > 1024) fail("a block must hold 32..1024 threads in whole warps");
    if (shared_bytes > 227 * 1024) fail("more shared memory than any supported chip has");
    m.grid = grid;
    m.block_dim = Dim3(threads);
    m.body = std::move(body);
    ++m.launches;
    std::vector<Block> blocks(size_t(grid.x) * grid.y * grid.z);
    // Shared memory ends at a page that cannot be touched, as large as asked and no larger.
    constexpr size_t kPage = 4096;
    size_t span = ((shared_bytes + 15) / 16 * 16 + kPage - 1) / kPage * kPage;
    size_t count = cooperative ? blocks.size() : 1;
    unsigned char* arena = static_cast<unsigned char*>(
        mmap(nullptr, count * (span + kPage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (arena == MAP_FAILED) fail("no memory for shared memory");
    for (size_t i = 0; i < count; ++i) mprotect(arena + i * (span + kPage) + span, kPage, PROT_NONE);
    race_track(arena, count * (span + kPage));
    m.grid_arrived = 0;
    m.grid_generation = 0;
    m.grid_blocks = cooperative ? unsigned(blocks.size()) : 0;
    std::vector<unsigned> order;
    permute(order, unsigned(blocks.size()), m.options.order);
    std::vector<Block*> now;
    for (size_t n = 0; n < order.size(); ++n) {
        Block& b = blocks[order[n]];
        unsigned i = order[n];
        b.id = Dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        b.threads = threads;
        b.warps.resize(threads / 32);
        for (Warp& w : b.warps) w.lanes = 32;
        b.shared_bytes = (shared_bytes + 15) / 16 * 16;
        size_t slot = cooperative ? n : 0;
        b.shared = arena + slot * (span + kPage) + span - (shared_bytes + 15) / 16 * 16;
        std::memset(b.shared, 0xFB, (shared_bytes + 15) / 16 * 16);  // poison: large negative floats
        now.push_back(&b);
        if (!cooperative) {
            race_forget(arena);
            run_blocks(now, threads);
            now.clear();
            b.warps.clear();
        }
    }
    if (cooperative) run_blocks(now, threads);
    race_untrack(arena);
    munmap(arena, count * (span + kPage));
}

}  // namespace emu

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
