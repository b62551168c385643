// References of the head and sampling suites, for CUDA and Metal. Included after the kernels: SampleSettings is theirs.
#pragma once
#include "oracle.h"

#include <algorithm>

namespace {

using namespace harness;
using namespace oracle;

enum Type { kBf16, kF16, kF32, kI8 };

std::vector<float> some_logits(Random& r, int n) {
    std::vector<float> l = normals(r, n, r.pick({0.5f, 3.0f, 10.0f}));
    if (r.below(3) == 0)
        for (float& v : l) v = std::round(v);  // many ties
    if (r.below(8) == 0) std::fill(l.begin(), l.end(), r.pick({1.5f, 0.0f, -3e38f}));
    if (r.below(8) == 0)
        for (float& v : l) v *= r.pick({1e30f, 1e-30f});
    if (r.below(8) == 0)
        for (float& v : l)
            if (r.below(3) == 0) v = r.pick({0.0f, -0.0f, 3e38f, -3e38f});
    if (r.below(6) == 0 && n > 1)  // masked, all but one at least
        for (int i = r.below(n), at = r.below(n); i > 0; --i) l[(at + i) % n] = -INFINITY;
    return l;
}
// Now and then a row that cannot be drawn from.
void spoil(Random& r, std::vector<float>& l) {
    int n = int(l.size()), kind = r.below(16);
    if (kind == 0) l[r.below(n)] = NAN;
    if (kind == 1) l[r.below(n)] = -NAN;
    if (kind == 2) l[r.below(n)] = INFINITY;
    if (kind == 3) std::fill(l.begin(), l.end(), -INFINITY);
    if (kind == 4) std::fill(l.begin(), l.end(), NAN);
}
// src/generate/sampler.rs: the lowest of the largest, and none where there is a NaN, an infinite score or no finite one.
int host_argmax(const std::vector<float>& l) {
    int best = 0;
    for (int i = 0; i < int(l.size()); ++i) {
        if (std::isnan(l[i])) return -1;
        if (l[i] > l[best]) best = i;
    }
    return std::isinf(l[best]) ? -1 : best;
}

uint64_t philox_reference(uint64_t seed, uint64_t draw) {
    uint32_t c[4] = {uint32_t(draw), uint32_t(draw >> 32), 0, 0}, k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    for (int i = 0; i < 10; ++i) {
        uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
        uint32_t n[4] = {uint32_t(b >> 32) ^ c[1] ^ k[0], uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k[1], uint32_t(a)};
        std::memcpy(c, n, sizeof c);
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
    return uint64_t(c[1]) << 32 | c[0];
}

// src/generate/exp.rs; volatile against contraction into FMA.
float host_exp(float x) {
    const float magic = 12582912.0f;
    volatile float t = x * 1.44269504088896340736f, shifted = t + magic, n = shifted - magic;
    volatile float a = n * 0.6933594f, b = n * -2.1219444e-4f, f = x - a;
    f = f - b;
    volatile float p = 1.9875691e-4f;
    for (float c : {1.3981999e-3f, 8.333452e-3f, 4.1665796e-2f, 1.6666665e-1f, 0.5f}) {
        volatile float q = p * f;
        p = q + c;
    }
    volatile float q = p * f;
    q = q * f;
    q = q + f;
    q = q + 1.0f;
    float m = magic, s = shifted;
    unsigned u, v;
    std::memcpy(&u, &s, 4), std::memcpy(&v, &m, 4);
    u = (u - v + 127u) << 23;
    float e;
    std::memcpy(&e, &u, 4);
    return x < -87.0f ? 0.0f : float(q) * e;
}
void exp_case() {
    start_case("exp of the host");
    // The same numbers are in src/generate/exp.rs.
    const std::pair<float, unsigned> known[] = {{0.0f, 0x3f800000u}, {-0.3f, 0x3f3da643u}, {-1.0f, 0x3ebc5ab2u}, {-7.7f, 0x39ed6972u}, {-33.3f, 0x2778b2eau}, {-86.9f, 0x00c60f89u}, {-87.5f, 0u}};
    for (auto [x, bits] : known) {
        float y = host_exp(x);
        unsigned u;
        std::memcpy(&u, &y, 4);
        if (u != bits) {
            char text[80];
            std::snprintf(text, sizeof text, "exp(%g) = 0x%08x, want 0x%08x", x, u, bits);
            mismatch(text);
        }
    }
}

struct Candidate {
    float score, weight;
    int id;
};
// What the host's sampler would draw from, in its order of merit; empty if it would refuse. `close`: a decision
// about a token where another order of summation may differ.
std::vector<Candidate> host_support(const SampleSettings& s, const std::vector<float>& scores, bool& close) {
    int best = host_argmax(scores);
    close = false;
    if (best < 0) return {};
    std::vector<Candidate> c;
    for (int i = 0; i < int(scores.size()); ++i) c.push_back({scores[i], 0, i});
    if (s.temperature == 0 || s.top_k == 1) return {c[best]};
    std::sort(c.begin(), c.end(), [](const Candidate& a, const Candidate& b) { return a.score != b.score ? a.score > b.score : a.id < b.id; });
    bool exact = true;
    for (Candidate& x : c) {
        volatile float difference = x.score - scores[best];
        x.weight = host_exp(difference / s.temperature);
        exact = exact && std::ldexp(x.weight, 40) == std::floor(std::ldexp(x.weight, 40));
    }
    if (s.top_k > 0 && size_t(s.top_k) < c.size()) c.resize(s.top_k);
    double mass = 0, above = 0;
    for (Candidate& x : c) mass += x.weight;
    std::vector<Candidate> kept;
    for (Candidate& x : c) {
        if (s.top_p < 1 && !exact && std::fabs(above / mass - s.top_p) < 1e-9) close = true;
        if (s.top_p < 1 && !kept.empty() && !(above < double(s.top_p) * mass)) break;
        kept.push_back(x);
        above += x.weight;
    }
    kept.erase(std::remove_if(kept.begin(), kept.end(), [&](const Candidate& x) { return !(x.weight >= s.min_p && x.weight > 0); }), kept.end());
    return kept;
}

void philox_case() {
    // Known answer of the Random123 test vectors: key 0, counter 0 gives 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    start_case("philox known answer");
    check(philox_reference(0, 0) == 0xe169c58d6627e8d5ull, "philox");
}

}  // namespace
