// The machine on which the emulators of CUDA (cuda.h) and Metal (metal.h) run kernels.
//
// One fiber per GPU thread. A fiber runs until it must wait for others (block barrier, warp
// operation, grid barrier) and is resumed when the rendezvous is complete. Between two
// rendezvous points a warp runs alone and to the end, in an order that `Options::order`
// permutes: a missing barrier therefore shows as a wrong result, not as a lucky one.
// Asynchronous copies are carried out as late as the program allows, at the wait, for the same reason.
//
// Switching uses _setjmp/_longjmp (no system call); makecontext only creates the stacks.
// Names are CUDA's; a Metal threadgroup is a block here and a simdgroup a warp, of `Options::width` lanes.
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

#define BITNET_BUG (emu::planted_bug)

namespace emu {

// The defect that the kernels run with: BITNET_BUG in the environment.
inline const int planted_bug = std::getenv("BITNET_BUG") ? std::atoi(std::getenv("BITNET_BUG")) : 0;

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
constexpr unsigned kMostLanes = 64;

struct Warp {
    unsigned lanes = 0, arrived = 0;
    uint64_t generation = 0;
    int op[2] = {0, 0};
    alignas(16) unsigned char slot[2][kMostLanes][kSlotBytes];
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
    // Lanes of a warp: 32 on every GPU supported, others to prove that a kernel does not depend on it. At most 64.
    unsigned width = 32;
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

// Every lane deposits `bytes` of `mine`; all lanes then see all deposits.
inline const unsigned char (*exchange(const void* mine, unsigned bytes, int op))[kSlotBytes] {
    Warp* w = current->warp;
    uint64_t g = w->generation;
    int side = int(g & 1);
    if (w->arrived == 0) w->op[side] = op;
    if (w->op[side] != op) fail("lanes of one warp met in different warp operations");
    std::memcpy(w->slot[side][current->lane], mine, bytes);
    if (++w->arrived == w->lanes) {
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
    std::memcpy(&r, all[source & (machine().options.width - 1)], sizeof(T));
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
    unsigned width = m.options.width;
    for (size_t i = 0; i < total; ++i) {
        Thread& t = *m.pool[i];
        Block* b = blocks[i / threads];
        unsigned r = unsigned(i % threads);
        t.tid = Dim3(r, 0, 0);
        t.block = b;
        t.warp = &b->warps[r / width];
        t.lane = r % width;
        t.done = false;
        t.wait_on = nullptr;
        t.groups.clear();
        t.open.clear();
        t.race = RaceThread{m.launches, b->id.x + m.grid.x * (b->id.y + m.grid.y * b->id.z), r, unsigned(i / width), 0, 0, 0, &b->met_others};
    }
    unsigned warps = unsigned(total / width);
    std::vector<unsigned> warp_order, lane_order;
    permute(warp_order, warps, m.options.order);
    permute(lane_order, width, m.options.order);
    size_t left = total;
    while (left) {
        bool moved = false;
        for (unsigned wi : warp_order) {
            bool warp_moved = true;
            while (warp_moved) {
                warp_moved = false;
                for (unsigned li : lane_order) {
                    Thread& t = *m.pool[size_t(wi) * width + li];
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
    unsigned width = m.options.width;
    if (threads == 0 || threads % width || threads > 1024) fail("a block must hold 32..1024 threads in whole warps");
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
        b.warps.resize(threads / width);
        for (Warp& w : b.warps) w.lanes = width;
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
