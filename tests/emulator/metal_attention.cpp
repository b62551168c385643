// Metal: decode attention and its combination, rope + KV write, prefill attention.
#include "harness.h"

#include "../../kernels/metal/attention.metal"
#include "../../kernels/metal/prefill_attention.metal"
#include "attention_oracle.h"
#include "metal.h"

namespace {

AttentionParams params_of(const Setup& s, int tokens, int splits) {
    return AttentionParams{tokens, s.heads, s.kv_heads, s.d, s.max_positions, splits, 1.0f / std::sqrt(float(s.d))};
}

// The kernels of one cache type.
template <class Store, class Decode, class Write, class Prefill>
struct Kernels {
    Decode decode;
    Write write;
    Prefill prefill[3];
};
template <class Store, class D, class W, class P>
Kernels<Store, D, W, P> kernels(D d, W w, P p64, P p128, P p256) {
    return {d, w, {p64, p128, p256}};
}
#define KERNELS(STORE, NAME) \
    kernels<STORE>(bitnet_decode_attention_##NAME, bitnet_rope_write_##NAME, bitnet_prefill_attention_##NAME##_64, bitnet_prefill_attention_##NAME##_128, bitnet_prefill_attention_##NAME##_256)
template <class F>
void with_kernels(Cache cache, F f) {
    if (cache == kF32)
        f(KERNELS(float, f32), (float*)nullptr);
    else if (cache == kBf16)
        f(KERNELS(ushort, bf16), (ushort*)nullptr);
    else
        f(KERNELS(half, f16), (half*)nullptr);
}

void decode_suite() {
    Random r(51);
    for (int n = 0; n < cases(3000); n += thinning()) {
        vary_order(r);
        int form = n / thinning();
        Setup s = random_setup(r, r.between(1, form % 16 ? 60 : 400));
        s.cache = Cache(form % 3);
        if (form % 16 && s.heads > 8) s.heads = s.kv_heads * 3;
        int tokens = r.between(1, s.slots), splits = r.pick({1, 2, 3, 5, 8, 16});
        AttentionCase c = AttentionCase::decode(r, s, tokens, splits);
        OnDevice on(c);
        int blocks = s.kv_heads * ((s.heads / s.kv_heads + 3) / 4);
        Buffer<float> partial(size_t(tokens) * s.heads * splits * (s.d + 2));
        AttentionParams p = params_of(s, tokens, splits);
        with_kernels(s.cache, [&](auto k, auto*) {
            launch_metal(k.decode, Grid(unsigned(blocks), unsigned(splits), unsigned(tokens)), 128, size_t(4) * (6 * s.d + 2320), p, on.qkv.ptr(), on.cos.ptr(), on.sin.ptr(), on.positions.ptr(), on.slots.ptr(), on.k.ptr(), on.v.ptr(), on.out.ptr(), partial.ptr());
        });
        if (splits > 1) {
            Width width(unsigned(r.pick({16, 32, 64})));
            launch_metal(bitnet_decode_combine, Grid(unsigned(s.heads), unsigned(tokens)), 128, 512, p, partial.ptr(), on.positions.ptr(), on.out.ptr());
        }
        check_attention(c, on, 2e-5);
    }
}

void prefill_suite() {
    Random r(52);
    for (int n = 0; n < cases(9000); n += thinning()) {
        vary_order(r);
        int form = n / thinning(), bucket = form / 3 % 3;
        bool small = r.below(30) != 0;
        Setup s = random_setup(r, small ? r.between(4, 40) : r.between(40, 160));
        s.cache = Cache(form % 3);
        s.d = bucket == 0 ? r.pick({4, 8, 20, 32, 64}) : bucket == 1 ? r.pick({68, 100, 128}) : r.pick({132, 200, 256});
        if (small) s.kv_heads = r.between(1, 2), s.heads = s.kv_heads * (s.kv_heads == 1 ? r.between(1, 2) : 1);
        if (bucket == 2) s.kv_heads = 1, s.heads = small ? 1 : 2;
        int sequences = r.between(1, std::min(s.slots, 2));
        AttentionCase c = AttentionCase::prefill(r, s, sequences, [&] { return std::min(s.max_positions, r.between(1, small ? 12 : s.max_positions)); });
        OnDevice on(c);
        AttentionParams p = params_of(s, c.tokens(), 1);
        unsigned queries = bucket == 2 ? 16 : 32;
        size_t shared = std::vector<size_t>{23040, 28928, 26240}[bucket];
        with_kernels(s.cache, [&](auto k, auto*) {
            launch_metal(k.write, Grid(unsigned(c.tokens())), 256, 0, p, on.qkv.ptr(), on.cos.ptr(), on.sin.ptr(), on.positions.ptr(), on.slots.ptr(), on.k.ptr(), on.v.ptr());
            launch_metal(k.prefill[bucket], Grid((unsigned(c.longest) + queries - 1) / queries, unsigned(s.heads), unsigned(sequences)), 4 * queries, shared, p, on.qkv.ptr(), on.positions.ptr(), on.slots.ptr(), on.starts.ptr(), on.k.ptr(), on.v.ptr(), on.out.ptr());
        });
        check_attention(c, on, 2e-5);
    }
}

}  // namespace

int attention_suites() {
    int f = 0;
    f += run_suite("metal decode attention", decode_suite);
    f += run_suite("metal rope, prefill attention", prefill_suite);
    return f;
}
