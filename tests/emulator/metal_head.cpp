// Metal: output head, embedding, argmax, sampling.
#include "harness.h"

#include "../../kernels/metal/head.metal"
#include "../../kernels/metal/sample.metal"
#include "head_oracle.h"
#include "metal.h"

namespace {

typedef decltype(&bitnet_head_f32_1) Head;
#define SIZES(NAME) {NAME##_1, NAME##_2, NAME##_4, NAME##_8}
const Head heads[4][4] = {SIZES(bitnet_head_bf16), SIZES(bitnet_head_f16), SIZES(bitnet_head_f32), SIZES(bitnet_head_i8)};

void head_suite() {
    Random r(61);
    for (int n = 0; n < cases(16000); n += thinning()) {
        vary_order(r);
        int form = n / thinning(), size = form / 4 % 4, kind = r.below(200);
        Type type = Type(form % 4);
        int hidden = r.between(1, kind ? 10 : 180) * 16, vocab = r.between(1, kind % 20 ? 20 : 150), tokens = r.between(1, 1 << size);
        if (type == ::kBf16 && r.below(2)) hidden += 8;
        if (type == ::kF32 && r.below(2)) hidden += 4;
        start_case("head type " + std::to_string(type) + " hidden " + std::to_string(hidden) + " vocab " + std::to_string(vocab) + " tokens " + std::to_string(tokens));
        size_t element = type == kF32 ? 4 : type == kI8 ? 1 : 2;
        std::vector<uint8_t> w(size_t(vocab) * hidden * element);
        std::vector<double> value(size_t(vocab) * hidden);
        std::vector<float> scales = normals(r, vocab), x = normals(r, size_t(tokens) * hidden);
        for (size_t i = 0; i < value.size(); ++i) {
            float v = float(r.below(4001) - 2000) / 1000;
            if (type == kF32) {
                std::memcpy(&w[i * 4], &v, 4);
                value[i] = v;
            } else if (type == kI8) {
                int q = r.between(-127, 127);
                w[i] = uint8_t(q);
                value[i] = double(q) * scales[i / hidden];
            } else {
                uint16_t s = half_bits(type == kBf16, v);
                std::memcpy(&w[i * 2], &s, 2);
                value[i] = half_value(type == kBf16, s);
            }
        }
        Buffer<uint8_t> wb(w);
        Buffer<float> sb(scales), xb(x), logits(size_t(tokens) * vocab);
        HeadParams p{tokens, hidden, vocab};
        {
            Width width(unsigned(r.pick({16, 32, 32, 64})));
            launch_metal(heads[type][size], Grid(unsigned(r.between(1, 3))), unsigned(r.pick({64, 256})), 0, p, wb.ptr(), sb.ptr(), xb.ptr(), logits.ptr());
        }
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
        auto embed = [&](auto function) { launch_metal(function, Grid(unsigned(tokens)), 256, 0, p, wb.ptr(), sb.ptr(), idb.ptr(), e.ptr()); };
        type == kI8 ? embed(bitnet_embed_i8) : type == kF32 ? embed(bitnet_embed_f32) : type == kBf16 ? embed(bitnet_embed_bf16) : embed(bitnet_embed_f16);
        std::vector<double> rows;
        for (int t = 0; t < tokens; ++t)
            for (int k = 0; k < hidden; ++k) rows.push_back(value[size_t(ids[t]) * hidden + k]);
        check_close(e.host(), rows, 1e-7, 0, "embedding");
    }
}

void argmax_suite() {
    Random r(62);
    for (int n = 0; n < cases(1000); n += thinning()) {
        vary_order(r);
        int vocab = r.between(1, n % 4 ? 600 : 3000), tokens = r.between(1, 8), groups = r.between(1, 6);
        start_case("argmax vocab " + std::to_string(vocab) + " tokens " + std::to_string(tokens));
        std::vector<float> l;
        std::vector<int> want;
        for (int t = 0; t < tokens; ++t) {
            auto row = some_logits(r, vocab);
            spoil(r, row);
            want.push_back(host_argmax(row));
            l.insert(l.end(), row.begin(), row.end());
        }
        Buffer<float> lb(l);
        Buffer<ulong> best(size_t(tokens) * groups);
        Buffer<int> ids(tokens);
        Width width(unsigned(r.pick({16, 32, 32, 64})));
        ChoiceParams p{vocab, groups, 0};
        launch_metal(bitnet_argmax, Grid(unsigned(groups), unsigned(tokens)), 256, 256, p, lb.ptr(), best.ptr());
        launch_metal(bitnet_argmax_pick, Grid(unsigned(tokens)), 256, 256, p, best.ptr(), ids.ptr());
        check_equal(ids.host(), want, "argmax");
    }
}

// 64-bit arithmetic that Metal lacks, against the compiler's.
void arithmetic_case() {
    Random r(64);
    start_case("wide products, shares, exp");
    for (int i = 0; i < 300000; ++i) {
        ulong a = r.next() >> r.below(64), b = r.next() >> r.below(64);
        check(multiply_high(a, b) == ulong((unsigned __int128)a * b >> 64), "multiply_high");
        float p = r.below(4) ? r.uniform() : std::ldexp(r.uniform(), -r.below(140));
        if (p >= 1) continue;
        int e;
        ulong m = ulong(std::ldexp(std::frexp(p, &e), 24));  // p = m 2^(e - 24)
        ulong want = 0;
        if (p > 0 && a > 0) {
            unsigned __int128 product = (unsigned __int128)a * m;
            int s = 24 - e;
            want = s >= 127 ? 1 : ulong((product >> s) + (product & ((((unsigned __int128)1) << s) - 1) ? 1 : 0));
        }
        check(share_of(a, p) == want, "share_of");
        float x = -100 * r.uniform();
        check(exp_nonpositive(x) == host_exp(x), "exp_nonpositive");
        ulong seed = r.next(), draw = r.next();
        check(philox(seed, draw) == philox_reference(seed, draw), "philox");
    }
}

void sample_suite() {
    Random r(63);
    int refused = 0, drawn = 0;
    for (int n = 0; n < cases(1000); n += thinning()) {
        vary_order(r);
        int vocab = r.between(1, n % 6 ? 300 : 5000), tokens = r.between(1, 3), slots = tokens + r.below(3);
        start_case("sample vocab " + std::to_string(vocab) + " tokens " + std::to_string(tokens));
        std::vector<float> l;
        std::vector<SampleSettings> set(tokens);
        for (int t = 0; t < tokens; ++t) {
            auto row = some_logits(r, vocab);
            spoil(r, row);
            l.insert(l.end(), row.begin(), row.end());
            SampleSettings& s = set[t];
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
        // Marks as the host keeps them: a prompt at once, then tokens of the answer one by one.
        std::vector<unsigned> marks(size_t(slots) * vocab, 0);
        Buffer<unsigned> markb(marks);
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
            if (updates.empty()) continue;
            Buffer<MarkUpdate> ub(updates);
            launch_metal(bitnet_mark, Grid(unsigned(updates.size() + 255) / 256), 256, 0, MarkParams{int(updates.size()), vocab}, ub.ptr(), markb.ptr());
        }
        check(markb.host() == marks, "marks");
        Buffer<float> lb(l), adjusted(l.size());
        Buffer<SampleSettings> sb(set);
        Buffer<int> ids(tokens), list(l.size());
        int groups = r.between(1, 4);
        Buffer<ulong> best(size_t(tokens) * groups);
        bool penalties = r.below(3);
        ChoiceParams p{vocab, groups, penalties};
        {
            Width width(unsigned(r.pick({16, 32, 32, 64})));
            launch_metal(bitnet_sample_prepare, Grid(unsigned(groups), unsigned(tokens)), 256, 256, p, lb.ptr(), sb.ptr(), markb.ptr(), adjusted.ptr(), best.ptr());
            launch_metal(bitnet_sample_pick, Grid(unsigned(tokens)), unsigned(r.pick({64, 256, 512})), sizeof(PickShared), p, adjusted.ptr(), sb.ptr(), best.ptr(), list.ptr(), ids.ptr());
        }
        auto got = ids.host();
        auto after = sb.host();
        auto adj = adjusted.host();
        for (int t = 0; t < tokens; ++t) {
            const SampleSettings& s = set[t];
            std::vector<float> scores;
            for (int i = 0; i < vocab; ++i) {
                volatile float v = l[size_t(t) * vocab + i];
                unsigned mark = penalties && s.slot >= 0 ? marks[size_t(s.slot) * vocab + i] : 0;
                if (mark) {
                    if (s.repetition != 1.0f) v = v < 0 ? v * s.repetition : v / s.repetition;
                    volatile float f = s.frequency * float(mark & 0x7fffffffu), both = s.presence + f;
                    if (mark & 0x7fffffffu) v = v - both;
                }
                scores.push_back(float(v));
                float a = adj[size_t(t) * vocab + i];
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
    check(thinning() > 1 || (refused > 0 && drawn > refused), "both kinds of rows occur");
}

}  // namespace

int head_suites() {
    int f = 0;
    f += run_suite("metal head + embedding", head_suite);
    f += run_suite("metal argmax", argmax_suite);
    f += run_suite("metal 64-bit arithmetic", arithmetic_case);
    f += run_suite("philox", philox_case);
    f += run_suite("exp", exp_case);
    f += run_suite("metal sampling", sample_suite);
    return f;
}
