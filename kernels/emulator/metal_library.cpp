// The Metal kernels as a shared library: launches by name with bound buffers, as a command encoder would, so that the host side
// can be run where there is no Mac. kernels/README.md, "Metal: launch interface", describes the call.
//
//   g++ -std=c++20 -O2 -DBITNET_EMULATOR -U_FORTIFY_SOURCE -w -shared -fPIC -o libbitnet_metal.so kernels/emulator/metal_library.cpp
#include <mutex>

#include "metal_kernels.h"

namespace {

struct Entry {
    const char* name;
    emu::Signature signature;
    void (*run)(const std::vector<void*>& bound, emu::Dim3 grid, unsigned threads, unsigned shared_bytes);
};
#define BITNET_ENTRY(NAME)                                                                                      \
    {#NAME, emu::signature(NAME), [](const std::vector<void*>& bound, emu::Dim3 grid, unsigned threads, unsigned shared_bytes) { \
         emu::dispatch(NAME, bound, grid, threads, shared_bytes);                                               \
     }},
const Entry entries[] = {BITNET_METAL_KERNELS(BITNET_ENTRY)};

const Entry* find(const char* name) {
    for (const Entry& e : entries)
        if (std::strcmp(e.name, name) == 0) return &e;
    return nullptr;
}

// With BITNET_METAL_GUARD=1 a launch works on copies of its buffers, each of which ends at a page that must not be touched: a host
// that binds a buffer too short ends with a memory fault, as a test should. Overlapping ranges share one copy.
class Guarded {
   public:
    Guarded(void* const* buffers, const size_t* sizes, uint32_t n) : bound(buffers, buffers + n) {
        std::vector<Range> ranges;
        for (uint32_t i = 0; i < n; ++i) {
            auto p = static_cast<unsigned char*>(buffers[i]);
            ranges.push_back({p, p + sizes[i], nullptr, 0});
        }
        std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
        for (const Range& r : ranges)
            if (!copies_.empty() && r.begin < copies_.back().end)
                copies_.back().end = std::max(copies_.back().end, r.end);
            else
                copies_.push_back(r);
        constexpr size_t kPage = 4096;
        for (Range& r : copies_) {
            // The copy's end must keep the alignment of its beginning.
            size_t bytes = (size_t(r.end - r.begin) + 15) / 16 * 16;
            r.span = (bytes + kPage - 1) / kPage * kPage + kPage;
            r.base = static_cast<unsigned char*>(mmap(nullptr, r.span, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
            if (r.base == MAP_FAILED) emu::fail("no memory for a guarded buffer");
            mprotect(r.base + r.span - kPage, kPage, PROT_NONE);
            std::memcpy(copy_of(r), r.begin, size_t(r.end - r.begin));
        }
        for (void*& b : bound)
            for (const Range& r : copies_) {
                auto p = static_cast<unsigned char*>(b);
                if (p >= r.begin && p < r.end) {
                    b = copy_of(r) + (p - r.begin);
                    break;
                }
            }
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() {
        for (const Range& r : copies_) {
            size_t bytes = size_t(r.end - r.begin);
            if (std::memcmp(r.begin, copy_of(r), bytes)) std::memcpy(r.begin, copy_of(r), bytes);  // it may be mapped for reading
            munmap(r.base, r.span);
        }
    }
    std::vector<void*> bound;

   private:
    struct Range {
        unsigned char *begin, *end, *base;
        size_t span;
    };
    static unsigned char* copy_of(const Range& r) { return r.base + r.span - 4096 - (size_t(r.end - r.begin) + 15) / 16 * 16; }
    std::vector<Range> copies_;
};

}  // namespace

extern "C" {

// 1 if the library has a kernel of this name.
int bitnet_metal_has(const char* name) { return find(name) != nullptr; }

// 0: done. 1: no such kernel. 2: an impossible grid or thread count. 3: wrong number of buffers. 4: parameters of another size.
// 5: a null or misaligned buffer. 6: too much threadgroup memory, or none where the kernel has some.
int bitnet_metal_launch(const char* name, void* const* buffers, const size_t* sizes, uint32_t n, const uint32_t* threadgroup_memory,
                        const uint32_t* grid, const uint32_t* threads) {
    const Entry* e = find(name);
    if (!e) return 1;
    uint64_t all = uint64_t(threads[0]) * threads[1] * threads[2];
    if (!grid[0] || !grid[1] || !grid[2] || !all || all > 1024 || all % 32 || threads[0] != all) return 2;
    if (n != e->signature.buffers) return 3;
    if (sizes[n - 1] != e->signature.params) return 4;
    for (uint32_t i = 0; i < n; ++i)
        if (!buffers[i] || reinterpret_cast<uintptr_t>(buffers[i]) % 4) return 5;
    uint32_t shared = threadgroup_memory ? threadgroup_memory[0] : 0;
    if (shared > emu::kThreadgroupMemory || shared % 16 || (e->signature.shared && shared == 0)) return 6;
    static std::mutex one_at_a_time;
    std::lock_guard<std::mutex> hold(one_at_a_time);
    static const bool guard = std::getenv("BITNET_METAL_GUARD") != nullptr;
    emu::Dim3 groups(grid[0], grid[1], grid[2]);
    if (guard)
        e->run(Guarded(buffers, sizes, n).bound, groups, unsigned(all), shared);
    else
        e->run(std::vector<void*>(buffers, buffers + n), groups, unsigned(all), shared);
    return 0;
}

// Order of simdgroups, lanes and threadgroups in later launches: 0 ascending, 1 descending, n a permutation.
void bitnet_metal_order(unsigned order) { emu::machine().options.order = order; }
}
