// The hooks of races.h. Compiled without the sanitizer: it must not watch itself.
#include "races.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace emu {

RaceThread* race_now = nullptr;

namespace {

struct Access {
    uint32_t launch = 0, block = 0, thread = 0, warp = 0, block_epoch = 0, warp_epoch = 0, grid_epoch = 0;
    bool atomic = false;
};
struct Cell {
    Access write, read, other_read;  // two readers of different threads are enough to find any conflict
};
struct Region {
    const unsigned char *begin, *end;
    std::vector<Cell> cells;
};
std::vector<Region*> regions;
Region* last = nullptr;
int found = 0;

Region* region_of(const unsigned char* p) {
    if (last && p >= last->begin && p < last->end) return last;
    for (Region* r : regions)
        if (p >= r->begin && p < r->end) return last = r;
    return nullptr;
}

bool ordered(const Access& before, const RaceThread& now) {
    if (before.launch != now.launch) return true;
    if (before.block != now.block) return before.grid_epoch < now.grid_epoch || *now.met_others;
    if (before.thread == now.thread || before.block_epoch < now.block_epoch) return true;
    return before.warp == now.warp && before.warp_epoch < now.warp_epoch;
}

void report(const Access& before, const RaceThread& now, const char* what) {
    if (++found <= 5)
        std::fprintf(stderr, "race: %s, block %u thread %u then block %u thread %u, no barrier between\n", what, before.block,
                     before.thread, now.block, now.thread);
}

}  // namespace

void race_track(const void* begin, size_t bytes) {
    auto p = static_cast<const unsigned char*>(begin);
    regions.push_back(new Region{p, p + bytes, {}});
}
void race_untrack(const void* begin) {
    for (size_t i = 0; i < regions.size(); ++i)
        if (regions[i]->begin == begin) {
            delete regions[i];
            regions[i] = regions.back();
            regions.pop_back();
            break;
        }
    last = nullptr;
}
void race_forget(const void* begin) {
    for (Region* r : regions)
        if (r->begin == begin) r->cells.clear();
}
void race_access(const void* at, size_t bytes, bool write, bool atomic) {
    if (!race_now) return;
    auto p = static_cast<const unsigned char*>(at);
    Region* r = region_of(p);
    if (!r) return;
    if (r->cells.empty()) r->cells.resize(size_t(r->end - r->begin));
    const RaceThread& t = *race_now;
    Access now{t.launch, t.block, t.thread, t.warp, t.block_epoch, t.warp_epoch, t.grid_epoch, atomic};
    for (size_t i = 0; i < bytes && p + i < r->end; ++i) {
        Cell& c = r->cells[size_t(p + i - r->begin)];
        if (!(atomic && c.write.atomic) && !ordered(c.write, t)) {
            report(c.write, t, write ? "write after write" : "read after write");
            return;
        }
        if (write) {
            if (!(atomic && c.read.atomic) && !ordered(c.read, t)) return report(c.read, t, "write after read");
            if (!(atomic && c.other_read.atomic) && !ordered(c.other_read, t)) return report(c.other_read, t, "write after read");
            c.write = now;
        } else {
            if (c.read.thread != now.thread || c.read.block != now.block) c.other_read = c.read;
            c.read = now;
        }
    }
}
int race_count() { return found; }

}  // namespace emu

extern "C" {
#define HOOK(N)                                                                    \
    void __tsan_read##N(void* p) { emu::race_access(p, N, false, false); }         \
    void __tsan_write##N(void* p) { emu::race_access(p, N, true, false); }
#define UNALIGNED(N)                                                               \
    void __tsan_unaligned_read##N(void* p) { emu::race_access(p, N, false, false); } \
    void __tsan_unaligned_write##N(void* p) { emu::race_access(p, N, true, false); }
HOOK(1)
HOOK(2)
HOOK(4)
HOOK(8)
HOOK(16)
UNALIGNED(2)
UNALIGNED(4)
UNALIGNED(8)
UNALIGNED(16)
void __tsan_volatile_read4(void*) {}
void __tsan_volatile_write4(void*) {}
void __tsan_read_range(void* p, size_t n) { emu::race_access(p, n, false, false); }
void __tsan_write_range(void* p, size_t n) { emu::race_access(p, n, true, false); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
