// As much of cuBLAS and cuRAND as opening a candle device takes, beside the emulated driver; what computes says that it
// cannot. One library in the place of both.
//
//   g++ -std=c++20 -O2 -shared -fPIC -o libcublas.so kernels/emulator/libraries.cpp
#include <cstddef>
#include <cstdint>

extern "C" {

#define API int __attribute__((visibility("default")))

API cublasCreate_v2(void** handle) { return *handle = reinterpret_cast<void*>(1), 0; }
API cublasDestroy_v2(void*) { return 0; }
API cublasSetStream_v2(void*, void*) { return 0; }
API cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }
API curandCreateGenerator(void** generator, int) { return *generator = reinterpret_cast<void*>(1), 0; }
API curandDestroyGenerator(void*) { return 0; }
API curandSetStream(void*, void*) { return 0; }
API curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) { return 0; }
API cublasGemmStridedBatchedEx() { return 15; }
API cublasDgemmStridedBatched() { return 15; }
API cublasGemmEx() { return 15; }
API curandGenerateUniform() { return 102; }
API curandGenerateUniformDouble() { return 102; }
API curandGenerateNormal() { return 102; }
API curandGenerateNormalDouble() { return 102; }
}
