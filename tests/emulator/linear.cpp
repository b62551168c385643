// Packing, norm + quantise, decode products, prefill products.
#include "oracle.h"

#include "../../kernels/cuda/gemm.cu"
#include "../../kernels/cuda/gemv.cu"
#include "../../kernels/cuda/norm.cu"
#include "../../kernels/cuda/pack.cu"
#include "linear_oracle.h"

using namespace harness;
using namespace oracle;

namespace {

void pack_on_device(Buffer<unsigned>& packed, const Ternary& t, int row0, int map) {
    Buffer<uint8_t> codes(t.codes);
    long words = long(t.rows) * ((t.cols + 255) / 256) * 16;
    LAUNCH(bitnet_pack, Grid(unsigned((words + 255) / 256)), 256, 0, codes.ptr(), packed.ptr(), t.rows, t.cols, t.row_bytes, row0, map);
}

void pack_suite() {
    Random r(1);
    for (int n = 0; n < 150 * kRepeat; n += thinning()) {
        vary_order(r);
        int cols = odd_k(r), rows = r.between(1, 40), row0 = r.below(37), map = r.below(3);
        pack_case(r, rows, cols, row0, map);
    }
}

void norm_suite() {
    Random r(2);
    for (int n = 0; n < 200 * kRepeat; n += thinning()) {
        vary_order(r);
        int k = n % 10 == 0 ? r.between(2000, 9000) : odd_k(r), rows = r.between(1, 4);
        bool add = r.below(2), norm = r.below(3) != 0;
        unsigned threads = unsigned(r.pick({32, 64, 96, 256, 512}));
        start_case("norm k " + std::to_string(k) + " rows " + std::to_string(rows) + (add ? " add" : "") + (norm ? " norm" : ""));
        float scale = r.pick({1e-4f, 1.0f, 300.0f});
        std::vector<float> x = normals(r, size_t(rows) * k, scale), d = normals(r, size_t(rows) * k, scale), w = normals(r, k);
        if (n % 17 == 3) std::fill(x.begin(), x.end(), 0.0f), add = false;
        float eps = 1e-5f;
        Buffer<float> xb(x), db(d), wb(w), sx(rows);
        Buffer<int> qsum(rows);
        Buffer<int8_t> q(size_t(rows) * padded(k));
        LAUNCH(bitnet_norm_quantise, Grid(unsigned(rows)), threads, bitnet::kQuantiseScratch, xb.ptr(), add ? db.ptr() : nullptr, norm ? wb.ptr() : nullptr, eps, rows, k, q.ptr(), sx.ptr(), qsum.ptr());
        Buffer<float> y(size_t(rows) * k), x2(x);
        LAUNCH(bitnet_rmsnorm, Grid(unsigned(rows)), threads, 128, x2.ptr(), add ? db.ptr() : nullptr, wb.ptr(), eps, rows, k, y.ptr());
        auto gq = q.host();
        auto gs = sx.host();
        auto gt = qsum.host();
        std::vector<float> sum = x;
        if (add)
            for (size_t i = 0; i < x.size(); ++i) sum[i] = x[i] + d[i];
        check_equal(xb.host(), sum, "residual");
        check_equal(x2.host(), sum, "residual of rmsnorm");
        std::vector<double> want_y;
        for (int row = 0; row < rows; ++row) {
            const float* s = &sum[size_t(row) * k];
            double squares = 0, top = 0;
            for (int i = 0; i < k; ++i) squares += double(s[i]) * s[i];
            double rr = 1 / std::sqrt(squares / k + eps);
            for (int i = 0; i < k; ++i) {
                double v = norm ? s[i] * rr * w[i] : s[i];
                top = std::max(top, std::fabs(v));
                want_y.push_back(s[i] * rr * w[i]);
            }
            double want_s = 127 / std::max(top, double(1e-5f));
            check(std::fabs(gs[row] - want_s) <= 3e-6 * want_s, "s_x");
            int total = 0;
            for (int i = 0; i < padded(k); ++i) {
                int got = gq[size_t(row) * padded(k) + i];
                total += got;
                if (i >= k) {
                    check(got == 0, "padding code");
                    continue;
                }
                if (norm) {
                    double v = s[i] * rr * w[i] * want_s;
                    check(std::fabs(got - v) <= 0.5 + 2e-3, "code of a normalised value");
                } else {
                    float m = 0;
                    for (int c = 0; c < k; ++c) m = std::max(m, std::fabs(s[c]));
                    float exact = 127.0f / std::max(m, 1e-5f);
                    if (i == 0) check(gs[row] == exact, "s_x bits");
                    check(got == int(std::nearbyintf(s[i] * exact)), "code");
                }
                check(got >= -127, "-128 never occurs");
            }
            check(total == gt[row], "sum of codes");
        }
        check_close(y.host(), want_y, 3e-6, 0, "rmsnorm");
    }
}

void rounding_case() {
    check_outputs_aside();
#ifdef BITNET_EMULATOR
    rounding_cases(Random(5), [](int acc, float sx, float m) { return bitnet::dequantise(acc, bitnet::factor(m, sx)); });
#endif
}

void gemv_suite() {
    Random r(3);
    for (int n = 0; n < 330 * kRepeat; n += thinning()) {
        vary_order(r);
        int k = n % 40 == 7 ? r.between(1500, 3000) : odd_k(r), rows = r.between(1, n % 5 ? 70 : 200), tokens = r.below(3) ? r.between(1, 8) : 1;
        int epilogue = r.below(3), activation = r.below(2);
        bool fused = r.below(2), norm = r.below(2);
        unsigned threads = unsigned(r.pick({32, 64, 96, 160, 256, 512}));
        Fill fill = r.below(6) ? Fill::Random : r.pick({Fill::Zero, Fill::Plus, Fill::Minus});
        if (n % 60 == 11) {  // real widths, and the widest row whose sums still fit (numerics.md)
            k = std::vector<int>{2560, 6912, 8640, 14336, 23040, 132104}[n / 60 % 6];
            rows = r.between(1, 20);
            tokens = k > 20000 ? 1 : r.pick({1, 8});
            if (k == 132104) fill = Fill::Plus, fused = false;
        }
        start_case("gemv n " + std::to_string(rows) + " k " + std::to_string(k) + " tokens " + std::to_string(tokens) + " epilogue " + std::to_string(epilogue) + (fused ? " fused" : "") + " threads " + std::to_string(threads));
        Product product(r, rows, k, epilogue, fill);
        int row_tiles = product.row_tiles;
        Quantised act = quantised(r, tokens, k, r.below(4) == 0);
        saturate(act, k);
        std::vector<float> x = normals(r, size_t(tokens) * k, 3), w = normals(r, k);
        Buffer<float> xb(x), wb(w), sx(act.sx);
        Buffer<int8_t> q(act.q);
        Buffer<int> qsum(act.qsum);
        float eps = 1e-6f;
        if (fused) {
            // The norm kernel, checked above, gives the codes this product must have used. Same reduction
            // shape needed for the same bits, so take threads per row from the product.
            int warps = int(threads) / 32, at_once = std::min(tokens, warps);
            unsigned per_row = unsigned(warps / at_once) * 32;
            LAUNCH(bitnet_norm_quantise, Grid(unsigned(tokens)), per_row, bitnet::kQuantiseScratch, xb.ptr(), nullptr, norm ? wb.ptr() : nullptr, eps, tokens, k, q.ptr(), sx.ptr(), qsum.ptr());
            act = Quantised{q.host(), sx.host(), qsum.host()};
        }
        Scales scales = make_scales(r, rows, product.gated);
        int ld = rows + r.below(3);
        std::vector<float> before = normals(r, size_t(tokens) * ld);
        Buffer<float> out(before);
        unsigned grid = unsigned(r.between(1, row_tiles + 2));
        size_t per_block = size_t(row_tiles + grid - 1) / grid;
        size_t shared = size_t(tokens) * (padded(k) + 16) + per_block * 512 + 64 + bitnet::kQuantiseScratch;
        if (shared > 200 * 1024) grid = unsigned(row_tiles), shared = size_t(tokens) * (padded(k) + 16) + 512 + 64 + bitnet::kQuantiseScratch;
        GemvParams p{};
        p.weights = reinterpret_cast<const uint4*>(product.packed.ptr());
        p.norm = norm ? wb.ptr() : nullptr;
        p.x = xb.ptr(), p.q = q.ptr(), p.sx = sx.ptr(), p.qsum = qsum.ptr();
        p.out = out.ptr(), p.scales = scales, p.eps = eps, p.tokens = tokens, p.n = rows, p.k = k, p.ld_out = ld, p.activation = activation;
        auto kernel = fused ? (epilogue == 0 ? bitnet_gemv_norm : epilogue == 1 ? bitnet_gemv_norm_residual : bitnet_gemv_norm_gated)
                            : (epilogue == 0 ? bitnet_gemv : epilogue == 1 ? bitnet_gemv_residual : bitnet_gemv_gated);
        LAUNCH(kernel, Grid(grid), threads, shared, p);
        product.check_output(act, scales, activation, tokens, ld, before, out.host());
    }
}

void gemm_suite() {
    Random r(4);
    for (int n = 0; n < 90 * kRepeat; n += thinning()) {
        vary_order(r);
        int k = n % 3 ? odd_k(r) : r.between(1, 300), rows = r.between(1, n % 5 ? 40 : 200), tokens = r.between(1, n % 5 == 1 ? 200 : 40);
        int epilogue = r.below(3), activation = r.below(2);
        bool wide = r.below(3) == 0;
        Fill fill = r.below(6) ? Fill::Random : r.pick({Fill::Zero, Fill::Plus, Fill::Minus});
        start_case("gemm n " + std::to_string(rows) + " k " + std::to_string(k) + " tokens " + std::to_string(tokens) + " epilogue " + std::to_string(epilogue) + (wide ? " wide" : ""));
        Product product(r, rows, k, epilogue, fill);
        Quantised act = quantised(r, tokens, k, r.below(4) == 0);
        Buffer<float> sx(act.sx);
        Buffer<int8_t> q(act.q);
        Buffer<int> qsum(act.qsum);
        int ld = rows + r.below(3);
        std::vector<float> before = normals(r, size_t(tokens) * ld);
        Buffer<float> out(before);
        GemmParams p{};
        p.weights = reinterpret_cast<const uint4*>(product.packed.ptr());
        p.q = q.ptr(), p.sx = sx.ptr(), p.qsum = qsum.ptr(), p.out = out.ptr();
        p.scales = make_scales(r, rows, product.gated);
        p.tokens = tokens, p.n = rows, p.k = k, p.ld_out = ld, p.activation = activation;
        auto kernel = wide ? (epilogue == 0 ? bitnet_gemm_128 : epilogue == 1 ? bitnet_gemm_residual_128 : bitnet_gemm_gated_128)
                           : (epilogue == 0 ? bitnet_gemm_64 : epilogue == 1 ? bitnet_gemm_residual_64 : bitnet_gemm_gated_64);
        unsigned span = wide ? 128 : 64;
        LAUNCH(kernel, Grid(unsigned(product.row_tiles + 7) / 8, (unsigned(tokens) + span - 1) / span), 256, size_t(2) * (8192 + span * 256), p);
        product.check_output(act, p.scales, activation, tokens, ld, before, out.host());
    }
}

void columns_suite() {
    Random r(6);
    for (int n = 0; n < 60 * kRepeat; n += thinning()) {
        vary_order(r);
        columns_case(
            r, 5, [](Grid grid, float* in, float* out, int tokens, int width, int activation) { LAUNCH(bitnet_gated, grid, 256, 0, in, out, tokens, width, activation); },
            [](Grid grid, float* in, float* out, int tokens, int width, int ld, int add) { LAUNCH(bitnet_place, grid, 256, 0, in, out, tokens, width, ld, add); });
    }
}

}  // namespace

int linear_suites() {
    int f = 0;
    f += run_suite("pack", pack_suite);
    f += run_suite("norm + quantise", norm_suite);
    f += run_suite("decode gemv", gemv_suite);
    f += run_suite("prefill gemm", gemm_suite);
    f += run_suite("rounding", rounding_case);
    f += run_suite("gated, place", columns_suite);
    return f;
}
