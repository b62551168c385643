// Naive references. Integers exact; real numbers in f64.
#pragma once
#include "harness.h"

namespace oracle {
using harness::Random;

struct Ternary {
    int rows, cols;
    std::vector<int8_t> w;        // {-1, 0, 1}
    std::vector<uint8_t> codes;   // canonical bytes
    int row_bytes;
};
enum class Fill { Random, Zero, Plus, Minus };

inline Ternary ternary(Random& r, int rows, int cols, Fill fill = Fill::Random) {
    Ternary t{rows, cols, std::vector<int8_t>(size_t(rows) * cols), {}, (cols + 3) / 4};
    // Rubbish in the padding bits: the packer must not trust them.
    t.codes.resize(size_t(rows) * t.row_bytes);
    for (auto& c : t.codes) c = uint8_t(r.next());
    for (int i = 0; i < rows; ++i)
        for (int k = 0; k < cols; ++k) {
            int v = fill == Fill::Random ? r.below(3) - 1 : fill == Fill::Zero ? 0 : fill == Fill::Plus ? 1 : -1;
            t.w[size_t(i) * cols + k] = int8_t(v);
            uint8_t& c = t.codes[size_t(i) * t.row_bytes + k / 4];
            int shift = 2 * (k % 4);
            c = uint8_t((c & ~(3 << shift)) | ((v + 1) << shift));
        }
    return t;
}

struct Quantised {
    std::vector<int8_t> q;  // [rows, padded]
    std::vector<float> sx;
    std::vector<int> qsum;
};
inline int padded(int k) { return (k + 255) / 256 * 256; }

inline Quantised quantised(Random& r, int rows, int k, bool extreme) {
    Quantised a;
    a.q.assign(size_t(rows) * padded(k), 0);
    for (int i = 0; i < rows; ++i) {
        int sum = 0;
        for (int c = 0; c < k; ++c) {
            int v = extreme ? (r.below(2) ? 127 : -127) : r.between(-127, 127);
            a.q[size_t(i) * padded(k) + c] = int8_t(v);
            sum += v;
        }
        a.qsum.push_back(sum);
        a.sx.push_back(0.1f + 10.0f * r.uniform());
    }
    return a;
}

inline int dot(const Ternary& t, int row, const int8_t* q) {
    int s = 0;
    for (int k = 0; k < t.cols; ++k) s += int(t.w[size_t(row) * t.cols + k]) * q[k];
    return s;
}
// As the CPU backend: the factor in f64, rounded once.
inline float dequantise(int acc, float sx, float multiplier) { return float(double(acc) * (double(multiplier) / double(sx))); }
inline float gated(float gate, float up, int activation) {
    if (activation == 1) return float((gate / (1.0f + std::exp(-gate)))) * up;
    float r = gate > 0 ? gate : 0;
    return r * r * up;
}

inline std::vector<float> normals(Random& r, size_t n, float scale = 1.0f) {
    std::vector<float> v(n);
    for (auto& x : v) x = r.normal() * scale;
    return v;
}

// bf16 or f16 of a float, and back.
inline uint16_t half_bits(bool is_bf16, float v) {
#ifdef __CUDACC__
    __nv_bfloat16 b = __float2bfloat16_rn(v);
    __half h = __float2half_rn(v);
#else
    unsigned u;
    std::memcpy(&u, &v, 4);
    uint16_t b = (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    _Float16 h = _Float16(v);
#endif
    uint16_t s;
    std::memcpy(&s, is_bf16 ? (void*)&b : (void*)&h, 2);
    return s;
}
inline double half_value(bool is_bf16, uint16_t s) {
    if (is_bf16) {
        unsigned u = unsigned(s) << 16;
        float f;
        std::memcpy(&f, &u, 4);
        return f;
    }
    int e = s >> 10 & 31, m = s & 1023;
    double v = e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24);
    return s & 0x8000 ? -v : v;
}

}  // namespace oracle
