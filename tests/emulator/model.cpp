// The recipes of kernels/README.md ("A prefill", "A decode step") on small random models, against a naive f64 model:
// the order of launches, the stacked and interleaved matrices, slots, positions and the token loop.
#include "harness.h"

#include "../../kernels/cuda/attention.cu"
#include "../../kernels/cuda/gemm.cu"
#include "../../kernels/cuda/gemv.cu"
#include "../../kernels/cuda/head.cu"
#include "../../kernels/cuda/norm.cu"
#include "../../kernels/cuda/pack.cu"
#include "../../kernels/cuda/prefill_attention.cu"
#include "../../kernels/cuda/sample.cu"

#include "model_oracle.h"

namespace {

// --- the model on the device

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

    static void pack_into(Buffer<unsigned>& packed, const Ternary& t, int row0, int map) {
        Buffer<uint8_t> codes(t.codes);
        long words = long(t.rows) * ((t.cols + 255) / 256) * 16;
        LAUNCH(bitnet_pack, Grid(unsigned((words + 255) / 256)), 256, 0, codes.ptr(), packed.ptr(), t.rows, t.cols, t.row_bytes, row0, map);
    }

    Device(const Config& c_, std::vector<Layer>& l, const std::vector<float>& cos_, const std::vector<float>& sin_, const std::vector<float>& last_, const std::vector<uint16_t>& table_, int room_)
        : c(c_), layers(l), cos(cos_), sin(sin_), last(last_), table(table_), room(room_), x(size_t(room) * c.hidden), qkv(size_t(room) * c.width()),
          attention(size_t(room) * c.heads * c.d), ffn(size_t(room) * c.ffn), normed(size_t(room) * c.hidden), logits(size_t(8) * c.vocab),
          partial(size_t(8) * c.heads * kSplits * (c.d + 2)), sx(room), q(size_t(room) * padded(std::max({c.hidden, c.ffn, c.heads * c.d}))), qsum(room),
          ids(room), positions(room), slots(room), starts(9), arrived(std::vector<unsigned>(size_t(8) * c.heads, 0)), best(std::vector<unsigned long long>(8, 0)) {}

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

}  // namespace

int model_suites() { return run_suite("whole model", [] { model_cases<Device>(12); }); }
