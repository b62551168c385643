// Output head, embedding, argmax, sampling.
#include "oracle.h"

#include "../../kernels/cuda/head.cu"
#include "../../kernels/cuda/sample.cu"
#include "head_oracle.h"

using namespace harness;
using namespace oracle;

namespace {

constexpr int kRepeat =
#ifdef BITNET_EMULATOR
    1;
#else
    3;
#endif

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
                uint16_t s = half_bits(type == kBf16, v);
                std::memcpy(&w[i * 2], &s, 2);
                value[i] = half_value(type == kBf16, s);
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

void argmax_suite() {
    Random r(22);
    for (int n = 0; n < 160 * kRepeat; n += thinning()) {
        vary_order(r);
        int vocab = r.between(1, 3000), tokens = r.between(1, 8);
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
        Buffer<unsigned long long> best(std::vector<unsigned long long>(tokens, 0));
        Buffer<unsigned> arrived(std::vector<unsigned>(tokens, 0));
        Buffer<int> ids(tokens);
        LAUNCH(bitnet_argmax, Grid(unsigned(r.between(1, 6)), unsigned(tokens)), unsigned(r.pick({32, 256})), 64, lb.ptr(), vocab, best.ptr(), arrived.ptr(), ids.ptr());
        check_equal(ids.host(), want, "argmax");
        for (auto b : best.host()) check(b == 0, "best is left at 0");
        for (auto a : arrived.host()) check(a == 0, "arrived is left at 0");
    }
}

void sample_suite() {
    Random r(23);
    int refused = 0, drawn = 0;
    for (int n = 0; n < 400 * kRepeat; n += thinning()) {
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
            LAUNCH(bitnet_mark, Grid(unsigned(updates.size() + 255) / 256), 256, 0, ub.ptr(), int(updates.size()), markb.ptr(), vocab);
        }
        check(markb.host() == marks, "marks");
        Buffer<float> lb(l), adjusted(l.size());
        Buffer<SampleSettings> sb(set);
        Buffer<int> ids(tokens), list(l.size());
        Buffer<unsigned long long> best(std::vector<unsigned long long>(tokens, 0));
        bool penalties = r.below(3);
        LAUNCH(bitnet_sample_prepare, Grid(3, unsigned(tokens)), 128, 64, lb.ptr(), vocab, sb.ptr(), penalties ? markb.ptr() : nullptr, adjusted.ptr(), best.ptr());
        LAUNCH(bitnet_sample_pick, Grid(unsigned(tokens)), unsigned(r.pick({64, 256})), sizeof(PickShared), adjusted.ptr(), vocab, sb.ptr(), best.ptr(), list.ptr(), ids.ptr());
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
        for (auto b : best.host()) check(b == 0, "best is left at 0");
    }
    check(thinning() > 1 || (refused > 0 && drawn > refused), "both kinds of rows occur");
}

}  // namespace

int head_suites() {
    int f = 0;
    f += run_suite("head + embedding", head_suite);
    f += run_suite("argmax", argmax_suite);
    f += run_suite("philox", philox_case);
    f += run_suite("exp", exp_case);
    f += run_suite("sampling", sample_suite);
    return f;
}
