// Opens the Metal library the way the host side does: every kernel of the sources can be launched by name, one launch gives
// what it must, and nonsense is refused.
//   metal_library_check LIBRARY kernel names...
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>

int main(int argc, char** argv) {
    void* library = argc > 1 ? dlopen(argv[1], RTLD_NOW) : nullptr;
    if (!library) {
        std::fprintf(stderr, "metal_library_check: %s\n", argc > 1 ? dlerror() : "no library named");
        return 1;
    }
    auto has = reinterpret_cast<int (*)(const char*)>(dlsym(library, "bitnet_metal_has"));
    auto launch = reinterpret_cast<int (*)(const char*, void* const*, const size_t*, uint32_t, const uint32_t*, const uint32_t*, const uint32_t*)>(
        dlsym(library, "bitnet_metal_launch"));
    int failures = argc < 3;
    for (int i = 2; i < argc; ++i)
        if (!has(argv[i])) {
            std::fprintf(stderr, "metal_library_check: %s is compiled but cannot be launched by name\n", argv[i]);
            ++failures;
        }
    // One row of 7 codes 0,1,2,0,1,2,0.
    alignas(16) uint8_t codes[16] = {0 | 1 << 2 | 2 << 4 | 0 << 6, 1 | 2 << 2 | 0 << 4};
    alignas(16) static uint32_t packed[256];
    int32_t params[5] = {1, 7, 2, 0, 0};
    void* buffers[3] = {codes, packed, params};
    size_t sizes[3] = {2, sizeof packed, sizeof params};
    uint32_t none = 0, most = 32784, one[3] = {1, 1, 1}, zero[3] = {0, 1, 1}, threads[3] = {256, 1, 1}, odd[3] = {33, 1, 1};
    auto expect = [&](int code, int got, const char* what) {
        if (got == code) return;
        std::fprintf(stderr, "metal_library_check: %s: %d, want %d\n", what, got, code);
        ++failures;
    };
    expect(0, launch("bitnet_pack", buffers, sizes, 3, &none, one, threads), "a launch");
    if (packed[0] != 0x00020100u || packed[4] != 0x00000201u) ++failures;  // lane 0: columns 0..3, lane 1: columns 4..6
    expect(1, launch("no_such_kernel", buffers, sizes, 3, &none, one, threads), "no such kernel");
    expect(2, launch("bitnet_pack", buffers, sizes, 3, &none, zero, threads), "an empty grid");
    expect(2, launch("bitnet_pack", buffers, sizes, 3, &none, one, odd), "half a simdgroup");
    expect(3, launch("bitnet_pack", buffers, sizes, 2, &none, one, threads), "a missing buffer");
    size_t wrong[3] = {2, sizeof packed, 16};
    expect(4, launch("bitnet_pack", buffers, wrong, 3, &none, one, threads), "parameters of another size");
    void* missing[3] = {codes, nullptr, params};
    expect(5, launch("bitnet_pack", missing, sizes, 3, &none, one, threads), "a null buffer");
    expect(6, launch("bitnet_pack", buffers, sizes, 3, &most, one, threads), "more than 32768 bytes of threadgroup memory");
    std::printf("%-28s %5d kernels  %s\n", "metal library", argc - 2, failures ? "FAILED" : "ok");
    return failures != 0;
}
