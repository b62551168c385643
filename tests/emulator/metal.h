// What the Metal suites share: launches with bound buffers, quantised activations as Metal has them. Included after the kernels.
#pragma once
#include "oracle.h"

namespace {

using namespace harness;
using namespace oracle;

// Buffers in the order of their indices, then the parameters.
template <class... A, class P, class... B>
void launch_metal(void (*function)(A...), Grid grid, unsigned threads, size_t shared, P params, B*... buffers) {
    emu::dispatch(function, {const_cast<void*>(static_cast<const void*>(buffers))..., &params}, grid, threads, unsigned(shared));
}
// Simdgroups of another width, for kernels that allow it.
struct Width {
    explicit Width(unsigned n) { emu::machine().options.width = n; }
    ~Width() { emu::machine().options.width = 32; }
};

// q and stats of norm_quantise, from codes.
struct Activations {
    std::vector<half> q;
    std::vector<float> stats;
};
inline int stats_of(int k) { return 4 + 8 * (padded(k) / 256); }
inline Activations activations(const Quantised& a, int k) {
    Activations m;
    for (int8_t c : a.q) m.q.push_back(half(c));
    for (size_t row = 0; row < a.sx.size(); ++row) {
        std::vector<float> s(stats_of(k), 0.0f);
        s[0] = a.sx[row];
        s[1] = float(a.qsum[row]);
        for (int c = 0; c < padded(k); ++c) {
            int chunk = c / 4;  // tile c / 256, half of it, quarter t; a unit's weight by position of its codes in the word
            s[4 + 8 * (c / 256) + 4 * (chunk / 32 % 2) + chunk % 4] += std::ldexp(float(a.q[row * padded(k) + c]), 10 - 2 * (c / 16 % 4));
        }
        m.stats.insert(m.stats.end(), s.begin(), s.end());
    }
    return m;
}

}  // namespace
