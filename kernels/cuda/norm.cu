// What goes on between products: norm and quantisation, the norm alone, the gated activation, placing columns.
//
// One block per row: x [+= add]; n = rmsnorm(x) * weight (or x itself); q = int8 codes, s_x, sum of q.
// Bytes per row: 4k read (8k with add, 4k written), padded(k) written. Prefill and unfused decode.
#include "quantise.cuh"

using namespace bitnet;

extern "C" __global__ void __launch_bounds__(512)
    bitnet_norm_quantise(float* __restrict__ x, const float* __restrict__ add, const float* __restrict__ weight,
                         float eps, int rows, int k, int8_t* __restrict__ q, float* __restrict__ sx,
                         int* __restrict__ qsum) {
    let_next_kernel_start();
    wait_previous_kernel();
    int row = blockIdx.x;
    if (row >= rows) return;
    int padded = padded_cols(k);
    QuantiseRows a{x + (long long)row * k, add ? add + (long long)row * k : nullptr, x + (long long)row * k, weight, eps,
                   1, k, k, (k & 3) == 0};
    quantise_rows(a, q + (long long)row * padded, padded, padded, sx + row, qsum + row, shared_memory());
}

// f32 RMSNorm alone: y = (x [+= add]) * weight * r, for the head. One block per row.
extern "C" __global__ void __launch_bounds__(512)
    bitnet_rmsnorm(float* __restrict__ x, const float* __restrict__ add, const float* __restrict__ weight, float eps,
                   int rows, int k, float* __restrict__ y) {
    let_next_kernel_start();
    wait_previous_kernel();
    int row = blockIdx.x;
    if (row >= rows) return;
    float* part = reinterpret_cast<float*>(shared_memory());
    x += (long long)row * k;
    y += (long long)row * k;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < k; i += blockDim.x) {
        float v = load_fresh(x + i);
        if (add) {
            v = add_rn(v, load_fresh(add + (long long)row * k + i));
            x[i] = v;
        }
        squares = fmaf(v, v, squares);
    }
    for (int m = 16; m; m >>= 1) squares += shfl_xor(squares, m);
    if ((threadIdx.x & 31) == 0) part[threadIdx.x / 32] = squares;
    sync_block();
    squares = 0.0f;
    for (int w = 0; w < (int)blockDim.x / 32; ++w) squares += part[w];
    float r = div_rn(1.0f, sqrt_rn(div_rn(squares, (float)k) + eps));
    for (int i = threadIdx.x; i < k; i += blockDim.x) y[i] = mul_rn(mul_rn(load_fresh(x + i), weight[i]), r);
}

// out = act(gate) * up of rows [gate | up], n values each: where the two came from products of their own (a low-rank
// update, a dense matrix). Grid (ceil(n / 256), tokens), 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    bitnet_gated(const float* __restrict__ gate_up, float* __restrict__ out, int tokens, int n, int activation) {
    let_next_kernel_start();
    wait_previous_kernel();
    int i = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (i >= n || token >= tokens) return;
    const float* row = gate_up + (long long)token * 2 * n;
    out[(long long)token * n + i] = gated(load_fresh(row + i), load_fresh(row + n + i), activation);
}

// Rows [tokens, n] into (add 0) or onto (add 1) columns of wider rows; `to` is the first of them. Same grid.
extern "C" __global__ void __launch_bounds__(256)
    bitnet_place(const float* __restrict__ from, float* __restrict__ to, int tokens, int n, int ld_to, int add) {
    let_next_kernel_start();
    wait_previous_kernel();
    int i = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (i >= n || token >= tokens) return;
    float v = load_fresh(from + (long long)token * n + i);
    float* out = to + (long long)token * ld_to + i;
    *out = add ? add_rn(load_fresh(out), v) : v;
}
