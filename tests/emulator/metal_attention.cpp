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
        start_case("decode heads " + std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " d " + std::to_string(s.d) + " max " + std::to_string(s.max_positions) + " splits " + std::to_string(splits) + " cache " + std::to_string(s.cache));
        std::vector<float> cos, sin;
        tables(r, s, cos, sin);
        std::vector<uint8_t> k0 = cache_of(r, s), v0 = cache_of(r, s);
        std::vector<int> slots(s.slots), positions(tokens);
        for (int i = 0; i < s.slots; ++i) slots[i] = i;
        for (int i = 0; i < s.slots; ++i) std::swap(slots[i], slots[r.below(s.slots)]);
        slots.resize(tokens);
        for (int& p : positions) p = r.below(4) ? r.below(s.max_positions) : s.max_positions - 1;
        int row = (s.heads + 2 * s.kv_heads) * s.d;
        std::vector<float> qkv = normals(r, size_t(tokens) * row);
        int blocks = s.kv_heads * ((s.heads / s.kv_heads + 3) / 4);
        Buffer<float> qb(qkv), cb(cos), sb(sin), out(size_t(tokens) * s.heads * s.d), partial(size_t(tokens) * s.heads * splits * (s.d + 2));
        Buffer<uint8_t> kb(k0), vb(v0);
        Buffer<int> slot_b(slots), position_b(positions);
        AttentionParams p = params_of(s, tokens, splits);
        with_kernels(s.cache, [&](auto k, auto*) {
            launch_metal(k.decode, Grid(unsigned(blocks), unsigned(splits), unsigned(tokens)), 128, size_t(4) * (6 * s.d + 2320), p, qb.ptr(), cb.ptr(), sb.ptr(), position_b.ptr(), slot_b.ptr(), kb.ptr(), vb.ptr(), out.ptr(), partial.ptr());
        });
        if (splits > 1) {
            Width width(unsigned(r.pick({16, 32, 64})));
            launch_metal(bitnet_decode_combine, Grid(unsigned(s.heads), unsigned(tokens)), 128, 512, p, partial.ptr(), position_b.ptr(), out.ptr());
        }
        auto k1 = kb.host(), v1 = vb.host();
        std::vector<double> want, want_k(k0.size() / s.element()), want_v(want_k.size());
        std::vector<uint8_t> written(want_k.size());
        for (int t = 0; t < tokens; ++t) {
            auto rotated = rotated_row(s, &qkv[size_t(t) * row], positions[t], cos, sin);
            for (int kv = 0; kv < s.kv_heads; ++kv)
                for (int c = 0; c < s.d; ++c) {
                    size_t at = s.at(slots[t], positions[t], kv) + c;
                    written[at] = 1;
                    want_k[at] = rotated[(s.heads + kv) * s.d + c];
                    want_v[at] = rotated[(s.heads + s.kv_heads + kv) * s.d + c];
                }
            attend(s, rotated, slots[t], positions[t] + 1, k1, v1, want);
        }
        check_cache(s, k1, k0, want_k, written, "k");
        check_cache(s, v1, v0, want_v, written, "v");
        check_close(out.host(), want, 2e-5, 1e-6, "attention");
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
        start_case("prefill heads " + std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " d " + std::to_string(s.d) + " sequences " + std::to_string(sequences) + " cache " + std::to_string(s.cache));
        std::vector<float> cos, sin;
        tables(r, s, cos, sin);
        std::vector<uint8_t> k0 = cache_of(r, s), v0 = cache_of(r, s);
        std::vector<int> starts{0}, positions, slots;
        int longest = 0;
        for (int i = 0; i < sequences; ++i) {
            int count = std::min(s.max_positions, r.between(1, small ? 12 : s.max_positions)), first = r.below(s.max_positions - count + 1);
            longest = std::max(longest, count);
            for (int c = 0; c < count; ++c) positions.push_back(first + c), slots.push_back(sequences - 1 - i);
            starts.push_back(int(positions.size()));
        }
        int tokens = int(positions.size()), row = (s.heads + 2 * s.kv_heads) * s.d;
        std::vector<float> qkv = normals(r, size_t(tokens) * row);
        Buffer<float> qb(qkv), cb(cos), sb(sin), out(size_t(tokens) * s.heads * s.d);
        Buffer<uint8_t> kb(k0), vb(v0);
        Buffer<int> slot_b(slots), position_b(positions), start_b(starts);
        AttentionParams p = params_of(s, tokens, 1);
        unsigned queries = bucket == 2 ? 16 : 32;
        size_t shared = std::vector<size_t>{23040, 28928, 26240}[bucket];
        with_kernels(s.cache, [&](auto k, auto*) {
            launch_metal(k.write, Grid(unsigned(tokens)), 256, 0, p, qb.ptr(), cb.ptr(), sb.ptr(), position_b.ptr(), slot_b.ptr(), kb.ptr(), vb.ptr());
            launch_metal(k.prefill[bucket], Grid((unsigned(longest) + queries - 1) / queries, unsigned(s.heads), unsigned(sequences)), 4 * queries, shared, p, qb.ptr(), position_b.ptr(), slot_b.ptr(), start_b.ptr(), kb.ptr(), vb.ptr(), out.ptr());
        });
        auto k1 = kb.host(), v1 = vb.host();
        std::vector<double> want, want_k(k0.size() / s.element()), want_v(want_k.size());
        std::vector<uint8_t> written(want_k.size());
        for (int t = 0; t < tokens; ++t) {
            auto rotated = rotated_row(s, &qkv[size_t(t) * row], positions[t], cos, sin);
            for (int kv = 0; kv < s.kv_heads; ++kv)
                for (int c = 0; c < s.d; ++c) {
                    size_t at = s.at(slots[t], positions[t], kv) + c;
                    written[at] = 1;
                    want_k[at] = rotated[(s.heads + kv) * s.d + c];
                    want_v[at] = rotated[(s.heads + s.kv_heads + kv) * s.d + c];
                }
            attend(s, rotated, slots[t], positions[t] + 1, k1, v1, want);
        }
        check_cache(s, k1, k0, want_k, written, "k");
        check_cache(s, v1, v0, want_v, written, "v");
        check_close(out.host(), want, 2e-5, 1e-6, "attention");
    }
}

}  // namespace

int attention_suites() {
    int f = 0;
    f += run_suite("metal decode attention", decode_suite);
    f += run_suite("metal rope, prefill attention", prefill_suite);
    return f;
}
