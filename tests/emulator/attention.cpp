// Decode attention, rope + KV write, prefill attention.
#include "oracle.h"

#include "../../kernels/cuda/attention.cu"
#include "../../kernels/cuda/prefill_attention.cu"

using namespace harness;
using namespace oracle;

namespace {

constexpr int kRepeat =
#ifdef BITNET_EMULATOR
    1;
#else
    3;
#endif

enum Cache { kF32, kBf16, kF16 };
unsigned bits_of(Cache c, float v) {
    unsigned u;
    if (c == kF32) {
        std::memcpy(&u, &v, 4);
        return u;
    }
#ifdef BITNET_EMULATOR
    return c == kBf16 ? bitnet::float_to_bf16(v) : bitnet::float_to_f16(v);
#else
    __nv_bfloat16 b = __float2bfloat16_rn(v);
    __half h = __float2half_rn(v);
    uint16_t s;
    std::memcpy(&s, c == kBf16 ? (void*)&b : (void*)&h, 2);
    return s;
#endif
}
double value_of(Cache c, const uint8_t* p) {
    if (c == kF32) {
        float f;
        std::memcpy(&f, p, 4);
        return f;
    }
    uint16_t s;
    std::memcpy(&s, p, 2);
    if (c == kBf16) {
        unsigned u = unsigned(s) << 16;
        float f;
        std::memcpy(&f, &u, 4);
        return f;
    }
    int e = s >> 10 & 31, m = s & 1023;
    double v = e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24);
    return s & 0x8000 ? -v : v;
}

struct Setup {
    int heads, kv_heads, d, slots, max_positions;
    Cache cache;
    size_t element() const { return cache == kF32 ? 4 : 2; }
    size_t at(int slot, int position, int kv) const { return ((size_t(slot) * max_positions + position) * kv_heads + kv) * d; }
};

// q rotated (not scaled), k rotated, v of one token, f64.
std::vector<double> rotated_row(const Setup& s, const float* row, int position, const std::vector<float>& cos, const std::vector<float>& sin) {
    std::vector<double> out(row, row + size_t(s.heads + 2 * s.kv_heads) * s.d);
    int half = s.d / 2;
    for (int h = 0; h < s.heads + s.kv_heads; ++h)
        for (int i = 0; i < half; ++i) {
            double a = row[h * s.d + i], b = row[h * s.d + i + half], c = cos[size_t(position) * half + i], n = sin[size_t(position) * half + i];
            out[h * s.d + i] = a * c - b * n;
            out[h * s.d + i + half] = b * c + a * n;
        }
    return out;
}

void attend(const Setup& s, const std::vector<double>& q, int slot, int length, const std::vector<uint8_t>& k, const std::vector<uint8_t>& v, std::vector<double>& out) {
    for (int h = 0; h < s.heads; ++h) {
        int kv = h / (s.heads / s.kv_heads);
        std::vector<double> score(length);
        double top = -1e300, sum = 0;
        for (int p = 0; p < length; ++p) {
            double dot = 0;
            for (int c = 0; c < s.d; ++c) dot += q[h * s.d + c] * value_of(s.cache, &k[(s.at(slot, p, kv) + c) * s.element()]);
            score[p] = dot / std::sqrt(double(s.d));
            top = std::max(top, score[p]);
        }
        for (double& x : score) sum += (x = std::exp(x - top));
        for (int c = 0; c < s.d; ++c) {
            double y = 0;
            for (int p = 0; p < length; ++p) y += score[p] * value_of(s.cache, &v[(s.at(slot, p, kv) + c) * s.element()]);
            out.push_back(y / sum);
        }
    }
}

Setup random_setup(Random& r, int max_positions) {
    Setup s;
    s.kv_heads = r.between(1, 3);
    s.heads = s.kv_heads * r.pick({1, 2, 3, 4, 5, 8});
    s.d = r.pick({4, 8, 20, 32, 64, 64, 100, 128, 256});
    if (s.d > 64) s.kv_heads = 1, s.heads = r.pick({1, 4, 6});
    s.slots = r.between(1, 4);
    s.max_positions = max_positions;
    s.cache = Cache(r.below(3));
    return s;
}
void tables(Random& r, const Setup& s, std::vector<float>& cos, std::vector<float>& sin) {
    cos.resize(size_t(s.max_positions) * s.d / 2);
    sin.resize(cos.size());
    for (size_t i = 0; i < cos.size(); ++i) {
        float a = r.uniform() * 6.28f;
        cos[i] = std::cos(a);
        sin[i] = std::sin(a);
    }
}
std::vector<uint8_t> cache_of(Random& r, const Setup& s) {
    std::vector<uint8_t> c(size_t(s.slots) * s.max_positions * s.kv_heads * s.d * s.element());
    for (size_t i = 0; i < c.size(); i += s.element()) {
        unsigned b = bits_of(s.cache, r.normal());
        std::memcpy(&c[i], &b, s.element());
    }
    return c;
}
// The cache afterwards: within one unit of storage of what it must be (f32 rotation rounds differently), bit-equal elsewhere.
void check_cache(const Setup& s, const std::vector<uint8_t>& got, const std::vector<uint8_t>& before, const std::vector<double>& want, const std::vector<uint8_t>& written, const char* what) {
    double unit = s.cache == kF32 ? 1e-6 : s.cache == kBf16 ? 1.0 / 128 : 1.0 / 1024;
    for (size_t i = 0; i * s.element() < got.size(); ++i) {
        if (!written[i]) {
            if (std::memcmp(&got[i * s.element()], &before[i * s.element()], s.element())) return mismatch(std::string(what) + ": a foreign cache entry changed");
        } else {
            double g = value_of(s.cache, &got[i * s.element()]);
            if (!(std::fabs(g - want[i]) <= unit * std::fabs(want[i]) + 1e-5)) return mismatch(std::string(what) + ": cache entry " + std::to_string(g) + ", want " + std::to_string(want[i]));
        }
    }
}

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
