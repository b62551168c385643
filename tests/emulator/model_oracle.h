// The naive model and the cases of the whole-model suites, for CUDA and Metal. Included after the kernels: Scales is theirs.
#pragma once
#include "oracle.h"

#include <algorithm>
#include <memory>

namespace {

using namespace harness;
using namespace oracle;

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

// --- for the model on the device

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

template <class T>
void put(Buffer<T>& b, const std::vector<T>& v) {
#ifdef BITNET_EMULATOR
    std::memcpy(b.ptr(), v.data(), v.size() * sizeof(T));
#else
    cuda_check(cudaMemcpy(b.ptr(), v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
#endif
}

// Prefills prompts and decodes a few tokens on `Gpu`, a model made of kernels, and compares with the naive one.
template <class Gpu>
void model_cases(int count) {
    Random r(31);
    for (int n = 0; n < count; n += thinning() > 1 ? 4 : 1) {
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
            Gpu::pack_into(*l.qkv_p, l.q, 0, 0), Gpu::pack_into(*l.qkv_p, l.k, c.heads * c.d, 0), Gpu::pack_into(*l.qkv_p, l.v, (c.heads + c.kv_heads) * c.d, 0);
            Gpu::pack_into(*l.o_p, l.o, 0, 0), Gpu::pack_into(*l.gate_up_p, l.gate, 0, 1), Gpu::pack_into(*l.gate_up_p, l.up, 0, 2), Gpu::pack_into(*l.down_p, l.down, 0, 0);
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
        Gpu gpu(c, layers, cos, sin, last, table16, std::max(tokens, 8));
        std::vector<Naive> naive;
        for (int s = 0; s < sequences; ++s) naive.push_back(Naive{c, layers, cos, sin, table, last, {}, {}});
        gpu.prefill(prompts, slot_of, mma);
        std::vector<int> chosen;
        for (int step = 0; step < 4; ++step) {
            auto got = gpu.logits.host();
            auto ids = gpu.ids.host();
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
            if (step < 3) gpu.decode(sequences);
        }
    }
}

}  // namespace
