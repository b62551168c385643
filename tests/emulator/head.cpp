// Output head, embedding, argmax, sampling.
#include "oracle.h"

#include "../../kernels/cuda/head.cu"
#include "../../kernels/cuda/sample.cu"
#include "head_oracle.h"

using namespace harness;
using namespace oracle;

namespace {

void head_suite() {
    Random r(21);
    for (int n = 0; n < 130 * kRepeat; n += thinning()) {
        vary_order(r);
        Type type = Type(r.below(4));
        int units = r.between(1, n % 9 ? 40 : 180), vocab = r.between(1, 150), tokens = r.between(1, 8);
        HeadCase c(r, type, units * 16, vocab, tokens, [&] { return r.normal(); });
        Buffer<uint8_t> wb(c.weights);
        Buffer<float> sb(c.scales), xb(c.x), logits(size_t(tokens) * vocab);
        HeadParams p{reinterpret_cast<const uint4*>(wb.ptr()), type == kI8 ? sb.ptr() : nullptr, xb.ptr(), logits.ptr(), tokens, c.hidden, vocab};
        int size = tokens > 4 ? 3 : tokens > 2 ? 2 : tokens > 1 ? 1 : 0;
        if (size < 3 && r.below(4) == 0) ++size;  // a larger variant must serve too
        void (*kernels[4][4])(HeadParams) = {{bitnet_head_bf16_1, bitnet_head_bf16_2, bitnet_head_bf16_4, bitnet_head_bf16_8},
                                             {bitnet_head_f16_1, bitnet_head_f16_2, bitnet_head_f16_4, bitnet_head_f16_8},
                                             {bitnet_head_f32_1, bitnet_head_f32_2, bitnet_head_f32_4, bitnet_head_f32_8},
                                             {bitnet_head_i8_1, bitnet_head_i8_2, bitnet_head_i8_4, bitnet_head_i8_8}};
        int span = 512 / int(c.element());
        size_t shared = size_t(1 << size) * ((c.hidden + span - 1) / span * span) * 4;
        auto kernel = kernels[type][size];
        LAUNCH(kernel, Grid(unsigned(r.between(1, 5))), unsigned(r.pick({32, 128, 256})), shared, p);
        c.check_logits(logits.host());
        // The same table as an embedding.
        Buffer<int> idb(c.pick_ids(r));
        Buffer<float> e(size_t(tokens) * c.hidden);
        if (type == kI8)
            LAUNCH(bitnet_embed_i8, Grid(unsigned(tokens)), 64, 0, reinterpret_cast<int8_t*>(wb.ptr()), sb.ptr(), idb.ptr(), e.ptr(), c.hidden, vocab);
        else {
            auto embed = type == kF32 ? bitnet_embed_f32 : type == kBf16 ? bitnet_embed_bf16 : bitnet_embed_f16;
            LAUNCH(embed, Grid(unsigned(tokens)), 64, 0, wb.ptr(), idb.ptr(), e.ptr(), c.hidden, vocab);
        }
        c.check_embedding(e.host());
    }
}

void argmax_suite() {
    Random r(22);
    for (int n = 0; n < 160 * kRepeat; n += thinning()) {
        vary_order(r);
        int vocab = r.between(1, 3000), tokens = r.between(1, 8);
        LogitRows rows(r, vocab, tokens);
        Buffer<float> lb(rows.values);
        Buffer<unsigned long long> best(std::vector<unsigned long long>(tokens, 0));
        Buffer<unsigned> arrived(std::vector<unsigned>(tokens, 0));
        Buffer<int> ids(tokens);
        LAUNCH(bitnet_argmax, Grid(unsigned(r.between(1, 6)), unsigned(tokens)), unsigned(r.pick({32, 256})), 64, lb.ptr(), vocab, best.ptr(), arrived.ptr(), ids.ptr());
        check_equal(ids.host(), rows.best, "argmax");
        for (auto b : best.host()) check(b == 0, "best is left at 0");
        for (auto a : arrived.host()) check(a == 0, "arrived is left at 0");
    }
}

void sample_suite() {
    Random r(23);
    int refused = 0, drawn = 0;
    for (int n = 0; n < 400 * kRepeat; n += thinning()) {
        vary_order(r);
        SampleCase c(r, n);
        int vocab = c.vocab, tokens = c.tokens;
        Buffer<unsigned> markb(c.marks);
        c.mark(r, [&](const std::vector<MarkUpdate>& updates) {
            Buffer<MarkUpdate> ub(updates);
            LAUNCH(bitnet_mark, Grid(unsigned(updates.size() + 255) / 256), 256, 0, ub.ptr(), int(updates.size()), markb.ptr(), vocab);
        });
        check(markb.host() == c.marks, "marks");
        Buffer<float> lb(c.logits), adjusted(c.logits.size());
        Buffer<SampleSettings> sb(c.settings);
        Buffer<int> ids(tokens), list(c.logits.size());
        Buffer<unsigned long long> best(std::vector<unsigned long long>(tokens, 0));
        bool penalties = r.below(3);
        LAUNCH(bitnet_sample_prepare, Grid(3, unsigned(tokens)), 128, 64, lb.ptr(), vocab, sb.ptr(), penalties ? markb.ptr() : nullptr, adjusted.ptr(), best.ptr());
        LAUNCH(bitnet_sample_pick, Grid(unsigned(tokens)), unsigned(r.pick({64, 256})), sizeof(PickShared), adjusted.ptr(), vocab, sb.ptr(), best.ptr(), list.ptr(), ids.ptr());
        c.check_draws(ids.host(), sb.host(), adjusted.host(), penalties, refused, drawn);
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
