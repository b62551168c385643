// Metal: packing, norm + quantise, decode products, prefill products, activation and columns.
#include "harness.h"

#include "../../kernels/metal/gemm.metal"
#include "../../kernels/metal/gemv.metal"
#include "../../kernels/metal/norm.metal"
#include "../../kernels/metal/pack.metal"
#include "linear_oracle.h"
#include "metal.h"

namespace {

void pack_on_device(Buffer<unsigned>& packed, const Ternary& t, int row0, int map) {
    Buffer<uint8_t> codes(t.codes);
    long words = long(t.rows) * ((t.cols + 255) / 256) * 16;
    launch_metal(bitnet_pack, Grid(unsigned((words + 255) / 256)), 256, 0, PackParams{t.rows, t.cols, t.row_bytes, row0, map}, codes.ptr(), packed.ptr());
}

void pack_suite() {
    Random r(41);
    for (int n = 0; n < cases(1000); n += thinning()) {
        vary_order(r);
        int cols = n % 4 ? r.between(1, 300) : odd_k(r), rows = r.between(1, n % 4 ? 12 : 40), row0 = r.below(37), map = r.below(3);
        pack_case(r, rows, cols, row0, map);
    }
}

void norm_suite() {
    Random r(42);
    for (int n = 0; n < cases(1000); n += thinning()) {
        vary_order(r);
        int k = n % 40 == 0 ? r.between(2000, 9000) : odd_k(r), rows = r.between(1, 3);
        bool add = r.below(2), norm = r.below(3) != 0;
        start_case("norm k " + std::to_string(k) + " rows " + std::to_string(rows) + (add ? " add" : "") + (norm ? " norm" : ""));
        float scale = r.pick({1e-4f, 1.0f, 300.0f});
        std::vector<float> x = normals(r, size_t(rows) * k, scale), d = normals(r, size_t(rows) * k, scale), w = normals(r, k);
        if (n % 17 == 3) std::fill(x.begin(), x.end(), 0.0f), add = false;
        float eps = 1e-5f;
        Buffer<float> xb(x), db(d), wb(w), stats(size_t(rows) * stats_of(k)), y(size_t(rows) * k), x2(x);
        Buffer<half> q(size_t(rows) * padded(k));
        launch_metal(bitnet_norm_quantise, Grid(unsigned(rows)), 256, 128, NormParams{rows, k, eps, add, norm}, xb.ptr(), db.ptr(), wb.ptr(), q.ptr(), stats.ptr());
        {
            Width width(unsigned(r.pick({16, 32, 32, 64})));
            launch_metal(bitnet_rmsnorm, Grid(unsigned(rows)), 256, 128, NormParams{rows, k, eps, add, norm}, x2.ptr(), db.ptr(), wb.ptr(), y.ptr());
        }
        auto gq = q.host();
        auto gs = stats.host();
        std::vector<float> sum = x;
        if (add)
            for (size_t i = 0; i < x.size(); ++i) sum[i] = x[i] + d[i];
        check_equal(xb.host(), sum, "residual");
        check_equal(x2.host(), sum, "residual of rmsnorm");
        std::vector<double> want_y;
        Quantised codes;
        for (int row = 0; row < rows; ++row) {
            const float* s = &sum[size_t(row) * k];
            float sx = gs[size_t(row) * stats_of(k)];
            double squares = 0, top = 0;
            for (int i = 0; i < k; ++i) squares += double(s[i]) * s[i];
            double rr = 1 / std::sqrt(squares / k + eps);
            for (int i = 0; i < k; ++i) {
                double v = norm ? s[i] * rr * w[i] : s[i];
                top = std::max(top, std::fabs(v));
                want_y.push_back(s[i] * rr * (norm ? w[i] : 1.0f));
            }
            double want_s = 127 / std::max(top, double(1e-5f));
            check(std::fabs(sx - want_s) <= 3e-6 * want_s, "s_x");
            float peak = 0;
            for (int c = 0; c < k; ++c) peak = std::max(peak, std::fabs(s[c]));
            float exact = 127.0f / std::max(peak, 1e-5f);
            if (!norm) check(sx == exact, "s_x bits");
            int total = 0;
            for (int i = 0; i < padded(k); ++i) {
                float got = float(gq[size_t(row) * padded(k) + i]);
                check(got == std::nearbyintf(got) && got >= -127 && got <= 127, "a code is an integer, and -128 never occurs");
                total += int(got);
                codes.q.push_back(int8_t(got));
                if (i >= k)
                    check(got == 0, "padding code");
                else if (norm)
                    check(std::fabs(got - s[i] * rr * w[i] * want_s) <= 0.5 + 2e-3, "code of a normalised value");
                else
                    check(got == std::nearbyintf(s[i] * exact), "code");
            }
            codes.sx.push_back(sx);
            codes.qsum.push_back(total);
        }
        check_equal(gs, activations(codes, k).stats, "stats");
        check_close(y.host(), want_y, 3e-6, 0, "rmsnorm");
    }
}

// Rows with what is not a number: the codes are what they are on the other devices, and nothing is undefined.
void spoiled_case() {
    Random r(43);
    for (int n = 0; n < 20; ++n) {
        start_case("a row with an infinity or NaN");
        int k = odd_k(r);
        std::vector<float> x = normals(r, k);
        x[r.below(k)] = n % 2 ? INFINITY : NAN;
        Buffer<float> xb(x), wb(x), stats(stats_of(k));
        Buffer<half> q(padded(k));
        launch_metal(bitnet_norm_quantise, Grid(1), 256, 128, NormParams{1, k, 1e-5f, 0, n % 3 == 0}, xb.ptr(), xb.ptr(), wb.ptr(), q.ptr(), stats.ptr());
        for (half h : q.host()) check(float(h) >= -127 && float(h) <= 127, "a code within range");
    }
}

typedef decltype(&bitnet_gemv_1) Gemv;
typedef decltype(&bitnet_gemv_norm_1) GemvNorm;
#define FORMS(NAME) {{NAME##_1, NAME##_2, NAME##_4, NAME##_8}, {NAME##_residual_1, NAME##_residual_2, NAME##_residual_4, NAME##_residual_8}, {NAME##_gated_1, NAME##_gated_2, NAME##_gated_4, NAME##_gated_8}}
const Gemv gemv_forms[3][4] = FORMS(bitnet_gemv);
const GemvNorm gemv_norm_forms[3][4] = FORMS(bitnet_gemv_norm);

ProductParams product_params(const Scales& s, float eps, int tokens, int n, int k, int ld, int activation, bool norm) {
    return ProductParams{s, eps, tokens, n, k, ld, activation, norm};
}

// `fused`: the _norm forms.
void gemv_cases(int count, bool fused) {
    Random r(44 + fused);
    for (int n = 0; n < cases(count); n += thinning()) {
        vary_order(r);
        // Every form in turn, so that each kernel has its thousand.
        int form = n / thinning(), size = form % 4, epilogue = form / 4 % 3, activation = r.below(2), kind = r.below(200);
        int k = kind < 2 ? r.between(1500, 3000) : kind < 30 ? odd_k(r) : r.between(1, 200), rows = r.between(1, kind % 30 ? 30 : 200);
        int tokens = r.between(1, r.below(3) ? std::min(2, 1 << size) : 1 << size);
        bool norm = r.below(2);
        Fill fill = r.below(6) ? Fill::Random : r.pick({Fill::Zero, Fill::Plus, Fill::Minus});
        if (form % 600 == 11) {  // real widths, and the widest row whose sums still fit (numerics.md)
            k = std::vector<int>{2560, 6912, 8640, 132104, 14336, 23040}[form / 600 % 6];
            rows = r.between(1, 20);
            if (k > 20000) tokens = 1;
            if (k == 132104) fill = Fill::Plus;
            if (fused) k = std::min(k, 8640), tokens = 1;
        }
        int limit = 1 << size;
        start_case("gemv n " + std::to_string(rows) + " k " + std::to_string(k) + " tokens " + std::to_string(tokens) + " of " + std::to_string(limit) + " epilogue " + std::to_string(epilogue));
        Product w(r, rows, k, epilogue, fill);
        Quantised act = quantised(r, tokens, k, r.below(4) == 0);
        saturate(act, k);
        unsigned grid = unsigned(r.between(1, w.row_tiles));
        size_t shared = size_t((w.row_tiles + grid - 1) / grid) * 64 * limit + 32 * limit;
        float eps = 1e-6f;
        Scales scales = make_scales(r, rows, w.gated);
        int ld = rows + r.below(3);
        std::vector<float> before = normals(r, size_t(tokens) * ld);
        Buffer<float> out(before);
        if (fused) {
            shared += size_t(tokens) * (2 * padded(k) + 4 * stats_of(k)) + 128;
            if (shared > 32768) grid = unsigned(w.row_tiles), shared = size_t(96) * limit + size_t(tokens) * (2 * padded(k) + 4 * stats_of(k)) + 128;
            if (shared > 32768) continue;
            std::vector<float> x = normals(r, size_t(tokens) * k, 3), norm_weight = normals(r, k);
            Buffer<float> xb(x), wb(norm_weight), stats(size_t(tokens) * stats_of(k));
            Buffer<half> q(size_t(tokens) * padded(k));
            // The norm kernel, checked above, gives the codes this product must have used, to the bit.
            launch_metal(bitnet_norm_quantise, Grid(unsigned(tokens)), 256, 128, NormParams{tokens, k, eps, 0, norm}, xb.ptr(), xb.ptr(), wb.ptr(), q.ptr(), stats.ptr());
            auto codes = q.host();
            auto s = stats.host();
            for (size_t i = 0; i < codes.size(); ++i) act.q[i] = int8_t(codes[i]);
            for (int t = 0; t < tokens; ++t) act.sx[t] = s[size_t(t) * stats_of(k)];
            launch_metal(gemv_norm_forms[epilogue][size], Grid(grid), 256, shared, product_params(scales, eps, tokens, rows, k, ld, activation, norm), w.packed.ptr(), xb.ptr(), wb.ptr(), out.ptr());
        } else {
            Activations m = activations(act, k);
            Buffer<half> q(m.q);
            Buffer<float> stats(m.stats);
            launch_metal(gemv_forms[epilogue][size], Grid(grid), 256, shared, product_params(scales, 0, tokens, rows, k, ld, activation, false), w.packed.ptr(), q.ptr(), stats.ptr(), out.ptr());
        }
        w.check_output(act, scales, activation, tokens, ld, before, out.host());
    }
}
void gemv_suite() { gemv_cases(12000, false); }
void gemv_norm_suite() { gemv_cases(12000, true); }

void gemm_suite() {
    Random r(46);
    decltype(&bitnet_gemm) forms[2][3] = {{bitnet_gemm, bitnet_gemm_residual, bitnet_gemm_gated}, {bitnet_gemm_64, bitnet_gemm_residual_64, bitnet_gemm_gated_64}};
    for (int n = 0; n < cases(6000); n += thinning()) {
        vary_order(r);
        int form = n / thinning(), epilogue = form % 3, wide = form / 3 % 2, kind = r.below(30);
        int k = kind < 1 ? odd_k(r) : r.between(1, kind < 8 ? 150 : 64), rows = r.between(1, kind ? 30 : 150), tokens = r.between(1, kind == 1 ? 150 : wide ? 66 : 34);
        int activation = r.below(2);
        Fill fill = r.below(6) ? Fill::Random : r.pick({Fill::Zero, Fill::Plus, Fill::Minus});
        start_case("gemm n " + std::to_string(rows) + " k " + std::to_string(k) + " tokens " + std::to_string(tokens) + " epilogue " + std::to_string(epilogue));
        Product w(r, rows, k, epilogue, fill);
        Quantised act = quantised(r, tokens, k, r.below(4) == 0);
        Activations m = activations(act, k);
        Buffer<half> q(m.q);
        Buffer<float> stats(m.stats);
        int ld = rows + r.below(3);
        std::vector<float> before = normals(r, size_t(tokens) * ld);
        Buffer<float> out(before);
        Scales scales = make_scales(r, rows, w.gated);
        unsigned span = wide ? 64 : 32;
        launch_metal(forms[wide][epilogue], Grid(unsigned(w.row_tiles + 3) / 4, (unsigned(tokens) + span - 1) / span), 128, wide ? 19456 : 13824, product_params(scales, 0, tokens, rows, k, ld, activation, false), w.packed.ptr(), q.ptr(), stats.ptr(), out.ptr());
        w.check_output(act, scales, activation, tokens, ld, before, out.host());
    }
}

void rounding_case() {
    check_outputs_aside();
    rounding_cases(Random(47), [](int acc, float sx, float m) { return ::dequantise(float(acc), factor(m, sx)); });
}

void columns_suite() {
    Random r(48);
    for (int n = 0; n < cases(1000); n += thinning()) {
        vary_order(r);
        columns_case(
            r, 3, [](Grid grid, float* in, float* out, int tokens, int width, int activation) { launch_metal(bitnet_gated, grid, 256, 0, GatedParams{tokens, width, activation}, in, out); },
            [](Grid grid, float* in, float* out, int tokens, int width, int ld, int add) { launch_metal(bitnet_place, grid, 256, 0, PlaceParams{tokens, width, ld, add}, in, out); });
    }
}

}  // namespace

int linear_suites() {
    int f = 0;
    f += run_suite("metal pack", pack_suite);
    f += run_suite("metal norm + quantise", norm_suite);
    f += run_suite("metal spoiled rows", spoiled_case);
    f += run_suite("metal gemv", gemv_suite);
    f += run_suite("metal gemv + norm", gemv_norm_suite);
    f += run_suite("metal gemm", gemm_suite);
    f += run_suite("metal rounding", rounding_case);
    f += run_suite("metal gated, place", columns_suite);
    return f;
}
