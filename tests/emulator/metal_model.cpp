// Metal: the recipes of kernels/README.md ("Metal: a decode step", "Metal: a prefill") on small random models, against a naive
// f64 model: the order of launches, the stacked and interleaved matrices, slots, positions and the token loop.
#include "harness.h"

#include "../../kernels/metal/attention.metal"
#include "../../kernels/metal/gemm.metal"
#include "../../kernels/metal/gemv.metal"
#include "../../kernels/metal/head.metal"
#include "../../kernels/metal/norm.metal"
#include "../../kernels/metal/pack.metal"
#include "../../kernels/metal/prefill_attention.metal"
#include "../../kernels/metal/sample.metal"
#include "metal.h"
#include "model_oracle.h"

namespace {

struct Model {
    const Config& c;
    std::vector<Layer>& layers;
    Buffer<float> cos, sin, last;
    Buffer<uint16_t> table;
    int room;  // tokens at once
    Buffer<float> x, qkv, attention, ffn, normed, logits, partial, stats;
    Buffer<half> q;
    Buffer<int> ids, positions, slots, starts;
    Buffer<ulong> best;
    bool fused = true;  // decode through the products that normalise; else through norm_quantise and the plain ones
    static constexpr int kSplits = 3, kGroups = 2;

    static int widest(const Config& c) { return std::max({c.hidden, c.ffn, c.heads * c.d}); }
    Model(const Config& c_, std::vector<Layer>& l, const std::vector<float>& cos_, const std::vector<float>& sin_, const std::vector<float>& last_, const std::vector<uint16_t>& table_, int room_)
        : c(c_), layers(l), cos(cos_), sin(sin_), last(last_), table(table_), room(room_), x(size_t(room) * c.hidden), qkv(size_t(room) * c.width()),
          attention(size_t(room) * c.heads * c.d), ffn(size_t(room) * c.ffn), normed(size_t(room) * c.hidden), logits(size_t(8) * c.vocab),
          partial(size_t(8) * c.heads * kSplits * (c.d + 2)), stats(size_t(room) * stats_of(widest(c))), q(size_t(room) * padded(widest(c))),
          ids(room), positions(room), slots(room), starts(9), best(8 * kGroups) {}

    static void pack_into(Buffer<unsigned>& packed, const Ternary& t, int row0, int map) {
        Buffer<uint8_t> codes(t.codes);
        long words = long(t.rows) * ((t.cols + 255) / 256) * 16;
        launch_metal(bitnet_pack, Grid(unsigned((words + 255) / 256)), 256, 0, PackParams{t.rows, t.cols, t.row_bytes, row0, map}, codes.ptr(), packed.ptr());
    }
    AttentionParams params(int tokens, int splits) {
        return AttentionParams{tokens, c.heads, c.kv_heads, c.d, c.max_positions, splits, 1.0f / std::sqrt(float(c.d))};
    }
    Scales qkv_scales(const Layer& l) { return scales_of({c.heads * c.d, (c.heads + c.kv_heads) * c.d}, {l.scale[0], l.scale[1], l.scale[2]}); }
    void quantise(Buffer<float>& in, Buffer<float>* weight, int tokens, int k) {
        launch_metal(bitnet_norm_quantise, Grid(unsigned(tokens)), 256, 128, NormParams{tokens, k, c.eps, 0, weight != nullptr}, in.ptr(), in.ptr(), weight ? weight->ptr() : in.ptr(), q.ptr(), stats.ptr());
    }
    template <class Norm, class Plain>
    void gemv(Norm norm, Plain plain, Buffer<unsigned>& w, Buffer<float>& in, Buffer<float>* weight, Buffer<float>& out, const Scales& s, int tokens, int n, int k, bool gated) {
        ProductParams p{s, c.eps, tokens, n, k, n, c.activation, weight != nullptr};
        int row_tiles = (n + (gated ? 7 : 15)) / (gated ? 8 : 16), grid = std::min(row_tiles, 3);
        size_t shared = size_t((row_tiles + grid - 1) / grid) * 64 * 4 + 32 * 4;
        if (fused) {
            shared += size_t(tokens) * (2 * padded(k) + 4 * stats_of(k)) + 128;
            launch_metal(norm, Grid(unsigned(grid)), 256, shared, p, w.ptr(), in.ptr(), weight ? weight->ptr() : in.ptr(), out.ptr());
        } else {
            quantise(in, weight, tokens, k);
            launch_metal(plain, Grid(unsigned(grid)), 256, shared, p, w.ptr(), q.ptr(), stats.ptr(), out.ptr());
        }
    }
    template <class Function>
    void gemm(Function narrow, Function wide, Buffer<unsigned>& w, Buffer<float>& in, Buffer<float>* weight, Buffer<float>& out, const Scales& s, int tokens, int n, int k, bool gated) {
        quantise(in, weight, tokens, k);
        int row_tiles = (n + (gated ? 7 : 15)) / (gated ? 8 : 16);
        unsigned span = tokens > 32 ? 64 : 32;
        launch_metal(span == 64 ? wide : narrow, Grid(unsigned(row_tiles + 3) / 4, (unsigned(tokens) + span - 1) / span), 128, span == 64 ? 19456 : 13824, ProductParams{s, 0, tokens, n, k, n, c.activation, 0}, w.ptr(), q.ptr(), stats.ptr(), out.ptr());
    }
    void embed(int tokens) {
        launch_metal(bitnet_embed_bf16, Grid(unsigned(tokens)), 256, 0, HeadParams{tokens, c.hidden, c.vocab}, table.ptr(), table.ptr(), ids.ptr(), x.ptr());
    }
    void head(int tokens) {
        launch_metal(bitnet_rmsnorm, Grid(unsigned(tokens)), 256, 128, NormParams{tokens, c.hidden, c.eps, 0, 1}, x.ptr(), x.ptr(), last.ptr(), normed.ptr());
        launch_metal(bitnet_head_bf16_4, Grid(2), 256, 0, HeadParams{tokens, c.hidden, c.vocab}, table.ptr(), table.ptr(), normed.ptr(), logits.ptr());
        ChoiceParams p{c.vocab, kGroups, 0};
        launch_metal(bitnet_argmax, Grid(kGroups, unsigned(tokens)), 256, 256, p, logits.ptr(), best.ptr());
        launch_metal(bitnet_argmax_pick, Grid(unsigned(tokens)), 256, 256, p, best.ptr(), ids.ptr());
    }
    // All prompts at once; logits of each one's last token.
    void prefill(const std::vector<std::vector<int>>& prompts, const std::vector<int>& slot_of, bool) {
        std::vector<int> id, position, slot, start{0};
        size_t longest = 0;
        for (size_t s = 0; s < prompts.size(); ++s) {
            for (size_t i = 0; i < prompts[s].size(); ++i) id.push_back(prompts[s][i]), position.push_back(int(i)), slot.push_back(slot_of[s]);
            start.push_back(int(id.size()));
            longest = std::max(longest, prompts[s].size());
        }
        int tokens = int(id.size());
        put(ids, id), put(positions, position), put(slots, slot), put(starts, start);
        embed(tokens);
        for (Layer& l : layers) {
            gemm(bitnet_gemm, bitnet_gemm_64, *l.qkv_p, x, l.input_norm_b.get(), qkv, qkv_scales(l), tokens, c.width(), c.hidden, false);
            AttentionParams p = params(tokens, 1);
            launch_metal(bitnet_rope_write_bf16, Grid(unsigned(tokens)), 256, 0, p, qkv.ptr(), cos.ptr(), sin.ptr(), positions.ptr(), slots.ptr(), l.k_cache->ptr(), l.v_cache->ptr());
            launch_metal(bitnet_prefill_attention_bf16_64, Grid(unsigned(longest + 31) / 32, unsigned(c.heads), unsigned(prompts.size())), 128, 23040, p, qkv.ptr(), positions.ptr(), slots.ptr(), starts.ptr(), l.k_cache->ptr(), l.v_cache->ptr(), attention.ptr());
            gemm(bitnet_gemm_residual, bitnet_gemm_residual_64, *l.o_p, attention, c.sub_norms ? l.attention_norm_b.get() : nullptr, x, scales_of({}, {l.scale[3]}), tokens, c.hidden, c.heads * c.d, false);
            gemm(bitnet_gemm_gated, bitnet_gemm_gated_64, *l.gate_up_p, x, l.post_norm_b.get(), ffn, scales_of({}, {l.scale[4], l.scale[5]}), tokens, c.ffn, c.hidden, true);
            gemm(bitnet_gemm_residual, bitnet_gemm_residual_64, *l.down_p, ffn, c.sub_norms ? l.ffn_norm_b.get() : nullptr, x, scales_of({}, {l.scale[6]}), tokens, c.hidden, c.ffn, false);
        }
        auto rows = x.host();
        std::vector<float> picked;
        for (size_t s = 1; s < start.size(); ++s) picked.insert(picked.end(), &rows[size_t(start[s] - 1) * c.hidden], &rows[size_t(start[s] - 1) * c.hidden] + c.hidden);
        put(x, picked);
        head(int(prompts.size()));
        // The decode loop goes on from here.
        std::vector<int> next;
        for (auto& p : prompts) next.push_back(int(p.size()));
        put(positions, next), put(slots, slot_of);
    }
    // One token of every sequence, from the ids that the last step chose.
    void decode(int tokens) {
        embed(tokens);
        for (Layer& l : layers) {
            gemv(bitnet_gemv_norm_4, bitnet_gemv_4, *l.qkv_p, x, l.input_norm_b.get(), qkv, qkv_scales(l), tokens, c.width(), c.hidden, false);
            AttentionParams p = params(tokens, kSplits);
            launch_metal(bitnet_decode_attention_bf16, Grid(unsigned(c.kv_heads * ((c.heads / c.kv_heads + 3) / 4)), kSplits, unsigned(tokens)), 128, size_t(4) * (6 * c.d + 2320), p, qkv.ptr(), cos.ptr(), sin.ptr(), positions.ptr(), slots.ptr(), l.k_cache->ptr(), l.v_cache->ptr(), attention.ptr(), partial.ptr());
            launch_metal(bitnet_decode_combine, Grid(unsigned(c.heads), unsigned(tokens)), 128, 512, p, partial.ptr(), positions.ptr(), attention.ptr());
            gemv(bitnet_gemv_norm_residual_4, bitnet_gemv_residual_4, *l.o_p, attention, c.sub_norms ? l.attention_norm_b.get() : nullptr, x, scales_of({}, {l.scale[3]}), tokens, c.hidden, c.heads * c.d, false);
            gemv(bitnet_gemv_norm_gated_4, bitnet_gemv_gated_4, *l.gate_up_p, x, l.post_norm_b.get(), ffn, scales_of({}, {l.scale[4], l.scale[5]}), tokens, c.ffn, c.hidden, true);
            gemv(bitnet_gemv_norm_residual_4, bitnet_gemv_residual_4, *l.down_p, ffn, c.sub_norms ? l.ffn_norm_b.get() : nullptr, x, scales_of({}, {l.scale[6]}), tokens, c.hidden, c.ffn, false);
        }
        fused = !fused;
        head(tokens);
        std::vector<int> next = positions.host();
        for (int t = 0; t < tokens; ++t) ++next[t];
        put(positions, next);
    }
};

}  // namespace

int model_suites() { return run_suite("metal whole model", [] { model_cases<Model>(20); }); }
