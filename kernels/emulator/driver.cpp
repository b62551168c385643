// A CUDA driver whose GPU is the emulator, so that the program built with `--features cuda` runs, from candle's device to
// captured graphs, where there is no GPU. It implements what this project and candle use of libcuda, and as much of cuBLAS
// and cuRAND as opening a device takes; candle's own kernels do not exist on it.
//
// It is strict where a GPU would be silent:
//   - work of a stream runs when somebody waits for it, not when it is enqueued: what the host frees or changes too early shows;
//   - new memory holds NaN bit patterns; an allocation ends at a page that must not be touched; freed memory is unmapped;
//   - while a stream is being captured, allocating, freeing, copying from the host or waiting is an error;
//   - shared memory above 48 kB must have been asked for, and fit the chip.
// Environment: BITNET_EMULATED_CHIP 75, 80, 86, 89 or 90 (default 90); BITNET_EMULATED_DEVICES, how many (default 1);
// BITNET_EMULATED_MEMORY, bytes of a device (default 4 GB); BITNET_EMULATED_FAULT=N, the N-th launch breaks the device.
//
//   g++ -std=c++20 -O2 -DBITNET_EMULATOR -U_FORTIFY_SOURCE -shared -fPIC -o libcuda.so.1 kernels/emulator/driver.cpp
#include "library.cpp"

#include <sys/mman.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <thread>

namespace {

enum Result {
    kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3, kNoDevice = 100, kInvalidDevice = 101,
    kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500, kNotReady = 600, kLaunchFailed = 719, kNotSupported = 801,
    kCaptureUnsupported = 900, kCaptureInvalidated = 901,
};
struct ResultText { int code; const char* name; const char* text; };
const ResultText result_texts[] = {
    {kSuccess, "CUDA_SUCCESS", "no error"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {kNoDevice, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {kNotFound, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {kNotReady, "CUDA_ERROR_NOT_READY", "device not ready"},
    {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {kNotSupported, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {kCaptureInvalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
};

size_t setting(const char* name, size_t fallback) {
    const char* text = std::getenv(name);
    return text && *text ? std::strtoull(text, nullptr, 10) : fallback;
}

struct Chip { int capability, sms; size_t shared_opt_in, shared_sm, l2; };
const Chip chips[] = {
    {75, 40, 64 << 10, 64 << 10, 4 << 20},     {80, 108, 163 << 10, 164 << 10, 40 << 20}, {86, 84, 99 << 10, 100 << 10, 6 << 20},
    {89, 128, 99 << 10, 100 << 10, 72 << 20}, {90, 132, 227 << 10, 228 << 10, 50 << 20},
};
const Chip& chip() {
    static const Chip found = [] {
        int wanted = int(setting("BITNET_EMULATED_CHIP", 90));
        for (const Chip& c : chips)
            if (c.capability == wanted) return c;
        Chip c = chips[0];  // an unsupported chip, to see it refused
        c.capability = wanted;
        return c;
    }();
    return found;
}

// One lock for everything: the emulator runs one launch at a time anyway.
std::recursive_mutex driver_mutex;
using Hold = std::lock_guard<std::recursive_mutex>;
bool initialized = false;
int broken = kSuccess;  // after a fault every call answers it
size_t launches = 0;
thread_local int current_context = 0;

constexpr size_t kPage = 4096, kAlign = 256;
struct Allocation { size_t bytes; char* map; size_t map_bytes; };
std::map<uintptr_t, Allocation> allocations;  // by device address
std::map<uintptr_t, Allocation> pinned;
size_t used = 0;

bool allocate(size_t bytes, std::map<uintptr_t, Allocation>& list, uintptr_t* address) {
    size_t rounded = (bytes + kAlign - 1) / kAlign * kAlign, span = (rounded + kPage - 1) / kPage * kPage;
    char* map = static_cast<char*>(mmap(nullptr, span + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map == MAP_FAILED) return false;
    mprotect(map + span, kPage, PROT_NONE);
    char* start = map + span - rounded;
    std::memset(start, 0xFF, rounded);
    *address = reinterpret_cast<uintptr_t>(start);
    list[*address] = {bytes, map, span + kPage};
    return true;
}
bool release(uintptr_t address, std::map<uintptr_t, Allocation>& list) {
    auto found = list.find(address);
    if (found == list.end()) return false;
    munmap(found->second.map, found->second.map_bytes);
    list.erase(found);
    return true;
}
bool holds(const std::map<uintptr_t, Allocation>& list, uintptr_t address, size_t bytes) {
    auto next = list.upper_bound(address);
    if (next == list.begin()) return false;
    auto found = std::prev(next);
    return address + bytes <= found->first + found->second.bytes;
}

using Work = std::function<void()>;
struct Stream {
    std::deque<Work> pending;
    std::vector<Work> captured;
    bool capturing = false, spoiled = false;
    int mode = 0;                // of the capture: 0 global, 1 thread-local, 2 relaxed
    std::thread::id captured_by;

    void drain() {
        while (!pending.empty()) {
            Work w = std::move(pending.front());
            pending.pop_front();
            w();
        }
    }
    int enqueue(Work w) {
        if (broken) return broken;
        if (capturing)
            captured.push_back(std::move(w));
        else
            pending.push_back(std::move(w));
        if (pending.size() > 4096) drain();
        return broken;
    }
    // For what must not happen during capture.
    int refuse() {
        if (capturing) spoiled = true;
        return capturing ? kCaptureUnsupported : broken;
    }
};
Stream default_stream;
std::vector<Stream*> streams;
Stream& of(void* handle) { return reinterpret_cast<uintptr_t>(handle) <= 2 ? default_stream : *static_cast<Stream*>(handle); }
void drain_all() {
    default_stream.drain();
    for (Stream* s : streams) s->drain();
}
// For what waits for a whole context.
int refuse_any() {
    for (Stream* s : streams)
        if (int r = s->refuse()) return r;
    return default_stream.refuse();
}
// For calls that are "potentially unsafe" during capture: whom they concern is the mode's to say.
int refuse_unsafe() {
    for (Stream* s : streams)
        if (s->mode == 0 || (s->mode == 1 && s->captured_by == std::this_thread::get_id()))
            if (int r = s->refuse()) return r;
    return broken;
}

struct Event { std::chrono::steady_clock::time_point at; };
struct Module { int dummy; };
struct Function { const Entry* entry; size_t shared_limit; };
struct Graph { std::vector<Work> work; };

}  // namespace

extern "C" {

#define API int __attribute__((visibility("default")))
typedef unsigned long long DevicePtr;

API cuInit(unsigned) {
    if (setting("BITNET_EMULATED_DEVICES", 1) == 0) return kNoDevice;
    initialized = true;
    return kSuccess;
}
API cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
API cuGetErrorName(int code, const char** text) {
    for (const ResultText& r : result_texts)
        if (r.code == code) return *text = r.name, kSuccess;
    return *text = nullptr, kInvalidValue;
}
API cuGetErrorString(int code, const char** text) {
    for (const ResultText& r : result_texts)
        if (r.code == code) return *text = r.text, kSuccess;
    return *text = nullptr, kInvalidValue;
}

// ---- devices and contexts
API cuDeviceGetCount(int* count) { return *count = int(setting("BITNET_EMULATED_DEVICES", 1)), initialized ? kSuccess : kNotInitialized; }
API cuDeviceGet(int* device, int ordinal) {
    if (!initialized) return kNotInitialized;
    if (ordinal < 0 || size_t(ordinal) >= setting("BITNET_EMULATED_DEVICES", 1)) return kInvalidDevice;
    return *device = ordinal, kSuccess;
}
API cuDeviceGetName(char* name, int length, int) {
    std::snprintf(name, size_t(length), "emulator %d.%d", chip().capability / 10, chip().capability % 10);
    return kSuccess;
}
API cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = setting("BITNET_EMULATED_MEMORY", size_t(4) << 30), kSuccess; }
API cuDeviceGetAttribute(int* value, int attribute, int) {
    const Chip& c = chip();
    switch (attribute) {
        case 1: *value = 1024; break;                       // threads of a block
        case 8: *value = 48 << 10; break;                   // shared memory of a block
        case 10: *value = 32; break;                        // warp
        case 13: *value = 1500000; break;                   // clock, kHz
        case 16: *value = c.sms; break;
        case 36: *value = 2600000; break;                   // memory clock, kHz
        case 37: *value = 5120; break;                      // bus width
        case 38: *value = int(c.l2); break;
        case 75: *value = c.capability / 10; break;
        case 76: *value = c.capability % 10; break;
        case 81: *value = int(c.shared_sm); break;
        case 97: *value = int(c.shared_opt_in); break;
        case 115: *value = 1; break;                        // memory pools
        default: return kInvalidValue;
    }
    return kSuccess;
}
API cuDevicePrimaryCtxRetain(void** context, int device) { return *context = reinterpret_cast<void*>(uintptr_t(device) + 1), kSuccess; }
API cuDevicePrimaryCtxRelease_v2(int) { return kSuccess; }
API cuCtxDestroy_v2(void*) { return kSuccess; }
API cuCtxGetCurrent(void** context) { return *context = reinterpret_cast<void*>(uintptr_t(current_context)), kSuccess; }
API cuCtxSetCurrent(void* context) { return current_context = int(reinterpret_cast<uintptr_t>(context)), kSuccess; }
API cuCtxSynchronize() {
    Hold hold(driver_mutex);
    if (int r = refuse_any()) return r;
    drain_all();
    return broken;
}
API cuCtxSetFlags(unsigned) { return kSuccess; }

// ---- memory
API cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    Hold hold(driver_mutex);
    cuDeviceTotalMem_v2(total, 0);
    *free_bytes = *total - used;
    return broken;
}
static int allocate_device(DevicePtr* address, size_t bytes) {
    size_t total;
    cuDeviceTotalMem_v2(&total, 0);
    if (bytes == 0) return kInvalidValue;
    uintptr_t a;
    if (bytes > total - used || !allocate(bytes, allocations, &a)) return kOutOfMemory;
    used += bytes;
    return *address = a, kSuccess;
}
static void free_device(DevicePtr address) {
    auto found = allocations.find(address);
    if (found == allocations.end()) {
        std::fprintf(stderr, "emulated driver: freeing what is not allocated\n");
        std::abort();
    }
    used -= found->second.bytes;
    release(address, allocations);
}
API cuMemAlloc_v2(DevicePtr* address, size_t bytes) {
    Hold hold(driver_mutex);
    if (int r = refuse_unsafe()) return r;
    return allocate_device(address, bytes);
}
API cuMemAllocAsync(DevicePtr* address, size_t bytes, void* stream) {
    Hold hold(driver_mutex);
    if (int r = of(stream).refuse()) return r;
    return allocate_device(address, bytes);
}
API cuMemFree_v2(DevicePtr address) {
    Hold hold(driver_mutex);
    if (int r = refuse_unsafe()) return r;
    drain_all();
    free_device(address);
    return kSuccess;
}
API cuMemFreeAsync(DevicePtr address, void* stream) {
    Hold hold(driver_mutex);
    if (int r = of(stream).refuse()) return r;
    return of(stream).enqueue([=] { free_device(address); });
}
API cuMemHostAlloc(void** address, size_t bytes, unsigned) {
    Hold hold(driver_mutex);
    uintptr_t a;
    if (!allocate(bytes, pinned, &a)) return kOutOfMemory;
    return *address = reinterpret_cast<void*>(a), kSuccess;
}
API cuMemFreeHost(void* address) {
    Hold hold(driver_mutex);
    drain_all();
    return release(reinterpret_cast<uintptr_t>(address), pinned) ? kSuccess : kInvalidValue;
}
static bool is_device(DevicePtr address, size_t bytes) { return holds(allocations, address, bytes); }
API cuMemcpyHtoDAsync_v2(DevicePtr to, const void* from, size_t bytes, void* stream) {
    Hold hold(driver_mutex);
    if (!is_device(to, bytes)) return kInvalidValue;
    void* target = reinterpret_cast<void*>(to);
    if (holds(pinned, reinterpret_cast<uintptr_t>(from), bytes)) return of(stream).enqueue([=] { std::memcpy(target, from, bytes); });
    // Pageable memory is staged before the call returns; its address is worthless in a graph.
    if (int r = of(stream).refuse()) return r;
    auto staged = std::make_shared<std::string>(static_cast<const char*>(from), bytes);
    return of(stream).enqueue([=] { std::memcpy(target, staged->data(), bytes); });
}
API cuMemcpyDtoHAsync_v2(void* to, DevicePtr from, size_t bytes, void* stream) {
    Hold hold(driver_mutex);
    if (!is_device(from, bytes)) return kInvalidValue;
    const void* source = reinterpret_cast<const void*>(from);
    if (holds(pinned, reinterpret_cast<uintptr_t>(to), bytes)) return of(stream).enqueue([=] { std::memcpy(to, source, bytes); });
    if (int r = of(stream).refuse()) return r;
    of(stream).drain();
    if (broken) return broken;
    std::memcpy(to, source, bytes);
    return kSuccess;
}
API cuMemcpyDtoDAsync_v2(DevicePtr to, DevicePtr from, size_t bytes, void* stream) {
    Hold hold(driver_mutex);
    if (!is_device(to, bytes) || !is_device(from, bytes)) return kInvalidValue;
    return of(stream).enqueue([=] { std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes); });
}
API cuMemcpyHtoD_v2(DevicePtr to, const void* from, size_t bytes) { return cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr); }
API cuMemcpyDtoH_v2(void* to, DevicePtr from, size_t bytes) {
    Hold hold(driver_mutex);
    if (int r = refuse_any()) return r;
    drain_all();
    return cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr);
}
API cuMemcpyDtoD_v2(DevicePtr to, DevicePtr from, size_t bytes) { return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr); }
API cuMemcpyPeerAsync(DevicePtr to, void*, DevicePtr from, void*, size_t bytes, void* stream) { return cuMemcpyDtoDAsync_v2(to, from, bytes, stream); }
API cuMemsetD8Async(DevicePtr to, unsigned char value, size_t bytes, void* stream) {
    Hold hold(driver_mutex);
    if (!is_device(to, bytes)) return kInvalidValue;
    return of(stream).enqueue([=] { std::memset(reinterpret_cast<void*>(to), value, bytes); });
}
API cuMemsetD8_v2(DevicePtr to, unsigned char value, size_t bytes) { return cuMemsetD8Async(to, value, bytes, nullptr); }

// ---- streams and events
API cuStreamCreate(void** stream, unsigned) {
    Hold hold(driver_mutex);
    streams.push_back(new Stream);
    return *stream = streams.back(), kSuccess;
}
API cuStreamCreateWithPriority(void** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
API cuStreamDestroy_v2(void* stream) {
    Hold hold(driver_mutex);
    Stream& s = of(stream);
    s.drain();
    if (&s == &default_stream) return kSuccess;
    std::erase(streams, &s);
    delete &s;
    return kSuccess;
}
API cuStreamSynchronize(void* stream) {
    Hold hold(driver_mutex);
    if (int r = of(stream).refuse()) return r;
    of(stream).drain();
    return broken;
}
API cuStreamQuery(void* stream) { return cuStreamSynchronize(stream); }
API cuEventCreate(void** event, unsigned) { return *event = new Event{}, kSuccess; }
API cuEventDestroy_v2(void* event) {
    Hold hold(driver_mutex);
    drain_all();
    delete static_cast<Event*>(event);
    return kSuccess;
}
API cuEventRecord(void* event, void* stream) {
    Hold hold(driver_mutex);
    return of(stream).enqueue([=] { static_cast<Event*>(event)->at = std::chrono::steady_clock::now(); });
}
API cuEventSynchronize(void*) {
    Hold hold(driver_mutex);
    if (int r = refuse_any()) return r;
    drain_all();
    return broken;
}
API cuEventQuery(void* event) { return cuEventSynchronize(event); }
API cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
    auto span = static_cast<Event*>(end)->at - static_cast<Event*>(start)->at;
    *milliseconds = std::chrono::duration<float, std::milli>(span).count();
    return kSuccess;
}
API cuEventElapsedTime(float* milliseconds, void* start, void* end) { return cuEventElapsedTime_v2(milliseconds, start, end); }
API cuStreamWaitEvent(void* stream, void*, unsigned) {
    Hold hold(driver_mutex);
    if (int r = of(stream).refuse()) return r;
    drain_all();
    return broken;
}

// ---- kernels
API cuModuleLoadData(void** module, const void*) { return *module = new Module{}, kSuccess; }
API cuModuleLoad(void** module, const char*) { return cuModuleLoadData(module, nullptr); }
API cuModuleUnload(void* module) { return delete static_cast<Module*>(module), kSuccess; }
API cuModuleGetFunction(void** function, void*, const char* name) {
    Hold hold(driver_mutex);
    static std::map<std::string, std::unique_ptr<Function>> functions;
    const Entry* entry = find(name);
    if (!entry) return kNotFound;
    auto& f = functions[name];
    if (!f) f.reset(new Function{entry, 48 << 10});
    return *function = f.get(), kSuccess;
}
API cuModuleGetGlobal_v2(DevicePtr*, size_t*, void*, const char*) { return kNotFound; }
API cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != 8) return kSuccess;
    if (size_t(value) > chip().shared_opt_in) return kInvalidValue;
    return static_cast<Function*>(function)->shared_limit = size_t(value), kSuccess;
}
API cuFuncGetAttribute(int* value, int attribute, void* function) {
    *value = attribute == 8 ? int(static_cast<Function*>(function)->shared_limit) : attribute == 0 ? 1024 : 0;
    return kSuccess;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int threads, size_t shared) {
    int by_threads = 2048 / threads, by_shared = shared ? int(chip().shared_sm / (shared + 1024)) : 32;
    *blocks = by_threads < by_shared ? by_threads : by_shared;
    return kSuccess;
}
static int launch(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream, void** arguments) {
    Hold hold(driver_mutex);
    auto* f = static_cast<Function*>(function);
    if (broken) return broken;
    size_t fault = setting("BITNET_EMULATED_FAULT", 0);
    if (fault && ++launches >= fault) return broken = kLaunchFailed;
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || by != 1 || bz != 1 || !bx || bx > 1024) return kInvalidValue;
    if (shared > f->shared_limit || shared > chip().shared_opt_in) return kInvalidValue;
    // Arguments are read now; what they point to when the kernel runs.
    std::function<void()> call = f->entry->make_call(arguments);
    return of(stream).enqueue([=] { emu::launch(emu::Dim3(gx, gy, gz), bx, shared, false, call); });
}
API cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream, void** arguments, void**) {
    return launch(function, gx, gy, gz, bx, by, bz, shared, stream, arguments);
}
struct LaunchAttribute { int id; char pad[4]; char value[64]; };
struct LaunchConfig { unsigned gx, gy, gz, bx, by, bz, shared; void* stream; LaunchAttribute* attributes; unsigned count; };
API cuLaunchKernelEx(const LaunchConfig* c, void* function, void** arguments, void**) {
    for (unsigned i = 0; i < c->count; ++i)  // programmatic stream serialization exists from 9.0 on
        if (c->attributes[i].id != 6 || chip().capability < 90) return kInvalidValue;
    return launch(function, c->gx, c->gy, c->gz, c->bx, c->by, c->bz, c->shared, c->stream, arguments);
}
API cuLaunchCooperativeKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**) { return kNotSupported; }

// ---- graphs
API cuStreamIsCapturing(void* stream, int* status) {
    Stream& s = of(stream);
    return *status = !s.capturing ? 0 : s.spoiled ? 2 : 1, kSuccess;
}
API cuStreamBeginCapture_v2(void* stream, int mode) {
    Hold hold(driver_mutex);
    Stream& s = of(stream);
    if (&s == &default_stream || s.capturing) return kCaptureUnsupported;
    s.capturing = true;
    s.spoiled = false;
    s.mode = mode;
    s.captured_by = std::this_thread::get_id();
    s.captured.clear();
    return broken;
}
API cuStreamEndCapture(void* stream, void** graph) {
    Hold hold(driver_mutex);
    Stream& s = of(stream);
    if (!s.capturing) return kInvalidValue;
    s.capturing = false;
    *graph = nullptr;
    if (s.spoiled) return kCaptureInvalidated;
    return *graph = new Graph{std::move(s.captured)}, kSuccess;
}
API cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) { return *executable = new Graph(*static_cast<Graph*>(graph)), kSuccess; }
API cuGraphUpload(void*, void*) { return kSuccess; }
API cuGraphLaunch(void* executable, void* stream) {
    Hold hold(driver_mutex);
    if (int r = of(stream).refuse()) return r;
    for (const Work& w : static_cast<Graph*>(executable)->work)
        if (int r = of(stream).enqueue(w)) return r;
    return kSuccess;
}
API cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), kSuccess; }
API cuGraphExecDestroy(void* executable) {
    Hold hold(driver_mutex);
    drain_all();
    return delete static_cast<Graph*>(executable), kSuccess;
}
}
