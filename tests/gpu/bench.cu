// Times the CUDA kernels on real hardware at the shapes of BitNet b1.58 2B-4T, beside a device copy and an int8
// matrix product measured in the same run. Every layer has its own weights, so nothing is read from a warm L2.
#include "../../kernels/cuda/attention.cu"
#include "../../kernels/cuda/gemm.cu"
#include "../../kernels/cuda/gemv.cu"
#include "../../kernels/cuda/head.cu"
#include "../../kernels/cuda/norm.cu"
#include "../../kernels/cuda/prefill_attention.cu"
#include "../../kernels/cuda/sample.cu"

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define OK(e) check((e), #e)
static void check(cudaError_t e, const char* what) {
    if (e != cudaSuccess) {
        std::printf("%s: %s\n", what, cudaGetErrorString(e));
        std::exit(4);
    }
}

constexpr int kHidden = 2560, kFfn = 6912, kLayers = 30, kHeads = 20, kKvHeads = 5, kDim = 128, kVocab = 128256;
constexpr int kQkv = (kHeads + 2 * kKvHeads) * kDim, kMaxPositions = 2048, kSlots = 8;

__global__ void fill_random(unsigned* p, size_t n, unsigned seed) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        unsigned long long z = (i + seed) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        p[i] = (unsigned)(z >> 32);
    }
}
// Codes: each 2-bit field 0..2.
__global__ void fill_codes(unsigned* p, size_t n, unsigned seed) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        unsigned long long z = (i + seed) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        unsigned u = (unsigned)(z >> 32);
        p[i] = u & ~((u & 0x55555555u) << 1);
    }
}
__global__ void fill_uniform(float* p, size_t n, float lo, float hi, unsigned seed) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        unsigned long long z = (i + seed) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        p[i] = lo + (hi - lo) * (float)(z >> 40) / (1 << 24);
    }
}
__global__ void fill_bf16(uint16_t* p, size_t n, float scale, unsigned seed) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        unsigned long long z = (i + seed) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        p[i] = float_to_bf16(scale * ((float)(z >> 40) / (1 << 23) - 1.0f));
    }
}
__global__ void read_all(const uint4* p, size_t n, unsigned* out) {
    unsigned s = 0;
    size_t stride = (size_t)gridDim.x * blockDim.x;
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    for (; i + 7 * stride < n; i += 8 * stride) {
        uint4 v[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = load_stream(p + i + k * stride);
#pragma unroll
        for (int k = 0; k < 8; ++k) s ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    if (s == 0x12345678u) *out = s;
}

static cudaStream_t stream;
static bool use_pdl = false;
template <class... P, class... A>
static void go(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared, A... args) {
    if (shared > 48 * 1024) OK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    cudaLaunchConfig_t c{};
    c.gridDim = grid;
    c.blockDim = dim3(threads);
    c.dynamicSmemBytes = shared;
    c.stream = stream;
    cudaLaunchAttribute a[1];
    a[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a[0].val.programmaticStreamSerializationAllowed = 1;
    c.attrs = a;
    c.numAttrs = use_pdl ? 1 : 0;
    OK(cudaLaunchKernelEx(&c, kernel, P(args)...));
}

// Median time in microseconds of one replay of what `body` launches.
static double graph_time(const std::function<void()>& body, int repeats = 20) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    body();
    OK(cudaStreamEndCapture(stream, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < 3; ++i) OK(cudaGraphLaunch(exec, stream));
    cudaEvent_t a, b;
    OK(cudaEventCreate(&a));
    OK(cudaEventCreate(&b));
    std::vector<float> t;
    for (int i = 0; i < repeats; ++i) {
        OK(cudaEventRecord(a, stream));
        OK(cudaGraphLaunch(exec, stream));
        OK(cudaEventRecord(b, stream));
        OK(cudaEventSynchronize(b));
        float ms;
        OK(cudaEventElapsedTime(&ms, a, b));
        t.push_back(ms * 1000);
    }
    OK(cudaGraphExecDestroy(exec));
    OK(cudaGraphDestroy(graph));
    std::sort(t.begin(), t.end());
    return t[t.size() / 2];
}

template <class T>
static T* alloc(size_t n) {
    T* p;
    OK(cudaMalloc(&p, n * sizeof(T)));
    OK(cudaMemset(p, 0, n * sizeof(T)));
    return p;
}

struct Layer {
    uint4 *qkv, *o, *gate_up, *down;
    uint16_t *k, *v;
};
static Layer layers[kLayers];
static float *x, *qkv_out, *attn_out, *ffn_out, *normed, *logits, *norm_w, *cos_t, *sin_t, *partial, *sx;
static int8_t* q;
static int *qsum, *ids, *positions, *slots;
static unsigned* arrived;
static unsigned long long* best;
static SampleSettings* settings;
static float* adjusted;
static int* candidates;
static uint16_t* head_w;
static uint16_t* embed_w;
static int sms;

static uint4* codes(int rows, int k, unsigned seed) {
    size_t n = (size_t)tiles(rows, 16) * tiles(k, 256) * 256;
    unsigned* p = alloc<unsigned>(n);
    fill_codes<<<1024, 256>>>(p, n, seed);
    return (uint4*)p;
}
static void set_up() {
    for (int l = 0; l < kLayers; ++l) {
        layers[l].qkv = codes(kQkv, kHidden, l * 4 + 1);
        layers[l].o = codes(kHidden, kHidden, l * 4 + 2);
        layers[l].gate_up = codes(2 * kFfn, kHidden, l * 4 + 3);
        layers[l].down = codes(kHidden, kFfn, l * 4 + 4);
        size_t n = (size_t)kSlots * kMaxPositions * kKvHeads * kDim;
        layers[l].k = alloc<uint16_t>(n);
        layers[l].v = alloc<uint16_t>(n);
        fill_bf16<<<1024, 256>>>(layers[l].k, n, 1.0f, l);
        fill_bf16<<<1024, 256>>>(layers[l].v, n, 1.0f, l + 99);
    }
    int t = 2048;
    x = alloc<float>((size_t)t * kHidden);
    qkv_out = alloc<float>((size_t)t * kQkv);
    attn_out = alloc<float>((size_t)t * kHidden);
    ffn_out = alloc<float>((size_t)t * kFfn);
    normed = alloc<float>((size_t)t * kHidden);
    logits = alloc<float>((size_t)8 * kVocab);
    norm_w = alloc<float>(kFfn);
    cos_t = alloc<float>((size_t)4096 * kDim);
    sin_t = alloc<float>((size_t)4096 * kDim);
    partial = alloc<float>((size_t)8 * kHeads * 64 * (kDim + 2));
    sx = alloc<float>(t);
    q = alloc<int8_t>((size_t)t * 7168);
    qsum = alloc<int>(t);
    ids = alloc<int>(t);
    positions = alloc<int>(t);
    slots = alloc<int>(t);
    arrived = alloc<unsigned>(4096);
    best = alloc<unsigned long long>(64);
    settings = alloc<SampleSettings>(8);
    adjusted = alloc<float>((size_t)8 * kVocab);
    candidates = alloc<int>((size_t)8 * kVocab);
    head_w = alloc<uint16_t>((size_t)kVocab * kHidden);
    embed_w = head_w;
    fill_bf16<<<1024, 256>>>(head_w, (size_t)kVocab * kHidden, 0.02f, 7);
    fill_uniform<<<1024, 256>>>(x, (size_t)t * kHidden, -1, 1, 1);
    fill_uniform<<<1024, 256>>>(norm_w, kFfn, 0.5f, 1.5f, 2);
    fill_uniform<<<1024, 256>>>(cos_t, (size_t)4096 * kDim, -1, 1, 3);
    fill_uniform<<<1024, 256>>>(sin_t, (size_t)4096 * kDim, -1, 1, 4);
    fill_random<<<1024, 256>>>((unsigned*)q, (size_t)t * 7168 / 4, 5);
    fill_uniform<<<1024, 256>>>(sx, t, 10, 20, 6);
    std::vector<int> s(t), p(t, 511);
    for (int i = 0; i < t; ++i) s[i] = i % kSlots;
    OK(cudaMemcpy(slots, s.data(), t * 4, cudaMemcpyHostToDevice));
    OK(cudaMemcpy(positions, p.data(), t * 4, cudaMemcpyHostToDevice));
    OK(cudaDeviceSynchronize());
}

struct Plan {
    int threads = 512, per_sm = 1;
    int splits = 16;
    bool fuse_norm = true;
};

static GemvParams params(const Plan&, const uint4* w, const float* in, float* out, int tokens, int n, int k, bool fused) {
    GemvParams p{};
    p.weights = w;
    p.x = fused ? in : nullptr;
    p.norm = fused ? norm_w : nullptr;
    p.q = q;
    p.sx = sx;
    p.qsum = qsum;
    p.out = out;
    p.scales.end[0] = p.scales.end[1] = p.scales.end[2] = 1 << 30;
    for (float& v : p.scales.value) v = 0.01f;
    p.eps = 1e-5f;
    p.tokens = tokens;
    p.n = n;
    p.k = k;
    p.ld_out = n;
    return p;
}
template <class K>
static void gemv(const Plan& plan, K fused_kernel, K plain_kernel, const uint4* w, float* in, float* out, int tokens, int n, int k, bool gated) {
    if (!plan.fuse_norm)
        go(bitnet_norm_quantise, dim3(tokens), 512, kQuantiseScratch, in, (const float*)nullptr, norm_w, 1e-5f, tokens, k, q, sx, qsum);
    int row_tiles = tiles(n, gated ? 8 : 16), grid = std::min(row_tiles, sms * plan.per_sm);
    size_t shared = (size_t)tokens * (padded_cols(k) + 16) + (size_t)tiles(row_tiles, grid) * 512 + 64 + kQuantiseScratch;
    go(plan.fuse_norm ? fused_kernel : plain_kernel, dim3(grid), plan.threads, shared, params(plan, w, in, out, tokens, n, k, plan.fuse_norm));
}
static AttentionParams attention_params(const Layer& l, int tokens, int splits) {
    AttentionParams p{};
    p.qkv = qkv_out, p.cos = cos_t, p.sin = sin_t, p.positions = positions, p.slots = slots;
    p.k_cache = l.k, p.v_cache = l.v, p.out = attn_out, p.partial = partial, p.arrived = arrived;
    p.tokens = tokens, p.heads = kHeads, p.kv_heads = kKvHeads, p.head_dim = kDim, p.max_positions = kMaxPositions, p.splits = splits;
    p.scale = 0.08838835f;
    return p;
}
static void qkv_step(const Plan& plan, const Layer& l, int tokens) { gemv(plan, bitnet_gemv_norm, bitnet_gemv, l.qkv, x, qkv_out, tokens, kQkv, kHidden, false); }
static void attention_step(const Plan& plan, const Layer& l, int tokens) {
    go(bitnet_decode_attention_bf16, dim3(kKvHeads * head_blocks(kHeads, kKvHeads), plan.splits, tokens), kAttentionThreads, decode_attention_shared(kDim), attention_params(l, tokens, plan.splits));
}
static void o_step(const Plan& plan, const Layer& l, int tokens) { gemv(plan, bitnet_gemv_norm_residual, bitnet_gemv_residual, l.o, attn_out, x, tokens, kHidden, kHidden, false); }
static void gate_step(const Plan& plan, const Layer& l, int tokens) { gemv(plan, bitnet_gemv_norm_gated, bitnet_gemv_gated, l.gate_up, x, ffn_out, tokens, kFfn, kHidden, true); }
static void down_step(const Plan& plan, const Layer& l, int tokens) { gemv(plan, bitnet_gemv_norm_residual, bitnet_gemv_residual, l.down, ffn_out, x, tokens, kHidden, kFfn, false); }
static void head_step(int tokens, int per_sm) {
    go(bitnet_rmsnorm, dim3(tokens), 512, 128, x, (const float*)nullptr, norm_w, 1e-5f, tokens, kHidden, normed);
    HeadParams p{(const uint4*)head_w, nullptr, normed, logits, tokens, kHidden, kVocab};
    int size = tokens > 4 ? 8 : tokens > 2 ? 4 : tokens;
    auto k = size == 8 ? bitnet_head_bf16_8 : size == 4 ? bitnet_head_bf16_4 : size == 2 ? bitnet_head_bf16_2 : bitnet_head_bf16_1;
    go(k, dim3(sms * per_sm), 256, (size_t)size * kHidden * 4, p);
}
static void sample_step(int tokens) {
    go(bitnet_sample_prepare, dim3(64, tokens), 256, 64, (const float*)logits, kVocab, (const SampleSettings*)settings, (const unsigned*)nullptr, adjusted, best);
    go(bitnet_sample_pick, dim3(tokens), 1024, sizeof(PickShared), (const float*)adjusted, kVocab, settings, best, candidates, ids);
}
static void step(const Plan& plan, int tokens) {
    go(bitnet_embed_bf16, dim3(tokens), 512, 0, (const void*)embed_w, (const int*)ids, x, kHidden, kVocab);
    for (const Layer& l : layers) {
        qkv_step(plan, l, tokens);
        attention_step(plan, l, tokens);
        o_step(plan, l, tokens);
        gate_step(plan, l, tokens);
        down_step(plan, l, tokens);
    }
    head_step(tokens, tokens > 2 ? 2 : 4);
    go(bitnet_argmax, dim3(64, tokens), 256, 64, (const float*)logits, kVocab, best, arrived + 2048, ids);
}

// --- prefill

template <class K>
static void gemm(K small, K large, const uint4* w, float* out, int tokens, int n, int k, bool gated, bool wide) {
    GemmParams p{};
    p.weights = w, p.q = q, p.sx = sx, p.qsum = qsum, p.out = out;
    p.scales.end[0] = p.scales.end[1] = p.scales.end[2] = 1 << 30;
    for (float& v : p.scales.value) v = 0.01f;
    p.tokens = tokens, p.n = n, p.k = k, p.ld_out = n;
    int row_tiles = tiles(n, gated ? 8 : 16), span = wide ? 128 : 64;
    go(wide ? large : small, dim3(tiles(row_tiles, 8), tiles(tokens, span)), 256, 2 * (8192 + span * 256), p);
}
static void qkv_gemm(const Layer& l, int tokens, bool wide) { gemm(bitnet_gemm_64, bitnet_gemm_128, l.qkv, qkv_out, tokens, kQkv, kHidden, false, wide); }
static void o_gemm(const Layer& l, int tokens, bool wide) { gemm(bitnet_gemm_residual_64, bitnet_gemm_residual_128, l.o, x, tokens, kHidden, kHidden, false, wide); }
static void gate_gemm(const Layer& l, int tokens, bool wide) { gemm(bitnet_gemm_gated_64, bitnet_gemm_gated_128, l.gate_up, ffn_out, tokens, kFfn, kHidden, true, wide); }
static void down_gemm(const Layer& l, int tokens, bool wide) { gemm(bitnet_gemm_residual_64, bitnet_gemm_residual_128, l.down, x, tokens, kHidden, kFfn, false, wide); }
static void quantise_step(const float* in, int tokens, int k) {
    go(bitnet_norm_quantise, dim3(tokens), 512, kQuantiseScratch, const_cast<float*>(in), (const float*)nullptr, norm_w, 1e-5f, tokens, k, q, sx, qsum);
}
static int* starts;
static void prefill_attention_step(const Layer& l, int tokens, bool mma) {
    PrefillParams p{attention_params(l, tokens, 1), starts, 1};
    go(bitnet_rope_write_bf16, dim3(tokens), 256, 0, p.a, qkv_out);
    if (mma)
        go(bitnet_prefill_attention_mma_bf16_128, dim3(tiles(tokens, 64), kHeads, 1), 128, 4 * 64 * (2 * kDim + 16), p);
    else
        go(bitnet_prefill_attention_bf16, dim3(tiles(tokens, 32), kHeads, 1), 128, (64 * (kDim + 4) + 1152) * 4, p);
}
static void prefill(int tokens, bool wide) {
    go(bitnet_embed_bf16, dim3(tokens), 512, 0, (const void*)embed_w, (const int*)ids, x, kHidden, kVocab);
    for (const Layer& l : layers) {
        quantise_step(x, tokens, kHidden);
        qkv_gemm(l, tokens, wide);
        prefill_attention_step(l, tokens, true);
        quantise_step(attn_out, tokens, kHidden);
        o_gemm(l, tokens, wide);
        quantise_step(x, tokens, kHidden);
        gate_gemm(l, tokens, wide);
        quantise_step(ffn_out, tokens, kFfn);
        down_gemm(l, tokens, wide);
    }
    head_step(1, 4);
}

// int8 x int8 -> int32 through cublasLt at a large square: what the matrix units give on this chip.
static double int8_ceiling() {
    cublasLtHandle_t lt;
    if (cublasLtCreate(&lt) != CUBLAS_STATUS_SUCCESS) return 0;
    const int n = 8192;
    int8_t* a = alloc<int8_t>((size_t)n * n);
    int8_t* b = alloc<int8_t>((size_t)n * n);
    int* c = alloc<int>((size_t)n * n);
    void* workspace = alloc<char>(64 << 20);
    fill_random<<<1024, 256>>>((unsigned*)a, (size_t)n * n / 4, 1);
    fill_random<<<1024, 256>>>((unsigned*)b, (size_t)n * n / 4, 2);
    OK(cudaDeviceSynchronize());
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t la, lb, lc;
    cublasLtMatmulPreference_t preference;
    cublasOperation_t transpose = CUBLAS_OP_T;
    cublasLtMatmulDescCreate(&op, CUBLAS_COMPUTE_32I, CUDA_R_32I);
    cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose);
    cublasLtMatrixLayoutCreate(&la, CUDA_R_8I, n, n, n);
    cublasLtMatrixLayoutCreate(&lb, CUDA_R_8I, n, n, n);
    cublasLtMatrixLayoutCreate(&lc, CUDA_R_32I, n, n, n);
    cublasLtMatmulPreferenceCreate(&preference);
    size_t bytes = 64 << 20;
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
    cublasLtMatmulHeuristicResult_t found[4];
    int count = 0;
    cublasLtMatmulAlgoGetHeuristic(lt, op, la, lb, lc, lc, preference, 4, found, &count);
    double best = 0;
    int one = 1, zero = 0;
    for (int i = 0; i < count; ++i) {
        if (cublasLtMatmul(lt, op, &one, a, la, b, lb, &zero, c, lc, c, lc, &found[i].algo, workspace, bytes, stream) != CUBLAS_STATUS_SUCCESS) continue;
        double us = graph_time([&] { cublasLtMatmul(lt, op, &one, a, la, b, lb, &zero, c, lc, c, lc, &found[i].algo, workspace, bytes, stream); }, 10);
        best = std::max(best, 2.0 * n * n * n / us * 1e-6);
    }
    for (void* p : {(void*)a, (void*)b, (void*)c, workspace}) OK(cudaFree(p));
    cublasLtDestroy(lt);
    return best;
}
// A loop of nothing but mma.sync: the ceiling of this instruction, below that of wgmma on 9.0.
__global__ void __launch_bounds__(256) mma_loop(int* out, int steps) {
    int c[8][4] = {};
    unsigned a = threadIdx.x * 0x01010101u, b = threadIdx.x * 0x03010201u;
    for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int i = 0; i < 8; ++i) mma_m16n8k32_us(c[i], a, a + i, a ^ b, b, b, a);
    int sum = 0;
    for (int i = 0; i < 8; ++i) sum += c[i][0] + c[i][1] + c[i][2] + c[i][3];
    if (sum == 0x12345678) *out = sum;
}

static std::vector<float> host_logits(int tokens) {
    std::vector<float> v((size_t)tokens * kVocab);
    OK(cudaStreamSynchronize(stream));
    OK(cudaMemcpy(v.data(), logits, v.size() * 4, cudaMemcpyDeviceToHost));
    return v;
}

static double copy_rate;
static void line(const char* name, double us, double bytes) {
    std::printf("%-34s %9.2f us  %8.1f GB/s  %5.1f %% of copy\n", name, us, bytes / us * 1e-3, 100 * bytes / us * 1e-3 / copy_rate);
}

int main() {
    cudaDeviceProp prop;
    OK(cudaGetDeviceProperties(&prop, 0));
    int driver, runtime;
    OK(cudaDriverGetVersion(&driver));
    OK(cudaRuntimeGetVersion(&runtime));
    sms = prop.multiProcessorCount;
    std::printf("%s, %d SMs, L2 %d MB, driver API %d, runtime %d\n", prop.name, sms, (int)(prop.l2CacheSize >> 20), driver, runtime);
    OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    {
        size_t n = (size_t)2 << 30;
        unsigned *a = alloc<unsigned>(n / 4), *b = alloc<unsigned>(n / 4);
        fill_random<<<1024, 256>>>(a, n / 4, 1);
        OK(cudaDeviceSynchronize());
        double us = graph_time([&] { OK(cudaMemcpyAsync(b, a, n, cudaMemcpyDeviceToDevice, stream)); }, 10);
        copy_rate = 2.0 * n / us * 1e-3;
        std::printf("device copy: %.1f GB/s (read + written)\n", copy_rate);
        us = graph_time([&] { go(read_all, dim3(sms * 8), 256, 0, (const uint4*)a, n / 16, b); }, 10);
        std::printf("read only:   %.1f GB/s\n", n / us * 1e-3);
        OK(cudaFree(a));
        OK(cudaFree(b));
    }
    set_up();
    auto bytes_of = [](int rows, int k) { return (double)rows * k / 4; };
    double ternary = kLayers * (bytes_of(kQkv, kHidden) + bytes_of(kHidden, kHidden) + bytes_of(2 * kFfn, kHidden) + bytes_of(kHidden, kFfn));
    double head = 2.0 * kVocab * kHidden, kv = 2.0 * 512 * kKvHeads * kDim * 2 * kLayers;
    for (int pdl = 0; pdl < 2; ++pdl) {
        use_pdl = pdl;
        for (int tokens : {1, 8}) {
            std::printf("--- kernels, %d token(s), %s, 30 layers in one graph, time per launch\n", tokens, pdl ? "pdl" : "plain");
            for (int variant = 0; variant < (pdl ? 1 : 4); ++variant) {
                Plan p;
                p.threads = variant & 1 ? 256 : 512;
                p.per_sm = variant & 2 ? 2 : 1;
                std::printf("threads %d, %d block(s) per SM\n", p.threads, p.per_sm);
                auto each = [&](const char* name, void (*f)(const Plan&, const Layer&, int), double bytes) {
                    double us = graph_time([&] { for (const Layer& l : layers) f(p, l, tokens); }) / kLayers;
                    line(name, us, bytes);
                };
                each("  qkv", qkv_step, bytes_of(kQkv, kHidden));
                each("  o", o_step, bytes_of(kHidden, kHidden));
                each("  gate/up", gate_step, bytes_of(2 * kFfn, kHidden));
                each("  down", down_step, bytes_of(kHidden, kFfn));
                if (variant == 0) each("  attention, context 512", attention_step, tokens * kv / kLayers);
            }
            for (int per_sm : {1, 2, 4}) {
                double us = graph_time([&] { head_step(tokens, per_sm); });
                line(("  head, blocks per SM " + std::to_string(per_sm)).c_str(), us, head);
            }
            line("  argmax", graph_time([&] { go(bitnet_argmax, dim3(64, tokens), 256, 64, (const float*)logits, kVocab, best, arrived + 2048, ids); }), tokens * 4.0 * kVocab);
            for (int cut = 0; cut < 4; ++cut) {
                std::vector<SampleSettings> set(tokens);
                for (SampleSettings& s : set) {
                    s = SampleSettings{1, 0, 0.8f, 1, 0, 1, 0, 0, 0, -1};
                    if (cut & 1) s.top_k = 50;
                    if (cut & 2) s.top_p = 0.95f;
                }
                OK(cudaMemcpy(settings, set.data(), set.size() * sizeof set[0], cudaMemcpyHostToDevice));
                const char* names[] = {"  sample", "  sample, top-k", "  sample, top-p", "  sample, top-k and top-p"};
                line(names[cut], graph_time([&] { sample_step(tokens); }), tokens * 4.0 * kVocab);
            }
        }
        for (int tokens : {1, 8})
            for (int variant = 0; variant < 6; ++variant) {
                Plan p;
                p.fuse_norm = variant < 4;
                p.threads = variant & 1 ? 256 : 512;
                p.per_sm = variant & 2 ? 2 : 1;
                double us = graph_time([&] { step(p, tokens); });
                double floor = (ternary + head + tokens * kv) / copy_rate * 1e-3;
                std::printf("step: %d token(s), %s, %s norm, %d threads x %d: %8.1f us  %8.1f tokens/s  floor %6.1f us  %5.1f %%\n", tokens, pdl ? "pdl" : "plain", p.fuse_norm ? "fused" : "own", p.threads, p.per_sm, us, tokens * 1e6 / us, floor, 100 * floor / us);
            }
    }
    // One step from the same token: plain launches, a graph, and programmatic launches must agree to the bit.
    int wrong = 0;
    for (int tokens : {1, 3, 8}) {
        Plan p;
        std::vector<float> want;
        for (int way = 0; way < 4; ++way) {
            use_pdl = way >= 2;
            OK(cudaMemsetAsync(ids, 0, 64, stream));
            if (way & 1)
                graph_time([&] { OK(cudaMemsetAsync(ids, 0, 64, stream)); step(p, tokens); }, 1);
            else
                step(p, tokens);
            auto got = host_logits(tokens);
            if (way == 0) want = got;
            bool same = std::memcmp(want.data(), got.data(), got.size() * 4) == 0;
            bool finite = true;
            for (float v : got) finite = finite && std::isfinite(v);
            if (!same || !finite) ++wrong;
            std::printf("step of %d: %s%s: %s%s\n", tokens, use_pdl ? "pdl " : "", way & 1 ? "graph" : "eager", same ? "same bits" : "DIFFERENT", finite ? "" : ", NOT FINITE");
        }
    }

    use_pdl = false;
    std::printf("--- prefill\n");
    double lt = int8_ceiling();
    double us = graph_time([&] { go(mma_loop, dim3(sms * 2), 256, 0, qsum, 4096); }, 5);
    double loop = 2.0 * 16 * 8 * 32 * 8 * 4096 * 8 * sms * 2 / us * 1e-6;
    std::printf("int8 ceiling: cublasLt 8192^3 %.0f TOPS, mma.sync loop %.0f TOPS\n", lt, loop);
    double ceiling = std::max(lt, loop);
    std::vector<int> order(2048), first{0, 2048};
    for (int i = 0; i < 2048; ++i) order[i] = i;
    OK(cudaMemcpy(positions, order.data(), 2048 * 4, cudaMemcpyHostToDevice));
    OK(cudaMemset(slots, 0, 2048 * 4));
    starts = alloc<int>(2);
    for (int tokens : {512, 2048}) {
        first[1] = tokens;
        OK(cudaMemcpy(starts, first.data(), 8, cudaMemcpyHostToDevice));
        OK(cudaMemset(ids, 0, 2048 * 4));
        double total = 2.0 * tokens * kLayers * ((double)kQkv * kHidden + (double)kHidden * kHidden + 2.0 * kFfn * kHidden + (double)kHidden * kFfn);
        for (bool wide : {false, true}) {
            struct { const char* name; void (*f)(const Layer&, int, bool); double ops; } parts[] = {
                {"qkv", qkv_gemm, 2.0 * tokens * kQkv * kHidden},
                {"o", o_gemm, 2.0 * tokens * kHidden * kHidden},
                {"gate/up", gate_gemm, 4.0 * tokens * kFfn * kHidden},
                {"down", down_gemm, 2.0 * tokens * kHidden * kFfn},
            };
            double sum = 0;
            for (auto& part : parts) {
                double t = graph_time([&] { for (const Layer& l : layers) part.f(l, tokens, wide); }, 7) / kLayers;
                sum += t;
                std::printf("prefill %4d, tile %3d, %-8s %9.2f us  %7.1f TOPS  %5.1f %% of ceiling\n", tokens, wide ? 128 : 64, part.name, t, part.ops / t * 1e-6, 100 * part.ops / t * 1e-6 / ceiling);
            }
            std::printf("prefill %4d, tile %3d, products %9.1f us  %7.1f TOPS  %5.1f %% of ceiling\n", tokens, wide ? 128 : 64, sum * kLayers, total / (sum * kLayers) * 1e-6, 100 * total / (sum * kLayers) * 1e-6 / ceiling);
        }
        for (bool mma : {false, true}) {
            double t = graph_time([&] { for (const Layer& l : layers) prefill_attention_step(l, tokens, mma); }, 5) / kLayers;
            double flop = 4.0 * kHeads * kDim * tokens * (tokens + 1.0) / 2;
            std::printf("prefill %4d, rope + attention %s %9.2f us  %7.1f TFLOP/s (causal half counted once)\n", tokens, mma ? "mma" : "f32", t, flop / t * 1e-6);
        }
        for (bool wide : {false, true}) {
            double t = graph_time([&] { prefill(tokens, wide); }, 5);
            std::printf("prefill %4d, tile %3d, whole model %9.1f us  %9.1f tokens/s  %5.1f %% of int8 ceiling (ternary products only)\n", tokens, wide ? 128 : 64, t, tokens * 1e6 / t, 100 * total / t * 1e-6 / ceiling);
        }
    }
    OK(cudaDeviceSynchronize());
    return wrong ? 1 : 0;
}
