// Decode attention, rope + KV write, prefill attention.
#include "oracle.h"

#include "../../kernels/cuda/attention.cu"
#include "../../kernels/cuda/prefill_attention.cu"
#include "attention_oracle.h"

using namespace harness;
using namespace oracle;

namespace {

AttentionParams params_of(const AttentionCase& c, OnDevice& on, int splits) {
    AttentionParams p{};
    p.qkv = on.qkv.ptr(), p.cos = on.cos.ptr(), p.sin = on.sin.ptr(), p.positions = on.positions.ptr(), p.slots = on.slots.ptr();
    p.k_cache = on.k.ptr(), p.v_cache = on.v.ptr(), p.out = on.out.ptr();
    p.tokens = c.tokens(), p.heads = c.s.heads, p.kv_heads = c.s.kv_heads, p.head_dim = c.s.d, p.max_positions = c.s.max_positions, p.splits = splits;
    p.scale = 1.0f / std::sqrt(float(c.s.d));
    return p;
}

void decode_suite() {
    Random r(11);
    for (int n = 0; n < 160 * kRepeat; n += thinning()) {
        vary_order(r);
        Setup s = random_setup(r, r.between(1, n % 8 ? 90 : 400));
        int tokens = r.between(1, s.slots);
        int splits = r.pick({1, 2, 3, 5, 8, 16});
        AttentionCase c = AttentionCase::decode(r, s, tokens, splits);
        OnDevice on(c);
        int blocks = s.kv_heads * bitnet::head_blocks(s.heads, s.kv_heads);
        Buffer<float> partial(size_t(tokens) * s.heads * splits * (s.d + 2));
        Buffer<unsigned> arrived(std::vector<unsigned>(size_t(tokens) * blocks, 0));
        AttentionParams p = params_of(c, on, splits);
        p.partial = partial.ptr(), p.arrived = arrived.ptr();
        auto kernel = s.cache == kF32 ? bitnet_decode_attention_f32 : s.cache == kBf16 ? bitnet_decode_attention_bf16 : bitnet_decode_attention_f16;
        LAUNCH(kernel, Grid(unsigned(blocks), unsigned(splits), unsigned(tokens)), bitnet::kAttentionThreads, size_t(bitnet::decode_attention_shared(s.d)), p);
        check_attention(c, on, 2e-5);
        for (unsigned a : arrived.host()) check(a == 0, "arrival counters are left at 0");
    }
}

// `mma`: the kernel on the matrix units, with the head sizes and caches it serves.
void prefill_cases(int cases, bool mma) {
    Random r(12 + mma);
    for (int n = 0; n < cases * kRepeat; n += thinning()) {
        vary_order(r);
        Setup s = random_setup(r, r.between(40, 160));
        if (mma) {
            s.d = r.pick({64, 64, 96, 128, 256});
            s.kv_heads = r.between(1, 2), s.heads = s.kv_heads * r.between(1, 2);
            s.cache = r.below(2) ? kBf16 : kF16;
        }
        int sequences = r.between(1, s.slots);
        AttentionCase c = AttentionCase::prefill(r, s, sequences, [&] { return r.between(1, n % 4 ? 40 : s.max_positions); });
        OnDevice on(c);
        PrefillParams pp{};
        pp.a = params_of(c, on, 1), pp.starts = on.starts.ptr(), pp.sequences = sequences;
        auto write = s.cache == kF32 ? bitnet_rope_write_f32 : s.cache == kBf16 ? bitnet_rope_write_bf16 : bitnet_rope_write_f16;
        auto attention = s.cache == kF32 ? bitnet_prefill_attention_f32 : s.cache == kBf16 ? bitnet_prefill_attention_bf16 : bitnet_prefill_attention_f16;
        LAUNCH(write, Grid(unsigned(c.tokens())), unsigned(r.pick({64, 256})), 0, pp.a, on.qkv.ptr());
        if (mma) {
            auto kernel = s.cache == kBf16 ? (s.d == 64 ? bitnet_prefill_attention_mma_bf16_64 : s.d == 96 ? bitnet_prefill_attention_mma_bf16_96 : s.d == 128 ? bitnet_prefill_attention_mma_bf16_128 : bitnet_prefill_attention_mma_bf16_256)
                                           : (s.d == 64 ? bitnet_prefill_attention_mma_f16_64 : s.d == 96 ? bitnet_prefill_attention_mma_f16_96 : s.d == 128 ? bitnet_prefill_attention_mma_f16_128 : bitnet_prefill_attention_mma_f16_256);
            size_t shared = size_t(4) * (s.d == 256 ? 32 : 64) * (2 * s.d + 16) + (s.d == 256 ? 65536 : 0);
            LAUNCH(kernel, Grid(unsigned((c.longest + 63) / 64), unsigned(s.heads), unsigned(sequences)), 128, shared, pp);
        } else
            LAUNCH(attention, Grid(unsigned((c.longest + 31) / 32), unsigned(s.heads), unsigned(sequences)), 128, size_t(64 * (s.d + 4) + 32 * 36) * 4, pp);
        check_attention(c, on, mma ? 6e-5 : 2e-5);
    }
}

void prefill_suite() { prefill_cases(110, false); }
void prefill_mma_suite() { prefill_cases(48, true); }

}  // namespace

int attention_suites() {
    int f = 0;
    f += run_suite("decode attention", decode_suite);
    f += run_suite("rope, kv, prefill attention", prefill_suite);
    f += run_suite("prefill attention, mma", prefill_mma_suite);
    return f;
}
