// The emulator as a shared library with the shape of the driver's launch call, so that the host side (packing,
// parameter structs, grids, shared memory) can be run and compared with the CPU where there is no GPU.
//
//   bitnet_emulator_launch(name, grid x, y, z, block, shared bytes, arguments)      device memory = host memory
//
// `arguments` is cuLaunchKernel's: one pointer per parameter. Launches run to their end before they return; they may
// come from any thread, one at a time. Allocate "device" memory aligned to 256 bytes, as a driver would. A kernel that
// deadlocks or misaligns ends the process with a message, as a test should.
//
//   g++ -std=c++20 -O2 -DBITNET_EMULATOR -U_FORTIFY_SOURCE -shared -fPIC -o libbitnet_emulator.so kernels/emulator/library.cpp
#include "../cuda/attention.cu"
#include "../cuda/gemm.cu"
#include "../cuda/gemv.cu"
#include "../cuda/head.cu"
#include "../cuda/norm.cu"
#include "../cuda/pack.cu"
#include "../cuda/prefill_attention.cu"
#include "../cuda/sample.cu"

#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>

namespace {

// A call with its arguments read now, as cuLaunchKernel reads them: it may run later.
template <class... P, size_t... I>
std::function<void()> make_call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    std::tuple<std::remove_cv_t<P>...> values(*static_cast<std::remove_cv_t<P>*>(arguments[I])...);
    return [=] { std::apply(kernel, values); };
}
template <class... P>
std::function<void()> make_call(void (*kernel)(P...), void** arguments) {
    return make_call(kernel, arguments, std::index_sequence_for<P...>{});
}

struct Entry {
    const char* name;
    std::function<void()> (*make_call)(void** arguments);
};
#define K(NAME) {#NAME, [](void** arguments) { return make_call(NAME, arguments); }}
#define K3(NAME) K(NAME##_f32), K(NAME##_bf16), K(NAME##_f16)
#define K1248(NAME) K(NAME##_1), K(NAME##_2), K(NAME##_4), K(NAME##_8)
#define KMMA(NAME) K(NAME##_64), K(NAME##_96), K(NAME##_128), K(NAME##_256)
#define KGEMM(NAME) K(NAME##_64), K(NAME##_128)

const Entry entries[] = {
    K(bitnet_pack), K(bitnet_norm_quantise), K(bitnet_rmsnorm), K(bitnet_gated), K(bitnet_place),
    K(bitnet_gemv), K(bitnet_gemv_residual), K(bitnet_gemv_gated),
    K(bitnet_gemv_norm), K(bitnet_gemv_norm_residual), K(bitnet_gemv_norm_gated),
    KGEMM(bitnet_gemm), KGEMM(bitnet_gemm_residual), KGEMM(bitnet_gemm_gated),
    K3(bitnet_decode_attention), K3(bitnet_rope_write), K3(bitnet_prefill_attention),
    KMMA(bitnet_prefill_attention_mma_bf16), KMMA(bitnet_prefill_attention_mma_f16),
    K1248(bitnet_head_bf16), K1248(bitnet_head_f16), K1248(bitnet_head_f32), K1248(bitnet_head_i8),
    K3(bitnet_embed), K(bitnet_embed_i8),
    K(bitnet_argmax), K(bitnet_mark), K(bitnet_sample_prepare), K(bitnet_sample_pick),
};

const Entry* find(const char* name) {
    for (const Entry& e : entries)
        if (std::strcmp(e.name, name) == 0) return &e;
    return nullptr;
}

}  // namespace

extern "C" {

// 1 if the library has a kernel of this name.
int bitnet_emulator_has(const char* name) { return find(name) != nullptr; }

// 0: done. 1: no such kernel. 2: a grid, block or shared-memory size no supported chip accepts.
int bitnet_emulator_launch(const char* name, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block,
                           unsigned shared_bytes, void** arguments) {
    const Entry* e = find(name);
    if (!e) return 1;
    if (!grid_x || !grid_y || !grid_z || grid_y > 65535 || grid_z > 65535 || !block || block > 1024 || block % 32 || shared_bytes > 227 * 1024)
        return 2;
    static std::mutex one_at_a_time;
    std::lock_guard<std::mutex> hold(one_at_a_time);
    emu::launch(emu::Dim3(grid_x, grid_y, grid_z), block, shared_bytes, false, e->make_call(arguments));
    return 0;
}

// Order of warps, lanes and blocks in later launches: 0 ascending, 1 descending, n a permutation.
void bitnet_emulator_order(unsigned order) { emu::machine().options.order = order; }
}
