// Decode attention, rope + KV write, prefill attention.
#include "oracle.h"

#include "../../kernels/cuda/attention.cu"
#include "../../kernels/cuda/prefill_attention.cu"
#include "attention_oracle.h"

using namespace harness;
using namespace oracle;

namespace {

constexpr int kRepeat =
#ifdef BITNET_EMULATOR
    1;
#else
    3;
#endif

void decode_suite() {
    Random r(11);
    for (int n = 0; n < 160 * kRepeat; n += thinning()) {
        vary_order(r);
        Setup s = random_setup(r, r.between(1, n % 8 ? 90 : 400));
        int tokens = r.between(1, s.slots);
        int splits = r.pick({1, 2, 3, 5, 8, 16});
        start_case("decode heads " + std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " d " + std::to_string(s.d) + " max " + std::to_string(s.max_positions) + " splits " + std::to_string(splits) + " cache " + std::to_string(s.cache));
        std::vector<float> cos, sin;
        tables(r, s, cos, sin);
        std::vector<uint8_t> k0 = cache_of(r, s), v0 = cache_of(r, s);
        std::vector<int> slots(s.slots), positions(tokens);
        for (int i = 0; i < s.slots; ++i) slots[i] = i;
        for (int i = 0; i < s.slots; ++i) std::swap(slots[i], slots[r.below(s.slots)]);
        slots.resize(tokens);
        for (int& p : positions) p = r.below(4) ? r.below(s.max_positions) : s.max_positions - 1;
        int width = (s.heads + 2 * s.kv_heads) * s.d;
        std::vector<float> qkv = normals(r, size_t(tokens) * width);
        int blocks = s.kv_heads * bitnet::head_blocks(s.heads, s.kv_heads);
        Buffer<float> qb(qkv), cb(cos), sb(sin), out(size_t(tokens) * s.heads * s.d), partial(size_t(tokens) * s.heads * splits * (s.d + 2));
        Buffer<uint8_t> kb(k0), vb(v0);
        Buffer<int> slot_b(slots), position_b(positions);
        Buffer<unsigned> arrived(std::vector<unsigned>(size_t(tokens) * blocks, 0));
        AttentionParams p{};
        p.qkv = qb.ptr(), p.cos = cb.ptr(), p.sin = sb.ptr(), p.positions = position_b.ptr(), p.slots = slot_b.ptr();
        p.k_cache = kb.ptr(), p.v_cache = vb.ptr(), p.out = out.ptr(), p.partial = partial.ptr(), p.arrived = arrived.ptr();
        p.tokens = tokens, p.heads = s.heads, p.kv_heads = s.kv_heads, p.head_dim = s.d, p.max_positions = s.max_positions, p.splits = splits;
        p.scale = 1.0f / std::sqrt(float(s.d));
        auto kernel = s.cache == kF32 ? bitnet_decode_attention_f32 : s.cache == kBf16 ? bitnet_decode_attention_bf16 : bitnet_decode_attention_f16;
        LAUNCH(kernel, Grid(unsigned(blocks), unsigned(splits), unsigned(tokens)), bitnet::kAttentionThreads, size_t(bitnet::decode_attention_shared(s.d)), p);
        auto k1 = kb.host(), v1 = vb.host();
        std::vector<double> want, want_k(k0.size() / s.element()), want_v(want_k.size());
        std::vector<uint8_t> written(want_k.size());
        for (int t = 0; t < tokens; ++t) {
            auto row = rotated_row(s, &qkv[size_t(t) * width], positions[t], cos, sin);
            for (int kv = 0; kv < s.kv_heads; ++kv)
                for (int c = 0; c < s.d; ++c) {
                    size_t at = s.at(slots[t], positions[t], kv) + c;
                    written[at] = 1;
                    want_k[at] = row[(s.heads + kv) * s.d + c];
                    want_v[at] = row[(s.heads + s.kv_heads + kv) * s.d + c];
                }
            attend(s, row, slots[t], positions[t] + 1, k1, v1, want);
        }
        check_cache(s, k1, k0, want_k, written, "k");
        check_cache(s, v1, v0, want_v, written, "v");
        check_close(out.host(), want, 2e-5, 1e-6, "attention");
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
        start_case("prefill heads " + std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " d " + std::to_string(s.d) + " sequences " + std::to_string(sequences) + " cache " + std::to_string(s.cache));
        std::vector<float> cos, sin;
        tables(r, s, cos, sin);
        std::vector<uint8_t> k0 = cache_of(r, s), v0 = cache_of(r, s);
        std::vector<int> starts{0}, positions, slots;
        int longest = 0;
        for (int i = 0; i < sequences; ++i) {
            int count = r.between(1, n % 4 ? 40 : s.max_positions), first = r.below(s.max_positions - count + 1);
            longest = std::max(longest, count);
            for (int c = 0; c < count; ++c) positions.push_back(first + c), slots.push_back(sequences - 1 - i);
            starts.push_back(int(positions.size()));
        }
        int tokens = int(positions.size()), width = (s.heads + 2 * s.kv_heads) * s.d;
        std::vector<float> qkv = normals(r, size_t(tokens) * width);
        Buffer<float> qb(qkv), cb(cos), sb(sin), out(size_t(tokens) * s.heads * s.d);
        Buffer<uint8_t> kb(k0), vb(v0);
        Buffer<int> slot_b(slots), position_b(positions), start_b(starts);
        PrefillParams pp{};
        AttentionParams& p = pp.a;
        p.qkv = qb.ptr(), p.cos = cb.ptr(), p.sin = sb.ptr(), p.positions = position_b.ptr(), p.slots = slot_b.ptr();
        p.k_cache = kb.ptr(), p.v_cache = vb.ptr(), p.out = out.ptr();
        p.tokens = tokens, p.heads = s.heads, p.kv_heads = s.kv_heads, p.head_dim = s.d, p.max_positions = s.max_positions, p.splits = 1;
        p.scale = 1.0f / std::sqrt(float(s.d));
        pp.starts = start_b.ptr(), pp.sequences = sequences;
        auto write = s.cache == kF32 ? bitnet_rope_write_f32 : s.cache == kBf16 ? bitnet_rope_write_bf16 : bitnet_rope_write_f16;
        auto attention = s.cache == kF32 ? bitnet_prefill_attention_f32 : s.cache == kBf16 ? bitnet_prefill_attention_bf16 : bitnet_prefill_attention_f16;
        LAUNCH(write, Grid(unsigned(tokens)), unsigned(r.pick({64, 256})), 0, p, qb.ptr());
        if (mma) {
            auto kernel = s.cache == kBf16 ? (s.d == 64 ? bitnet_prefill_attention_mma_bf16_64 : s.d == 96 ? bitnet_prefill_attention_mma_bf16_96 : s.d == 128 ? bitnet_prefill_attention_mma_bf16_128 : bitnet_prefill_attention_mma_bf16_256)
                                           : (s.d == 64 ? bitnet_prefill_attention_mma_f16_64 : s.d == 96 ? bitnet_prefill_attention_mma_f16_96 : s.d == 128 ? bitnet_prefill_attention_mma_f16_128 : bitnet_prefill_attention_mma_f16_256);
            size_t shared = size_t(4) * (s.d == 256 ? 32 : 64) * (2 * s.d + 16) + (s.d == 256 ? 65536 : 0);
            LAUNCH(kernel, Grid(unsigned((longest + 63) / 64), unsigned(s.heads), unsigned(sequences)), 128, shared, pp);
        } else
            LAUNCH(attention, Grid(unsigned((longest + 31) / 32), unsigned(s.heads), unsigned(sequences)), 128, size_t(64 * (s.d + 4) + 32 * 36) * 4, pp);
        auto k1 = kb.host(), v1 = vb.host();
        std::vector<double> want, want_k(k0.size() / s.element()), want_v(want_k.size());
        std::vector<uint8_t> written(want_k.size());
        for (int t = 0; t < tokens; ++t) {
            auto row = rotated_row(s, &qkv[size_t(t) * width], positions[t], cos, sin);
            for (int kv = 0; kv < s.kv_heads; ++kv)
                for (int c = 0; c < s.d; ++c) {
                    size_t at = s.at(slots[t], positions[t], kv) + c;
                    written[at] = 1;
                    want_k[at] = row[(s.heads + kv) * s.d + c];
                    want_v[at] = row[(s.heads + s.kv_heads + kv) * s.d + c];
                }
            attend(s, row, slots[t], positions[t] + 1, k1, v1, want);
        }
        check_cache(s, k1, k0, want_k, written, "k");
        check_cache(s, v1, v0, want_v, written, "v");
        check_close(out.host(), want, mma ? 6e-5 : 2e-5, 1e-6, "attention");
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
