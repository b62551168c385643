// Opens the emulator library the way the host side does: every kernel that it exports can be launched by name, one
// launch gives what it must, and nonsense is refused.
//   library_check LIBRARY kernel names...
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

int main(int argc, char** argv) {
    void* library = argc > 1 ? dlopen(argv[1], RTLD_NOW) : nullptr;
    if (!library) {
        std::fprintf(stderr, "library_check: %s\n", argc > 1 ? dlerror() : "no library named");
        return 1;
    }
    auto has = reinterpret_cast<int (*)(const char*)>(dlsym(library, "bitnet_emulator_has"));
    auto launch = reinterpret_cast<int (*)(const char*, unsigned, unsigned, unsigned, unsigned, unsigned, void**)>(dlsym(library, "bitnet_emulator_launch"));
    int failures = 0;
    for (int i = 2; i < argc; ++i)
        if (!has(argv[i])) {
            std::fprintf(stderr, "library_check: %s is compiled but cannot be launched by name\n", argv[i]);
            ++failures;
        }
    // One row of 7 codes 0,1,2,0,1,2,0.
    uint8_t codes[2] = {0 | 1 << 2 | 2 << 4 | 0 << 6, 1 | 2 << 2 | 0 << 4};
    alignas(16) static uint32_t packed[256];
    const uint8_t* c = codes;
    uint32_t* p = packed;
    int rows = 1, cols = 7, row_bytes = 2, row0 = 0, map = 0;
    void* arguments[] = {&c, &p, &rows, &cols, &row_bytes, &row0, &map};
    failures += launch("bitnet_pack", 1, 1, 1, 256, 0, arguments) != 0;
    failures += packed[0] != 0x00020100u || packed[4] != 0x00000201u;  // lane 0: columns 0..3, lane 1: columns 4..6
    failures += launch("no_such_kernel", 1, 1, 1, 32, 0, arguments) != 1;
    failures += launch("bitnet_pack", 1, 1, 1, 33, 0, arguments) != 2;
    std::printf("%-28s %5d kernels  %s\n", "library", argc - 2, failures ? "FAILED" : "ok");
    return failures != 0;
}
