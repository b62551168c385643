// What the kernel suites share: device buffers, launches, random numbers, counting. Built by g++ against the
// emulator (-DBITNET_EMULATOR) and by nvcc for a real GPU; the suites do not know which. With BITNET_METAL for Metal's
// kernels, which run in the emulator only.
#pragma once
#ifndef BITNET_METAL
#include "../../kernels/cuda/intrinsics.cuh"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#ifdef BITNET_EMULATOR
#include <signal.h>
#include <unistd.h>
#ifdef BITNET_METAL
#include <memory>

#include "../../kernels/metal/common.metal"  // its words for address spaces would disturb C++ headers that come later
#endif
#else
#include <cuda_runtime.h>
#endif

namespace harness {

struct Random {
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15ull + 0xD1B54A32D192ED03ull) { next(); }
    uint64_t next() {
        uint64_t z = (state += 0x9E3779B97F4A7C15ull);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    }
    int below(int n) { return int(next() % uint64_t(n)); }
    int between(int lo, int hi) { return lo + below(hi - lo + 1); }
    float uniform() { return float(next() >> 40) * (1.0f / (1 << 24)); }
    float normal() {
        float u = uniform() + 1e-7f, v = uniform();
        return std::sqrt(-2.0f * std::log(u)) * std::cos(6.2831853f * v);
    }
    template <class T>
    T pick(std::initializer_list<T> l) { return l.begin()[below(int(l.size()))]; }
};

struct Suite {
    const char* name = "";
    int cases = 0, failures = 0;
    std::string now;
};
inline Suite*& running() {
    static Suite* s = nullptr;
    return s;
}
// A case's size budget: 1 runs everything; compute-sanitizer runs use a larger divisor.
inline int& thinning() {
    static int n = 1;
    return n;
}

// Cases of a suite that takes `n` by default; BITNET_REPEAT multiplies them (nightly runs).
inline int cases(int n) {
    const char* e = std::getenv("BITNET_REPEAT");
    return n * std::max(1, e ? std::atoi(e) : 1);
}

// A GPU takes more cases than the emulator in the same time.
constexpr int kRepeat =
#ifdef BITNET_EMULATOR
    1;
#else
    3;
#endif

inline void start_case(const std::string& what) {
    ++running()->cases;
    running()->now = what;
}
inline void mismatch(const std::string& what) {
    if (++running()->failures <= 5)
        std::fprintf(stderr, "%s: %s: %s\n", running()->name, running()->now.c_str(), what.c_str());
    if (std::getenv("BITNET_STOP")) std::_Exit(1);  // where the first mismatch is all that is asked for
}
inline void check(bool ok, const char* what) {
    if (!ok) mismatch(what);
}
template <class T>
void check_equal(const std::vector<T>& got, const std::vector<T>& want, const char* what) {
    if (got.size() != want.size()) return mismatch(std::string(what) + ": size");
    for (size_t i = 0; i < got.size(); ++i)
        if (std::memcmp(&got[i], &want[i], sizeof(T)) != 0)
            return mismatch(std::string(what) + "[" + std::to_string(i) + "] = " + std::to_string(double(got[i])) + ", want " +
                            std::to_string(double(want[i])));
}
// |got - want| <= relative * max|want| + absolute, NaN never passes.
inline void check_close(const std::vector<float>& got, const std::vector<double>& want, double relative, double absolute,
                        const char* what) {
    if (got.size() != want.size()) return mismatch(std::string(what) + ": size");
    double top = 0;
    for (double w : want) top = std::max(top, std::fabs(w));
    for (size_t i = 0; i < got.size(); ++i)
        if (!(std::fabs(got[i] - want[i]) <= relative * top + absolute))
            return mismatch(std::string(what) + "[" + std::to_string(i) + "] = " + std::to_string(got[i]) + ", want " +
                            std::to_string(want[i]));
}

#ifdef BITNET_EMULATOR

// Memory that ends at a page nobody may touch and starts behind a canary.
template <class T>
class Buffer {
   public:
    explicit Buffer(size_t n, unsigned char fill = 0xEE) : n_(n) {
        size_t bytes = (n * sizeof(T) + 15) / 16 * 16;
        span_ = (bytes + kCanary + 4095) / 4096 * 4096 + 4096;
        base_ = static_cast<unsigned char*>(mmap(nullptr, span_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED) emu::fail("no memory");
        mprotect(base_ + span_ - 4096, 4096, PROT_NONE);
        data_ = reinterpret_cast<T*>(base_ + span_ - 4096 - bytes);
        std::memset(reinterpret_cast<unsigned char*>(data_) - kCanary, 0xA5, kCanary);
        std::memset(static_cast<void*>(data_), fill, bytes);
        emu::race_track(data_, bytes);
    }
    explicit Buffer(const std::vector<T>& v) : Buffer(v.size()) { std::memcpy(static_cast<void*>(data_), v.data(), v.size() * sizeof(T)); }
    Buffer(const Buffer&) = delete;
    ~Buffer() {
        const unsigned char* c = reinterpret_cast<unsigned char*>(data_) - kCanary;
        for (size_t i = 0; i < kCanary; ++i)
            if (c[i] != 0xA5) {
                mismatch("a write before the start of a buffer");
                break;
            }
        emu::race_untrack(data_);
        munmap(base_, span_);
    }
    T* ptr() { return data_; }
    std::vector<T> host() const { return std::vector<T>(data_, data_ + n_); }
    size_t size() const { return n_; }

   private:
    static constexpr size_t kCanary = 64;
    size_t n_, span_;
    unsigned char* base_;
    T* data_;
};

#define LAUNCH(KERNEL, GRID, THREADS, SHARED, ...) \
    emu::launch(GRID, THREADS, SHARED, false, [&] { KERNEL(__VA_ARGS__); })
#define LAUNCH_COOPERATIVE(KERNEL, GRID, THREADS, SHARED, ...) \
    emu::launch(GRID, THREADS, SHARED, true, [&] { KERNEL(__VA_ARGS__); })
using Grid = emu::Dim3;
inline void vary_order(Random& r) { emu::machine().options.order = unsigned(r.below(4)); }

inline void on_fault(int) {
    const char* a = "memory fault in case: ";
    (void)!write(2, a, std::strlen(a));
    if (running()) (void)!write(2, running()->now.c_str(), running()->now.size());
    (void)!write(2, "\n", 1);
    _exit(4);
}
inline void set_up() {
    static unsigned char stack[64 * 1024];
    stack_t s{};
    s.ss_sp = stack;
    s.ss_size = sizeof stack;
    sigaltstack(&s, nullptr);
    struct sigaction a {};
    a.sa_handler = on_fault;
    a.sa_flags = SA_ONSTACK;
    sigaction(SIGSEGV, &a, nullptr);
    sigaction(SIGBUS, &a, nullptr);
}

#else

inline void cuda_check(cudaError_t e, const char* what) {
    if (e != cudaSuccess) {
        std::fprintf(stderr, "%s: %s (case %s)\n", what, cudaGetErrorString(e), running() ? running()->now.c_str() : "-");
        std::exit(4);
    }
}
template <class T>
class Buffer {
   public:
    explicit Buffer(size_t n, unsigned char fill = 0xEE) : n_(n) {
        cuda_check(cudaMalloc(&data_, n * sizeof(T) + 16), "cudaMalloc");
        cuda_check(cudaMemset(data_, fill, n * sizeof(T)), "cudaMemset");
    }
    explicit Buffer(const std::vector<T>& v) : Buffer(v.size()) {
        cuda_check(cudaMemcpy(data_, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice), "copy to device");
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { cudaFree(data_); }
    T* ptr() { return data_; }
    std::vector<T> host() const {
        std::vector<T> v(n_);
        cuda_check(cudaMemcpy(v.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost), "copy to host");
        return v;
    }
    size_t size() const { return n_; }

   private:
    size_t n_;
    T* data_ = nullptr;
};

using Grid = dim3;
template <class... P, class... A>
void launch(void (*kernel)(P...), bool cooperative, Grid grid, unsigned threads, size_t shared, A... args) {
    if (shared > 48 * 1024)
        cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "shared memory");
    if (cooperative) {
        std::tuple<P...> held{P(args)...};
        std::apply(
            [&](auto&... v) {
                void* pointers[] = {(void*)&v...};
                cuda_check(cudaLaunchCooperativeKernel((void*)kernel, grid, dim3(threads), pointers, shared, 0), "cooperative launch");
            },
            held);
    } else {
        kernel<<<grid, threads, shared>>>(P(args)...);
    }
    cuda_check(cudaGetLastError(), "launch");
    cuda_check(cudaDeviceSynchronize(), "kernel");
}
#define LAUNCH(KERNEL, GRID, THREADS, SHARED, ...) harness::launch(KERNEL, false, GRID, THREADS, SHARED, __VA_ARGS__)
#define LAUNCH_COOPERATIVE(KERNEL, GRID, THREADS, SHARED, ...) harness::launch(KERNEL, true, GRID, THREADS, SHARED, __VA_ARGS__)
inline void vary_order(Random&) {}
inline void set_up() {}

#endif

// Runs one suite, prints its line, returns its failures.
template <class F>
int run_suite(const char* name, F body) {
#ifdef BITNET_EMULATOR
    int races = emu::race_count();
#endif
    Suite s;
    s.name = name;
    running() = &s;
    body();
#ifdef BITNET_EMULATOR
    if (emu::race_count() != races) {
        s.failures += emu::race_count() - races;
        std::fprintf(stderr, "%s: %d data races\n", name, emu::race_count() - races);
    }
#endif
    std::printf("%-28s %5d cases  %s\n", name, s.cases, s.failures ? "FAILED" : "ok");
    if (s.failures) std::printf("%-28s %5d mismatches\n", name, s.failures);
    std::fflush(stdout);
    running() = nullptr;
    return s.failures;
}

}  // namespace harness
