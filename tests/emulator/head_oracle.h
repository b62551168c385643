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

// A matrix of some type with inputs for it, as an output head and as an embedding.
struct HeadCase {
    Type type;
    int hidden, vocab, tokens;
    std::vector<uint8_t> weights;
    std::vector<float> scales, x;
    std::vector<double> value;
    std::vector<int> ids;

    size_t element() const { return type == kF32 ? 4 : type == kI8 ? 1 : 2; }

    // `hidden` is made longer now and then; `next` gives the values of the dense types.
    template <class F>
    HeadCase(Random& r, Type type_, int hidden_, int vocab_, int tokens_, F next) : type(type_), hidden(hidden_), vocab(vocab_), tokens(tokens_), ids(tokens_) {
        if (type == kBf16 && r.below(2)) hidden += 8;
        if (type == kF32 && r.below(2)) hidden += 4;
        start_case("head type " + std::to_string(type) + " hidden " + std::to_string(hidden) + " vocab " + std::to_string(vocab) + " tokens " + std::to_string(tokens));
        value.resize(size_t(vocab) * hidden);
        weights.resize(value.size() * element());
        scales = normals(r, vocab), x = normals(r, size_t(tokens) * hidden);
        for (size_t i = 0; i < value.size(); ++i) {
            float v = next();
            if (type == kF32) {
                std::memcpy(&weights[i * 4], &v, 4);
                value[i] = v;
            } else if (type == kI8) {
                int q = r.between(-127, 127);
                weights[i] = uint8_t(q);
                value[i] = double(q) * scales[i / hidden];
            } else {
                uint16_t s = half_bits(type == kBf16, v);
                std::memcpy(&weights[i * 2], &s, 2);
                value[i] = half_value(type == kBf16, s);
            }
        }
    }
    void check_logits(const std::vector<float>& got) const {
        std::vector<double> want;
        double norm = 0;
        for (int t = 0; t < tokens; ++t)
            for (int v = 0; v < vocab; ++v) {
                double s = 0, a = 0;
                for (int k = 0; k < hidden; ++k) {
                    double y = value[size_t(v) * hidden + k] * x[size_t(t) * hidden + k];
                    s += y;
                    a += std::fabs(y);
                }
                norm = std::max(norm, a);
                want.push_back(s);
            }
        check_close(got, want, 0, 1e-6 * norm, "logit");
    }
    const std::vector<int>& pick_ids(Random& r) {
        for (int& i : ids) i = r.below(vocab);
        return ids;
    }
    void check_embedding(const std::vector<float>& got) const {
        std::vector<double> rows;
        for (int t = 0; t < tokens; ++t)
            for (int k = 0; k < hidden; ++k) rows.push_back(value[size_t(ids[t]) * hidden + k]);
        check_close(got, rows, 1e-7, 0, "embedding");
    }
};

// Rows of logits, some spoiled, and the largest of each.
struct LogitRows {
    std::vector<float> values;
    std::vector<int> best;
    LogitRows(Random& r, int vocab, int tokens) {
        start_case("argmax vocab " + std::to_string(vocab) + " tokens " + std::to_string(tokens));
        for (int t = 0; t < tokens; ++t) {
            auto row = some_logits(r, vocab);
            spoil(r, row);
            best.push_back(host_argmax(row));
            values.insert(values.end(), row.begin(), row.end());
        }
    }
};

// Rows to draw from, with settings and marks.
struct SampleCase {
    int vocab, tokens, slots;
    std::vector<float> logits;
    std::vector<SampleSettings> settings;
    std::vector<unsigned> marks;

    SampleCase(Random& r, int n) : vocab(r.between(1, n % 6 ? 300 : 5000)), tokens(r.between(1, 3)), slots(tokens + r.below(3)), settings(tokens), marks(size_t(slots) * vocab, 0) {
        start_case("sample vocab " + std::to_string(vocab) + " tokens " + std::to_string(tokens));
        for (int t = 0; t < tokens; ++t) {
            auto row = some_logits(r, vocab);
            spoil(r, row);
            logits.insert(logits.end(), row.begin(), row.end());
            SampleSettings& s = settings[t];
            s = SampleSettings{};
            s.seed = r.next(), s.draw = r.next();
            s.temperature = r.below(6) ? 0.2f + 2 * r.uniform() : r.pick({0.0f, 1e-40f, 1e-6f, 3e38f});
            s.top_p = r.below(2) ? 1.0f : r.below(3) ? r.uniform() + 1e-6f : r.pick({0.5f, 0.25f, 0.999f, 1e-20f});
            s.min_p = r.below(2) ? 0.0f : r.below(4) ? r.uniform() * 0.3f : r.pick({1.0f, 1e-20f, 1e-6f});
            s.top_k = r.below(2) ? 0 : r.below(5) ? r.between(1, 50) : r.pick({vocab - 1, vocab, vocab + 1, 1 << 30});
            if (s.top_k < 0) s.top_k = 0;
            s.repetition = r.below(2) ? 1.0f : r.pick({1.3f, 0.5f});
            s.presence = r.below(2) ? 0.0f : r.pick({0.7f, -2.0f});
            s.frequency = r.below(2) ? 0.0f : r.pick({0.4f, -0.3f});
            s.slot = r.below(5) ? (t + n) % slots : -1;
        }
    }
    // Marks as the host keeps them: a prompt at once, then tokens of the answer one by one; `launch` gets the updates.
    template <class F>
    void mark(Random& r, F launch) {
        for (int step = 0, steps = r.below(12); step < steps; ++step) {
            std::vector<MarkUpdate> updates;
            for (int slot = 0; slot < slots; ++slot) {
                std::vector<int> seen;
                for (int i = step ? 1 : r.below(60); i > 0; --i) seen.push_back(r.below(std::min(vocab, 40)));
                for (int id : seen) {
                    unsigned& m = marks[size_t(slot) * vocab + id];
                    m = (m | 1u << 31) + (step ? 1 : 0);
                }
                std::sort(seen.begin(), seen.end());
                seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
                for (int id : seen) updates.push_back({slot, id, marks[size_t(slot) * vocab + id]});
                if (r.below(4) == 0) updates.push_back({-1, r.below(vocab), 7});
                if (r.below(8) == 0) updates.push_back({slot, vocab + r.below(9), 7});
            }
            if (!updates.empty()) launch(updates);
        }
    }
    // The tokens drawn, the settings afterwards and the logits after penalties. Counts the rows that were refused and drawn from.
    void check_draws(const std::vector<int>& got, const std::vector<SampleSettings>& after, const std::vector<float>& adjusted, bool penalties, int& refused, int& drawn) const {
        for (int t = 0; t < tokens; ++t) {
            const SampleSettings& s = settings[t];
            std::vector<float> scores;
            for (int i = 0; i < vocab; ++i) {
                volatile float v = logits[size_t(t) * vocab + i];
                unsigned mark = penalties && s.slot >= 0 ? marks[size_t(s.slot) * vocab + i] : 0;
                if (mark) {
                    if (s.repetition != 1.0f) v = v < 0 ? v * s.repetition : v / s.repetition;
                    volatile float f = s.frequency * float(mark & 0x7fffffffu), both = s.presence + f;
                    if (mark & 0x7fffffffu) v = v - both;
                }
                scores.push_back(float(v));
                float a = adjusted[size_t(t) * vocab + i];
                if (!(std::isnan(a) && std::isnan(scores[i])) && std::memcmp(&a, &scores[i], 4)) mismatch("adjusted logit");
            }
            bool close;
            std::vector<Candidate> c = host_support(s, scores, close);
            check(after[t].draw == s.draw + !c.empty(), "the draw counter moves by one with every draw");
            if (c.empty()) {
                ++refused;
                check(got[t] == -1, "a row without a sound best is refused");
                continue;
            }
            ++drawn;
            if (close) continue;
            // Weights too small for a mass are never drawn.
            auto mass = [](const Candidate& x) { return uint64_t(std::ldexp(double(x.weight), 40)); };
            uint64_t total = 0;
            for (Candidate& x : c) total += mass(x);
            uint64_t target = uint64_t((unsigned __int128)philox_reference(s.seed, s.draw) * total >> 64), run = 0;
            size_t pick = 0;
            while (c.size() > 1 && run + mass(c[pick]) <= target) run += mass(c[pick++]);
            if (got[t] != c[pick].id) mismatch("sampled " + std::to_string(got[t]) + ", want " + std::to_string(c[pick].id));
        }
    }
};

}  // namespace
