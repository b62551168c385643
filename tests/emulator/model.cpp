// The recipes of kernels/README.md ("A prefill", "A decode step") on small random models, against a naive f64 model:
// the order of launches, the stacked and interleaved matrices, slots, positions and the token loop.
#include "oracle.h"

#include "../../kernels/cuda/attention.cu"
#include "../../kernels/cuda/gemm.cu"
#include "../../kernels/cuda/gemv.cu"
#include "../../kernels/cuda/head.cu"
#include "../../kernels/cuda/norm.cu"
#include "../../kernels/cuda/pack.cu"
#include "../../kernels/cuda/prefill_attention.cu"
#include "../../kernels/cuda/sample.cu"

#include <algorithm>
#include <memory>

using namespace harness;
using namespace oracle;

namespace {

struct Config {
    int hidden, heads, kv_heads, d, ffn, layers, vocab, max_positions, slots, activation;
    bool sub_norms;
    float eps = 1e-5f;
    int width() const { return (heads + 2 * kv_heads) * d; }
};

struct Layer {
    Ternary q, k, v, o, gate, up, down;
    std::vector<float> input_norm, attention_norm, post_norm, ffn_norm;
    float scale[7];
    std::unique_ptr<Buffer<unsigned>> qkv_p, o_p, gate_up_p, down_p;
    std::unique_ptr<Buffer<float>> input_norm_b, attention_norm_b, post_norm_b, ffn_norm_b;
    std::unique_ptr<Buffer<uint16_t>> k_cache, v_cache;
};

// --- the naive model

std::vector<double> bit_linear(const Ternary& w, const std::vector<double>& x, float scale) {
    double top = 0;
    for (double v : x) top = std::max(top, std::fabs(v));
    double s = 127 / std::max(top, 1e-5);
    std::vector<double> y(w.rows);
    for (int r = 0; r < w.rows; ++r) {
        double sum = 0;
        for (int k = 0; k < w.cols; ++k) sum += w.w[size_t(r) * w.cols + k] * std::nearbyint(x[k] * s);
        y[r] = sum / s * scale;
    }
    return y;
}
std::vector<double> norm(const std::vector<double>& x, const std::vector<float>& w, float eps) {
    double s = 0;
    for (double v : x) s += v * v;
    s = 1 / std::sqrt(s / double(x.size()) + eps);
    std::vector<double> y;
    for (size_t i = 0; i < x.size(); ++i) y.push_back(x[i] * s * w[i]);
    return y;
}
float bf16(float v) {
    unsigned u;
    std::memcpy(&u, &v, 4);
    u = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
    std::memcpy(&v, &u, 4);
    return v;
}

struct Naive {
    const Config& c;
    const std::vector<Layer>& layers;
    const std::vector<float>&cos, &sin, &table, &last;
    std::vector<std::vector<std::vector<double>>> k, v;  // [layer][position]

    std::vector<double> advance(int token) {
        k.resize(c.layers), v.resize(c.layers);
        int position = int(k[0].size()), half = c.d / 2;
        std::vector<double> x(&table[size_t(token) * c.hidden], &table[size_t(token) * c.hidden] + c.hidden);
        auto rotate = [&](std::vector<double>& y) {
            for (size_t h = 0; h < y.size(); h += c.d)
                for (int i = 0; i < half; ++i) {
                    double a = y[h + i], b = y[h + i + half], co = cos[size_t(position) * half + i], si = sin[size_t(position) * half + i];
                    y[h + i] = a * co - b * si;
                    y[h + i + half] = b * co + a * si;
                }
        };
        for (int n = 0; n < c.layers; ++n) {
            const Layer& l = layers[n];
            auto h = norm(x, l.input_norm, c.eps);
            auto q = bit_linear(l.q, h, l.scale[0]), kk = bit_linear(l.k, h, l.scale[1]), vv = bit_linear(l.v, h, l.scale[2]);
            rotate(q);
            rotate(kk);
            for (double& y : kk) y = bf16(float(y));
            for (double& y : vv) y = bf16(float(y));
            k[n].push_back(kk);
            v[n].push_back(vv);
            std::vector<double> a(size_t(c.heads) * c.d, 0.0);
            for (int head = 0; head < c.heads; ++head) {
                int g = head / (c.heads / c.kv_heads) * c.d;
                std::vector<double> s;
                double top = -1e300, sum = 0;
                for (int p = 0; p <= position; ++p) {
                    double dot = 0;
                    for (int i = 0; i < c.d; ++i) dot += q[head * c.d + i] * k[n][p][g + i];
                    s.push_back(dot / std::sqrt(double(c.d)));
                    top = std::max(top, s.back());
                }
                for (double& w : s) sum += (w = std::exp(w - top));
                for (int p = 0; p <= position; ++p)
                    for (int i = 0; i < c.d; ++i) a[head * c.d + i] += s[p] / sum * v[n][p][g + i];
            }
            if (c.sub_norms) a = norm(a, l.attention_norm, c.eps);
            auto o = bit_linear(l.o, a, l.scale[3]);
            for (int i = 0; i < c.hidden; ++i) x[i] += o[i];
            h = norm(x, l.post_norm, c.eps);
            auto gate = bit_linear(l.gate, h, l.scale[4]), up = bit_linear(l.up, h, l.scale[5]);
            for (int i = 0; i < c.ffn; ++i) gate[i] = c.activation == 1 ? gate[i] / (1 + std::exp(-gate[i])) * up[i] : std::max(gate[i], 0.0) * std::max(gate[i], 0.0) * up[i];
            if (c.sub_norms) gate = norm(gate, l.ffn_norm, c.eps);
            auto down = bit_linear(l.down, gate, l.scale[6]);
            for (int i = 0; i < c.hidden; ++i) x[i] += down[i];
        }
        auto h = norm(x, last, c.eps);
        std::vector<double> logits(c.vocab, 0.0);
        for (int t = 0; t < c.vocab; ++t)
            for (int i = 0; i < c.hidden; ++i) logits[t] += h[i] * table[size_t(t) * c.hidden + i];
        return logits;
    }
};

// --- the model on the device

void pack_into(Buffer<unsigned>& packed, const Ternary& t, int row0, int map) {
    Buffer<uint8_t> codes(t.codes);
    long words = long(t.rows) * ((t.cols + 255) / 256) * 16;
    LAUNCH(bitnet_pack, Grid(unsigned((words + 255) / 256)), 256, 0, codes.ptr(), packed.ptr(), t.rows, t.cols, t.row_bytes, row0, map);
}
std::unique_ptr<Buffer<unsigned>> matrix(int rows_padded, int cols) {
    return std::make_unique<Buffer<unsigned>>(std::vector<unsigned>(size_t(rows_padded) * ((cols + 255) / 256) * 16, 0));
}
Scales scales_of(std::initializer_list<int> ends, std::initializer_list<float> values) {
    Scales s;
    for (int& e : s.end) e = 1 << 30;
    std::copy(ends.begin(), ends.end(), s.end);
    std::fill(s.value, s.value + 4, 1.0f);
    std::copy(values.begin(), values.end(), s.value);
    return s;
}

struct Device {
    const Config& c;
    std::vector<Layer>& layers;
    Buffer<float> cos, sin, last;
    Buffer<uint16_t> table;
    int room;  // tokens at once
    Buffer<float> x, qkv, attention, ffn, normed, logits, partial, sx;
    Buffer<int8_t> q;
    Buffer<int> qsum, ids, positions, slots, starts;
    Buffer<unsigned> arrived;
    Buffer<unsigned long long> best;
    static constexpr int kSplits = 3;

    Device(const Config& c_, std::vector<Layer>& l, const std::vector<float>& cos_, const std::vector<float>& sin_, const std::vector<float>& last_, const std::vector<uint16_t>& table_, int room_)
        : c(c_), layers(l), cos(cos_), sin(sin_), last(last_), table(table_), room(room_), x(size_t(room) * c.hidden), qkv(size_t(room) * c.width()),
          attention(size_t(room) * c.heads * c.d), ffn(size_t(room) * c.ffn), normed(size_t(room) * c.hidden), logits(size_t(8) * c.vocab),
          partial(size_t(8) * c.heads * kSplits * (c.d + 2)), sx(room), q(size_t(room) * padded(std::max({c.hidden, c.ffn, c.heads * c.d}))), qsum(room),
          ids(room), positions(room), slots(room), starts(9), arrived(std::vector<unsigned>(size_t(8) * c.heads, 0)), best(std::vector<unsigned long long>(8, 0)) {}

    template <class T>
    static void put(Buffer<T>& b, const std::vector<T>& v) {
#ifdef BITNET_EMULATOR
        std::memcpy(b.ptr(), v.data(), v.size() * sizeof(T));
#else
        cuda_check(cudaMemcpy(b.ptr(), v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
#endif
    }
    AttentionParams attention_params(const Layer& l, int tokens, int splits) {
        AttentionParams p{};
        p.qkv = qkv.ptr(), p.cos = cos.ptr(), p.sin = sin.ptr(), p.positions = positions.ptr(), p.slots = slots.ptr();
        p.k_cache = l.k_cache->ptr(), p.v_cache = l.v_cache->ptr(), p.out = attention.ptr(), p.partial = partial.ptr(), p.arrived = arrived.ptr();
        p.tokens = tokens, p.heads = c.heads, p.kv_heads = c.kv_heads, p.head_dim = c.d, p.max_positions = c.max_positions, p.splits = splits;
        p.scale = 1.0f / std::sqrt(float(c.d));
        return p;
    }
    void gemv(void (*kernel)(GemvParams), Buffer<unsigned>& w, Buffer<float>& in, Buffer<float>* weight, Buffer<float>& out, const Scales& s, int tokens, int n, int k, bool gated) {
        GemvParams p{};
        p.weights = reinterpret_cast<const uint4*>(w.ptr());
        p.x = in.ptr(), p.norm = weight ? weight->ptr() : nullptr, p.out = out.ptr(), p.scales = s, p.eps = c.eps;
        p.tokens = tokens, p.n = n, p.k = k, p.ld_out = n, p.activation = c.activation;
        int row_tiles = (n + (gated ? 7 : 15)) / (gated ? 8 : 16), grid = std::min(row_tiles, 3);
        size_t shared = size_t(tokens) * (padded(k) + 16) + size_t((row_tiles + grid - 1) / grid) * 512 + 448;
        LAUNCH(kernel, Grid(unsigned(grid)), 128, shared, p);
    }
    void gemm(void (*kernel)(GemmParams), Buffer<unsigned>& w, Buffer<float>& in, Buffer<float>* weight, Buffer<float>& out, const Scales& s, int tokens, int n, int k, bool gated) {
        LAUNCH(bitnet_norm_quantise, Grid(unsigned(tokens)), 64, 384, in.ptr(), nullptr, weight ? weight->ptr() : nullptr, c.eps, tokens, k, q.ptr(), sx.ptr(), qsum.ptr());
        GemmParams p{};
        p.weights = reinterpret_cast<const uint4*>(w.ptr());
        p.q = q.ptr(), p.sx = sx.ptr(), p.qsum = qsum.ptr(), p.out = out.ptr(), p.scales = s;
        p.tokens = tokens, p.n = n, p.k = k, p.ld_out = n, p.activation = c.activation;
        int row_tiles = (n + (gated ? 7 : 15)) / (gated ? 8 : 16);
        LAUNCH(kernel, Grid(unsigned(row_tiles + 7) / 8, unsigned(tokens + 63) / 64), 256, 49152, p);
    }
    Scales qkv_scales(const Layer& l) { return scales_of({c.heads * c.d, (c.heads + c.kv_heads) * c.d}, {l.scale[0], l.scale[1], l.scale[2]}); }
    void head(float* rows, int tokens) {
        LAUNCH(bitnet_rmsnorm, Grid(unsigned(tokens)), 64, 128, rows, nullptr, last.ptr(), c.eps, tokens, c.hidden, normed.ptr());
        HeadParams p{reinterpret_cast<const uint4*>(table.ptr()), nullptr, normed.ptr(), logits.ptr(), tokens, c.hidden, c.vocab};
        LAUNCH(bitnet_head_bf16_8, Grid(2), 64, size_t(8) * ((c.hidden + 255) / 256 * 256) * 4, p);
        LAUNCH(bitnet_argmax, Grid(2, unsigned(tokens)), 64, 64, logits.ptr(), c.vocab, best.ptr(), arrived.ptr(), ids.ptr());
    }
    // All prompts at once; logits of each one's last token.
    void prefill(const std::vector<std::vector<int>>& prompts, const std::vector<int>& slot_of, bool mma) {
        std::vector<int> id, position, slot, start{0};
        size_t longest = 0;
        for (size_t s = 0; s < prompts.size(); ++s) {
            for (size_t i = 0; i < prompts[s].size(); ++i) id.push_back(prompts[s][i]), position.push_back(int(i)), slot.push_back(slot_of[s]);
            start.push_back(int(id.size()));
            longest = std::max(longest, prompts[s].size());
        }
        int tokens = int(id.size());
        put(ids, id), put(positions, position), put(slots, slot), put(starts, start);
        LAUNCH(bitnet_embed_bf16, Grid(unsigned(tokens)), 64, 0, table.ptr(), ids.ptr(), x.ptr(), c.hidden, c.vocab);
        for (Layer& l : layers) {
            gemm(bitnet_gemm_64, *l.qkv_p, x, l.input_norm_b.get(), qkv, qkv_scales(l), tokens, c.width(), c.hidden, false);
            PrefillParams p{attention_params(l, tokens, 1), starts.ptr(), int(prompts.size())};
            LAUNCH(bitnet_rope_write_bf16, Grid(unsigned(tokens)), 64, 0, p.a, qkv.ptr());
            if (mma)
                LAUNCH(bitnet_prefill_attention_mma_bf16_64, Grid(unsigned(longest + 63) / 64, unsigned(c.heads), unsigned(prompts.size())), 128, size_t(4 * 64 * (2 * 64 + 16)), p);
            else
                LAUNCH(bitnet_prefill_attention_bf16, Grid(unsigned(longest + 31) / 32, unsigned(c.heads), unsigned(prompts.size())), 128, size_t(64 * (c.d + 4) + 1152) * 4, p);
            gemm(bitnet_gemm_residual_64, *l.o_p, attention, c.sub_norms ? l.attention_norm_b.get() : nullptr, x, scales_of({}, {l.scale[3]}), tokens, c.hidden, c.heads * c.d, false);
            gemm(bitnet_gemm_gated_64, *l.gate_up_p, x, l.post_norm_b.get(), ffn, scales_of({}, {l.scale[4], l.scale[5]}), tokens, c.ffn, c.hidden, true);
            gemm(bitnet_gemm_residual_64, *l.down_p, ffn, c.sub_norms ? l.ffn_norm_b.get() : nullptr, x, scales_of({}, {l.scale[6]}), tokens, c.hidden, c.ffn, false);
        }
        auto rows = x.host();
        std::vector<float> picked;
        for (size_t s = 1; s < start.size(); ++s) picked.insert(picked.end(), &rows[size_t(start[s] - 1) * c.hidden], &rows[size_t(start[s] - 1) * c.hidden] + c.hidden);
        put(x, picked);
        head(x.ptr(), int(prompts.size()));
        // The decode loop goes on from here.
        std::vector<int> next;
        for (auto& p : prompts) next.push_back(int(p.size()));
        put(positions, next), put(slots, slot_of);
    }
    // One token of every sequence, from the ids that the last step chose.
    void decode(int tokens) {
        LAUNCH(bitnet_embed_bf16, Grid(unsigned(tokens)), 64, 0, table.ptr(), ids.ptr(), x.ptr(), c.hidden, c.vocab);
        for (Layer& l : layers) {
            gemv(bitnet_gemv_norm, *l.qkv_p, x, l.input_norm_b.get(), qkv, qkv_scales(l), tokens, c.width(), c.hidden, false);
            LAUNCH(bitnet_decode_attention_bf16, Grid(unsigned(c.kv_heads * bitnet::head_blocks(c.heads, c.kv_heads)), kSplits, unsigned(tokens)), 128, size_t(bitnet::decode_attention_shared(c.d)), attention_params(l, tokens, kSplits));
            gemv(bitnet_gemv_norm_residual, *l.o_p, attention, c.sub_norms ? l.attention_norm_b.get() : nullptr, x, scales_of({}, {l.scale[3]}), tokens, c.hidden, c.heads * c.d, false);
            gemv(bitnet_gemv_norm_gated, *l.gate_up_p, x, l.post_norm_b.get(), ffn, scales_of({}, {l.scale[4], l.scale[5]}), tokens, c.ffn, c.hidden, true);
            gemv(bitnet_gemv_norm_residual, *l.down_p, ffn, c.sub_norms ? l.ffn_norm_b.get() : nullptr, x, scales_of({}, {l.scale[6]}), tokens, c.hidden, c.ffn, false);
        }
        head(x.ptr(), tokens);
        std::vector<int> next = positions.host();
        for (int t = 0; t < tokens; ++t) ++next[t];
        put(positions, next);
    }
};

void model_suite() {
    Random r(31);
    for (int n = 0; n < 12; n += thinning() > 1 ? 4 : 1) {
        vary_order(r);
        Config c{};
        bool mma = r.below(2);
        c.d = mma ? 64 : r.pick({16, 32, 20});
        c.kv_heads = r.between(1, 2), c.heads = c.kv_heads * r.between(1, mma ? 2 : 6);
        c.hidden = r.pick({64, 120, 264}), c.ffn = r.pick({96, 200, 300}), c.layers = 2, c.vocab = r.between(20, 90);
        c.slots = 4, c.max_positions = 48, c.activation = r.below(2), c.sub_norms = r.below(2);
        start_case("model hidden " + std::to_string(c.hidden) + " heads " + std::to_string(c.heads) + "/" + std::to_string(c.kv_heads) + " d " + std::to_string(c.d) + " ffn " + std::to_string(c.ffn));
        std::vector<Layer> layers(c.layers);
        auto up = [](int v, int to) { return (v + to - 1) / to * to; };
        for (Layer& l : layers) {
            l.q = ternary(r, c.heads * c.d, c.hidden), l.k = ternary(r, c.kv_heads * c.d, c.hidden), l.v = ternary(r, c.kv_heads * c.d, c.hidden);
            l.o = ternary(r, c.hidden, c.heads * c.d), l.gate = ternary(r, c.ffn, c.hidden), l.up = ternary(r, c.ffn, c.hidden), l.down = ternary(r, c.hidden, c.ffn);
            auto weights = [&](int k) {
                std::vector<float> w(k);
                for (float& v : w) v = 0.5f + r.uniform();
                return w;
            };
            l.input_norm = weights(c.hidden), l.attention_norm = weights(c.heads * c.d), l.post_norm = weights(c.hidden), l.ffn_norm = weights(c.ffn);
            for (int i = 0; i < 7; ++i) {
                float s = (0.7f + r.uniform()) / std::sqrt(float(i == 3 ? c.heads * c.d : i == 6 ? c.ffn : c.hidden));
                l.scale[i] = s;
            }
            l.qkv_p = matrix(up(c.width(), 16), c.hidden), l.o_p = matrix(up(c.hidden, 16), c.heads * c.d);
            l.gate_up_p = matrix(up(c.ffn, 8) * 2, c.hidden), l.down_p = matrix(up(c.hidden, 16), c.ffn);
            pack_into(*l.qkv_p, l.q, 0, 0), pack_into(*l.qkv_p, l.k, c.heads * c.d, 0), pack_into(*l.qkv_p, l.v, (c.heads + c.kv_heads) * c.d, 0);
            pack_into(*l.o_p, l.o, 0, 0), pack_into(*l.gate_up_p, l.gate, 0, 1), pack_into(*l.gate_up_p, l.up, 0, 2), pack_into(*l.down_p, l.down, 0, 0);
            l.input_norm_b = std::make_unique<Buffer<float>>(l.input_norm), l.attention_norm_b = std::make_unique<Buffer<float>>(l.attention_norm);
            l.post_norm_b = std::make_unique<Buffer<float>>(l.post_norm), l.ffn_norm_b = std::make_unique<Buffer<float>>(l.ffn_norm);
            size_t cache = size_t(c.slots) * c.max_positions * c.kv_heads * c.d;
            l.k_cache = std::make_unique<Buffer<uint16_t>>(cache, 0xff), l.v_cache = std::make_unique<Buffer<uint16_t>>(cache, 0xff);  // NaN wherever nothing was written
        }
        std::vector<float> cos, sin, table = normals(r, size_t(c.vocab) * c.hidden), last(c.hidden, 1.0f);
        std::vector<uint16_t> table16;
        for (float& v : table) {
            v = bf16(v);
            unsigned u;
            std::memcpy(&u, &v, 4);
            table16.push_back(uint16_t(u >> 16));
        }
        for (int p = 0; p < c.max_positions; ++p)
            for (int i = 0; i < c.d / 2; ++i) {
                float a = float(p) * std::pow(10000.0f, -2.0f * float(i) / float(c.d));
                cos.push_back(std::cos(a));
                sin.push_back(std::sin(a));
            }
        int sequences = r.between(1, 3);
        std::vector<std::vector<int>> prompts(sequences);
        std::vector<int> slot_of;
        int tokens = 0;
        for (int s = 0; s < sequences; ++s) {
            prompts[s].resize(r.between(1, 30));
            for (int& t : prompts[s]) t = r.below(c.vocab);
            tokens += int(prompts[s].size());
            slot_of.push_back((s * 3 + 1) % c.slots);
        }
        Device device(c, layers, cos, sin, last, table16, std::max(tokens, 8));
        std::vector<Naive> naive;
        for (int s = 0; s < sequences; ++s) naive.push_back(Naive{c, layers, cos, sin, table, last, {}, {}});
        device.prefill(prompts, slot_of, mma);
        std::vector<int> chosen;
        for (int step = 0; step < 4; ++step) {
            auto got = device.logits.host();
            auto ids = device.ids.host();
            for (int s = 0; s < sequences; ++s) {
                std::vector<double> want;
                if (step == 0)
                    for (int t : prompts[s]) want = naive[s].advance(t);
                else
                    want = naive[s].advance(chosen[s]);
                std::vector<float> row(&got[size_t(s) * c.vocab], &got[size_t(s) * c.vocab] + c.vocab);
                // A code that falls on the other side of a rounding edge moves a logit by a fraction of a percent;
                // a wrong matrix, slot or position moves it by all of it.
                check_close(row, want, 0.03, 1e-3, step ? "decode logits" : "prefill logits");
                check(ids[s] == int(std::max_element(row.begin(), row.end()) - row.begin()), "chosen token");
            }
            chosen.assign(ids.begin(), ids.begin() + sequences);
            if (step < 3) device.decode(sequences);
        }
    }
}

}  // namespace

int model_suites() { return run_suite("whole model", model_suite); }
