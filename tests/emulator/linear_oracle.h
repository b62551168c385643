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

// Runs the kernel that packs; each suite has its own.
void pack_on_device(Buffer<unsigned>& packed, const Ternary& t, int row0, int map);

void pack_case(Random& r, int rows, int cols, int row0, int map) {
    start_case("pack rows " + std::to_string(rows) + " cols " + std::to_string(cols) + " row0 " + std::to_string(row0) + " map " + std::to_string(map));
    Ternary t = ternary(r, rows, cols);
    int total = map ? (rows + 7) / 8 * 16 : (row0 + rows + 15) / 16 * 16;
    std::vector<unsigned> zero(size_t(total) * ((cols + 255) / 256) * 16, 0);
    Buffer<unsigned> packed(zero);
    pack_on_device(packed, t, row0, map);
    check_equal(packed.host(), pack_reference(t, row0, map, zero), "word");
}

// The weights of a product, packed.
struct Product {
    int epilogue;
    bool gated;
    Ternary a, b;
    int row_tiles;
    Buffer<unsigned> packed;
    Product(Random& r, int rows, int k, int epilogue_, Fill fill)
        : epilogue(epilogue_), gated(epilogue == 2), a(ternary(r, rows, k, fill)), b(ternary(r, rows, k)), row_tiles(gated ? (rows + 7) / 8 : (rows + 15) / 16),
          packed(std::vector<unsigned>(size_t(row_tiles) * ((k + 255) / 256) * 256, 0)) {
        pack_on_device(packed, a, 0, gated ? 1 : 0);
        if (gated) pack_on_device(packed, b, 0, 2);
    }
    void check_output(const Quantised& act, const Scales& scales, int activation, int tokens, int ld, const std::vector<float>& before, const std::vector<float>& got) const {
        check_equal(got, expected(a, b, act, scales, epilogue, activation, tokens, ld, before, got), "output");
    }
};

// Sums of the widest rows are as large as they can be.
void saturate(Quantised& act, int k) {
    if (k != 132104) return;
    std::fill(act.q.begin(), act.q.begin() + k, int8_t(127));
    act.qsum[0] = 127 * k;
}

// Two roundings instead of one would leave a third of the outputs aside.
void check_outputs_aside() {
    start_case("outputs are rounded once");
    check(outputs > 0 && aside * 100000 <= outputs, "more than one output in 100 000 differs from the f64 form");
}
// `dequantise`: the kernels', of a sum, s_x and a multiplier.
template <class F>
void rounding_cases(Random r, F dequantise) {
    int missed = 0;
    for (int i = 0; i < 1000000; ++i) {
        int acc = r.below(1 << 24) >> r.below(24);
        if (r.below(2)) acc = -acc;
        float sx = std::ldexp(1 + r.uniform(), r.between(-20, 23)), m = std::ldexp(1 + r.uniform(), r.between(-20, 20));
        float got = dequantise(acc, sx, m), want = oracle::dequantise(acc, sx, m);
        if (got == want) continue;
        ++missed;
        check(got == std::nextafter(want, INFINITY) || got == std::nextafter(want, -INFINITY), "within one unit");
    }
    check(missed <= 5, "one rounding in a million cases");
}

// The activation alone, and columns of a wider row, of up to `most` tokens. `gated` and `place` run the kernels.
template <class G, class P>
void columns_case(Random& r, int most, G gated, P place) {
    int width = r.below(4) ? r.between(1, 300) : r.pick({255, 256, 257, 1000}), tokens = r.between(1, most), activation = r.below(2), add = r.below(2);
    int ld = width + r.below(40), first = r.below(ld - width + 1);
    start_case("columns n " + std::to_string(width) + " tokens " + std::to_string(tokens) + " ld " + std::to_string(ld) + (add ? " add" : ""));
    std::vector<float> gate_up = normals(r, size_t(tokens) * 2 * width, 3), before = normals(r, size_t(tokens) * ld), want, placed = before;
    Buffer<float> in(gate_up), out(size_t(tokens) * width), wide(before);
    Grid grid(unsigned(width + 255) / 256, unsigned(tokens));
    gated(grid, in.ptr(), out.ptr(), tokens, width, activation);
    auto got = out.host();
    place(grid, out.ptr(), wide.ptr() + first, tokens, width, ld, add);
    for (int t = 0; t < tokens; ++t)
        for (int i = 0; i < width; ++i) {
            float g = got[size_t(t) * width + i], y = oracle::gated(gate_up[size_t(t) * 2 * width + i], gate_up[size_t(t) * 2 * width + width + i], activation);
            want.push_back(activation == 1 && std::fabs(g - y) <= 1e-6f * std::fabs(y) + 1e-30f ? g : y);
            float& p = placed[size_t(t) * ld + first + i];
            p = add ? p + g : g;
        }
    check_equal(got, want, "gated");
    check_equal(wide.host(), placed, "placed");
}

}  // namespace
