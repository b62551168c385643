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
    e->run(std::vector<void*>(buffers, buffers + n), emu::Dim3(grid[0], grid[1], grid[2]), unsigned(all), shared);
    return 0;
}

// Order of simdgroups, lanes and threadgroups in later launches: 0 ascending, 1 descending, n a permutation.
void bitnet_metal_order(unsigned order) { emu::machine().options.order = order; }
}
