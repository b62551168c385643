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
    for (int n = 0; n < cases(1200); n += thinning()) {
        vary_order(r);
        Type type = Type(r.below(4));
        int hidden = r.between(1, n % 20 ? 24 : 180) * 16, vocab = r.between(1, n % 4 ? 40 : 150), tokens = r.between(1, 8);
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
        int size = tokens > 4 ? 3 : tokens > 2 ? 2 : tokens > 1 ? 1 : 0;
        if (size < 3 && r.below(4) == 0) ++size;  // a larger variant must serve too
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

}  // namespace

int head_suites() {
    int f = 0;
    f += run_suite("metal head + embedding", head_suite);
    f += run_suite("metal argmax", argmax_suite);
    return f;
}
