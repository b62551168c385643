// Data-race detection for emulated kernels. The sources are compiled with -fsanitize=thread, which makes the
// compiler call a hook at every memory access; the hooks (races.cpp, linked instead of the sanitizer's run time)
// look only at shared memory and at the tests' buffers.
//
// Two accesses to a byte by different threads of one block, one of them a write, must be ordered by a block
// barrier, or within a warp by sync_warp. Shuffles and mma order nothing. Atomics do not race with each other.
// Across blocks of a launch, a conflicting access is accepted only after the later block has met the earlier one
// through an atomic.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emu {

// Who is running now; null outside kernels.
struct RaceThread {
    uint32_t launch, block, thread, warp;
    uint32_t block_epoch, warp_epoch, grid_epoch;
    const bool* met_others;
};

#ifdef BITNET_RACES
extern RaceThread* race_now;
void race_track(const void* begin, size_t bytes);
void race_untrack(const void* begin);
void race_forget(const void* begin);
void race_access(const void* p, size_t bytes, bool write, bool atomic);
int race_count();
#else
inline void race_track(const void*, size_t) {}
inline void race_untrack(const void*) {}
inline void race_forget(const void*) {}
inline void race_access(const void*, size_t, bool, bool) {}
inline int race_count() { return 0; }
#endif

}  // namespace emu
