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
        int units = r.between(1, kind ? 10 : 180), vocab = r.between(1, kind % 20 ? 20 : 150), tokens = r.between(1, 1 << size);
        HeadCase c(r, type, units * 16, vocab, tokens, [&] { return float(r.below(4001) - 2000) / 1000; });
        Buffer<uint8_t> wb(c.weights);
        Buffer<float> sb(c.scales), xb(c.x), logits(size_t(tokens) * vocab);
        HeadParams p{tokens, c.hidden, vocab};
        {
            Width width(unsigned(r.pick({16, 32, 32, 64})));
            launch_metal(heads[type][size], Grid(unsigned(r.between(1, 3))), unsigned(r.pick({64, 256})), 0, p, wb.ptr(), sb.ptr(), xb.ptr(), logits.ptr());
        }
        c.check_logits(logits.host());
        // The same table as an embedding.
        Buffer<int> idb(c.pick_ids(r));
        Buffer<float> e(size_t(tokens) * c.hidden);
        auto embed = [&](auto function) { launch_metal(function, Grid(unsigned(tokens)), 256, 0, p, wb.ptr(), sb.ptr(), idb.ptr(), e.ptr()); };
        type == kI8 ? embed(bitnet_embed_i8) : type == kF32 ? embed(bitnet_embed_f32) : type == kBf16 ? embed(bitnet_embed_bf16) : embed(bitnet_embed_f16);
        c.check_embedding(e.host());
    }
}

void argmax_suite() {
    Random r(62);
    for (int n = 0; n < cases(1000); n += thinning()) {
        vary_order(r);
        int vocab = r.between(1, n % 4 ? 600 : 3000), tokens = r.between(1, 8), groups = r.between(1, 6);
        LogitRows rows(r, vocab, tokens);
        Buffer<float> lb(rows.values);
        Buffer<ulong> best(size_t(tokens) * groups);
        Buffer<int> ids(tokens);
        Width width(unsigned(r.pick({16, 32, 32, 64})));
        ChoiceParams p{vocab, groups, 0};
        launch_metal(bitnet_argmax, Grid(unsigned(groups), unsigned(tokens)), 256, 256, p, lb.ptr(), best.ptr());
        launch_metal(bitnet_argmax_pick, Grid(unsigned(tokens)), 256, 256, p, best.ptr(), ids.ptr());
        check_equal(ids.host(), rows.best, "argmax");
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
        SampleCase c(r, n);
        int vocab = c.vocab, tokens = c.tokens;
        Buffer<unsigned> markb(c.marks);
        c.mark(r, [&](const std::vector<MarkUpdate>& updates) {
            Buffer<MarkUpdate> ub(updates);
            launch_metal(bitnet_mark, Grid(unsigned(updates.size() + 255) / 256), 256, 0, MarkParams{int(updates.size()), vocab}, ub.ptr(), markb.ptr());
        });
        check(markb.host() == c.marks, "marks");
        Buffer<float> lb(c.logits), adjusted(c.logits.size());
        Buffer<SampleSettings> sb(c.settings);
        Buffer<int> ids(tokens), list(c.logits.size());
        int groups = r.between(1, 4);
        Buffer<ulong> best(size_t(tokens) * groups);
        bool penalties = r.below(3);
        ChoiceParams p{vocab, groups, penalties};
        {
            Width width(unsigned(r.pick({16, 32, 32, 64})));
            launch_metal(bitnet_sample_prepare, Grid(unsigned(groups), unsigned(tokens)), 256, 256, p, lb.ptr(), sb.ptr(), markb.ptr(), adjusted.ptr(), best.ptr());
            launch_metal(bitnet_sample_pick, Grid(unsigned(tokens)), unsigned(r.pick({64, 256, 512})), sizeof(PickShared), p, adjusted.ptr(), sb.ptr(), best.ptr(), list.ptr(), ids.ptr());
        }
        c.check_draws(ids.host(), sb.host(), adjusted.host(), penalties, refused, drawn);
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
