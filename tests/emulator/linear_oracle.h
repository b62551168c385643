// References of the linear suites, for CUDA and Metal. Included after the kernels: Scales is theirs.
#pragma once
#include "oracle.h"

namespace {

using namespace harness;
using namespace oracle;

int odd_k(Random& r) {
    return r.below(3) ? r.between(1, 600) : r.pick({1, 3, 4, 15, 16, 17, 255, 256, 257, 320, 511, 512, 768, 1000, 1300});
}

// The layout written out by hand from the diagram of the kernels.
std::vector<unsigned> pack_reference(const Ternary& t, int row0, int map, std::vector<unsigned> packed) {
    int k_tiles = (t.cols + 255) / 256;
    for (int r = 0; r < t.rows; ++r) {
        int target = map == 0 ? row0 + r : r / 8 * 16 + (map == 2 ? 8 : 0) + r % 8;
        for (int tile = 0; tile < k_tiles; ++tile)
            for (int lane_t = 0; lane_t < 4; ++lane_t)
                for (int j = 0; j < 4; ++j) {
                    unsigned word = 0;
                    for (int i = 0; i < 4; ++i)
                        for (int b = 0; b < 4; ++b) {
                            int k = tile * 256 + j * 64 + i * 16 + lane_t * 4 + b;
                            unsigned code = k < t.cols ? unsigned(t.w[size_t(r) * t.cols + k] + 1) : 0;
                            word |= code << (8 * b + 2 * i);
                        }
                    size_t at = (size_t(target / 16) * k_tiles + tile) * 256 + (target / 8 % 2) * 128 + (target % 8 * 4 + lane_t) * 4 + j;
                    packed[at] = word;
                }
    }
    return packed;
}

Scales make_scales(Random& r, int n, bool gated) {
    Scales s;
    s.end[0] = gated ? 1 << 30 : r.between(0, n);
    s.end[1] = gated ? 1 << 30 : r.between(s.end[0], n);
    s.end[2] = gated ? 1 << 30 : r.between(s.end[1], n);
    // Mostly multipliers as masters give them, and now and then one far away.
    for (float& v : s.value) v = r.below(8) ? 0.25f + r.uniform() : std::ldexp(1 + r.uniform(), r.between(-12, 12));
    return s;
}
float scale_of(const Scales& s, int row) { return row < s.end[0] ? s.value[0] : row < s.end[1] ? s.value[1] : row < s.end[2] ? s.value[2] : s.value[3]; }

// Outputs of both products so far, and those that missed the f64 form by a unit in the last place.
long outputs, aside;
float next_to(float want, float got) {
    ++outputs;
    if (got == want) return want;
    if (got != std::nextafter(want, INFINITY) && got != std::nextafter(want, -INFINITY)) return want;
    ++aside;
    return got;
}

// What a product must write over `before` [tokens, ld]. A dequantised value may be one unit aside; silu may differ
// from `got` in the last bits of exp.
std::vector<float> expected(const Ternary& a, const Ternary& b, const Quantised& act, const Scales& scales, int epilogue, int activation, int tokens, int ld, std::vector<float> before, const std::vector<float>& got) {
    for (int t = 0; t < tokens; ++t)
        for (int row = 0; row < a.rows; ++row) {
            const int8_t* c = &act.q[size_t(t) * padded(a.cols)];
            float& y = before[size_t(t) * ld + row];
            float g = got[size_t(t) * ld + row];
            if (epilogue == 2) {
                y = oracle::gated(oracle::dequantise(dot(a, row, c), act.sx[t], scales.value[0]), oracle::dequantise(dot(b, row, c), act.sx[t], scales.value[1]), activation);
                if (activation == 1 && std::fabs(g - y) <= 1e-6f * std::fabs(y) + 1e-30f) y = g;
                if (activation == 0 && g != y && std::fabs(g - y) <= 4e-7f * std::fabs(y)) ++aside, y = g;
                ++outputs;
            } else {
                float v = oracle::dequantise(dot(a, row, c), act.sx[t], scale_of(scales, row));
                y = next_to(epilogue == 1 ? y + v : v, g);
            }
        }
    return before;
}
}  // namespace
