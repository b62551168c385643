// References of the attention suites, for CUDA and Metal.
#pragma once
#include "oracle.h"

namespace {

using namespace harness;
using namespace oracle;

enum Cache { kF32, kBf16, kF16 };
unsigned bits_of(Cache c, float v) {
    unsigned u;
    if (c == kF32) {
        std::memcpy(&u, &v, 4);
        return u;
    }
    return half_bits(c == kBf16, v);
}
double value_of(Cache c, const uint8_t* p) {
    if (c == kF32) {
        float f;
        std::memcpy(&f, p, 4);
        return f;
    }
    uint16_t s;
    std::memcpy(&s, p, 2);
    return half_value(c == kBf16, s);
}

struct Setup {
    int heads, kv_heads, d, slots, max_positions;
    Cache cache;
    size_t element() const { return cache == kF32 ? 4 : 2; }
    size_t at(int slot, int position, int kv) const { return ((size_t(slot) * max_positions + position) * kv_heads + kv) * d; }
};

// q rotated (not scaled), k rotated, v of one token, f64.
std::vector<double> rotated_row(const Setup& s, const float* row, int position, const std::vector<float>& cos, const std::vector<float>& sin) {
    std::vector<double> out(row, row + size_t(s.heads + 2 * s.kv_heads) * s.d);
    int half = s.d / 2;
    for (int h = 0; h < s.heads + s.kv_heads; ++h)
        for (int i = 0; i < half; ++i) {
            double a = row[h * s.d + i], b = row[h * s.d + i + half], c = cos[size_t(position) * half + i], n = sin[size_t(position) * half + i];
            out[h * s.d + i] = a * c - b * n;
            out[h * s.d + i + half] = b * c + a * n;
        }
    return out;
}

void attend(const Setup& s, const std::vector<double>& q, int slot, int length, const std::vector<uint8_t>& k, const std::vector<uint8_t>& v, std::vector<double>& out) {
    for (int h = 0; h < s.heads; ++h) {
        int kv = h / (s.heads / s.kv_heads);
        std::vector<double> score(length);
        double top = -1e300, sum = 0;
        for (int p = 0; p < length; ++p) {
            double dot = 0;
            for (int c = 0; c < s.d; ++c) dot += q[h * s.d + c] * value_of(s.cache, &k[(s.at(slot, p, kv) + c) * s.element()]);
            score[p] = dot / std::sqrt(double(s.d));
            top = std::max(top, score[p]);
        }
        for (double& x : score) sum += (x = std::exp(x - top));
        for (int c = 0; c < s.d; ++c) {
            double y = 0;
            for (int p = 0; p < length; ++p) y += score[p] * value_of(s.cache, &v[(s.at(slot, p, kv) + c) * s.element()]);
            out.push_back(y / sum);
        }
    }
}

Setup random_setup(Random& r, int max_positions) {
    Setup s;
    s.kv_heads = r.between(1, 3);
    s.heads = s.kv_heads * r.pick({1, 2, 3, 4, 5, 8});
    s.d = r.pick({4, 8, 20, 32, 64, 64, 100, 128, 256});
    if (s.d > 64) s.kv_heads = 1, s.heads = r.pick({1, 4, 6});
    s.slots = r.between(1, 4);
    s.max_positions = max_positions;
    s.cache = Cache(r.below(3));
    return s;
}
void tables(Random& r, const Setup& s, std::vector<float>& cos, std::vector<float>& sin) {
    cos.resize(size_t(s.max_positions) * s.d / 2);
    sin.resize(cos.size());
    for (size_t i = 0; i < cos.size(); ++i) {
        float a = r.uniform() * 6.28f;
        cos[i] = std::cos(a);
        sin[i] = std::sin(a);
    }
}
std::vector<uint8_t> cache_of(Random& r, const Setup& s) {
    std::vector<uint8_t> c(size_t(s.slots) * s.max_positions * s.kv_heads * s.d * s.element());
    for (size_t i = 0; i < c.size(); i += s.element()) {
        unsigned b = bits_of(s.cache, r.normal());
        std::memcpy(&c[i], &b, s.element());
    }
    return c;
}
// The cache afterwards: within one unit of storage of what it must be (f32 rotation rounds differently), bit-equal elsewhere.
void check_cache(const Setup& s, const std::vector<uint8_t>& got, const std::vector<uint8_t>& before, const std::vector<double>& want, const std::vector<uint8_t>& written, const char* what) {
    double unit = s.cache == kF32 ? 1e-6 : s.cache == kBf16 ? 1.0 / 128 : 1.0 / 1024;
    for (size_t i = 0; i * s.element() < got.size(); ++i) {
        if (!written[i]) {
            if (std::memcmp(&got[i * s.element()], &before[i * s.element()], s.element())) return mismatch(std::string(what) + ": a foreign cache entry changed");
        } else {
            double g = value_of(s.cache, &got[i * s.element()]);
            if (!(std::fabs(g - want[i]) <= unit * std::fabs(want[i]) + 1e-5)) return mismatch(std::string(what) + ": cache entry " + std::to_string(g) + ", want " + std::to_string(want[i]));
        }
    }
}

// What attention is given: some tokens over a cache.
struct AttentionCase {
    Setup s;
    std::vector<float> cos, sin, qkv;
    std::vector<uint8_t> k, v;
    std::vector<int> positions, slots, starts{0};
    int longest = 0;  // most tokens of a sequence

    int tokens() const { return int(positions.size()); }

   private:
    AttentionCase(Random& r, const Setup& s_) : s(s_) {
        tables(r, s, cos, sin);
        k = cache_of(r, s), v = cache_of(r, s);
    }
    void draw_qkv(Random& r) { qkv = normals(r, size_t(tokens()) * (s.heads + 2 * s.kv_heads) * s.d); }

   public:
    // One token of each of some slots.
    static AttentionCase decode(Random& r, const Setup& s, int tokens, int splits) {
        start_case("decode heads " + std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " d " + std::to_string(s.d) + " max " + std::to_string(s.max_positions) + " splits " + std::to_string(splits) + " cache " + std::to_string(s.cache));
        AttentionCase c(r, s);
        c.slots.resize(s.slots), c.positions.resize(tokens);
        for (int i = 0; i < s.slots; ++i) c.slots[i] = i;
        for (int i = 0; i < s.slots; ++i) std::swap(c.slots[i], c.slots[r.below(s.slots)]);
        c.slots.resize(tokens);
        for (int& p : c.positions) p = r.below(4) ? r.below(s.max_positions) : s.max_positions - 1;
        c.draw_qkv(r);
        return c;
    }
    // Sequences of as many tokens as `count` says.
    template <class F>
    static AttentionCase prefill(Random& r, const Setup& s, int sequences, F count) {
        start_case("prefill heads " + std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " d " + std::to_string(s.d) + " sequences " + std::to_string(sequences) + " cache " + std::to_string(s.cache));
        AttentionCase c(r, s);
        for (int i = 0; i < sequences; ++i) {
            int n = count(), first = r.below(s.max_positions - n + 1);
            c.longest = std::max(c.longest, n);
            for (int t = 0; t < n; ++t) c.positions.push_back(first + t), c.slots.push_back(sequences - 1 - i);
            c.starts.push_back(c.tokens());
        }
        c.draw_qkv(r);
        return c;
    }
};

// The same in device memory, and the output.
struct OnDevice {
    Buffer<float> qkv, cos, sin, out;
    Buffer<uint8_t> k, v;
    Buffer<int> positions, slots, starts;
    explicit OnDevice(const AttentionCase& c)
        : qkv(c.qkv), cos(c.cos), sin(c.sin), out(size_t(c.tokens()) * c.s.heads * c.s.d), k(c.k), v(c.v), positions(c.positions), slots(c.slots), starts(c.starts) {}
};

// Output and cache afterwards; the cache that is attended to is the device's, as it was rounded there.
void check_attention(const AttentionCase& c, const OnDevice& on, double tolerance) {
    const Setup& s = c.s;
    auto k = on.k.host(), v = on.v.host();
    std::vector<double> want, want_k(k.size() / s.element()), want_v(want_k.size());
    std::vector<uint8_t> written(want_k.size());
    for (int t = 0; t < c.tokens(); ++t) {
        auto row = rotated_row(s, &c.qkv[size_t(t) * (s.heads + 2 * s.kv_heads) * s.d], c.positions[t], c.cos, c.sin);
        for (int kv = 0; kv < s.kv_heads; ++kv)
            for (int i = 0; i < s.d; ++i) {
                size_t at = s.at(c.slots[t], c.positions[t], kv) + i;
                written[at] = 1;
                want_k[at] = row[(s.heads + kv) * s.d + i];
                want_v[at] = row[(s.heads + s.kv_heads + kv) * s.d + i];
            }
        attend(s, row, c.slots[t], c.positions[t] + 1, k, v, want);
    }
    check_cache(s, k, c.k, want_k, written, "k");
    check_cache(s, v, c.v, want_v, written, "v");
    check_close(on.out.host(), want, tolerance, 1e-6, "attention");
}

}  // namespace
