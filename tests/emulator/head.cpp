// Output head, embedding, argmax, sampling.
#include "oracle.h"

#include "../../kernels/cuda/head.cu"
#include "../../kernels/cuda/sample.cu"

#include <algorithm>

using namespace harness;
using namespace oracle;

namespace {

constexpr int kRepeat =
#ifdef BITNET_EMULATOR
    1;
#else
    3;
#endif

enum Type { kBf16, kF16, kF32, kI8 };

uint16_t half_bits(Type t, float v) {
#ifdef BITNET_EMULATOR
    return t == kBf16 ? bitnet::float_to_bf16(v) : bitnet::float_to_f16(v);
#else
    __nv_bfloat16 b = __float2bfloat16_rn(v);
    __half h = __float2half_rn(v);
    uint16_t s;
    std::memcpy(&s, t == kBf16 ? (void*)&b : (void*)&h, 2);
    return s;
#endif
}
double half_value(Type t, uint16_t s) {
    if (t == kBf16) {
        unsigned u = unsigned(s) << 16;
        float f;
        std::memcpy(&f, &u, 4);
        return f;
    }
    int e = s >> 10 & 31, m = s & 1023;
    double v = e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24);
    return s & 0x8000 ? -v : v;
}

void head_suite() {
    Random r(21);
    for (int n = 0; n < 130 * kRepeat; n += thinning()) {
        vary_order(r);
        Type type = Type(r.below(4));
        int hidden = r.between(1, n % 9 ? 40 : 180) * 16, vocab = r.between(1, 150), tokens = r.between(1, 8);
        if (type == kBf16 && r.below(2)) hidden += 8;
        if (type == kF32 && r.below(2)) hidden += 4;
        start_case("head type " + std::to_string(type) + " hidden " + std::to_string(hidden) + " vocab " + std::to_string(vocab) + " tokens " + std::to_string(tokens));
        size_t element = type == kF32 ? 4 : type == kI8 ? 1 : 2;
        std::vector<uint8_t> w(size_t(vocab) * hidden * element);
        std::vector<double> value(size_t(vocab) * hidden);
        std::vector<float> scales = normals(r, vocab), x = normals(r, size_t(tokens) * hidden);
        for (size_t i = 0; i < value.size(); ++i) {
            float v = r.normal();
            if (type == kF32) {
                std::memcpy(&w[i * 4], &v, 4);
                value[i] = v;
            } else if (type == kI8) {
                int q = r.between(-127, 127);
                w[i] = uint8_t(q);
                value[i] = double(q) * scales[i / hidden];
            } else {
                uint16_t s = half_bits(type, v);
                std::memcpy(&w[i * 2], &s, 2);
                value[i] = half_value(type, s);
            }
        }
        Buffer<uint8_t> wb(w);
        Buffer<float> sb(scales), xb(x), logits(size_t(tokens) * vocab);
        HeadParams p{reinterpret_cast<const uint4*>(wb.ptr()), type == kI8 ? sb.ptr() : nullptr, xb.ptr(), logits.ptr(), tokens, hidden, vocab};
        int size = tokens > 4 ? 3 : tokens > 2 ? 2 : tokens > 1 ? 1 : 0;
        if (size < 3 && r.below(4) == 0) ++size;  // a larger variant must serve too
        void (*kernels[4][4])(HeadParams) = {{bitnet_head_bf16_1, bitnet_head_bf16_2, bitnet_head_bf16_4, bitnet_head_bf16_8},
                                             {bitnet_head_f16_1, bitnet_head_f16_2, bitnet_head_f16_4, bitnet_head_f16_8},
                                             {bitnet_head_f32_1, bitnet_head_f32_2, bitnet_head_f32_4, bitnet_head_f32_8},
                                             {bitnet_head_i8_1, bitnet_head_i8_2, bitnet_head_i8_4, bitnet_head_i8_8}};
        int span = 512 / int(element);
        size_t shared = size_t(1 << size) * ((hidden + span - 1) / span * span) * 4;
        auto kernel = kernels[type][size];
        LAUNCH(kernel, Grid(unsigned(r.between(1, 5))), unsigned(r.pick({32, 128, 256})), shared, p);
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
        check_close(logits.host(), want, 0, 1e-6 * norm, "logit");
        // The same table as an embedding.
        std::vector<int> ids(tokens);
        for (int& i : ids) i = r.below(vocab);
        Buffer<int> idb(ids);
        Buffer<float> e(size_t(tokens) * hidden);
        if (type == kI8)
            LAUNCH(bitnet_embed_i8, Grid(unsigned(tokens)), 64, 0, reinterpret_cast<int8_t*>(wb.ptr()), sb.ptr(), idb.ptr(), e.ptr(), hidden, vocab);
        else {
            auto embed = type == kF32 ? bitnet_embed_f32 : type == kBf16 ? bitnet_embed_bf16 : bitnet_embed_f16;
            LAUNCH(embed, Grid(unsigned(tokens)), 64, 0, wb.ptr(), idb.ptr(), e.ptr(), hidden, vocab);
        }
        std::vector<double> rows;
        for (int t = 0; t < tokens; ++t)
            for (int k = 0; k < hidden; ++k) rows.push_back(value[size_t(ids[t]) * hidden + k]);
        check_close(e.host(), rows, 1e-7, 0, "embedding");
    }
}

std::vector<float> some_logits(Random& r, int n) {
    std::vector<float> l = normals(r, n, r.pick({0.5f, 3.0f, 10.0f}));
    if (r.below(3) == 0)
        for (float& v : l) v = std::round(v);  // many ties
    if (r.below(8) == 0) std::fill(l.begin(), l.end(), 1.5f);
    if (r.below(8) == 0 && n > 3) l[r.below(n)] = -INFINITY;
    return l;
}

void argmax_suite() {
    Random r(22);
    for (int n = 0; n < 120 * kRepeat; n += thinning()) {
        vary_order(r);
        int vocab = r.between(1, 3000), tokens = r.between(1, 8);
        start_case("argmax vocab " + std::to_string(vocab) + " tokens " + std::to_string(tokens));
        std::vector<float> l;
        std::vector<int> want;
        for (int t = 0; t < tokens; ++t) {
            auto row = some_logits(r, vocab);
            want.push_back(int(std::max_element(row.begin(), row.end()) - row.begin()));
            l.insert(l.end(), row.begin(), row.end());
        }
        Buffer<float> lb(l);
        Buffer<unsigned long long> best(std::vector<unsigned long long>(tokens, 0));
        Buffer<unsigned> arrived(std::vector<unsigned>(tokens, 0));
        Buffer<int> ids(tokens);
        LAUNCH(bitnet_argmax, Grid(unsigned(r.between(1, 6)), unsigned(tokens)), unsigned(r.pick({32, 256})), 64, lb.ptr(), vocab, best.ptr(), arrived.ptr(), ids.ptr());
        check_equal(ids.host(), want, "argmax");
        for (auto b : best.host()) check(b == 0, "best is left at 0");
        for (auto a : arrived.host()) check(a == 0, "arrived is left at 0");
    }
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

void sample_suite() {
    Random r(23);
    for (int n = 0; n < 160 * kRepeat; n += thinning()) {
        vary_order(r);
        int vocab = r.between(1, n % 6 ? 300 : 5000), tokens = r.between(1, 3), window = r.between(1, 20);
        start_case("sample vocab " + std::to_string(vocab) + " tokens " + std::to_string(tokens));
        std::vector<float> l;
        std::vector<SampleSettings> set(tokens);
        std::vector<int> counts(size_t(tokens) * vocab, 0), ring(size_t(tokens) * window, -1), cursor(tokens, 0);
        for (int t = 0; t < tokens; ++t) {
            auto row = some_logits(r, vocab);
            l.insert(l.end(), row.begin(), row.end());
            SampleSettings& s = set[t];
            s = SampleSettings{};
            s.seed = r.next(), s.draw = r.next();
            s.temperature = r.below(6) ? 0.2f + 2 * r.uniform() : 0.0f;
            s.top_p = r.below(2) ? 1.0f : r.uniform();
            s.min_p = r.below(2) ? 0.0f : r.uniform() * 0.3f;
            s.top_k = r.below(2) ? 0 : r.between(1, 50);
            s.repetition = r.below(2) ? 1.0f : 1.3f;
            s.presence = r.below(2) ? 0.0f : 0.7f;
            s.frequency = r.below(2) ? 0.0f : 0.4f;
        }
        Buffer<float> lb(l), adjusted(l.size());
        Buffer<SampleSettings> sb(set);
        Buffer<int> ids(tokens), list(l.size()), ringb(ring), cursorb(cursor), countb(counts);
        // Fill the window through the kernel, past its end.
        for (int i = 0; i < window + 5; ++i) {
            std::vector<int> step(tokens);
            for (int t = 0; t < tokens; ++t) {
                step[t] = r.below(vocab);
                int& slot = ring[size_t(t) * window + i % window];
                if (slot >= 0) --counts[size_t(t) * vocab + slot];
                slot = step[t];
                ++counts[size_t(t) * vocab + slot];
            }
            Buffer<int> stepb(step);
            LAUNCH(bitnet_note_token, Grid(unsigned(tokens)), 32, 0, stepb.ptr(), ringb.ptr(), cursorb.ptr(), window, countb.ptr(), vocab);
        }
        check_equal(countb.host(), counts, "counts");
        Buffer<unsigned long long> best(std::vector<unsigned long long>(tokens, 0));
        bool penalties = r.below(2);
        LAUNCH(bitnet_sample_prepare, Grid(3, unsigned(tokens)), 128, 64, lb.ptr(), vocab, sb.ptr(), penalties ? countb.ptr() : nullptr, adjusted.ptr(), best.ptr());
        LAUNCH(bitnet_sample_pick, Grid(unsigned(tokens)), unsigned(r.pick({64, 256})), sizeof(PickShared), adjusted.ptr(), vocab, sb.ptr(), best.ptr(), list.ptr(), ids.ptr());
        auto got = ids.host();
        auto after = sb.host();
        auto adj = adjusted.host();
        for (int t = 0; t < tokens; ++t) {
            const SampleSettings& s = set[t];
            check(after[t].draw == s.draw + 1, "the draw counter moves by one");
            struct C {
                float v;
                int id;
                uint64_t mass;
            };
            std::vector<C> c;
            for (int i = 0; i < vocab; ++i) {
                float v = l[size_t(t) * vocab + i];
                int seen = penalties ? counts[size_t(t) * vocab + i] : 0;
                if (seen > 0) {
                    if (s.repetition != 1.0f) v = v > 0 ? v / s.repetition : v * s.repetition;
                    float f = s.frequency * float(seen);
                    float both = s.presence + f;
                    v = v - both;
                }
                if (s.temperature > 0) v = v / s.temperature;
                c.push_back({v, i, 0});
                if (std::memcmp(&adj[size_t(t) * vocab + i], &v, 4)) mismatch("adjusted logit");
            }
            std::sort(c.begin(), c.end(), [](const C& a, const C& b) { return a.v != b.v ? a.v > b.v : a.id < b.id; });
            if (s.temperature <= 0) {
                check(got[t] == c[0].id, "greedy");
                continue;
            }
            // On a GPU exp may differ in the last bit, so the draw may fall one candidate aside near an edge.
            uint64_t total = 0;
            for (C& x : c) x.mass = uint64_t(std::exp(x.v - c[0].v) * 4294967296.0f);
            c.erase(std::remove_if(c.begin(), c.end(), [](const C& x) { return x.mass == 0; }), c.end());
            if (s.top_k > 0 && size_t(s.top_k) < c.size()) c.resize(s.top_k);
            if (s.top_p < 1.0f) {
                for (C& x : c) total += x.mass;
                uint64_t target = uint64_t(double(total) * double(s.top_p)), run = 0;
                if (target > 0) --target;
                if (target >= total) target = total - 1;
                size_t keep = 0;
                while (run <= target) run += c[keep++].mass;
                c.resize(keep);
            }
            if (s.min_p > 0) {
                uint64_t least = std::max<uint64_t>(1, uint64_t(std::min(s.min_p, 1.0f) * 4294967296.0f));
                c.erase(std::remove_if(c.begin(), c.end(), [&](const C& x) { return x.mass < least; }), c.end());
            }
            total = 0;
            for (C& x : c) total += x.mass;
            uint64_t target = uint64_t((unsigned __int128)philox_reference(s.seed, s.draw) * total >> 64), run = 0;
            size_t pick = 0;
            while (run + c[pick].mass <= target) run += c[pick++].mass;
            bool ok = got[t] == c[pick].id;
#ifndef BITNET_EMULATOR
            double slack = 1e-6 * double(total);
            if (!ok && pick > 0 && double(target - run) < slack) ok = got[t] == c[pick - 1].id;
            if (!ok && pick + 1 < c.size() && double(run + c[pick].mass - target) < slack) ok = got[t] == c[pick + 1].id;
#endif
            if (!ok) mismatch("sampled " + std::to_string(got[t]) + ", want " + std::to_string(c[pick].id));
        }
        for (auto b : best.host()) check(b == 0, "best is left at 0");
    }
}

void philox_case() {
    // Known answer of the Random123 test vectors: key 0, counter 0 gives 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    start_case("philox known answer");
    check(philox_reference(0, 0) == 0xe169c58d6627e8d5ull, "philox");
}

}  // namespace

int head_suites() {
    int f = 0;
    f += run_suite("head + embedding", head_suite);
    f += run_suite("argmax", argmax_suite);
    f += run_suite("philox", philox_case);
    f += run_suite("sampling", sample_suite);
    return f;
}
